"""`save` and `load`: one safetensors file with the weights and, in its metadata, a JSON description.

A chain of stock layers is described by its layers (format version 1, see `bmrs.files.layers`), any other network by its
operators (version 3, see `bmrs.files.graphs`), so that it runs without the code of its class. With that code, the same
file gives a network of the class. Reading runs no code from the file.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, fx, nn

from bmrs.checks import as_path, check_module, one_line, shown
from bmrs.compaction.describing import describe
from bmrs.compaction.description import UnsupportedError
from bmrs.compaction.record import record_of
from bmrs.files.atomic import write_atomically
from bmrs.files.graphs import GRAPH_VERSION, describe_graph, read_graph
from bmrs.files.installation import describe_changes, install
from bmrs.files.layer_network import build_network, read_chain
from bmrs.files.layers import CHAIN_VERSION, LAYER_GRAPH_VERSION, describe_chain, read_layers
from bmrs.graph.analysis import analyse
from bmrs.graph.capture import MarkedNoise, capture, mark, refuse_quantised
from bmrs.graph.copies import evaluation_copy
from bmrs.graph.inputs import Inputs, as_inputs, map_tensors
from bmrs.noise.lookup import noise_layers

_METADATA_KEY = "bmrs"
_LONGEST_REASON = 500


class _NotAskedSoError(ValueError):
    """A file of `save` does not hold what was asked of it; the message says, after its path, what is wrong."""


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
) -> None:
    """Save a compacted model as one safetensors file, replacing any file there in a single step.

    Args:
        path: the file, by habit with the suffix ``.safetensors``.
        model: a network that `bmrs.compact` returned, trained further or not, or any other one without noise layers
            that torch.export can capture. Noise layers that ``compact(..., keep_noise=True)`` left are saved too.
        example_inputs: an input, as `bmrs.compact` takes it; needed only for networks that it did not return.

    Raises:
        TypeError: the model has noise layers that `bmrs.compact` has not narrowed, or a tensor of a dtype that
            safetensors does not know, or is not one that it returned and there is no example.
        ValueError: the model does not run on the example, or is quantised.
        OSError: the file cannot be written.
    """
    file = as_path("path", path)
    if not isinstance(model, nn.Module):
        raise TypeError(f"save needs a torch.nn.Module, got {type(model).__name__}")
    noisy = [name for name, layer in noise_layers(model).items() if not layer.compacted]
    if noisy:
        raise TypeError(
            f"save needs a model without noise layers, and {noisy[0]!r} is one: bmrs.compact(model, example_inputs) "
            "makes a smaller one, with keep_noise=True also with the noise that is left, bmrs.fold(model) one of full "
            "size"
        )
    refuse_quantised(model, "save")
    nodes = read_chain(model)
    if nodes is not None:
        description = describe_chain(nodes)
        tensors = dict(model.state_dict())
    else:
        description, tensors = _described(model, _inputs_of(model, example_inputs))
    description["channels_last"] = [name for name, tensor in tensors.items() if _is_channels_last(tensor)]
    # Cloned, as safetensors refuses tensors that share memory.
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        content = serialize(stored, metadata={_METADATA_KEY: json.dumps(description)})
    except KeyError as error:  # as of a dtype that safetensors has no word for
        name = next((name for name, tensor in stored.items() if tensor.dtype == error.args[0]), "")
        raise TypeError(f"tensor {name!r} is of {error.args[0]}, which safetensors cannot hold") from error
    write_atomically(file, content)


def load(
    path: str | os.PathLike[str], *, model: nn.Module | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a model that `save` wrote.

    Args:
        path: the file.
        model: a freshly built network of the class and sizes that the saved one had before compaction; it becomes the
            saved one, in place, and loses parametrizations, which the saved one has not. Without it, a network that
            needs no code but torch's is returned: ``nn.Sequential`` of stock layers where these were a chain, a
            ``torch.fx.GraphModule`` of operators otherwise. The latter takes other numbers of examples and, for inputs
            of up to three dimensions, other lengths than the example had, where the model does; images have to be of
            its size.
        device: where to put the model.

    Returns:
        The model in evaluation mode, with bitwise the saved weights.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``model`` is not a module, or ``device`` is neither text nor a ``torch.device``.
        ValueError: the file is broken, of another version, not such a file, or needs ``model``; ``model`` is not the
            network that it was made from, or ``device`` is none that this machine has; what is wrong is said.
    """
    if model is not None:
        check_module(model)
    _check_device(device)
    path = as_path("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Cloned, so that nothing refers to the file once it is closed.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {one_line(error)}") from error
    try:
        with torch.inference_mode(False):
            return _loaded(model, _parse(metadata), tensors, device)
    except _NotAskedSoError as error:
        raise ValueError(f"{path} {one_line(error, limit=_LONGEST_REASON)}") from error
    except ValueError as error:
        raise ValueError(
            f"{path} does not hold a model that bmrs.save wrote: {one_line(error, limit=_LONGEST_REASON)}"
        ) from error


def _check_device(device: object) -> None:
    if not isinstance(device, torch.device | str):
        raise TypeError(
            f"device must be a torch.device or text such as 'cpu' or 'cuda:0', got {shown(device)}"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"device must be one that can be used here, got {shown(device)}: {one_line(error)}"
        ) from error


