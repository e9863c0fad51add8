"""What a compacted network remembers of its making: plain attributes, which copies keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from bmrs.compaction.cutting import Selection
from bmrs.compaction.report import CompactReport
from bmrs.graph.inputs import Inputs

_ATTRIBUTE = "_bmrs_record"


@dataclass(frozen=True)
class Record:
    """How a network was compacted.

    Attributes:
        report: what was done.
        inputs: a few examples.
        selections: by qualified name of a parameter, what of it is left, where it became smaller.
        code_sizes: by qualified name of a module, integer attributes that its code takes sizes from and that changed,
            in this compaction or in one before.
        numbers: likewise, other numbers that changed with the sizes, as ε.
    """

    report: CompactReport
    inputs: Inputs
    selections: dict[str, Selection] = field(default_factory=dict)
    code_sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)


def joined(
    earlier: Mapping[str, Mapping[str, Any]], later: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return attributes that changed, by qualified name of a module, one time after another."""
    return {path: {**earlier.get(path, {}), **later.get(path, {})} for path in {**earlier, **later}}


def remember(network: nn.Module, record: Record) -> None:
    """Attach a record to a network."""
    # Of a graph module, copies keep this mapping and no other attribute.
    holder: dict[str, Any] = network.meta if isinstance(network, fx.GraphModule) else vars(network)
    holder[_ATTRIBUTE] = record


def record_of(network: nn.Module) -> Record | None:
    """Return the record of a network, None if `bmrs.compact` did not make it."""
    holder = getattr(network, "meta", {}) if isinstance(network, fx.GraphModule) else vars(network)
    found = holder.get(_ATTRIBUTE)
    return found if isinstance(found, Record) else None
