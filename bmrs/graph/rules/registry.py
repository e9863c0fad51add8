"""Where the rules for operators are registered, and what a rule gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bmrs.graph.values import Findings, Value


@dataclass(frozen=True)
class Call:
    """One operation of a network.

    Attributes:
        operator: name without namespace, overload and the underscore of operations in place, such as ``"relu"``.
        target: the operator itself.
        arguments: all its arguments by name, defaults too, with values in place of tensors.
        shapes: of its results; one, unless it returns several tensors.
        can_shift: whether a constant can be added to what it returns, in a bias that nothing else uses: its own, or one
            that its layer has not and can get.
        new_bias: qualified name of that bias, where its layer has none.
        ignores_zeros: whether the layer makes up for channels that leave the mean square that it takes, if they are
            zero.
        constants_behind: of a layer norm that constants may leave, as an approximation, what gives what they are behind
            it, NaN for NaN; None of all others.
    """

    operator: str
    target: torch._ops.OpOverload
    arguments: Mapping[str, Any]
    shapes: tuple[torch.Size, ...]
    can_shift: bool = False
    new_bias: str = ""
    ignores_zeros: bool = False
    constants_behind: Callable[[Tensor], Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the only result."""
        return self.shapes[0]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def values(self) -> list[Value]:
        """Return the tensors that it takes, lists of tensors included."""
        found: list[Value] = []
        for argument in self.arguments.values():
            items = argument if isinstance(argument, list | tuple) else [argument]
            found += [item for item in items if isinstance(item, Value)]
        return found


Rule: TypeAlias = Callable[[Findings, Call], "Value | list[Value]"]

RULES: dict[str, Rule] = {}
"""The rule for each operator, by name."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule for operators."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


def unknown(findings: Findings, call: Call) -> list[Value]:
    """Keep all channels that reach an operator without a rule."""
    for value in call.values():
        findings.stay_all(value, f"there is no rule for the operator {call.operator}")
    return [Value(shape) for shape in call.shapes]
