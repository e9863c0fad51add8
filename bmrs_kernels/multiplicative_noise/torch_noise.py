"""Noise multiplied onto an activation by eager torch operations, in few passes over tiles that stay in cache.

float32 arithmetic wherever it meets the numerics contract; structures for which it does not, and float64
activations, take the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bmrs_kernels.dispatch.torch_first_calls import settle_first_calls
from bmrs_kernels.multiplicative_noise import reference
from bmrs_kernels.multiplicative_noise.call import NoiseCall
from bmrs_kernels.multiplicative_noise.reference import LogNoise
from bmrs_kernels.truncated_normal import torch_special
from bmrs_kernels.truncated_normal.regimes import TAIL_START, WIDE_SIGMA
from bmrs_kernels.uniform import torch_philox

# Elements a tile: on a CPU several tiles of memory stay in the last cache, elsewhere launches are few.
TILE, LARGE_TILE = 1 << 17, 1 << 24
NUM_BUFFERS = 6

ACTIVATIONS = {"relu": torch.relu_, "tanh": torch.tanh_}  # in place


sample_noise = reference.sample_noise


class Single(NamedTuple):
    """Per-structure constants in float32, shaped to broadcast with x; the last five are for gradients."""

    mu: Tensor
    sigma: Tensor
    below: Tensor  # Φ(α)
    above: Tensor  # 1 - Φ(β)
    mass: Tensor  # Φ(β) - Φ(α)
    lower_density: Tensor  # φ(α)
    upper_density: Tensor  # φ(β)
    from_lower: Tensor  # μ - lower
    from_upper: Tensor  # μ - upper
    log_sigma_in_range: Tensor


class TorchNoise:
    """The noise of one call: constants computed once, log θ evaluated tile by tile."""

    def __init__(self, call: NoiseCall) -> None:
        x, self.dim, self.lower, self.upper = call.x, call.dim, call.lower, call.upper
        self.mu, self.log_sigma = along(call.mu, x, call.dim), along(call.log_sigma, x, call.dim)
        self.factor = None if call.mask is None else along(call.mask, x, call.dim)
        self.exact = x.dtype == torch.float64
        wide_mu, wide_log_sigma = self.mu.double(), self.log_sigma.double()
        sigma = torch_special.sigma_from_log(wide_log_sigma)
        # Both ends together: half the operations, and small layers are bound by their number.
        from_ends = torch.stack([wide_mu - self.lower, wide_mu - self.upper])
        standardised = from_ends / -sigma
        alpha, beta = standardised
        below, above = torch_special.normal_cdf(torch.stack([alpha, -beta]))
        self.single = Single(
            *torch.stack(
                [
                    wide_mu,
                    sigma,
                    below,
                    above,
                    1.0 - below - above,  # enough where the mode is inside or not far outside
                    *torch_special.normal_density(standardised),
                    *from_ends,
                    torch_special.log_sigma_in_range(wide_log_sigma),
                ]
            ).float()
        )
        hard = (sigma > WIDE_SIGMA) | (torch.maximum(alpha, -beta) > TAIL_START)
        self.hard = hard.view(-1).nonzero().squeeze(1)

    def log(self, uniform: Tensor, buffers: Sequence[Tensor], *, with_gradients: bool) -> LogNoise:
        """Return log θ at the uniforms of a tile, float32, or float64 for float64 activations.

        The results may lie in the buffers, which have the shape of the uniforms.
        """
        if self.exact or self.hard.numel() == self.mu.numel():
            return self._reference(self.mu, self.log_sigma, uniform, with_gradients=with_gradients)
        result = self._single(uniform, buffers, with_gradients=with_gradients)
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

    def _single(self, uniform: Tensor, buffers: Sequence[Tensor], *, with_gradients: bool) -> LogNoise:
        q = self.single
        complement, below, above, *scratch = buffers
        torch.neg(uniform, out=complement).add_(1.0)
        torch.addcmul(q.below, q.mass, uniform, out=below)
        torch.addcmul(q.above, q.mass, complement, out=above)
        first, second, third = scratch
        z, inverse_density = torch_special.normal_quantile(
            below, above, (first, second, third), with_density=with_gradients
        )
        x = torch.addcmul(q.mu, q.sigma, z, out=above).clamp_(self.lower, self.upper)
        if inverse_density is None:
            return LogNoise(x, x.new_empty(0), x.new_empty(0))
        near_lower = complement.mul_(inverse_density).mul_(q.lower_density)
        near_upper = inverse_density.mul_(uniform).mul_(q.upper_density)
        grad_log_sigma = z.mul_(q.sigma)
        grad_log_sigma.addcmul_(q.from_lower, near_lower)
        grad_log_sigma.addcmul_(q.from_upper, near_upper)
        grad_mu = near_lower.neg_().sub_(near_upper).add_(1.0)
        return LogNoise(x, grad_mu, grad_log_sigma.mul_(q.log_sigma_in_range))


class Buffers:
    """Memory that all tiles of a call share: touching fresh memory costs more than the arithmetic on it."""

    def __init__(
        self, shape: Sequence[int], rows: int, count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.memory = torch.empty(count, min(rows, shape[0]), *shape[1:], dtype=dtype, device=device)

    def for_rows(self, count: int) -> tuple[Tensor, ...]:
        """Return the buffers cut to a tile's number of examples."""
        return self.memory[:, :count].unbind()