def _loaded(
    model: nn.Module | None,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    device: torch.device | str,
) -> nn.Module:
    tensors = {name: tensor.clone() for name, tensor in _laid_out(description, tensors).items()}
    network = (
        _load_alone(description, tensors, device)
        if model is None
        else _load_into(model, description, tensors)
    )
    return network.to(device).eval()


def _inputs_of(model: nn.Module, example_inputs: Any) -> Inputs:
    if example_inputs is not None:
        return as_inputs(example_inputs)
    inputs = recorded_inputs(model)
    if inputs is None:
        raise TypeError(
            f"save needs a network that bmrs.compact returned or example_inputs, and got {type(model).__name__} alone"
        )
    return inputs


def recorded_inputs(model: nn.Module) -> Inputs | None:
    """Return examples for a compacted model, on its device and in its dtype; None if `compact` did not make it."""
    record = record_of(model)
    if record is None:
        return None
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    dtype = next((t.dtype for t in model.parameters() if t.is_floating_point()), None)
    return map_tensors(lambda t: t.to(device, dtype if t.is_floating_point() else None), record.inputs)


def _described(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Any], dict[str, Tensor]]:
    copy_of_model = evaluation_copy(model)
    tensors = {name: t for name, t in copy_of_model.state_dict().items() if isinstance(t, Tensor)}
    named = dict(copy_of_model.named_parameters(remove_duplicate=False))
    noise = noise_layers(copy_of_model)
    description: dict[str, Any] = {
        "version": GRAPH_VERSION,
        "form": "graph" if isinstance(model, fx.GraphModule) else "module",
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sorted(named),
        **describe_changes(copy_of_model),
    }
    record = record_of(model)
    description["sizes"] = record.code_sizes if record is not None else {}
    description["numbers"] = record.numbers if record is not None else {}
    # Whatever masks and factors say now, the network is saved at the widths that it has.
    mark(copy_of_model, {n: torch.ones_like(layer.spread(layer.mu.detach())) for n, layer in noise.items()})
    for dynamic in ("sequences", "first", "none"):
        try:
            with torch.no_grad():
                captured = capture(copy_of_model, inputs, "save", dynamic=dynamic)
                description["graph"] = describe_graph(describe(analyse(captured, all_stay=True), {}, noise))
            description["graph_because"] = ""
            break
        except UnsupportedError as error:
            description["graph"], description["graph_because"] = None, str(error)
    if description["graph"] is None:
        warnings.warn(
            f"the saved network can only be loaded with bmrs.load(path, model=...), a network of its class "
            f"{type(model).__name__}: {description['graph_because']}",
            stacklevel=3,
        )
        return description, tensors
    if (fixed := captured.fixed_number()) is not None:
        warnings.warn(
            f"the saved network takes {fixed} along the first dimension of its inputs and no other number, unless it "
            f"is loaded with bmrs.load(path, model=...): the code of {type(model).__name__}, or torch.export of it, "
            "makes a plain number of that size, as len(x) does and x.shape[0] does not, or divides it into parts of a "
            "given size, as x.split(8) does",
            stacklevel=3,
        )
    marked = copy_of_model.named_modules(remove_duplicate=False)
    factors = {f"{name}.factors" for name, module in marked if isinstance(module, MarkedNoise)}
    for placeholder, tensor in captured.tensors.items():
        name = captured.names.get(placeholder, f"constants.{placeholder}")
        if name not in factors:
            tensors.setdefault(name, tensor)
    return description, tensors


def _parse(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        description = json.loads(metadata[_METADATA_KEY])
        version = description["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"it has no readable description ({type(error).__name__}: {one_line(error)})"
        ) from error
    if version not in (CHAIN_VERSION, LAYER_GRAPH_VERSION, GRAPH_VERSION):
        raise ValueError(
            f"it has format version {shown(version)}, and this version of bmrs reads {CHAIN_VERSION} to {GRAPH_VERSION}"
        )
    assert isinstance(description, dict)
    return description


def _load_alone(
    description: dict[str, Any], tensors: dict[str, Tensor], device: torch.device | str
) -> nn.Module:
    if description["version"] != GRAPH_VERSION:
        return build_network(read_layers(description, tensors))
    graph = description.get("graph")
    if graph is None and (reason := description.get("graph_because")):
        of_class = str(description.get("class"))[:100]
        raise _NotAskedSoError(
            f"can only be loaded with model=, a freshly built network of its class {of_class}: {str(reason)[:300]}"
        )
    if not isinstance(graph, dict):
        raise ValueError("its graph is not a mapping")
    return read_graph(
        graph,
        tensors,
        parameters=_names(description, "parameters"),
        frozen=_names(description, "frozen"),
        device=device,
    )


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _laid_out(description: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the memory formats that they had."""
    names = description.get("channels_last", [])
    if not isinstance(names, list):
        raise ValueError("its names of tensors in channels_last format are not a list")
    last, named = torch.channels_last, {name for name in names if isinstance(name, str)}
    return {
        n: t.contiguous(memory_format=last) if n in named and t.dim() == 4 else t for n, t in tensors.items()
    }


def _names(description: Mapping[str, Any], key: str) -> set[str]:
    names = description.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its {key} are not a list of names")
    return set(names)


def _load_into(model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    if description.get("form") == "graph":
        raise _NotAskedSoError("holds a graph of operators, not layers of a class: load it without model=")
    try:
        install(model, description, tensors)
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise _NotAskedSoError(f"does not fit model ({type(model).__name__}): {kind}{error}") from error
    return model
