"""What a node of a captured graph says of itself: its layer, the user's line, its operator and what reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bmrs.graph.operators import CELLS, CONVOLUTIONS, GATES, SCATTERS, plain_name


def place_of(node: fx.Node) -> str:
    """Return an operation's name and the layer that it belongs to, for messages."""
    path = layer_of(node)
    name = operator_name(node) if node.op == "call_function" else node.name
    return f"{name} in layer {path!r}" if path else str(name)


def line_of(node: fx.Node) -> str:
    """Return the user's line that an operation comes from, as a part of a sentence."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    places = [i for i, line in enumerate(lines) if line.startswith("File ")]
    return f" ({', '.join(lines[places[-1] :][:2])})" if places else ""


def layer_of(node: fx.Node) -> str:
    """Return the qualified name of the innermost layer that an operation belongs to, "" for the model."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(stack.values())), "")


def operator_name(node: fx.Node) -> str:
    """Return the name of what a node calls: of an operator without namespace, overload and underscore in place."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    return plain_name(target._schema.name.split("::")[1])


def only_starts_recurrences(node: fx.Node) -> bool:
    """Return whether nothing but recurrent layers reads a tensor, or others like it."""
    return all(
        isinstance(user.target, torch._ops.OpOverload)
        and (
            operator_name(user) in GATES
            or (operator_name(user) == "zeros_like" and only_starts_recurrences(user))
        )
        for user in node.users
    )


def only_goes_on(node: fx.Node) -> bool:
    """Return whether nothing but sums, products and linear layers reads a tensor, as of what a loop starts from."""
    names = {operator_name(user) if user.op == "call_function" else "" for user in node.users}
    return bool(names) and names <= {"add", "sub", "mul", "linear", "addmm", "cat", *CELLS}


def is_kernel_of_each_channel(node: fx.Node) -> bool:
    """Return whether depthwise convolutions alone read a tensor, as a kernel that is the same for all channels."""
    source, shape = node.args[0], node.meta["val"].shape
    if not isinstance(source, fx.Node) or source.meta["val"].shape[:1] != (1,) or shape[0] == 1:
        return False
    return all(
        user.op == "call_function"
        and operator_name(user) in CONVOLUTIONS
        and user.args[1] is node
        and groups_of(user) == shape[0]
        for user in node.users
    )


def summed_into_along(node: fx.Node) -> int | None:
    """Return the dimension along which nothing but entries at indices are put into a tensor, None if more is done."""
    dims = {
        user.args[1]
        if user.args[0] is node
        and isinstance(user.target, torch._ops.OpOverload)
        and operator_name(user) in SCATTERS
        else None
        for user in node.users
        if len(user.args) > 1
    }
    (dim,) = dims if len(dims) == 1 else (None,)
    return dim if isinstance(dim, int) else None


def groups_of(node: fx.Node) -> int:
    """Return the number of groups of a convolution."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    place = names.index("groups")
    return int(node.args[place] if place < len(node.args) else node.kwargs.get("groups", 1))  # type: ignore[arg-type]


def tensors_in(example: Any) -> list[Tensor]:
    """Return the tensors that an operation returns, from what its node keeps as an example of that."""
    if isinstance(example, Tensor):
        return [example]
    return [t for t in example if isinstance(t, Tensor)] if isinstance(example, list | tuple) else []
