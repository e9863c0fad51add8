"""Floating-point operations of one operation, as products of sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from bmrs.compaction.flop_count import flop_counter
from bmrs.graph.analysis import Analysis
from bmrs.graph.operators import CONVOLUTIONS, GATES, LINEAR, TRANSPOSED_CONVOLUTIONS
from bmrs.graph.rules import Call
from bmrs.graph.values import Value


class Axis(NamedTuple):
    """A dimension of a tensor of a network.

    Attributes:
        holder: the operation that takes or returns the tensor; for a parameter, its qualified name.
        argument: name of the operation's argument, with the place in it if that is a list, as in ``"tensors.0"``; ""
            for what it returns, and for a parameter.
        dim: the dimension, from 0.
    """

    holder: fx.Node | str
    argument: str
    dim: int


def value_of(analysis: Analysis, axis: Axis) -> Value:
    """Return the tensor of which an axis is a dimension."""
    if isinstance(axis.holder, str):
        return analysis.parameters[axis.holder]
    if not axis.argument:
        found = analysis.values[axis.holder]
    else:
        name, _, place = axis.argument.partition(".")
        found = analysis.calls[axis.holder][name]
        found = found[int(place)] if place else found
    assert isinstance(found, Value)
    return found


def products(analysis: Analysis, node: fx.Node) -> list[list[Axis]]:
    """Return the multiply-adds of an operation as a sum of products of sizes, as `flop_counter` counts them."""
    call = analysis.calls[node]

    def axes(argument: str, *dims: int) -> list[Axis]:
        value = call[argument] if argument else analysis.values[node]
        every = range(len(value.shape))
        return [Axis(node, argument, every[d]) for d in (dims or every)]

    if call.operator in LINEAR:
        x, weight = ("mat1", "mat2") if call.operator == "addmm" else ("input", "weight")
        rows = axes(x)[:-1]
        return [[*rows, *_weight(call, node, weight, 0, 1)]] if rows else []
    if call.operator in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, "convolution"):
        transposed = "transpose" in call.operator or bool(call["transposed"])
        spatial = len(call["weight"].shape) - 2
        positions = axes("input" if transposed else "")[-spatial:]
        batch = axes("input")[: len(call["input"].shape) - spatial - 1]
        return [[*batch, *positions, *_weight(call, node, "weight", *range(spatial + 2))]]
    if call.operator in ("matmul", "mm", "bmm"):
        first = "self"
        second = "other" if call["other"] is not None else "mat2"
        if min(len(call[first].shape), len(call[second].shape)) < 2:
            return []
        return [[*axes(""), *axes(first, -1)]]
    if call.operator == "baddbmm":
        return [[*axes(""), *axes("batch1", -1)]]
    if call.operator == "scaled_dot_product_attention" and _is_counted(node, call):
        return [
            [*axes("query"), *axes("key", -2)],
            [*axes("query")[:-1], *axes("key", -2), *axes("value", -1)],
        ]
    if call.operator in GATES and call["input"] and _is_counted(node, call):
        weights = [(i, value.parameter) for i, value in enumerate(call["params"]) if len(value.shape) == 2]
        return [
            [
                *axes("input")[:-1],
                *(Axis(name, "", d) if name else Axis(node, f"params.{i}", d) for d in range(2)),
            ]
            for i, name in weights
        ]
    if call.operator == "einsum":
        return _einsum(call, node)
    return []


def _weight(call: Call, node: fx.Node, argument: str, *dims: int) -> list[Axis]:
    """Return axes of a weight, of the parameter itself where it is one."""
    name = call[argument].parameter
    return [Axis(node, argument, d) if name is None else Axis(name, "", d) for d in dims]


def _einsum(call: Call, node: fx.Node) -> list[list[Axis]]:
    inputs, _, out = call["equation"].replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(names) != 2 or "." in inputs or not set("".join(names)) - set(out):
        return []
    places = {
        letter: Axis(node, f"tensors.{i}", d) for i, n in enumerate(names) for d, letter in enumerate(n)
    }
    return [list(places.values())]


def _is_counted(node: fx.Node, call: Call) -> bool:
    """Return whether `flop_counter` sees the products in attention, which depends on the kernel that torch takes."""
    arguments = arguments_of_sizes(node, call, {})
    with flop_counter() as counter:
        call.target(**arguments)
    return bool(counter.get_total_flops())


def arguments_of_sizes(
    node: fx.Node, call: Call, sizes: Mapping[tuple[str, int], int], fill: float = 0
) -> dict[str, Any]:
    """Return arguments to run an operation with, of the devices and dtypes that it has in the network.

    Args:
        node: the operation.
        call: its call.
        sizes: other sizes than its tensors have, by the argument's name, as in `Axis`, and the dimension.
        fill: what tensors are filled with.
    """
    arguments: dict[str, Any] = {}
    for place, argument in enumerate(call.target._schema.arguments):
        given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)

        def filled(value: Any, source: Any, name: str = argument.name) -> Any:
            if isinstance(value, list) and any(isinstance(item, Value) for item in value):
                return [
                    filled(v, n, f"{name}.{i}") for i, (v, n) in enumerate(zip(value, source, strict=True))
                ]
            if not isinstance(value, Value):
                return value
            shape = [sizes.get((name, d), size) for d, size in enumerate(value.shape)]
            example = source.meta["val"]
            return torch.full(shape, fill, dtype=example.dtype, device=example.device)

        arguments[argument.name] = filled(call[argument.name], given)
    return arguments
