"""What speaks for keeping structures that could leave together, by a criterion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bmrs.criteria import Criterion, Decision
from bmrs.graph.masked_graph import Unit
from bmrs.pruning.report import Judgement


class Evidence:
    """What speaks for keeping units, by a criterion."""

    def __init__(self, criterion: Criterion, judgement: Judgement) -> None:
        self.criterion, self.judgement = criterion, judgement
        self._known: dict[Unit, float] = {}

    def of(self, units: Sequence[Unit]) -> list[float]:
        """Return what each unit is worth, at least 0; those of a unit that is pruned already are 0."""
        alike: dict[tuple[str, ...], list[Unit]] = defaultdict(list)
        for unit in units:
            alike[tuple(s.layer for s in unit.structures)].append(unit)
        for layers, its_units in alike.items():
            numbers = torch.tensor([[s.number for s in unit.structures] for unit in its_units]).T
            decisions, kept = [], []
            for layer, places in zip(layers, numbers, strict=True):
                whole = self.judgement.decisions[layer]
                decisions.append(Decision(whole.scores[places], whole.prune[places]))
                kept.append(self.judgement.masks[layer][places])
            joint = self.criterion.decide_tied(decisions, torch.stack(kept)).scores
            worth = self._for_keeping(joint).masked_fill(~torch.stack(kept).any(dim=0), 0.0)
            self._known |= dict(zip(its_units, worth.tolist(), strict=True))
        return [self._known[unit] for unit in units]

    def staying(self, units: Sequence[Unit], masks: Mapping[str, Tensor]) -> float:
        """Return what is worth keeping in the layers of some units beside these units, by masks."""
        rest = {s.layer: masks[s.layer].clone() for unit in units for s in unit.structures}
        for unit in units:
            for layer, number in unit.structures:
                rest[layer][number] = False
        return sum(self.of_structures(layer, mask) for layer, mask in rest.items())

    def of_layers(self, names: Sequence[str], masks: Mapping[str, Tensor]) -> float:
        """Return what all that is kept of some layers is worth by itself."""
        return sum(self.of_structures(name, masks[name]) for name in names)

    def of_structures(self, layer: str, pruned: Tensor) -> float:
        """Return what some structures of a layer are worth by themselves."""
        return float(self._for_keeping(self.judgement.decisions[layer].scores[pruned]).sum())

    def _for_keeping(self, scores: Tensor) -> Tensor:
        sign = -1.0 if self.criterion.prunes_high_scores else 1.0
        return (sign * scores.double()).nan_to_num(math.inf).clamp(min=0.0)
