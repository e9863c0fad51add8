"""Truncated log-normal noise in pure torch: the definition that every other backend is tested against.

log θ = x = μ + σ z with z the quantile of a standard normal truncated to [α, β] at a uniform y. Probabilities come in
pairs, from below and from above, so that neither tail is a difference from one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bmrs_kernels.constants import SQRT2
from bmrs_kernels.dispatch.torch_first_calls import settle_first_calls
from bmrs_kernels.truncated_normal import torch_special
from bmrs_kernels.truncated_normal.regimes import REFERENCE_TAIL_START

# Below this tail probability erfinv's argument is too close to ±1, and z is taken from the smaller tail instead.
RARE = 0.02
TAIL_ITERATIONS = 3


class Posterior(NamedTuple):
    """Per-structure constants in float64."""

    mu: Tensor
    sigma: Tensor
    alpha: Tensor  # (lower - μ)/σ
    beta: Tensor  # (upper - μ)/σ
    below: Tensor  # Φ(α)
    above: Tensor  # 1 - Φ(β)
    mass: Tensor  # Φ(β) - Φ(α)
    log_sigma_in_range: Tensor


class LogNoise(NamedTuple):
    """x = log θ at given uniforms, and its derivatives at fixed uniforms, empty if not asked for."""

    value: Tensor
    grad_mu: Tensor
    grad_log_sigma: Tensor


def posterior(mu: Tensor, log_sigma: Tensor, lower: float, upper: float) -> Posterior:
    """Return the constants of each structure's posterior, in the shape of μ."""
    mu, log_sigma = mu.double(), log_sigma.double()
    sigma = torch_special.sigma_from_log(log_sigma)
    alpha, beta = (lower - mu) / sigma, (upper - mu) / sigma
    return Posterior(
        mu=mu,
        sigma=sigma,
        alpha=alpha,
        beta=beta,
        below=torch_special.normal_cdf(alpha),
        above=torch_special.normal_cdf(-beta),
        mass=torch_special.normal_mass(alpha, beta),
        log_sigma_in_range=torch_special.log_sigma_in_range(log_sigma),
    )


