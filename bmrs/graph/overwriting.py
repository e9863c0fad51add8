"""Operations in place: what else reads the memory that they write into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from bmrs.graph.channels import compressed
from bmrs.graph.operators import is_view
from bmrs.graph.rules import Call
from bmrs.graph.values import Value


def overwrite(values: dict[fx.Node, Any], calls: Mapping[fx.Node, Call], node: fx.Node, result: Any) -> None:
    """Let all that read the same memory after an operation in place read its result."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if not node.target._schema.is_mutable or not isinstance(result, Value) or not node.args:
        return
    source = node.args[0]
    if not isinstance(source, fx.Node) or not result.shape.numel():  # into an empty slice
        return
    before = values.get(source)
    values[source] = replace(result, parameter=None)
    unchanged = _equal_constants(before, result)
    while _is_view(source):
        call, source = calls.get(source), source.args[0]
        assert isinstance(source, fx.Node)
        value = values[source]
        if isinstance(value, Value):
            unchanged = None if unchanged is None else _of_all(call, unchanged, value.shape)
            known = value.known()
            constant = None if known is None or unchanged is None else known.where(unchanged, torch.nan)
            constant = None if constant is None else compressed(constant)
            values[source] = replace(value, constant=constant, tensor=None, parameter=None)


def _equal_constants(before: object, after: Value) -> Tensor | None:
    """Return where a tensor is the same constant as before, None if that is nowhere known."""
    was, is_now = (before.known() if isinstance(before, Value) else None), after.known()
    return None if was is None or is_now is None or was.shape != is_now.shape else was == is_now


def _of_all(call: Call | None, holds: Tensor, shape: torch.Size) -> Tensor | None:
    """Return of a tensor what holds for a part of it, which an operation picks; nothing is said of the rest.

    What does not hold for one of the entries that are picked along a dimension does not for any; None if it is not
    known which they are.
    """
    if call is None or call.operator not in ("select", "slice", "narrow"):
        return None
    axis = call["dim"] % len(shape)
    holds = holds.unsqueeze(axis) if call.operator == "select" else holds.all(dim=axis, keepdim=True)
    return holds.expand(shape)


def _is_view(node: Any) -> bool:
    return (
        isinstance(node, fx.Node) and isinstance(node.target, torch._ops.OpOverload) and is_view(node.target)
    )
