"""The paper's formulas evaluated as they are printed, as a first implementation would: what all is compared with.

They are right where the posterior's mass lies well inside the interval; elsewhere they lose digits or give NaN. Each
takes μ and log σ of one shape, computes in their dtype, and leaves derivatives to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LN2 = math.log(2.0)
SQRT2 = math.sqrt(2.0)


def normal_cdf(z: Tensor) -> Tensor:
    """Return Φ(z)."""
    return 0.5 * (1.0 + torch.erf(z / SQRT2))


def normal_density(z: Tensor) -> Tensor:
    """Return φ(z)."""
    return torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def scale(log_sigma: Tensor) -> Tensor:
    """Return σ."""
    return log_sigma.clamp(-20.0, 5.0).exp()


def kl_divergence(mu: Tensor, log_sigma: Tensor, lower: float = -20.0, upper: float = 0.0) -> Tensor:
    """Return KL(q‖p) in nats."""
    sigma = scale(log_sigma)
    alpha, beta = (lower - mu) / sigma, (upper - mu) / sigma
    mass = normal_cdf(beta) - normal_cdf(alpha)
    ends = (alpha * normal_density(alpha) - beta * normal_density(beta)) / (2.0 * mass)
    constant = math.log(upper - lower) - 0.5 * math.log(2.0 * math.pi * math.e)
    return constant - torch.log(sigma) - torch.log(mass) - ends


def noise_moment(
    mu: Tensor, log_sigma: Tensor, power: int, lower: float = -20.0, upper: float = 0.0
) -> Tensor:
    """Return E[θᵖ] for a power p."""
    sigma = scale(log_sigma)
    alpha, beta = (lower - mu) / sigma, (upper - mu) / sigma
    shift = power * sigma
    tilted = normal_cdf(beta - shift) - normal_cdf(alpha - shift)
    mass = normal_cdf(beta) - normal_cdf(alpha)
    return torch.exp(power * mu + 0.5 * shift * shift) * tilted / mass


def noise_mean(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Return E[θ]."""
    return noise_moment(mu, log_sigma, 1)


def noise_snr(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Return E[θ]/sd(θ)."""
    mean = noise_moment(mu, log_sigma, 1)
    return mean / torch.sqrt(noise_moment(mu, log_sigma, 2) - mean * mean)


def delta_f_lognormal(
    mu: Tensor, log_sigma: Tensor, prior_std: float = 1e-6, lower: float = -20.0, upper: float = 0.0
) -> Tensor:
    """Return ΔF of Eq. 8 in nats, with its 2π, for a reduced prior at the lower end."""
    variance, prior_variance = scale(log_sigma) ** 2, prior_std**2
    prior_mean = lower
    product_variance = 1.0 / (1.0 / variance + 1.0 / prior_variance)
    product_mean = product_variance * (mu / variance + prior_mean / prior_variance)

    def mass(mean: Tensor, spread: Tensor) -> Tensor:
        return normal_cdf((upper - mean) / spread) - normal_cdf((lower - mean) / spread)

    prior_mass = mass(torch.full_like(mu, prior_mean), torch.full_like(mu, prior_std))
    masses = mass(product_mean, product_variance.sqrt()) / (mass(mu, variance.sqrt()) * prior_mass)
    variances = product_variance / (2.0 * math.pi * variance * prior_variance)
    squares = mu**2 / variance + prior_mean**2 / prior_variance - product_mean**2 / product_variance
    return math.log(upper - lower) + torch.log(masses) + 0.5 * torch.log(variances) - 0.5 * squares


def delta_f_loguniform(
    mu: Tensor,
    log_sigma: Tensor,
    reduced_lower: float = -23.0 * LN2,
    reduced_upper: float = -8.0 * LN2,
    lower: float = -20.0,
    upper: float = 0.0,
) -> Tensor:
    """Return ΔF in nats for a reduced prior that is log-uniform on a smaller interval."""
    sigma = scale(log_sigma)
    reduced = normal_cdf((reduced_upper - mu) / sigma) - normal_cdf((reduced_lower - mu) / sigma)
    mass = normal_cdf((upper - mu) / sigma) - normal_cdf((lower - mu) / sigma)
    return math.log((upper - lower) / (reduced_upper - reduced_lower)) + torch.log(reduced) - torch.log(mass)


def sample_noise(
    mu: Tensor, log_sigma: Tensor, uniform: Tensor, lower: float = -20.0, upper: float = 0.0
) -> Tensor:
    """Return θ at uniforms in (0, 1) by inverting the distribution function."""
    sigma = scale(log_sigma)
    low, high = normal_cdf((lower - mu) / sigma), normal_cdf((upper - mu) / sigma)
    probability = low + uniform * (high - low)
    log_theta = mu + sigma * SQRT2 * torch.erfinv(2.0 * probability - 1.0)
    return log_theta.clamp(lower, upper).exp()


def multiply_noise(
    x: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    *,
    dim: int = 1,
    granularity: str = "element",
    uniform: Tensor | None = None,
    lower: float = -20.0,
    upper: float = 0.0,
) -> Tensor:
    """Return x · θ with θ drawn at uniforms, by default fresh ones, in a shape that broadcasts with x."""
    if uniform is None:
        uniform = torch.rand(draw_shape(x.shape, dim, granularity), device=x.device)
    return x * sample_noise(along(mu, x, dim), along(log_sigma, x, dim), uniform, lower, upper)


def along(per_structure: Tensor, x: Tensor, dim: int) -> Tensor:
    """View a vector of values for each structure along the structures of x."""
    return per_structure.reshape([-1 if axis == dim else 1 for axis in range(x.dim())])


def draw_shape(shape: Sequence[int], dim: int, granularity: str) -> tuple[int, ...]:
    """Return the shape of the draws for x of a shape; its structures are along ``dim``, which is not negative."""
    own = {"element": range(len(shape)), "sample": (0, dim), "batch": (dim,)}[granularity]
    return tuple(size if axis in own else 1 for axis, size in enumerate(shape))
