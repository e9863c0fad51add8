"""Whether posteriors have had the time to get anywhere."""

from __future__ import annotations

import torch

import bmrs_kernels
from bmrs.criteria import PosteriorCriterion
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.wrappers import whole

_LEARNING_RATE = 0.2
_MOST_STEPS = 200


def travelled(layer: NoiseLayer) -> float:
    """Return how far the posterior that has moved most is from where the layer's posteriors start, in μ or log σ."""
    with torch.no_grad():
        moved_mu = (whole(layer.mu) - layer.initial_mu).abs().max()
        moved_log_sigma = (whole(layer.log_sigma) - layer.initial_log_sigma).abs().max()
    return float(torch.maximum(moved_mu, moved_log_sigma))


@torch.enable_grad()
def way_to_go(layer: NoiseLayer, criterion: PosteriorCriterion) -> float | None:
    """Return how far a posterior that the data say nothing about moves before a criterion prunes it; None if never.

    The KL term alone drives it, and Adam moves μ and log σ by about the learning rate at each step.
    """
    start = torch.tensor([[layer.initial_mu], [layer.initial_log_sigma]], dtype=torch.float64)
    mu, log_sigma = (row.clone().requires_grad_() for row in start)
    optimizer = torch.optim.Adam([mu, log_sigma], lr=_LEARNING_RATE)
    bounds = {"lower": layer.lower, "upper": layer.upper}
    for _ in range(_MOST_STEPS):
        scores = criterion.scores(mu.detach(), log_sigma.detach(), **bounds, backend="torch")
        if bool(criterion.decide(scores)):
            return float((torch.stack([mu.detach(), log_sigma.detach()]) - start).abs().max())
        optimizer.zero_grad()
        bmrs_kernels.kl_divergence(mu, log_sigma, **bounds, backend="torch").backward()
        optimizer.step()
    return None
