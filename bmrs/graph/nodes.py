"""What a node of a captured graph says of itself: its layer, the user's line, its operator and what reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

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


def name_layers(graphs: fx.GraphModule, model: nn.Module) -> None:
    """Give every operation of a model's graph the names that its layers have in the model, in place.

    Where a layer has several names, torch.export goes by how the code came to it, as in ``f.slice(1, None, None).0``.
    """
    real = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for part in graphs.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            stack = node.meta.get("nn_module_stack") or {}
            if any(str(path) not in real for path, _ in stack.values()):
                named = {key: (_real_path(str(path), model), kind) for key, (path, kind) in stack.items()}
                node.meta["nn_module_stack"] = named


def _real_path(path: str, model: nn.Module) -> str:
    """Return the name of a layer that the code came to by slices of others, or as much of it as the model has."""
    found: list[str] = []
    owner: nn.Module = model
    inside: nn.Module = model  # what the next part of the path is looked up in: its owner, or a slice of that
    for part in path.split(".") if path else ():
        if part.startswith("slice("):
            try:
                bounds = [None if bound == "None" else int(bound) for bound in part[6:-1].split(", ")]
                inside = inside[slice(*bounds)]  # type: ignore[index]
            except Exception:  # of a class with another idea of slices
                break
            continue
        child = inside._modules.get(part)
        name = next((name for name, module in owner._modules.items() if module is child), None)
        if child is None or name is None:
            break
        found.append(name)
        owner = inside = child
    return ".".join(found)


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
