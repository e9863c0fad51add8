"""Networks of stock layers in a file's description: format versions 1 and 2.

In version 1 the layers are a chain: in order, every layer's name, type, constructor arguments and dtype. In version 2,
which is read but no longer written, each also has the names of its inputs, earlier layers or null for the model's
input, and the type of an addition is ``Addition``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bmrs.checks import one_line, shown
from bmrs.files.layer_arguments import check_arguments
from bmrs.files.layer_network import Node
from bmrs.graph.stock_layers import (
    STOCK_LAYERS,
    Addition,
    argument_names,
    build_layer,
    constructor_arguments,
)

CHAIN_VERSION, LAYER_GRAPH_VERSION = 1, 2

_LAYER_TYPES = {layer_type.__name__: layer_type for layer_type in (*STOCK_LAYERS, Addition)}
_KEYS = {
    CHAIN_VERSION: {"name", "type", "arguments", "dtype"},
    LAYER_GRAPH_VERSION: {"name", "type", "arguments", "dtype", "inputs"},
}


def describe_chain(nodes: Sequence[Node]) -> dict[str, Any]:
    """Return the description of a chain of layers, ready for JSON."""
    layers = [
        {
            "name": node.name,
            "type": type(node.layer).__name__,
            "arguments": constructor_arguments(node.layer),
            "dtype": _dtype_name(node.layer),
        }
        for node in nodes
    ]
    return {"version": CHAIN_VERSION, "layers": layers}


def read_layers(description: dict[str, Any], tensors: dict[str, Tensor]) -> list[Node]:
    """Return the layers of a description, around their tensors.

    Raises:
        ValueError: the description or a tensor is not as it should be; what is wrong is said.
    """
    return _nodes(_parse(description), tensors)


def _dtype_name(layer: nn.Module) -> str | None:
    """Return the floating dtype of a layer's tensors, None if it has none."""
    dtypes = {t.dtype for t in layer.state_dict().values() if t.is_floating_point()}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or None


def _parse(description: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the description's layers, with types, arguments and inputs checked; a chain's get their inputs."""
    version, layers = description["version"], description.get("layers")
    if not isinstance(layers, list):
        raise ValueError("its layers are not a list")
    before = None
    for entry in layers:
        if not isinstance(entry, dict) or entry.keys() != _KEYS[version]:
            raise ValueError(f"its layer {shown(entry)} lacks or adds a key")
        name, type_name, arguments = entry["name"], entry["type"], entry["arguments"]
        if not isinstance(name, str) or not isinstance(type_name, str) or not isinstance(arguments, dict):
            raise ValueError(f"its layer {shown(name)} is not described by a name, a type name and arguments")
        if type_name not in _LAYER_TYPES:
            raise ValueError(f"its layer {shown(name)} is of unknown type {shown(type_name)}")
        known = arguments.keys() <= set(argument_names(_LAYER_TYPES[type_name]))
        if not known or not all(map(_is_plain, arguments.values())):
            raise ValueError(
                f"its layer {shown(name)} ({type_name}) has unknown or unsuitable arguments {shown(arguments)}"
            )
        inputs = entry.setdefault("inputs", [before])
        if not isinstance(inputs, list) or not all(x is None or isinstance(x, str) for x in inputs):
            raise ValueError(f"its layer {shown(name)} ({type_name}) has unsuitable inputs {shown(inputs)}")
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
            check_arguments(_LAYER_TYPES[entry["type"]], arguments)
            layer = build_layer(_LAYER_TYPES[entry["type"]], arguments, own)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"its layer {shown(name)} ({entry['type']}) cannot be built: {one_line(error)}"
            ) from error
        if _dtype_name(layer) != entry["dtype"]:
            raise ValueError(
                f"its layer {shown(name)} is {_dtype_name(layer)}, but described as {shown(entry['dtype'])}"
            )
        nodes.append(Node(name, layer, tuple(entry["inputs"])))
    if tensors:
        raise ValueError(f"its tensors {shown(sorted(tensors))} belong to no layer")
    return nodes
