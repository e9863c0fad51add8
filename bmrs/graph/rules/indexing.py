"""Operators that pick and write elements at indices: what they pick along channels has to be known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bmrs.graph.channels import compressed, varying_axes
from bmrs.graph.operators import SCATTERS
from bmrs.graph.rules.contraction import uniform
from bmrs.graph.rules.movement import moved_alike, plain_arguments
from bmrs.graph.rules.registry import Call, rule
from bmrs.graph.values import Findings, Value, combine


@rule("index", "index_select", "gather", "take_along_dim", "masked_select")
def indexed(findings: Findings, call: Call) -> Value:
    """Follow elements picked by indices, which have to be known where they pick along channels."""
    value, plain = call["self"], plain_arguments(call)
    indices = [v for v in call.values() if v is not value]
    simple = call.operator in ("index", "index_select") and len(indices) == 1 and len(indices[0].shape) == 1
    if not simple:
        # Known indices into channels would have to be renumbered.
        for layer in value.layers:
            if set(_picked_axes(call, len(value.shape))) & set(varying_axes(layer)):
                findings.stay(layer, f"{call.operator} picks from it")
    if any(index.tensor is None for index in indices):
        picked = set(_picked_axes(call, len(value.shape)))
        for layer in value.layers:
            if picked & set(varying_axes(layer)):
                findings.stay(layer, f"{call.operator} picks by the input")
        if call.operator not in ("index", "index_select"):
            return Value(call.shape)
        # So are constants, where they are the same all along what is picked from.
        constant = None if value.constant is None else uniform(value.constant, sorted(picked))
        constant = None if constant is None else constant.expand(value.shape)
        layers = tuple(x for x in value.layers if not picked & set(varying_axes(x)))
        value = Value(value.shape, layers, constant)
        # Any entry will do, as all carry the same channels.
        name = "index" if call.operator == "index_select" else "indices"
        plain[name] = tree_map(
            lambda index: torch.zeros(index.shape, dtype=torch.int64) if isinstance(index, Value) else index,
            call[name],
        )

    def move(x: Tensor) -> Tensor:
        result = call.target(**{**plain, "self": x})
        assert isinstance(result, Tensor)
        return result

    return moved_alike(findings, call, value, move)[0]


def _picked_axes(call: Call, rank: int) -> Sequence[int]:
    """Return the dimensions along which indices pick: all, where there is an index for each entry."""
    if call.operator == "index":
        return _indexed_axes(call)
    return [call["dim"] % rank] if call.operator == "index_select" else range(rank)


def _indexed_axes(call: Call) -> list[int]:
    return [d for d, index in enumerate(call["indices"]) if index is not None]


@rule(*SCATTERS)
def scattered(findings: Findings, call: Call) -> Value:
    """Follow entries put or summed into others at indices along one dimension, as messages between nodes of a graph.

    Along the other dimensions what lies at the same place is tied.
    """
    x, axis = call["self"], call["dim"] % max(len(call.shape), 1)
    source, index = call["source"] or call["src"], call["index"]
    values = [value for value in (x, source) if isinstance(value, Value)]
    # In `scatter` there is an index for every entry.
    values += [index] if call.operator.startswith("scatter") else []
    sizes = {value.shape[:axis] + value.shape[axis + 1 :] for value in values}
    if len(sizes) > 1 or call["value"] not in (None, 0):
        for value in values:
            findings.stay_all(value, f"{call.operator} writes into a part of it")
        return Value(call.shape)
    operands = []
    for value in values:
        for layer in value.layers:
            if axis in varying_axes(layer):
                findings.stay(layer, f"{call.operator} runs over its dimension")
        left = [layer.narrow(axis, 0, 1) for layer in value.layers if axis not in varying_axes(layer)]
        operands.append(([1 if d == axis else size for d, size in enumerate(value.shape)], left))
    layers = combine(findings, operands[0][0], operands)
    zeros = [_zero_along(value, axis) for value in values if value is not index]
    constant = None
    if all(zero is not None for zero in zeros):
        zero = torch.stack(torch.broadcast_tensors(*zeros)).all(dim=0)
        known = torch.zeros(zero.shape, dtype=torch.float64).masked_fill(~zero, torch.nan)
        constant = compressed(known.expand(call.shape))
    return Value(call.shape, tuple(layer.expand(call.shape) for layer in layers), constant)


@rule("index_put")
def put(findings: Findings, call: Call) -> Value:
    """Follow one number put at the places of a mask; other indices keep all that they write to."""
    x, indices, number = call["self"], call["indices"], call["values"]
    mask = indices[0] if len(indices) == 1 else None
    # Of all dimensions or of the first ones, as of examples and times.
    masks = mask is not None and len(x.shape) > 1 and mask.shape == x.shape[: len(mask.shape)]
    if mask is None or not masks or number.shape.numel() != 1:
        for value in (x, number):
            findings.stay_all(value, "index_put writes into a part of it")
        return Value(call.shape)
    rest = (1,) * (len(x.shape) - len(mask.shape))
    of_mask = ((*mask.shape, *rest), [layer.view(*layer.shape, *rest) for layer in mask.layers])
    layers = combine(findings, call.shape, [(x.shape, x.layers), of_mask])
    known, put_there = x.known(), number.known()
    if known is None or put_there is None:
        return Value(call.shape, layers)
    same = put_there.flatten()[0] == (0.0 if call["accumulate"] else known)
    constant = known.where(same, torch.nan)
    return Value(call.shape, layers, compressed(constant))


def _zero_along(value: Value, axis: int) -> Tensor | None:
    """Return where all entries along a dimension are known to be 0, with size 1 along that; None if none are."""
    known = value.known()
    return None if known is None else (known == 0).all(dim=axis, keepdim=True)


@rule("select_scatter")
def placed(findings: Findings, call: Call) -> Value:
    """Follow a tensor of which one entry along a dimension is replaced; what lies at its place is tied."""
    value, source, axis = call["self"], call["src"], call["dim"] % len(call.shape)
    place = call["index"] % value.shape[axis]
    for layer in value.layers:
        part = compressed(layer.select(axis, place))
        axes = varying_axes(part)
        own = next((other for other in source.layers if varying_axes(other) == axes), None)
        if own is None:
            findings.stay(part, "it meets a tensor that cannot be cut")
        else:
            findings.tie(part, own)
    for layer in source.layers:
        if not any(
            varying_axes(compressed(x.select(axis, place))) == varying_axes(layer) for x in value.layers
        ):
            findings.stay(layer, "it meets a tensor that cannot be cut")
    known = [value.known(), source.known()]
    if known == [None, None]:
        return Value(call.shape, value.layers)
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    whole, part = (
        nan.expand(v.shape) if k is None else k for v, k in zip((value, source), known, strict=True)
    )
    # Only where a dimension has many entries is it laid out in memory.
    constant = torch.cat(
        [
            whole.narrow(axis, 0, place),
            part.unsqueeze(axis),
            whole.narrow(axis, place + 1, whole.shape[axis] - place - 1),
        ],
        axis,
    )
    return Value(call.shape, value.layers, compressed(constant))
