"""Compacted models in a file without pickle.

One safetensors file holds the weights and, in its metadata, a JSON description: a format version and, in
order, every layer's name, type, constructor arguments and dtype. In version 1 the layers are a chain; in version 2
each also has the names of its inputs, earlier layers or null for the model's input, and the type of an addition is
``Addition``. Reading it runs no code from the file: only known stock layers are constructed, with plain values as
arguments, and names are checked before they become those of children.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, fx, nn

from bmrs.compaction.network import Node, build_network, is_chain, read_network
from bmrs.compaction.stock_layers import (
    STOCK_LAYERS,
    Addition,
    argument_names,
    build_layer,
    constructor_arguments,
)

CHAIN_VERSION, GRAPH_VERSION = 1, 2

_METADATA_KEY = "bmrs"
_LAYER_TYPES = {layer_type.__name__: layer_type for layer_type in (*STOCK_LAYERS, Addition)}
_KEYS = {
    CHAIN_VERSION: {"name", "type", "arguments", "dtype"},
    GRAPH_VERSION: {"name", "type", "arguments", "dtype", "inputs"},
}


def save(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Save a compacted model as one safetensors file, replacing any file there in a single step.

    Args:
        path: the file, by habit with the suffix ``.safetensors``.
        model: ``nn.Sequential`` of stock layers or ``torch.fx.GraphModule`` of stock layers and additions, as
            `bmrs.compact` returns them.

    Raises:
        TypeError: the model is anything else; the layer that cannot be saved is named.
        OSError: the file cannot be written.
    """
    nodes = read_network(model)
    version = CHAIN_VERSION if is_chain(nodes) else GRAPH_VERSION
    layers = [
        {key: value for key, value in _describe(node).items() if key in _KEYS[version]} for node in nodes
    ]
    description = {"version": version, "layers": layers}
    # Cloned, as safetensors refuses tensors that share memory.
    tensors = {
        f"{node.name}.{name}": tensor.detach().cpu().contiguous().clone()
        for node in nodes
        for name, tensor in node.layer.state_dict().items()
    }
    data = serialize(tensors, metadata={_METADATA_KEY: json.dumps(description)})
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> nn.Sequential | fx.GraphModule:
    """Load a model that `save` wrote.

    Args:
        path: the file.
        device: where to put the model.

    Returns:
        The model in evaluation mode, with bitwise the saved weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, of another version, or not such a file; what is wrong is said.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Cloned, so that nothing refers to the file once it is closed.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        return build_network(_nodes(_parse(metadata), tensors)).to(device)
    except ValueError as error:
        raise ValueError(f"{path} does not hold a model that bmrs.save wrote: {error}") from error


def _describe(node: Node) -> dict[str, Any]:
    layer, type_name = node.layer, type(node.layer).__name__
    if type(layer) not in _LAYER_TYPES.values():
        raise TypeError(f"save cannot describe layer {node.name!r} ({type_name}): not a stock layer it knows")
    if any(True for _ in layer.children()) or layer._forward_hooks or layer._forward_pre_hooks:
        raise TypeError(f"save cannot describe layer {node.name!r} ({type_name}): it has hooks or children")
    return {
        "name": node.name,
        "type": type_name,
        "arguments": constructor_arguments(layer),
        "dtype": _dtype_name(layer),
        "inputs": node.inputs,
    }


def _dtype_name(layer: nn.Module) -> str | None:
    """The floating dtype of a layer's tensors, None if it has none."""
    dtypes = {t.dtype for t in layer.state_dict().values() if t.is_floating_point()}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or None


def _parse(metadata: dict[str, str]) -> list[dict[str, Any]]:
    """The description's layers, with types, arguments and inputs checked; a chain's get their inputs."""
    try:
        description = json.loads(metadata[_METADATA_KEY])
        version, layers = description["version"], description["layers"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it has no readable description ({type(error).__name__}: {error})") from error
    if version not in (CHAIN_VERSION, GRAPH_VERSION):
        raise ValueError(
            f"it has format version {version!r}, and this version of bmrs reads {CHAIN_VERSION} and "
            f"{GRAPH_VERSION}"
        )
    if not isinstance(layers, list):
        raise ValueError("its layers are not a list")
    before = None
    for entry in layers:
        if not isinstance(entry, dict) or entry.keys() != _KEYS[version]:
            raise ValueError(f"its layer {entry!r} lacks or adds a key")
        name, type_name, arguments = entry["name"], entry["type"], entry["arguments"]
        if not isinstance(name, str) or not isinstance(type_name, str) or not isinstance(arguments, dict):
            raise ValueError(f"its layer {name!r} is not described by a name, a type name and arguments")
        if type_name not in _LAYER_TYPES:
            raise ValueError(f"its layer {name!r} is of unknown type {type_name!r}")
        known = arguments.keys() <= set(argument_names(_LAYER_TYPES[type_name]))
        if not known or not all(map(_is_plain, arguments.values())):
            raise ValueError(
                f"its layer {name!r} ({type_name}) has unknown or unsuitable arguments {arguments}"
            )
        inputs = entry.setdefault("inputs", [before])
        if not isinstance(inputs, list) or not all(x is None or isinstance(x, str) for x in inputs):
            raise ValueError(f"its layer {name!r} ({type_name}) has unsuitable inputs {inputs!r}")
        before = name
    return layers


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(item is None or isinstance(item, int) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _nodes(entries: list[dict[str, Any]], tensors: dict[str, Tensor]) -> list[Node]:
    """Construct the layers around their tensors; every tensor must belong to one."""
    nodes = []
    for entry in entries:
        name, prefix = entry["name"], f"{entry['name']}."
        own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        arguments = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in entry["arguments"].items()
        }
        try:
            layer = build_layer(_LAYER_TYPES[entry["type"]], arguments, own)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"its layer {name!r} ({entry['type']}) cannot be built: {error}") from error
        if _dtype_name(layer) != entry["dtype"]:
            raise ValueError(
                f"its layer {name!r} is {_dtype_name(layer)}, but described as {entry['dtype']!r}"
            )
        nodes.append(Node(name, layer, tuple(entry["inputs"])))
    if tensors:
        raise ValueError(f"its tensors {sorted(tensors)} belong to no layer")
    return nodes
