"""What pruning decides, and the report of what it did."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from bmrs.criteria import Decision
from bmrs.text_table import table_lines


@dataclass(frozen=True)
class LayerReport:
    """What pruning did to one noise layer.

    Attributes:
        name: qualified name of the noise layer.
        structures: all its structures, pruned ones included.
        before: structures kept before.
        after: structures kept now.
        lowest_score: lowest score of the structures kept before.
        highest_score: highest score of them.
        best_kept: True if the criterion asked for all of them and the best one was kept nevertheless.
        emptied: True if it asked for all of them and all went, because a shortcut carries on.
    """

    name: str
    structures: int
    before: int
    after: int
    lowest_score: float
    highest_score: float
    best_kept: bool
    emptied: bool = False


@dataclass(frozen=True)
class PruneReport:
    """What pruning did to a model; ``str()`` gives a text table.

    Attributes:
        criterion: the criterion as text.
        score_name: what its scores are.
        layers: one entry for each noise layer, in module order.
        tied: names of noise layers that were judged together, in groups.
        times_longer: where nothing went because the posteriors have hardly left their start: how many times as many
            steps bring a structure that the data say nothing about to where the criterion prunes, infinity if they have
            not moved at all; else None.
    """

    criterion: str
    score_name: str
    layers: tuple[LayerReport, ...]
    tied: tuple[tuple[str, ...], ...] = ()
    times_longer: float | None = None

    @property
    def before(self) -> int:
        """Structures kept before, over all layers."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        """Structures kept now, over all layers."""
        return sum(layer.after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, ready for JSON; a non-finite score becomes None."""
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            for key in ("lowest_score", "highest_score"):
                layer[key] = layer[key] if math.isfinite(layer[key]) else None
        return {
            "criterion": self.criterion,
            "score_name": self.score_name,
            "before": self.before,
            "after": self.after,
            "layers": layers,
            "tied": [list(group) for group in self.tied],
            "times_longer": None if self.times_longer == math.inf else self.times_longer,
        }

    def __str__(self) -> str:
        columns = ("layer", "structures", "before", "after")
        header = (*columns, f"lowest {self.score_name}", f"highest {self.score_name}")
        rows = [
            (
                layer.name or "(model)",
                str(layer.structures),
                str(layer.before),
                str(layer.after),
                f"{layer.lowest_score:.4g}",
                f"{layer.highest_score:.4g}",
            )
            for layer in self.layers
        ]
        structures = sum(layer.structures for layer in self.layers)
        total = ("total", str(structures), str(self.before), str(self.after), "", "")
        lines = table_lines([header, *rows, total], left=0)
        notes = [
            f"{layer.name or '(model)'}: the criterion asked for every structure; the best one was kept"
            for layer in self.layers
            if layer.best_kept
        ]
        notes += [
            f"{layer.name or '(model)'}: the criterion asked for every structure; all went, as a shortcut carries on"
            for layer in self.layers
            if layer.emptied
        ]
        if self.times_longer == math.inf:
            notes.append(
                "nothing went, because no posterior has left its start: are μ and log σ in the optimizer, which has to "
                "be built after the noise was added?"
            )
        elif self.times_longer is not None:
            notes.append(
                "nothing went, because the posteriors are still near their start: about "
                f"{self.times_longer:.2g} times as many steps at this rate bring one that the data say nothing about "
                "to where this criterion prunes; bmrs.learn_posteriors goes on until they have settled"
            )
        ties = [f"judged together: {', '.join(group)}" for group in self.tied]
        return "\n".join([f"pruned by {self.criterion}", *lines, *ties, *notes])


@dataclass(frozen=True)
class Judgement:
    """What a criterion decides on a model, before anything is pruned; all on the CPU.

    Attributes:
        decisions: by name of a noise layer, what it says of each structure by itself.
        kept: bool, what was kept of each noise layer before.
        masks: bool, what is to be kept.
        report: what that changes.
    """

    decisions: dict[str, Decision]
    kept: dict[str, Tensor]
    masks: dict[str, Tensor]
    report: PruneReport
