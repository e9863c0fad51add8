"""Pruning: a criterion applied to every noise layer of a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.checks import check_choice
from bmrs.criteria import Criterion, Decision, PosteriorCriterion, check_criterion
from bmrs.graph.layer_norms import check_approximate
from bmrs.graph.masked_graph import graph_for_pruning
from bmrs.graph.ties import producers
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import layers_of_one_kind, settled_noise_layers
from bmrs.noise.parameters import warn_of_weight_decay
from bmrs.pruning.emptying import emptied
from bmrs.pruning.report import Judgement, LayerReport, PruneReport
from bmrs.pruning.travel import travelled, way_to_go


@torch.no_grad()
def prune(
    model: nn.Module,
    criterion: Criterion,
    *,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    empty_layers: bool = False,
    approximate: Collection[str] = (),
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
        empty_layers: True lets a layer lose its best structure too where the criterion asks for it and every output
            still depends on the input, as in a residual branch; of the branch `bmrs.compact` then leaves a constant.
        approximate: what `bmrs.compact` will be asked to approximate: layers whose channels leave only so are pruned
            together too, as those of a residual stream that a LayerNorm counts.

    Returns:
        The change in every layer, with the scores of the structures that were kept before; for layers judged
        together these are the joint scores.

    Raises:
        TypeError: ``model`` is not a module, ``criterion`` is not a criterion, or ``example_inputs`` is nothing that
            `bmrs.compact` takes.
        ValueError: the model has no noise layer, a ``mu`` or ``log_sigma`` is not finite (layers and
            counts are named), the criterion does not suit a layer, ``example_inputs`` is given and `bmrs.compact`
            does not take the model, or ``empty_layers`` is True without it. Nothing is pruned then.
    """
    check_criterion(criterion)
    check_choice("empty_layers", empty_layers, (False, True))
    if empty_layers and example_inputs is None:
        raise ValueError("empty_layers=True needs example_inputs, to find the shortcuts with")
    allowed = check_approximate(approximate)
    if allowed and example_inputs is None:
        raise ValueError("approximate needs example_inputs, to find what leaves together with")
    layers = settled_noise_layers(model)
    warn_of_weight_decay(layers)
    check_finite(layers)
    graph = None if example_inputs is None else graph_for_pruning(model, example_inputs, approximate=allowed)
    tied = [] if graph is None else graph.tied
    judgement = judge(model, layers, criterion, tied, example_inputs=example_inputs)
    may_empty = empty_layers and not isinstance(model, NoiseLayer)  # which alone has no shortcut
    if graph is not None and may_empty and any(layer.best_kept for layer in judgement.report.layers):
        with torch.inference_mode(False), torch.no_grad():
            judgement = emptied(judgement, criterion, graph)
    write_masks(layers, judgement.masks)
    return judgement.report


def judge(
    model: nn.Module,
    layers: dict[str, NoiseLayer],
    criterion: Criterion,
    tied: Sequence[Sequence[str]],
    *,
    example_inputs: Any,
) -> Judgement:
    """Apply a criterion to the noise layers of a model, and change nothing.

    Args:
        model: the model.
        layers: its noise layers by name.
        criterion: the criterion.
        tied: names of noise layers that are judged together, in groups.
        example_inputs: as for `prune`.
    """
    by_layer = _decide(model, layers, criterion, example_inputs)
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
    model: nn.Module, layers: dict[str, NoiseLayer], criterion: Criterion, example_inputs: Any
) -> dict[NoiseLayer, Decision]:
    """Return the criterion's decision on every layer, on the CPU."""
    if isinstance(criterion, PosteriorCriterion):
        return _decide_together(layers, criterion)
    purpose = type(criterion).__name__
    producer_of = producers(model, purpose, example_inputs) if criterion.needs_producer else {}
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
    asked_for_all = bool(kept.any() and not mask.any())
    if asked_for_all:
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
        best_kept=asked_for_all,
    )
    return mask, report
