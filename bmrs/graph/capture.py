"""The graph of what a model does in evaluation mode, as torch.export sees it, with noise layers marked."""

from __future__ import annotations

import functools
import inspect
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map

from bmrs.graph.copies import copied
from bmrs.graph.free_numbers import fixed_number, has_number_of_parts, is_right_for_more
from bmrs.graph.inputs import Inputs, is_dataclass, map_tensors, several_examples
from bmrs.noise.channel_scale import ChannelScale
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers
from bmrs.noise.wrappers import is_in_another_form


@torch.library.custom_op("bmrs::mark_noise", mutates_args=())
def mark_noise(x: Tensor, factors: Tensor, dim: int, name: str, structure_size: int) -> Tensor:
    """Return x · factors along a dimension, in a form that stays recognisable in a graph."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return x * factors.to(x.dtype).view(shape)


@mark_noise.register_fake
def _(x: Tensor, factors: Tensor, dim: int, name: str, structure_size: int) -> Tensor:
    return torch.empty_like(x)


class MarkedNoise(ChannelScale):
    """A noise layer in evaluation mode, as a single marked operation.

    Args:
        layer: the noise layer.
        name: its qualified name.
        factors: what multiplies the entries along its dimension.
    """

    def __init__(self, layer: NoiseLayer, name: str, factors: Tensor) -> None:
        super().__init__(factors, dim=layer.dim, activation=layer.activation)
        self.name, self.structure_size = name, layer.structure_size

    def scaled(self, x: Tensor) -> Tensor:
        """Return x · factors, with gradients where it is run and not captured."""
        if not torch.compiler.is_exporting():
            return super().scaled(x)
        result: Tensor = mark_noise(x, self.factors, self.dim, self.name, self.structure_size)
        return result


@dataclass(frozen=True)
class Moments:
    """Means over examples of a layer norm's statistics: of mean / deviation, and of 1 / deviation.

    The deviation is the root of variance plus ε.
    """

    mean: float = 0.0
    inverse: float = 1.0

    def normalised(self, constant: Tensor) -> Tensor:
        """Return the mean of what a layer norm makes of constants, before its weight and bias."""
        return constant * self.inverse - self.mean


@dataclass(frozen=True)
class Captured:
    """A model and its graph.

    Attributes:
        model: a copy in evaluation mode, which shares parameters and buffers with the original; noise layers are
            `MarkedNoise`.
        program: its graph.
        tensors: by the name of a placeholder of the graph, the parameter, buffer or constant that it stands for.
        names: by the name of a placeholder, the qualified name of the parameter or buffer.
        approximate: names of what may be approximated, so that more can leave; see `bmrs.graph.layer_norms`.
        moments: of layer norms that may be, by the qualified name of their weight; None if they are not known yet.
        own_biases: what is known so far of layers of the user's own, whether they would use a bias.
    """

    model: nn.Module
    program: ExportedProgram
    tensors: dict[str, Tensor]
    names: dict[str, str]
    approximate: frozenset[str] = frozenset()
    moments: Mapping[str, Moments] | None = None
    own_biases: dict[nn.Module, bool] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph of operators."""
        return self.program.graph

    def fixed_number(self) -> int | None:
        """Return how many examples the graph takes if that is one number alone, which torch.export found in the code.

        None if the number is free, at least in one of the inputs.
        """
        return fixed_number(self.program)