def rows_per_tile(x: Tensor, dim: int) -> int:
    """Return how many entries of axis 0 make a tile: all of them if the structures lie along it."""
    tile = TILE if x.device.type == "cpu" else LARGE_TILE
    return max(1, tile * x.shape[0] // max(1, x.numel())) if dim else max(1, x.shape[0])


def along(per_structure: Tensor, x: Tensor, dim: int) -> Tensor:
    """View a vector along one axis of x."""
    return per_structure.view([x.shape[dim] if axis == dim else 1 for axis in range(x.dim())])


def prepare(call: NoiseCall) -> TorchNoise:
    """Return the constants of the structures."""
    settle_first_calls()
    return TorchNoise(call)


def multiply_noise(call: NoiseCall, noise: TorchNoise) -> Tensor:
    """Return activation(x) · θ · mask for θ at a seed's uniforms."""
    return multiply_noise_at(call, noise, _uniforms(call))


def multiply_noise_backward(
    call: NoiseCall, noise: TorchNoise, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``multiply_noise`` in x, μ and log σ."""
    return multiply_noise_at_backward(call, noise, grad, _uniforms(call))


def _uniforms(call: NoiseCall) -> Tensor:
    shape = call.draw_shape
    return torch_philox.uniform_stream(call.seed, math.prod(shape)).reshape(shape)


def multiply_noise_at(call: NoiseCall, noise: TorchNoise, uniform: Tensor) -> Tensor:
    """Return activation(x) · θ · mask for θ at uniforms whose shape broadcasts with x."""
    x = call.x
    rows = rows_per_tile(x, call.dim)
    wide_dtype = torch.float64 if noise.exact else torch.float32
    noise_buffers = Buffers(uniform.shape, rows, NUM_BUFFERS, torch.float32, x.device)
    wide_buffer = Buffers(x.shape, rows, 1, wide_dtype, x.device)
    out = torch.empty_like(x)
    theta = None
    for x_tile, out_tile, uniform_tile in zip(
        x.split(rows), out.split(rows), _uniform_tiles(uniform, x, rows), strict=True
    ):
        if theta is None or uniform_tile is not uniform:
            buffers = noise_buffers.for_rows(uniform_tile.shape[0])
            theta = noise.log(uniform_tile, buffers, with_gradients=False).value.exp_()
            theta = theta if noise.factor is None else theta.mul_(noise.factor)
        (wide,) = wide_buffer.for_rows(x_tile.shape[0])
        wide.copy_(x_tile)
        if call.activation is not None:
            ACTIVATIONS[call.activation](wide)
        out_tile.copy_(wide.mul_(theta))
    return out


def multiply_noise_at_backward(
    call: NoiseCall, noise: TorchNoise, grad: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``multiply_noise_at`` in x, μ and log σ; tiles are added up in order, in float64."""
    x, dim, activation = call.x, call.dim, call.activation
    rows = rows_per_tile(x, dim)
    wide_dtype = torch.float64 if noise.exact else torch.float32
    noise_buffers = Buffers(uniform.shape, rows, NUM_BUFFERS + 1, torch.float32, x.device)
    wide_buffers = Buffers(x.shape, rows, 3, wide_dtype, x.device)
    grad_x = torch.empty_like(x)
    grad_mu, grad_log_sigma = (
        torch.zeros(call.mu.shape, dtype=torch.float64, device=call.mu.device) for _ in range(2)
    )
    # What the uniforms share is summed before the noise is multiplied on.
    repeated = [axis for axis in range(1, x.dim()) if uniform.shape[axis] != x.shape[axis]]
    others = [axis for axis in range(x.dim()) if axis != dim]
    for grad_tile, x_tile, grad_x_tile, uniform_tile in zip(
        grad.split(rows), x.split(rows), grad_x.split(rows), _uniform_tiles(uniform, x, rows), strict=True
    ):
        *buffers, theta_buffer = noise_buffers.for_rows(uniform_tile.shape[0])
        log_theta = noise.log(uniform_tile, buffers, with_gradients=True)
        theta = log_theta.value.exp() if noise.exact else torch.exp(log_theta.value, out=theta_buffer)
        theta = theta if noise.factor is None else theta.mul_(noise.factor)

        wide_grad, wide_x, weight = wide_buffers.for_rows(x_tile.shape[0])
        wide_grad.copy_(grad_tile)
        wide_x.copy_(x_tile)
        if activation == "relu":
            dead = wide_x <= 0  # filled and not multiplied, since 0 times infinity is not 0
            wide_grad.masked_fill_(dead, 0.0)
            wide_x.masked_fill_(dead, 0.0)
        elif activation == "tanh":
            wide_x.tanh_()
        torch.mul(wide_grad, wide_x, out=weight)
        if activation == "tanh":
            wide_grad.mul_(wide_x.square_().neg_().add_(1.0))
        grad_x_tile.copy_(wide_grad.mul_(theta))

        if repeated:
            weight = weight.sum(repeated, keepdim=True)
        weight = weight * theta if weight.shape != x_tile.shape else weight.mul_(theta)
        for total, part in ((grad_mu, log_theta.grad_mu), (grad_log_sigma, log_theta.grad_log_sigma)):
            product = weight * part if part.shape != weight.shape else part.mul_(weight)
            total += (product.sum(others) if others else product).view(-1)
    return grad_x, grad_mu.to(call.mu.dtype), grad_log_sigma.to(call.mu.dtype)


def _uniform_tiles(uniform: Tensor, x: Tensor, rows: int) -> Sequence[Tensor]:
    """Return the uniforms of each tile of x; always the same ones if all examples share them."""
    if uniform.shape[0] == x.shape[0]:
        return uniform.split(rows)
    return [uniform] * len(x.split(rows))
