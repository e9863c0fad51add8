"""Truncated log-normal noise in pure torch: the definition that every other backend is tested against.

log θ = x = μ + σ z with z the quantile of a standard normal truncated to [α, β]. Everything is written for means
in the lower half of the interval; those in the upper half are reflected, which exchanges y and 1 - y.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bmrs_kernels import torch_math
from bmrs_kernels.torch_math import SQRT2

# Beyond this many σ outside, the quantile is solved for in the distance from the end: z itself would lose digits.
TAIL = 5.0
TAIL_ITERATIONS = 3


class Posterior(NamedTuple):
    """Per-structure constants of the quantile, in float64 and, where reflected, in the reflected frame."""

    mu: Tensor
    sigma: Tensor
    reflected: Tensor  # bool
    direction: Tensor  # -1 where reflected, else 1
    near_end: Tensor  # the end of the interval that is nearer to μ
    alpha: Tensor  # z at the near end
    beta: Tensor  # z at the far end
    lower_tail: Tensor  # Φ(α)
    upper_tail: Tensor  # 1 - Φ(β)
    mass: Tensor  # Φ(β) - Φ(α)
    log_sigma_in_range: Tensor
    lower: float
    upper: float


class LogNoise(NamedTuple):
    """x = log θ at given uniforms, and its derivatives at fixed uniforms."""

    value: Tensor
    grad_mu: Tensor
    grad_log_sigma: Tensor


def posterior(mu: Tensor, log_sigma: Tensor, lower: float, upper: float) -> Posterior:
    """Return the constants of each structure's posterior, in the shape of μ."""
    mu, log_sigma = mu.double(), log_sigma.double()
    sigma = torch_math.sigma_from_log(log_sigma)
    below, above = mu - lower, upper - mu
    reflected = below > above
    alpha = -torch.where(reflected, above, below) / sigma
    beta = torch.where(reflected, below, above) / sigma
    return Posterior(
        mu=mu,
        sigma=sigma,
        reflected=reflected,
        direction=torch.where(reflected, -1.0, 1.0).double(),
        near_end=torch.where(reflected, upper, lower).double(),
        alpha=alpha,
        beta=beta,
        lower_tail=torch_math.normal_cdf(alpha),
        upper_tail=torch_math.normal_cdf(-beta),
        mass=torch.where(
            alpha > 0,
            torch_math.normal_cdf(-alpha) - torch_math.normal_cdf(-beta),
            0.5 * (torch.erf(beta / SQRT2) - torch.erf(alpha / SQRT2)),
        ),
        log_sigma_in_range=torch_math.log_sigma_in_range(log_sigma),
        lower=lower,
        upper=upper,
    )


def log_noise(q: Posterior, uniform: Tensor, *, with_gradients: bool) -> LogNoise:
    """Return log θ at uniforms that broadcast with the constants; empty gradients unless asked for."""
    y = uniform.double()
    y, complement = torch.where(q.reflected, 1.0 - y, y), torch.where(q.reflected, y, 1.0 - y)

    # Both tail probabilities are sums of positive terms, and the smaller one gives the quantile.
    below = q.lower_tail + y * q.mass
    above = q.upper_tail + complement * q.mass
    z = torch.special.ndtri(torch.minimum(below, above))
    z = torch.where(below > above, -z, z)
    x = q.mu + (q.direction * q.sigma) * z
    # log φ(α)/φ(z) as a product, since both squares may be huge.
    gap = 0.5 * (z - q.alpha) * (z + q.alpha)

    tail = (q.alpha > TAIL).expand(y.shape)
    if in_tail := bool(tail.any()):
        alpha, beta, scale, near_end = (
            constant.expand(y.shape)[tail]
            for constant in (q.alpha, q.beta, q.direction * q.sigma, q.near_end)
        )
        from_end = tail_quantile(alpha, beta, y[tail], complement[tail])
        x[tail] = near_end + scale * from_end
        gap[tail] = from_end * (alpha + 0.5 * from_end)
    x = x.clamp(q.lower, q.upper)
    if not with_gradients:
        return LogNoise(x, x.new_empty(0), x.new_empty(0))

    near = complement * torch.exp(gap)
    far = y * torch.exp(gap - 0.5 * (q.beta - q.alpha) * (q.beta + q.alpha))
    grad_mu = (1.0 - near - far).clamp(0.0, 1.0)
    grad_log_sigma = z - q.alpha * near - q.beta * far
    if in_tail:
        # The same with z = α + v, so that α multiplies one small number instead of two that cancel.
        grad_log_sigma[tail] = alpha * grad_mu[tail] + from_end - (beta - alpha) * far[tail]
    return LogNoise(x, grad_mu, (q.direction * q.sigma * q.log_sigma_in_range) * grad_log_sigma)


