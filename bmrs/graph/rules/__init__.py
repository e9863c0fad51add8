"""What operators do to channels: a small file for each family of operators."""

from bmrs.graph.rules import contraction, movement, pointwise, reduction
from bmrs.graph.rules.registry import RULES, Call, unknown

__all__ = ["RULES", "Call", "contraction", "movement", "pointwise", "reduction", "unknown"]