def mark(model: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Replace a model's noise layers by `MarkedNoise`, in place.

    Args:
        model: the model.
        factors: by qualified name of the noise layer, its factors in evaluation mode.

    Raises:
        ValueError: a noise layer does something else than `NoiseLayer`.
    """
    for name, layer in noise_layers(model).items():
        changed = type(layer).forward is not NoiseLayer.forward or "forward" in vars(layer)
        if changed or layer._forward_hooks or layer._forward_pre_hooks:
            raise ValueError(
                f"noise layer {name!r} ({type(layer).__name__}) has a forward or hooks of its own, which would be "
                "lost: put what they do into a layer beside it"
            )
    replacements = {
        layer: MarkedNoise(layer, name, factors[name]).eval() for name, layer in noise_layers(model).items()
    }
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, NoiseLayer):
                module._modules[name] = replacements[child]


def capture(
    model: nn.Module,
    inputs: Inputs,
    purpose: str,
    *,
    dynamic: Literal["none", "first", "sequences"] = "none",
    approximate: frozenset[str] = frozenset(),
) -> Captured:
    """Capture what a model in evaluation mode does.

    Args:
        model: the model; its hooks are a part of what it does.
        inputs: an example.
        purpose: who asks, for errors.
        dynamic: which sizes of the inputs may be other ones later, where the model allows it: none, those of the first
            dimensions, as the number of examples, or lengths of sequences too.
        approximate: see `Captured`.

    Raises:
        ValueError: the model does not run on the example, cannot be captured, or is quantised.
    """
    refuse_quantised(model, purpose)
    advice = "Without removing anything, bmrs.fold(model) makes a network without noise layers"
    captured = _captured(model, export_program(model, inputs, purpose, dynamic=dynamic, advice=advice))
    return replace(captured, approximate=approximate)


def export_program(
    model: nn.Module,
    inputs: Inputs,
    purpose: str,
    *,
    dynamic: Literal["none", "first", "sequences"],
    advice: str,
) -> ExportedProgram:
    """Return what torch.export makes of a model in evaluation mode.

    Args:
        model: see `capture`, as for the next ones.
        inputs: an example.
        purpose: who asks, for errors.
        dynamic: which sizes of the inputs may be other ones later, where the model allows it.
        advice: what to do where it fails, a sentence.

    Raises:
        ValueError: the model does not run on the example, or cannot be captured.
    """
    refuse_torchscript(model, purpose)
    attempts: list[tuple[Inputs, Any]] = [(inputs, None)]
    if dynamic != "none":
        several = several_examples(inputs)
        attempts.insert(0, (several, _first_dimensions))
        if dynamic == "sequences":
            attempts.insert(0, (several, _dimensions_of_sequences))
    failure: Exception | None = None
    with_another_number: ExportedProgram | None = None
    for example, dimensions in attempts:
        args, kwargs = example
        try:
            shapes = None if dimensions is None else _shapes_by_name(model, tree_map(dimensions, example))
            # A copy: what a forward keeps in attributes would be symbols.
            exported = _as_export_takes_it(copied(model, share=True))
            with _quiet_export(), torch.no_grad():
                program = torch.export.export(exported, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            failure = error
            continue
        if dimensions is None:
            return program
        if has_number_of_parts(program) or (
            dynamic == "sequences" and not is_right_for_more(program, model, example)
        ):
            continue
        # Where the number of examples is a part of the code, it has to be the given one.
        if example is inputs or fixed_number(program) is None:
            return program
        with_another_number = with_another_number or program
    if with_another_number is not None:
        return with_another_number
    raise ValueError(_why_not(model, inputs, purpose, failure, advice)) from failure


def refuse_torchscript(model: nn.Module, purpose: str) -> None:
    """Raise ValueError if a part of a model is TorchScript, which torch.export cannot follow."""
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"{purpose} follows the model with torch.export, which cannot see into TorchScript: "
                f"{f'layer {name!r}' if name else 'the model'} is a {type(part).__name__}. Give it the Python module "
                "that was scripted or traced, and script the result, if at all"
            )


def refuse_quantised(model: nn.Module, purpose: str) -> None:
    """Raise ValueError if a tensor of a model does not hold its values as they are, so that it cannot be cut."""
    for path, layer in model.named_modules():
        place = f"layer {path!r}" if path else "the model"
        place += f" ({type(layer).__name__})"
        if type(layer).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise ValueError(
                f"{place} is quantised, so that it cannot be cut: {purpose} first, then quantise"
            )
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if is_in_another_form(tensor):
                raise ValueError(
                    f"{name} of {place} is of class {type(tensor).__qualname__}, which holds its values in a form of "
                    f"its own, as after quantisation, and cannot be cut: {purpose} first, then quantise"
                )


def _as_export_takes_it(model: nn.Module) -> nn.Module:
    """Have a model of transformers compute, in place, in the one of its ways that torch.export can follow.

    Keys and values for further tokens are not returned, which it does not know, and the matrices of experts are picked
    for each token, neither called in turn, as often as the input says, nor by kernels for some dtypes alone.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        settings = getattr(config, "__dict__", {})
        if settings.get("use_cache") is True:
            settings["use_cache"] = False
        if settings.get("_experts_implementation_internal") not in (None, "batched_mm"):
            config._experts_implementation = "batched_mm"
    return model


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep torch.export from printing the graph that it had come to when it failed; the error says what matters."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    printed = io.StringIO()
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
        sys.stderr.write(printed.getvalue())  # the model's own
    finally:
        log.setLevel(level)


def has_autocast(graph: fx.Graph) -> bool:
    """Return whether a part of a graph runs under torch.autocast."""
    calls = [n for n in graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
    return any("autocast" in node.name and len(node.args) > 2 and node.args[2] is True for node in calls)


def _captured(model: nn.Module, program: ExportedProgram) -> Captured:
    signature = program.graph_signature
    own_inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    # What nobody reads goes, unless it has weights: the model's code calls these layers all the same.
    program.graph.eliminate_dead_code(
        is_impure_node=lambda node: (
            node.is_impure() or any(n.name in own_inputs for n in node.all_input_nodes)
        )
    )
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    own = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    tensors = {placeholder: own[name] for placeholder, name in names.items() if name in own}
    for placeholder, name in signature.inputs_to_lifted_tensor_constants.items():
        constant = program.constants[name]
        assert isinstance(constant, Tensor)
        tensors[placeholder] = constant
    return Captured(model, program, tensors, {p: n for p, n in names.items() if n in own})


def _dimensions_of_sequences(leaf: Any) -> Any:
    # Symbolic sizes of images make torch.export take minutes for networks that divide them into windows.
    small = isinstance(leaf, Tensor) and leaf.dim() <= 3
    return dict.fromkeys(range(leaf.dim()), Dim.AUTO) if small else _first_dimensions(leaf)


def _first_dimensions(leaf: Any) -> Any:
    return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None


def _shapes_by_name(model: nn.Module, shapes: Any) -> Any:
    """Return dynamic shapes as torch.export takes them: positional ones and named ones in one tree."""
    args, kwargs = shapes
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def does_not_run(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    """Say that a model does not run on an example."""
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    examples = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
    return (
        f"the model ({type(model).__name__}) does not run on example_inputs of {examples}: {_in_short(error)}"
    )


def _why_not(model: nn.Module, inputs: Inputs, purpose: str, failure: Exception | None, advice: str) -> str:
    try:
        packed, outputs = _probed(model, inputs)
    except Exception as error:
        return does_not_run(model, inputs, error)
    if packed:
        return (
            f"{purpose} follows the model with torch.export, which cannot follow packed sequences, as layer {packed} "
            "takes: let an attribute of the model switch pack_padded_sequence off in its forward, and switch it on "
            f"again afterwards. {advice}"
        )
    for what, values in (("an input", inputs), ("an output", outputs)):
        if (unknown := _unknown_in(values, failure)) is not None:
            return (
                f"{purpose} follows the model with torch.export, which does not know {type(unknown).__qualname__}, "
                f"{what} of {type(model).__name__}: {_how_to_register(unknown)}"
            )
    return (
        f"{purpose} follows the model with torch.export, which failed on {type(model).__name__}"
        f"{line_of_error(failure)}: {_in_short(failure)}. {advice}"
    )


def _unknown_in(values: Any, failure: Exception | None) -> Any:
    """Return the first of some inputs or outputs of whose class torch.export says that it does not know it, or None."""
    # Of Python's own and torch's classes it can say other things.
    own = [
        v
        for v in tree_flatten(values)[0]
        if type(v).__module__.partition(".")[0] not in ("builtins", "torch")
    ]
    return next((value for value in own if repr(type(value)) in str(failure)), None)


def _how_to_register(value: Any) -> str:
    name = type(value).__qualname__
    if is_dataclass(value):
        return f"call torch.export.register_dataclass({name}) before"
    return (
        "use a tensor, a tuple, a dict or a dataclass, for which torch.export.register_dataclass is called before, "
        "in its place"
    )


def _probed(model: nn.Module, inputs: Inputs) -> tuple[str, Any]:
    """Run a model, and return which layer first took a packed sequence, as text, "" if none did; and the outputs."""
    found: list[str] = []

    def note(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        if any(isinstance(value, PackedSequence) for value in given):
            found.append(f"{name!r} ({type(layer).__name__})")

    probe = copied(model, share=True)
    for name, layer in probe.named_modules():
        layer.register_forward_pre_hook(functools.partial(note, name))
    args, kwargs = map_tensors(torch.clone, inputs)
    with torch.no_grad():
        outputs = probe(*args, **kwargs)
    return next(iter(found), ""), outputs


def _in_short(error: Exception | None) -> str:
    text = str(error).strip()
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}"


def line_of_error(error: BaseException | None) -> str:
    """Return the last line of the user's own code that an error passed, as a part of a sentence."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    own = [
        f for f in frames if "/torch/" not in f.filename and "bmrs" not in f.filename and f.name == "forward"
    ]
    return f" at line {own[-1].lineno} of {own[-1].filename} ({own[-1].line})" if own else ""