def tail_quantile(alpha: Tensor, beta: Tensor, y: Tensor, complement: Tensor) -> Tensor:
    """Return v = z - α for a standard normal truncated to [α, β], α > TAIL, at uniforms y = 1 - complement.

    Solves log S(α) - log S(α + v) = l for the survival function S of the normal, where l is the logarithm of
    S(α) over the survival at the quantile, by Halley steps; log S = log erfcx(z/√2) - z²/2 + const.
    """
    width = beta - alpha
    scaled_survival = torch.special.erfcx(alpha / SQRT2)
    log_far = -width * (alpha + 0.5 * width)
    far_survival = torch.special.erfcx(beta / SQRT2) / scaled_survival * torch.exp(log_far)
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
    shape = torch.broadcast_shapes(mu.shape, uniform.shape)
    log_theta = log_noise(
        posterior(mu, log_sigma, lower, upper), uniform.expand(shape), with_gradients=with_gradients
    )
    theta = log_theta.value.exp()
    if not with_gradients:
        return theta.to(mu.dtype), mu.new_empty(0), mu.new_empty(0)
    return (
        theta.to(mu.dtype),
        (theta * log_theta.grad_mu).to(mu.dtype),
        (theta * log_theta.grad_log_sigma).to(mu.dtype),
    )


ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Return the activation of x."""
    return x if activation is None else ACTIVATIONS[activation](x)


def activation_gradient(x: Tensor, activation: str | None) -> Tensor | float:
    """Return the derivative of the activation at x."""
    if activation is None:
        return 1.0
    if activation == "relu":
        return (x > 0).to(x.dtype)
    return 1.0 - torch.tanh(x) ** 2


def draw_shape(x: Tensor, dim: int, granularity: str) -> tuple[int, ...]:
    """Return the shape of the uniforms, which broadcasts with x; ``dim`` is non-negative."""
    if granularity == "element":
        return tuple(x.shape)
    kept = {dim} if granularity == "batch" else {0, dim}
    return tuple(size if axis in kept else 1 for axis, size in enumerate(x.shape))


def multiply_noise(
    x: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    mask: Tensor | None,
    uniform: Tensor,
    dim: int,
    activation: str | None,
    lower: float,
    upper: float,
) -> Tensor:
    """Return activation(x) · θ · mask for θ at uniforms whose shape broadcasts with x."""
    q = posterior(_along(mu, x, dim), _along(log_sigma, x, dim), lower, upper)
    theta = log_noise(q, uniform, with_gradients=False).value.exp()
    if mask is not None:
        theta = theta * _along(mask, x, dim)
    wide = _arithmetic_dtype(x)
    return (activate(x.to(wide), activation) * theta.to(wide)).to(x.dtype)


def multiply_noise_backward(
    grad: Tensor,
    x: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    mask: Tensor | None,
    uniform: Tensor,
    dim: int,
    activation: str | None,
    lower: float,
    upper: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``multiply_noise`` in x, μ and log σ."""
    q = posterior(_along(mu, x, dim), _along(log_sigma, x, dim), lower, upper)
    log_theta = log_noise(q, uniform, with_gradients=True)
    theta = log_theta.value.exp()
    if mask is not None:
        theta = theta * _along(mask, x, dim)
    wide = _arithmetic_dtype(x)
    grad, wide_x = grad.to(wide), x.to(wide)
    grad_x = (grad * theta.to(wide) * activation_gradient(wide_x, activation)).to(x.dtype)

    # What the uniforms share is summed before the noise is multiplied on.
    shared = [axis for axis in range(x.dim()) if uniform.shape[axis] != x.shape[axis]]
    weight = grad * activate(wide_x, activation)
    if shared:
        weight = weight.sum(shared, keepdim=True, dtype=torch.float64)
    weight = weight * theta
    others = [axis for axis in range(x.dim()) if axis != dim]
    grad_mu, grad_log_sigma = (
        (weight * part).sum(others).to(mu.dtype) if others else (weight * part).to(mu.dtype)
        for part in (log_theta.grad_mu, log_theta.grad_log_sigma)
    )
    return grad_x, grad_mu, grad_log_sigma


def _along(per_structure: Tensor, x: Tensor, dim: int) -> Tensor:
    """View a vector along one axis of x."""
    return per_structure.reshape([-1 if axis == dim else 1 for axis in range(x.dim())])


def _arithmetic_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
