"""Layers that may lose all their structures: a shortcut carries on what they would have changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bmrs.criteria import Criterion
from bmrs.graph.emptied import has_constant_output
from bmrs.graph.masked_graph import MaskedGraph
from bmrs.pruning.report import Judgement


def emptied(judgement: Judgement, criterion: Criterion, graph: MaskedGraph) -> Judgement:
    """Return a judgement in which layers go whole that the criterion asks for whole, where something carries on.

    They go one after another, those worth least first, as a network may do without each and not without all. Of layers
    that are tied, all go or, where that would leave nothing, one after another too.
    """
    asked = [report.name for report in judgement.report.layers if report.best_kept]
    sign = -1.0 if criterion.prunes_high_scores else 1.0

    def worth(name: str) -> float:
        scores = judgement.decisions[name].scores[judgement.kept[name]]
        return float((sign * scores.double()).max())

    asked.sort(key=worth)
    group_of = {name: tuple(group) for group in judgement.report.tied for name in group}
    groups = [*dict.fromkeys(group_of.get(name, (name,)) for name in asked), *((name,) for name in asked)]
    masks = judgement.masks
    for names in groups:
        if any(masks[name].any() for name in names):
            masks = without_layers(masks, names, graph) or masks
    layers = tuple(
        replace(report, after=0, best_kept=False, emptied=True)
        if report.best_kept and not masks[report.name].any()
        else report
        for report in judgement.report.layers
    )
    return replace(judgement, masks=masks, report=replace(judgement.report, layers=layers))


def without_layers(
    masks: dict[str, Tensor], names: Sequence[str], graph: MaskedGraph
) -> dict[str, Tensor] | None:
    """Return masks without some layers, None if an output would then not depend on the input."""
    tried = masks | {name: torch.zeros_like(masks[name]) for name in names}
    graph.set_masks(tried)
    return None if has_constant_output(graph.without()) else tried
