"""What operators do to channels: a small file for each family of operators."""

from bmrs.graph.rules import (
    contraction,
    convolution,
    creation,
    indexing,
    movement,
    pointwise,
    recurrence,
    reduction,
)
from bmrs.graph.rules.registry import RULES, Call, unknown

__all__ = [
    "RULES",
    "Call",
    "contraction",
    "convolution",
    "creation",
    "indexing",
    "movement",
    "pointwise",
    "recurrence",
    "reduction",
    "unknown",
]
