"""Pruning: a criterion applied to every noise layer of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.criteria import Criterion, Decision, PosteriorCriterion, check_criterion
from bmrs.graph.ties import producers, tied_noise_layers
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import layers_of_one_kind, settled_noise_layers
from bmrs.noise.parameters import warn_of_weight_decay
from bmrs.pruning.travel import travelled, way_to_go
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
    """

    name: str
    structures: int
    before: int
    after: int
    lowest_score: float
    highest_score: float
    best_kept: bool


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


@torch.no_grad()
def prune(
    model: nn.Module, criterion: Criterion, *, example_inputs: Tensor | Sequence[Tensor] | None = None
) -> PruneReport:
    """Prune the structures of a model's noise layers that a criterion asks for, in place and for good.

    A pruned structure stays pruned and is not judged again. Where a criterion asks for all kept
    structures of a layer, the best one by its scores is kept.

    In a network with residual additions a channel can only be removed if all branches that are added prune it.
    With ``example_inputs``, structures tied by additions are pruned together or not at all: by `BMRSNormal` and
    `BMRSUniform` where the sum of their ΔF is at least 0, because log evidences add, by `BMRSOdds` where the sum of
    their log odds is at most 0, and by the other criteria where each of them should be. Without, every layer decides by
    itself, and a channel that one branch alone prunes is masked, but stays in the compacted network.

    Args:
        model: a model with noise layers.
        criterion: one of the criteria of `bmrs`.
        example_inputs: an input of the model, as `bmrs.compact` takes it, to find the additions with.

    Returns:
        The change in every layer, with the scores of the structures that were kept before; for layers judged
        together these are the joint scores.

    Raises:
        TypeError: ``model`` is not a module, ``criterion`` is not a criterion, or ``example_inputs`` is nothing that
            `bmrs.compact` takes.
        ValueError: the model has no noise layer, a ``mu`` or ``log_sigma`` is not finite (layers and
            counts are named), the criterion does not suit a layer, or ``example_inputs`` is given and `bmrs.compact`
            does not take the model. Nothing is pruned then.
    """
    check_criterion(criterion)
    layers = settled_noise_layers(model)
    warn_of_weight_decay(layers)
    check_finite(layers)
    tied = [] if example_inputs is None else tied_noise_layers(model, example_inputs)
    judgement = judge(model, layers, criterion, tied)
    write_masks(layers, judgement.masks)
    return judgement.report


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


def judge(
    model: nn.Module, layers: dict[str, NoiseLayer], criterion: Criterion, tied: Sequence[Sequence[str]]
) -> Judgement:
    """Apply a criterion to the noise layers of a model, and change nothing.

    Args:
        model: the model.
        layers: its noise layers by name.
        criterion: the criterion.
        tied: names of noise layers that are judged together, in groups.
    """
    by_layer = _decide(model, layers, criterion)
    decisions = {name: by_layer[layer] for name, layer in layers.items()}
    kept_of = _on_cpu(layers, "mask")
    kept = {name: kept_of[layer] for name, layer in layers.items()}
    final = dict(decisions)
    for names in tied:
        joint = criterion.decide_tied(
            [decisions[name] for name in names], torch.stack([kept[name] for name in names])
        )
        final |= dict.fromkeys(names, joint)
    # All masks are computed before any is written, so that an error leaves the model as it was.
    results = {
        name: _judge(name, layer, kept[name], final[name], criterion) for name, layer in layers.items()
    }
    reports = tuple(report for _, report in results.values())
    report = PruneReport(
        repr(criterion),
        criterion.score_name,
        reports,
        tuple(map(tuple, tied)),
        _times_longer(layers, reports, criterion),
    )
    return Judgement(decisions, kept, {name: mask for name, (mask, _) in results.items()}, report)


