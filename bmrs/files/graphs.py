"""Networks of operators in a file's description: format version 3.

The description lists the operations of the network in their order, as `bmrs.compaction.description` has them: names,
operators of ATen by name, arguments as plain values. Reading it runs no code from the file: only operators of a fixed
list are called, only batch norms, dropout and noise layers are constructed, with plain values as arguments.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from bmrs.checks import one_line
from bmrs.compaction.description import (
    NOISE,
    SCALAR_FUNCTIONS,
    Description,
    Operation,
    Reference,
    UnsupportedError,
    check_operator,
)
from bmrs.compaction.graph_network import build
from bmrs.files.layer_arguments import check_arguments
from bmrs.graph.stock_layers import BATCH_NORMS, DROPOUTS, argument_names
from bmrs.noise.layer import NoiseLayer

GRAPH_VERSION = 3

_LAYERS = {
    **{layer.__name__: layer for layer in BATCH_NORMS},
    **{layer.__name__: layer for layer in DROPOUTS},
    NOISE: NoiseLayer,
}
_KINDS = ("input", "tensor", "call", "scalar", "item", "layer", "scale")
_KEYS = {"name", "kind", "target", "args", "kwargs"}
_SPECIAL: dict[type, str] = {
    torch.dtype: "dtype",
    torch.memory_format: "memory_format",
    torch.layout: "layout",
    torch.device: "device",
}


def describe_graph(description: Description) -> dict[str, Any]:
    """Return a description as plain values, ready for JSON.

    Raises:
        UnsupportedError: an argument cannot be written down, or a name cannot be read again.
    """
    for op in description.operations:
        path = op.target if op.kind == "tensor" else str(op.args[1]) if op.kind == "layer" else ""
        for part in path.split(".") if path else ():
            if not _can_be_attribute(part):
                raise UnsupportedError(
                    f"the name {path!r} has {part!r} in it, where only letters, digits, _ and - can be read again"
                )
    return {
        "operations": [
            {
                "name": op.name,
                "kind": op.kind,
                "target": op.target,
                "args": [_plain(a, op.name) for a in op.args],
                "kwargs": {key: _plain(value, op.name) for key, value in op.kwargs.items()},
            }
            for op in description.operations
        ],
        "outputs": _plain_tree(description.outputs),
        "in_tree": _plain_tree(description.in_tree),
    }


def read_graph(
    data: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    parameters: set[str],
    frozen: set[str],
    device: Any,
) -> fx.GraphModule:
    """Return the network of a description.

    Raises:
        ValueError: it is not a description of a network; what is wrong is said.
    """
    operations = data.get("operations")
    if not isinstance(operations, list):
        raise ValueError("its operations are not a list")
    known: set[str] = set()
    read = []
    for entry in operations:
        operation = _operation(entry, known, device)
        if operation.kind == "tensor" and operation.target not in tensors:
            raise ValueError(f"its tensor {operation.target!r} is missing")
        known.add(operation.name)
        read.append(operation)
    description = Description(
        tuple(read), _read_tree(data.get("outputs"), known), _read_tree(data.get("in_tree"), known)
    )
    tree = description.in_tree
    if not isinstance(tree, tuple) or [type(part) for part in tree] != [tuple, dict]:
        raise ValueError("its arguments are not a tuple and a dict")
    if not all(map(_is_name, tree[1])):
        raise ValueError("its arguments have unsuitable names")
    inputs = sum(operation.kind == "input" for operation in read)
    if len(tree_flatten(tree, is_leaf=lambda leaf: leaf is None)[0]) != inputs:
        raise ValueError(f"its arguments are not as many as its {inputs} inputs")
    if not any(isinstance(leaf, Reference) for leaf in tree_flatten(description.outputs)[0]):
        raise ValueError("it has no outputs")
    try:
        return build(description, tensors, parameters=parameters, frozen=frozen)
    except (
        AssertionError,
        AttributeError,
        KeyError,
        RuntimeError,
        SyntaxError,
        TypeError,
        UnsupportedError,
    ) as error:
        raise ValueError(f"its graph cannot be built: {type(error).__name__}: {one_line(error)}") from error


def _operation(entry: Any, known: set[str], device: Any) -> Operation:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise ValueError(f"its operation {str(entry)[:100]} lacks or adds a key")
    name, kind, target = entry["name"], entry["kind"], entry["target"]
    if not isinstance(name, str) or not _is_name(name) or name in known:
        raise ValueError(f"its operation {str(name)[:100]!r} has an unsuitable name")
    if kind not in _KINDS or not isinstance(target, str):
        raise ValueError(f"its operation {name!r} is of unknown kind {str(kind)[:100]!r}")
    if not isinstance(entry["args"], list) or not isinstance(entry["kwargs"], dict):
        raise ValueError(f"its operation {name!r} has no arguments")
    args = tuple(_read(a, known, device) for a in entry["args"])
    kwargs = {str(key): _read(value, known, device) for key, value in entry["kwargs"].items()}
    if kind == "call":
        try:
            known_names = {argument.name for argument in check_operator(target, name)._schema.arguments}
        except UnsupportedError as error:
            raise ValueError(str(error)) from error
        unknown = sorted(kwargs.keys() - known_names)
        if unknown:
            # They become a part of code that torch.fx generates.
            raise ValueError(
                f"its operation {name!r}, {target}, does not take an argument {unknown[0][:100]!r}"
            )
    if kind == "scalar" and target not in SCALAR_FUNCTIONS:
        raise ValueError(f"its operation {name!r} is an unknown function {target[:100]!r}")
    if kind == "tensor" and not all(map(_can_be_attribute, target.split("."))):
        raise ValueError(f"its tensor {target[:100]!r} has an unsuitable name")
    if kind == "layer":
        _check_layer(name, target, args, kwargs)
    if kind == "input":
        _check_expected(name, args)
    if kind == "item" and (len(args) != 2 or not isinstance(args[1], int)):
        raise ValueError(f"its operation {name!r} takes no item")
    if kind == "scale" and (len(args) != 3 or not isinstance(args[2], int)):
        raise ValueError(f"its operation {name!r} scales along no dimension")
    return Operation(name, kind, target, args, kwargs)


def _check_expected(name: str, args: tuple[Any, ...]) -> None:
    """Raise ValueError unless this is what an input has to be, see `bmrs.compaction.graph_network.check_inputs`."""
    kind, wanted = args if len(args) == 2 else ("", None)
    constant = kind == "constant" and (wanted is None or isinstance(wanted, bool | int | float | str))
    sizes = kind == "sizes" and isinstance(wanted, list) and all(map(_is_size, wanted))
    if not constant and not sizes:
        raise ValueError(f"its input {name!r} has unsuitable sizes")


def _is_size(size: object) -> bool:
    if isinstance(size, list) and len(size) == 3:
        letter, lower, upper = size
        return (
            isinstance(letter, str) and isinstance(lower, int) and (upper is None or isinstance(upper, int))
        )
    return isinstance(size, int)


def _check_layer(name: str, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if target not in _LAYERS or not kwargs.keys() <= set(argument_names(_LAYERS[target])):
        raise ValueError(f"its layer {name!r} is of unknown type {target[:100]!r} or has unknown arguments")
    if len(args) != 2 or not isinstance(args[1], str) or not all(map(_can_be_attribute, args[1].split("."))):
        raise ValueError(f"its layer {name!r} has no place")
    try:
        check_arguments(_LAYERS[target], kwargs)
    except ValueError as error:
        raise ValueError(f"its layer {name!r} ({target}) cannot be built: {error}") from error


def _is_name(name: str) -> bool:
    return (
        re.fullmatch(r"[^\W\d]\w*", name, re.ASCII) is not None
        and not keyword.iskeyword(name)
        and name != "self"
    )


def _can_be_attribute(name: str) -> bool:
    # They become attributes of plain modules, whose own must not be hidden. torch.fx puts a hyphen into quotes.
    return re.fullmatch(r"[\w-]+", name, re.ASCII) is not None and name not in _module_attributes()


def _module_attributes() -> frozenset[str]:
    return frozenset(dir(torch.nn.Module()))


def _plain(value: Any, place: str) -> Any:
    if isinstance(value, Reference):
        return {"of": value.name}
    if isinstance(value, list | tuple):
        return [_plain(item, place) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for kind, key in _SPECIAL.items():
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    raise UnsupportedError(f"a network cannot be described with {place!r}, of which {value!r} is an argument")


def _read(value: Any, known: set[str], device: Any) -> Any:
    if isinstance(value, list):
        return [_read(item, known, device) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"its argument {str(value)[:100]} is unknown")
    ((key, content),) = value.items()
    if key == "of" and isinstance(content, str) and content in known:
        return Reference(content)
    if key == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if key == "device":
        return torch.device(device)
    kind = next((kind for kind, its_key in _SPECIAL.items() if its_key == key), None)
    found = getattr(torch, str(content), None) if kind is not None else None
    if found is None or kind is None or not isinstance(found, kind):
        raise ValueError(f"its argument {str(value)[:100]} is unknown")
    return found


def _plain_tree(tree: Any) -> Any:
    if isinstance(tree, Reference):
        return {"of": tree.name}
    if isinstance(tree, dict):
        for key in tree:
            if not isinstance(key, str | int):
                raise UnsupportedError(
                    f"a network cannot be described that returns a dict with the key {key!r}"
                )
        if all(isinstance(key, str) for key in tree):
            return {"dict": {key: _plain_tree(value) for key, value in tree.items()}}
        return {"pairs": [[key, _plain_tree(value)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [_plain_tree(value) for value in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise UnsupportedError(f"a network cannot be described that returns {type(tree).__name__}")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)


def _read_tree(tree: Any, known: set[str]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((key, content),) = tree.items()
        if key == "of" and isinstance(content, str) and content in known:
            return Reference(content)
        if key == "dict" and isinstance(content, dict):
            return {name: _read_tree(value, known) for name, value in content.items()}
        if key == "pairs" and isinstance(content, list) and all(map(_is_pair, content)):
            return {name: _read_tree(value, known) for name, value in content}
        if key in ("list", "tuple") and isinstance(content, list):
            items = [_read_tree(value, known) for value in content]
            return items if key == "list" else tuple(items)
    raise ValueError(f"its tree {str(tree)[:100]} is unknown")
