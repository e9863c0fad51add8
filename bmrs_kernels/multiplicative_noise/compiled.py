"""Noise multiplied onto an activation by compiled CPU loops: the arrays and tiles that ``loops`` are called with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bmrs_kernels.loop_threads import in_threads
from bmrs_kernels.multiplicative_noise import loops
from bmrs_kernels.multiplicative_noise.eager import draw_shape

ACTIVATIONS = {None: loops.IDENTITY, "relu": loops.RELU, "tanh": loops.TANH}
# Of one thread, for an element; for the number of threads, these need not be exact.
FORWARD_SECONDS, BACKWARD_SECONDS, EXACT_SECONDS, UNIFORM_SECONDS = 9e-9, 13e-9, 3e-7, 1e-9


class Noise:
    """The noise of one call: constants of the structures, and tiles of an activation that each element's own θ meets.

    Args:
        shape: shape of the activation, in logical order.
        dim: axis of the structures, non-negative.
        mu: location μ.
        log_sigma: log σ.
        mask: factor per structure, or None.
        seed: int64 scalar tensor.
        dtype: dtype of the activation, float32 or float64.
        lower: lower end of log θ.
        upper: upper end of log θ.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        mu: Tensor,
        log_sigma: Tensor,
        mask: Tensor | None,
        seed: Tensor,
        dtype: torch.dtype,
        lower: float,
        upper: float,
    ) -> None:
        self.lower, self.upper, self.seed = float(lower), float(upper), int(seed)
        self.mu, self.log_sigma, self.dtype = mu, log_sigma, dtype
        structures = mu.numel()
        self.table = loops.constants_kernel(
            _array(mu.double()), _array(log_sigma.double()), self.lower, self.upper
        )
        self.mask = _array(mu.new_ones(structures, dtype=dtype) if mask is None else mask.to(dtype))
        self.sizes = (math.prod(shape[:dim]), structures, math.prod(shape[dim + 1 :]))
        self.tile = loops.tile_shape(*self.sizes)
        blocks = [-(-size // tile) for size, tile in zip(self.sizes, self.tile, strict=True)]
        self.num_sums, self.num_tiles = blocks[0] * blocks[2], math.prod(blocks)

    def multiply(self, x: Tensor, activation: str | None) -> Tensor:
        """Return activation(x) · θ · mask, contiguous; x is contiguous and has the noise's dtype."""
        out = torch.empty_like(x)
        arguments = (_array(x), _array(out), self.table, self.mask, self.seed, self.sizes, self.tile)

        def call(first: int, last: int) -> None:
            loops.forward_kernel(*arguments, ACTIVATIONS[activation], first, last, self.lower, self.upper)

        in_threads(call, self.num_tiles, seconds=self._seconds(x, FORWARD_SECONDS))
        return out

    def gradients(self, grad: Tensor, x: Tensor, activation: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ``multiply`` in x, μ and log σ."""
        grad_x = torch.empty_like(x)
        sums = np.empty((2, self.num_sums, self.sizes[1]))
        arguments = (_array(grad), _array(x), _array(grad_x), sums, self.table, self.mask, self.seed)

        def call(first: int, last: int) -> None:
            loops.backward_kernel(
                *arguments,
                self.sizes,
                self.tile,
                ACTIVATIONS[activation],
                first,
                last,
                self.lower,
                self.upper,
            )

        in_threads(call, self.num_tiles, seconds=self._seconds(x, BACKWARD_SECONDS))
        grad_mu, grad_log_sigma = torch.empty(2, self.sizes[1], dtype=torch.float64)
        loops.sum_kernel(sums, self.table, grad_mu.numpy(), grad_log_sigma.numpy())
        return grad_x, grad_mu.to(self.mu.dtype), grad_log_sigma.to(self.log_sigma.dtype)

    def _seconds(self, x: Tensor, for_an_element: float) -> float:
        return x.numel() * (EXACT_SECONDS if self.dtype == torch.float64 else for_an_element)


def multiply_noise(
    x: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    dim: int,
    granularity: str,
    activation: str | None,
    lower: float,
    upper: float,
) -> Tensor:
    """Return activation(x) · θ · mask in x's memory layout."""
    if x.numel() == 0:
        return torch.empty_like(x)
    wide = _widened(x)
    draws = draw_shape(x, dim, granularity)
    posterior = mu, log_sigma, mask, seed, wide.dtype, lower, upper
    if math.prod(draws) == x.numel():
        return _laid_out(Noise(x.shape, dim, *posterior).multiply(wide.contiguous(), activation), x)
    noise = Noise((math.prod(draws) // mu.numel(), mu.numel()), 1, *posterior)
    theta = noise.multiply(wide.new_ones(noise.sizes[:2]), None).view(draws)
    return _laid_out(_activated(wide, activation) * theta, x)


def multiply_noise_backward(
    grad: Tensor,
    x: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    dim: int,
    granularity: str,
    activation: str | None,
    lower: float,
    upper: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``multiply_noise`` in x, μ and log σ; bitwise the same on every run."""
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(mu), torch.zeros_like(log_sigma)
    wide, wide_grad = _widened(x), _widened(grad)
    draws = draw_shape(x, dim, granularity)
    posterior = mu, log_sigma, mask, seed, wide.dtype, lower, upper
    if math.prod(draws) == x.numel():
        noise = Noise(x.shape, dim, *posterior)
        grad_x, *gradients = noise.gradients(wide_grad.contiguous(), wide.contiguous(), activation)
        return _laid_out(grad_x, x), gradients[0], gradients[1]
    # What the draws share is summed first; of these sums, the noise is that of a small activation.
    activated = _activated(wide, activation)
    if activation == "relu":
        dead = wide <= 0  # filled and not multiplied, since 0 times infinity is not 0
        wide_grad = wide_grad.masked_fill(dead, 0.0)
    weight = wide_grad * activated
    shared = [axis for axis, size in enumerate(draws) if size != x.shape[axis]]
    weight = weight.sum(shared).view(-1, mu.numel()) if shared else weight.view(-1, mu.numel())
    noise = Noise(weight.shape, 1, *posterior)
    theta, *gradients = noise.gradients(torch.ones_like(weight), weight.contiguous(), None)
    grad_x = wide_grad * theta.view(draws)
    if activation == "tanh":
        grad_x = grad_x * (1.0 - activated * activated)
    return _laid_out(grad_x, x), gradients[0], gradients[1]


def sample_noise(
    mu: Tensor, log_sigma: Tensor, uniform: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return θ at given uniforms and its derivatives in μ and log σ, in the broadcast shape and μ's dtype."""
    shape = torch.broadcast_shapes(mu.shape, uniform.shape)
    inputs = [_array(part.double().expand(shape).contiguous()) for part in (mu, log_sigma, uniform)]
    count = inputs[0].size
    results = [
        torch.empty(count if wanted else 0, dtype=torch.float64) for wanted in (True, *[with_gradients] * 2)
    ]
    outputs = [_array(result) for result in results]

    def call(first: int, last: int) -> None:
        loops.sample_kernel(*inputs, float(lower), float(upper), *outputs, with_gradients, first, last)

    in_threads(call, count, seconds=count * EXACT_SECONDS)
    theta, *gradients = (result.to(mu.dtype) for result in results)
    if with_gradients:
        gradients = [gradient.view(shape) for gradient in gradients]
    return theta.view(shape), gradients[0], gradients[1]


def uniform_stream(seed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` uniforms of a seed as a float32 vector; ``seed`` is an int64 scalar tensor."""
    out = torch.empty(count, dtype=torch.float32)
    number, array = int(seed), _array(out)

    def call(first: int, last: int) -> None:
        loops.uniform_kernel(number, array, first, last)

    in_threads(call, count, seconds=count * UNIFORM_SECONDS)
    return out


def _array(tensor: Tensor) -> np.ndarray:
    """Return a contiguous tensor's memory as a vector."""
    array: np.ndarray = tensor.detach().view(-1).numpy()
    return array


def _widened(x: Tensor) -> Tensor:
    """Return a tensor in the dtype of the arithmetic."""
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _activated(x: Tensor, activation: str | None) -> Tensor:
    """Return activation(x)."""
    return x if activation is None else {"relu": torch.relu, "tanh": torch.tanh}[activation](x)


def _laid_out(value: Tensor, x: Tensor) -> Tensor:
    """Return a result in x's dtype and memory layout."""
    out = torch.empty_like(x) if value.dtype != x.dtype or not x.is_contiguous() else None
    return (
        value
        if out is None or (out.dtype, out.stride()) == (value.dtype, value.stride())
        else out.copy_(value)
    )