def log_noise(
    mu: Tensor, log_sigma: Tensor, uniform: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> LogNoise:
    """Return log θ at uniforms in the broadcast shape of the arguments, in float64."""
    settle_first_calls()
    q = posterior(mu.contiguous(), log_sigma.contiguous(), lower, upper)
    y = uniform.double().expand(torch.broadcast_shapes(mu.shape, uniform.shape)).contiguous()
    result = _central_noise(q, y, with_gradients=with_gradients)
    # Structures far outside are few or none, and cost a gather.
    outside = torch.maximum(q.alpha, -q.beta) > REFERENCE_TAIL_START
    if outside.any():
        chosen = outside.expand(y.shape)
        gathered = Posterior(*(constant.expand(y.shape)[chosen] for constant in q))
        tail = _tail_noise(gathered, y[chosen], lower, upper, with_gradients=with_gradients)
        for everywhere, there in zip(result, tail, strict=True):
            if everywhere.numel():
                everywhere[chosen] = there
    return result._replace(value=result.value.clamp_(lower, upper))


def _central_noise(q: Posterior, y: Tensor, *, with_gradients: bool) -> LogNoise:
    """Return log θ where the mode lies inside the interval or not far outside."""
    complement = 1.0 - y
    below = torch.addcmul(q.below, q.mass, y)
    above = torch.addcmul(q.above, q.mass, complement)
    z = torch.erfinv(below - above).mul_(SQRT2)
    rare = (torch.minimum(below, above) < RARE).view(-1).nonzero().squeeze(1)
    rare_below, rare_above = below.view(-1)[rare], above.view(-1)[rare]
    from_tail = torch.special.ndtri(torch.minimum(rare_below, rare_above))
    z.view(-1)[rare] = torch.where(rare_below > rare_above, -from_tail, from_tail)
    x = torch.addcmul(q.mu, q.sigma, z)
    if not with_gradients:
        return LogNoise(x, x.new_empty(0), x.new_empty(0))
    # φ(α)/φ(z) and φ(β)/φ(z); the squares in the exponent may be huge, their difference is taken as a product.
    near_lower = complement * torch.exp(0.5 * (z - q.alpha) * (z + q.alpha))
    near_upper = y * torch.exp(0.5 * (z - q.beta) * (z + q.beta))
    grad_mu = (1.0 - near_lower) - near_upper
    grad_log_sigma = z - q.alpha * near_lower - q.beta * near_upper
    return LogNoise(x, grad_mu, (q.sigma * q.log_sigma_in_range) * grad_log_sigma)


def _tail_noise(q: Posterior, y: Tensor, lower: float, upper: float, *, with_gradients: bool) -> LogNoise:
    """Return log θ where the mode lies far outside, in the distance v from the end nearest to it."""
    # Modes above the interval are reflected to below, which exchanges y and 1 - y.
    reflected = q.beta < 0
    y, complement = torch.where(reflected, 1.0 - y, y), torch.where(reflected, y, 1.0 - y)
    alpha = torch.where(reflected, -q.beta, q.alpha)
    width = q.beta - q.alpha
    v = tail_quantile(alpha, width, y, complement)
    signed_sigma = torch.where(reflected, -q.sigma, q.sigma)
    x = torch.where(reflected, v.new_full((), upper), v.new_full((), lower)) + signed_sigma * v
    if not with_gradients:
        return LogNoise(x, x.new_empty(0), x.new_empty(0))
    gap = v * (alpha + 0.5 * v)  # log φ(α)/φ(z)
    near = complement * torch.exp(gap)
    far = y * torch.exp(gap - width * (alpha + 0.5 * width))
    grad_mu = (1.0 - near) - far
    # z - α near - β far with z = α + v: α multiplies one small number.
    grad_log_sigma = alpha * grad_mu + v - width * far
    return LogNoise(x, grad_mu, (signed_sigma * q.log_sigma_in_range) * grad_log_sigma)


def tail_quantile(alpha: Tensor, width: Tensor, y: Tensor, complement: Tensor) -> Tensor:
    """Return v = z - α for a standard normal truncated to [α, α + width] at uniforms y = 1 - complement.

    Meant for α > REFERENCE_TAIL_START. Solves log S(α) - log S(α + v) = l for the survival function S of the normal,
    where l is the logarithm of S(α) over the survival at the quantile, by Halley steps; log S = log erfcx(z/√2) - z²/2
    + const.
    """
    scaled_survival = torch.special.erfcx(alpha / SQRT2)
    log_far = -width * (alpha + 0.5 * width)
    far_survival = torch.special.erfcx((alpha + width) / SQRT2) / scaled_survival * torch.exp(log_far)
    lost = y * (1.0 - far_survival)
    level = torch.where(lost < 0.5, -torch.log1p(-lost), -torch.log(complement + y * far_survival))

    # The hazard at α and its slope give the starting point.
    hazard = math.sqrt(2.0 / math.pi) / scaled_survival
    slope = hazard * (hazard - alpha)
    v = 2.0 * level / (hazard + torch.sqrt(hazard * hazard + 2.0 * slope * level))
    for _ in range(TAIL_ITERATIONS):
        survival = torch.special.erfcx((alpha + v) / SQRT2)
        residual = v * (alpha + 0.5 * v) + torch.log(scaled_survival / survival) - level
        hazard = math.sqrt(2.0 / math.pi) / survival
        newton = residual / hazard
        v = v - newton / (1.0 - 0.5 * newton * (hazard - (alpha + v)))
    return torch.minimum(v.clamp(min=0.0), width)


def sample_noise(
    mu: Tensor, log_sigma: Tensor, uniform: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return θ at given uniforms and its derivatives in μ and log σ, in the broadcast shape and μ's dtype."""
    log_theta = log_noise(mu, log_sigma, uniform, lower, upper, with_gradients=with_gradients)
    theta = log_theta.value.exp()
    if not with_gradients:
        return theta.to(mu.dtype), mu.new_empty(0), mu.new_empty(0)
    return (
        theta.to(mu.dtype),
        (theta * log_theta.grad_mu).to(mu.dtype),
        (theta * log_theta.grad_log_sigma).to(mu.dtype),
    )