def write_masks(layers: dict[str, NoiseLayer], masks: dict[str, Tensor]) -> None:
    """Prune what masks, by name of the noise layer, do not keep."""
    for group in layers_of_one_kind(layers.values()):
        names = {layer: name for name, layer in layers.items()}
        new_masks = torch.cat([masks[names[layer]] for layer in group.layers])
        for layer, mask in group.split(new_masks.to(group.layers[0].mask.device)):
            layer.set_kept(mask)


def _times_longer(
    layers: dict[str, NoiseLayer], reports: tuple[LayerReport, ...], criterion: Criterion
) -> float | None:
    nothing_went = all(report.before == report.after == report.structures for report in reports)
    if not nothing_went or not isinstance(criterion, PosteriorCriterion):
        return None
    fastest = max(layers.values(), key=travelled)
    if (so_far := travelled(fastest)) == 0:
        return math.inf
    way = way_to_go(fastest, criterion)
    return None if way is None or so_far >= way else way / so_far


def _on_cpu(layers: dict[str, NoiseLayer], name: str) -> dict[NoiseLayer, Tensor]:
    """Return the tensor of a name of each layer, on the CPU: one transfer for many, as each waits for the device."""
    found: dict[NoiseLayer, Tensor] = {}
    for group in layers_of_one_kind(layers.values()):
        found |= group.split(group.joined(name).cpu())
    return found


def check_finite(layers: dict[str, NoiseLayer]) -> None:
    """Raise ValueError if a posterior is NaN or infinite."""
    mu, log_sigma = _on_cpu(layers, "mu"), _on_cpu(layers, "log_sigma")
    broken = []
    for name, layer in layers.items():
        count = int((~(mu[layer].isfinite() & log_sigma[layer].isfinite())).sum())
        if count:
            broken.append(f"{name!r} ({count} of {layer.num_structures} structures)")
    if broken:
        raise ValueError(
            f"mu or log_sigma is NaN or infinite in noise layer {', '.join(broken)}; nothing was pruned"
        )


def _decide(
    model: nn.Module, layers: dict[str, NoiseLayer], criterion: Criterion
) -> dict[NoiseLayer, Decision]:
    """Return the criterion's decision on every layer, on the CPU."""
    if isinstance(criterion, PosteriorCriterion):
        return _decide_together(layers, criterion)
    producer_of = producers(model, type(criterion).__name__) if criterion.needs_producer else {}
    decisions = {}
    for name, layer in layers.items():
        with _naming([name]):
            scores, prune = criterion(layer, producer_of.get(layer))
        decisions[layer] = Decision(scores.cpu(), prune.cpu())
    return decisions


def _decide_together(
    layers: dict[str, NoiseLayer], criterion: PosteriorCriterion
) -> dict[NoiseLayer, Decision]:
    names = {layer: name for name, layer in layers.items()}
    decisions = {}
    for group in layers_of_one_kind(layers.values()):
        with _naming([names[layer] for layer in group.layers]):
            scores = group.computed(criterion.scores).cpu()
        for layer, layer_scores in group.split(scores):
            decisions[layer] = Decision(layer_scores, criterion.decide(layer_scores))
    return decisions


@contextmanager
def _naming(names: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{error} (noise layer {', '.join(map(repr, names))}); nothing was pruned"
        ) from error


def _judge(
    name: str, layer: NoiseLayer, kept: Tensor, decision: Decision, criterion: Criterion
) -> tuple[Tensor, LayerReport]:
    """Return the layer's new mask, on the CPU like the one before, and its report."""
    mask = kept & ~decision.prune
    emptied = bool(kept.any() and not mask.any())
    if emptied:
        candidates = kept.nonzero().flatten()
        mask[candidates[criterion.best_first(decision.scores[candidates])[0]]] = True
    scores = decision.scores[kept]
    report = LayerReport(
        name=name,
        structures=layer.num_structures,
        before=int(kept.sum()),
        after=int(mask.sum()),
        lowest_score=float(scores.min()) if len(scores) else math.nan,
        highest_score=float(scores.max()) if len(scores) else math.nan,
        best_kept=emptied,
    )
    return mask, report
