"""The paper's formulas evaluated as they are printed, the way a first implementation would: the comparison.

Good where the posterior's mass lies well inside the interval; elsewhere they lose their digits or turn NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SQRT2 = math.sqrt(2.0)


def normal_cdf(z: Tensor) -> Tensor:
    """Return Φ(z)."""
    return 0.5 * (1.0 + torch.erf(z / SQRT2))


def normal_density(z: Tensor) -> Tensor:
    """Return φ(z)."""
    return torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def kl_divergence(mu: Tensor, log_sigma: Tensor, lower: float = -20.0, upper: float = 0.0) -> Tensor:
    """Return KL(q‖p) in nats."""
    sigma = log_sigma.exp()
    alpha, beta = (lower - mu) / sigma, (upper - mu) / sigma
    mass = normal_cdf(beta) - normal_cdf(alpha)
    ends = (alpha * normal_density(alpha) - beta * normal_density(beta)) / (2.0 * mass)
    return (
        math.log(upper - lower) - log_sigma - torch.log(mass) - 0.5 * math.log(2.0 * math.pi * math.e) - ends
    )


def multiply_noise(
    x: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    *,
    dim: int = 1,
    granularity: str = "element",
    lower: float = -20.0,
    upper: float = 0.0,
) -> Tensor:
    """Return x · θ with θ drawn by inverting the distribution function, all of it left to autograd."""
    along = [-1 if axis == dim else 1 for axis in range(x.dim())]
    mu, sigma = mu.reshape(along), log_sigma.reshape(along).exp()
    kept = {"element": range(x.dim()), "sample": (0, dim), "batch": (dim,)}[granularity]
    uniform = torch.rand([size if axis in kept else 1 for axis, size in enumerate(x.shape)], device=x.device)
    low, high = normal_cdf((lower - mu) / sigma), normal_cdf((upper - mu) / sigma)
    probability = low + uniform * (high - low)
    log_theta = mu + sigma * SQRT2 * torch.erfinv(2.0 * probability - 1.0)
    return x * log_theta.clamp(lower, upper).exp()
