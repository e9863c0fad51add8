"""Operators that make tensors of the sizes of others, or bring others to one size."""

from __future__ import annotations

import torch

from bmrs.graph.operators import NEW_FILLS
from bmrs.graph.rules.registry import Call, rule
from bmrs.graph.values import Findings, Value


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "zero")
def like(findings: Findings, call: Call) -> Value:
    """Follow a tensor made with another's sizes, which loses what the other loses."""
    fills = {"zeros_like": 0.0, "zero": 0.0, "ones_like": 1.0, "full_like": call["fill_value"]}
    fill = fills.get(call.operator)
    constant = None if fill is None else torch.tensor(float(fill), dtype=torch.float64).expand(call.shape)
    return Value(call.shape, call["self"].layers, constant)


@rule(*NEW_FILLS)
def new(findings: Findings, call: Call) -> Value:
    """Follow a tensor of one number, made with nothing but the dtype and device of another."""
    fill = {"new_zeros": 0.0, "new_ones": 1.0, "new_full": call["fill_value"]}[call.operator]
    constant = torch.tensor(torch.nan if fill is None else float(fill), dtype=torch.float64)
    return Value(call.shape, (), constant.expand(call.shape))


@rule("meshgrid", "broadcast_tensors")
def broadcast(findings: Findings, call: Call) -> list[Value]:
    """Follow tensors brought to one shape."""
    return [
        Value(shape, tuple(layer.expand(shape) for layer in value.layers), None)
        for value, shape in zip(call["tensors"], call.shapes, strict=True)
    ]
