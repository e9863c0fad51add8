"""What each criterion says about the structures of a trained network: a worth for each, and the least goes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bmrs
from bmrs.criteria import PAPER_TOLERANCE, PosteriorCriterion
from bmrs.data import Split
from bmrs.graph.ties import producers
from bmrs.noise.lookup import noise_layers

RULES: dict[str, PosteriorCriterion] = {
    "bmrs-n": bmrs.BMRSNormal(),
    "bmrs-n-authors": bmrs.BMRSNormal(tolerance=PAPER_TOLERANCE),
    "bmrs-u-8": bmrs.BMRSUniform(p1=8),
    "bmrs-u-4": bmrs.BMRSUniform(p1=4),
    "snr": bmrs.SNR(),
    "mean": bmrs.Mean(),
    "odds": bmrs.BMRSOdds(),
}
"""Criteria that stop by themselves."""

RANKINGS = ("l2", "gradient", "random")
"""What only ranks; it is given the number of structures at which `GIVEN_BY` stops."""

GIVEN_BY = "bmrs-n-authors"

Worths = Sequence[Tensor]
"""Of each noise layer in module order, shape (structures,)."""


def posterior_worth(rule: str, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float) -> Tensor:
    """Return how much structures are worth to a rule, in its own unit, from their posteriors."""
    criterion = RULES[rule]
    scores = criterion.scores(mu, log_sigma, lower=lower, upper=upper, backend="auto")
    return -scores if criterion.prunes_high_scores else scores


@torch.no_grad()
def worths(model: nn.Module, split: Split, *, seed: int) -> dict[str, Worths]:
    """Return the worth of every structure to every criterion.

    Args:
        model: a network with noise and nothing pruned.
        split: training images, whose loss has the gradient.
        seed: of the random order.
    """
    layers = list(noise_layers(model).values())
    found: dict[str, Worths] = {}
    for rule in RULES:
        found[rule] = [
            posterior_worth(rule, layer.mu, layer.log_sigma, lower=layer.lower, upper=layer.upper)
            for layer in layers
        ]
    producer_of = producers(model, "the ranking by L2 norms")
    found["l2"] = [bmrs.L2(ratio=0.0)(layer, producer_of[layer]).scores for layer in layers]
    _set_gradient(model, split)
    found["gradient"] = [bmrs.GradientNorm(ratio=0.0)(layer, producer_of[layer]).scores for layer in layers]
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    found["random"] = [torch.rand(layer.num_structures, generator=generator) for layer in layers]
    return found


def _set_gradient(model: nn.Module, split: Split) -> None:
    """Leave the gradient of the mean loss over all images, with E[θ] in place of noise."""
    model.eval().zero_grad()
    with torch.enable_grad():
        for images, labels in split.in_order(500):
            loss = F.cross_entropy(model(images), labels, reduction="sum") / len(split)
            loss.backward()


def kept_after(worths: Worths, count: int) -> list[Tensor]:
    """Return what is kept, bool of each layer, after so many structures of least worth went; no layer is emptied.

    Args:
        worths: of the structures.
        count: how many go; at most all but one of each layer.
    """
    flat = torch.cat(list(worths))
    starts = torch.tensor([0, *(len(layer) for layer in worths)]).cumsum(0)
    best = [int(start + layer.argmax()) for start, layer in zip(starts, worths, strict=False)]
    order = [index for index in flat.argsort(stable=True).tolist() if index not in set(best)]
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[order[:count]] = False
    return list(kept.split([len(layer) for layer in worths]))


def most_prunable(worths: Worths) -> int:
    """Return how many structures `kept_after` can take."""
    return sum(len(layer) - 1 for layer in worths)


def set_kept(model: nn.Module, kept: Sequence[Tensor] | None = None) -> None:
    """Keep these structures of each noise layer and prune the others; keep all if None."""
    for number, layer in enumerate(noise_layers(model).values()):
        layer.set_kept(torch.ones_like(layer.mask) if kept is None else kept[number])


def kept_by(model: nn.Module, rule: str) -> list[Tensor]:
    """Return what a rule keeps of a network of which nothing is pruned; the network is left as it is."""
    bmrs.prune(model, RULES[rule])
    kept = [layer.kept.clone() for layer in noise_layers(model).values()]
    set_kept(model)
    return kept


def spearman(first: Tensor, second: Tensor) -> float:
    """Return the rank correlation of two vectors; ties have their mean rank."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[place]


def joined(values: Mapping[str, Worths]) -> dict[str, Tensor]:
    """Return the worths of all layers behind each other."""
    return {name: torch.cat(list(layers)) for name, layers in values.items()}
