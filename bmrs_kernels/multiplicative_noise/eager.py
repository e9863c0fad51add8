"""Noise multiplied onto an activation by eager torch operations, in few passes over tiles that stay in cache.

float32 arithmetic wherever it meets the numerics contract; structures for which it does not, and float64
activations, take the reference's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bmrs_kernels import torch_math
from bmrs_kernels.multiplicative_noise import reference
from bmrs_kernels.multiplicative_noise.reference import LogNoise

# Elements a tile: a handful of float32 arrays of this size fit into a core's cache.
TILE = 1 << 16

# Where float32 is enough: z has a relative error of 3e-7 and is multiplied by σ; the mode may be 3 σ outside.
MAX_SIGMA = 4.0
MAX_OUTSIDE = 3.0

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


class Single(NamedTuple):
    """Per-structure constants in float32, shaped to broadcast with x; the last five are for gradients."""

    mu: Tensor
    sigma: Tensor
    below: Tensor  # Φ(α)
    above: Tensor  # 1 - Φ(β)
    mass: Tensor  # Φ(β) - Φ(α)
    lower_density: Tensor  # φ(α)
    upper_density: Tensor  # φ(β)
    lower_offset: Tensor  # σ α = lower - μ
    upper_offset: Tensor  # σ β = upper - μ
    log_sigma_in_range: Tensor


class Noise:
    """The noise of one call: constants computed once, log θ evaluated tile by tile."""

    def __init__(
        self, mu: Tensor, log_sigma: Tensor, x: Tensor, dim: int, lower: float, upper: float
    ) -> None:
        self.dim, self.lower, self.upper = dim, lower, upper
        self.mu, self.log_sigma = along(mu, x, dim), along(log_sigma, x, dim)
        self.exact = x.dtype == torch.float64
        wide_mu, wide_log_sigma = self.mu.double(), self.log_sigma.double()
        sigma = torch_math.sigma_from_log(wide_log_sigma)
        # Both ends together: half the operations, and small layers are bound by their number.
        offsets = torch.stack([lower - wide_mu, upper - wide_mu])
        standardised = offsets / sigma
        alpha, beta = standardised
        below, above = torch_math.normal_cdf(torch.stack([alpha, -beta]))
        self.single = Single(
            *torch.stack(
                [
                    wide_mu,
                    sigma,
                    below,
                    above,
                    1.0 - below - above,  # enough where the mode is inside or not far outside
                    *torch_math.normal_density(standardised),
                    *offsets,
                    torch_math.log_sigma_in_range(wide_log_sigma),
                ]
            ).float()
        )
        hard = (sigma > MAX_SIGMA) | (torch.maximum(alpha, -beta) > MAX_OUTSIDE)
        self.hard = hard.view(-1).nonzero().squeeze(1)

    def log(self, uniform: Tensor, *, with_gradients: bool) -> LogNoise:
        """Return log θ at the uniforms of a tile, float32, or float64 for float64 activations."""
        if self.exact or self.hard.numel() == self.mu.numel():
            return self._reference(self.mu, self.log_sigma, uniform, with_gradients=with_gradients)
        result = self._single(uniform, with_gradients=with_gradients)
        if self.hard.numel():
            mu, log_sigma, chosen = (
                part.index_select(self.dim, self.hard) for part in (self.mu, self.log_sigma, uniform)
            )
            exact = self._reference(mu, log_sigma, chosen, with_gradients=with_gradients)
            for everywhere, there in zip(result, exact, strict=True):
                if everywhere.numel():
                    everywhere.index_copy_(self.dim, self.hard, there)
        return result

    def _reference(self, mu: Tensor, log_sigma: Tensor, uniform: Tensor, *, with_gradients: bool) -> LogNoise:
        exact = reference.log_noise(
            mu, log_sigma, uniform, self.lower, self.upper, with_gradients=with_gradients
        )
        return exact if self.exact else LogNoise(*(part.float() for part in exact))

    def _single(self, uniform: Tensor, *, with_gradients: bool) -> LogNoise:
        q = self.single
        complement = 1.0 - uniform
        below = torch.addcmul(q.below, q.mass, uniform)
        above = torch.addcmul(q.above, q.mass, complement)
        z, inverse_density = torch_math.normal_quantile(below, above, with_density=with_gradients)
        x = torch.addcmul(q.mu, q.sigma, z).clamp_(self.lower, self.upper)
        if not with_gradients:
            return LogNoise(x, x.new_empty(0), x.new_empty(0))
        near_lower = complement.mul_(inverse_density).mul_(q.lower_density)
        near_upper = inverse_density.mul_(uniform).mul_(q.upper_density)
        grad_log_sigma = z.mul_(q.sigma)
        grad_log_sigma.addcmul_(q.lower_offset, near_lower, value=-1.0)
        grad_log_sigma.addcmul_(q.upper_offset, near_upper, value=-1.0)
        grad_mu = near_lower.neg_().sub_(near_upper).add_(1.0)
        return LogNoise(x, grad_mu, grad_log_sigma.mul_(q.log_sigma_in_range))


def tiles(x: Tensor, dim: int) -> Iterator[slice]:
    """Yield slices of axis 0 that cover x in tiles; one slice if the structures lie along axis 0."""
    examples = x.shape[0]
    step = max(1, TILE * examples // max(1, x.numel())) if dim else examples
    for start in range(0, examples, max(1, step)):
        yield slice(start, start + max(1, step))


def draw_shape(x: Tensor, dim: int, granularity: str) -> tuple[int, ...]:
    """Return the shape of the uniforms, which broadcasts with x; ``dim`` is non-negative."""
    if granularity == "element":
        return tuple(x.shape)
    kept = {dim} if granularity == "batch" else {0, dim}
    return tuple(size if axis in kept else 1 for axis, size in enumerate(x.shape))


def along(per_structure: Tensor, x: Tensor, dim: int) -> Tensor:
    """View a vector along one axis of x."""
    return per_structure.view([x.shape[dim] if axis == dim else 1 for axis in range(x.dim())])


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
    noise = Noise(mu, log_sigma, x, dim, lower, upper)
    factor = None if mask is None else along(mask, x, dim)
    out = torch.empty_like(x)
    shared = _theta(noise, uniform, factor) if uniform.shape[0] != x.shape[0] else None
    for rows in tiles(x, dim):
        theta = _theta(noise, uniform[rows], factor) if shared is None else shared
        wide = x[rows].to(theta.dtype)
        activated = wide if activation is None else ACTIVATIONS[activation](wide)
        out[rows] = activated * theta
    return out


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
    """Return the gradients of ``multiply_noise`` in x, μ and log σ; tiles are summed in order, in float64."""
    noise = Noise(mu, log_sigma, x, dim, lower, upper)
    factor = None if mask is None else along(mask, x, dim)
    grad_x = torch.empty_like(x)
    grad_mu, grad_log_sigma = (torch.zeros(mu.shape, dtype=torch.float64, device=mu.device) for _ in range(2))
    # What the uniforms share is summed before the noise is multiplied on.
    repeated = [axis for axis in range(1, x.dim()) if uniform.shape[axis] != x.shape[axis]]
    others = [axis for axis in range(x.dim()) if axis != dim]
    for rows in tiles(x, dim):
        log_theta = noise.log(
            uniform[rows] if uniform.shape[0] == x.shape[0] else uniform, with_gradients=True
        )
        theta = log_theta.value.exp()
        if factor is not None:
            theta = theta * factor
        wide_grad, wide_x = grad[rows].to(theta.dtype), x[rows].to(theta.dtype)
        weight = wide_grad * wide_x
        if activation == "relu":
            positive = wide_x > 0
            weight, wide_grad = weight * positive, wide_grad * positive
        elif activation == "tanh":
            tanh = torch.tanh(wide_x)
            weight, wide_grad = wide_grad * tanh, wide_grad * (1.0 - tanh * tanh)
        grad_x[rows] = wide_grad * theta
        if repeated:
            weight = weight.sum(repeated, keepdim=True)
        weight = weight * theta
        for total, part in ((grad_mu, log_theta.grad_mu), (grad_log_sigma, log_theta.grad_log_sigma)):
            product = weight * part
            total += (product.sum(others, dtype=torch.float64) if others else product).view(-1)
    return grad_x, grad_mu.to(mu.dtype), grad_log_sigma.to(log_sigma.dtype)


def _theta(noise: Noise, uniform: Tensor, factor: Tensor | None) -> Tensor:
    theta = noise.log(uniform, with_gradients=False).value.exp_()
    return theta if factor is None else theta * factor
