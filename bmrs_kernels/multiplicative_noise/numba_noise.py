"""Noise multiplied onto an activation by compiled CPU loops: the arrays and tiles that ``numba_loops`` are called with.

float64 activations and noise at given uniforms, which are float64 too, are left to tensor operations: in float64 these
are faster than loops over scalar special functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmrs_kernels.dispatch.numba_threads import in_threads
from bmrs_kernels.multiplicative_noise import numba_loops, torch_noise
from bmrs_kernels.multiplicative_noise.torch_noise import draw_shape

sample_noise = torch_noise.sample_noise

ACTIVATIONS = {None: numba_loops.IDENTITY, "relu": numba_loops.RELU, "tanh": numba_loops.TANH}
# Of one thread, for an element; for the number of threads, these need not be exact.
FORWARD_SECONDS, BACKWARD_SECONDS, UNIFORM_SECONDS, SCALING_SECONDS = 6e-9, 9e-9, 1e-9, 1e-9


class Noise:
    """The noise of one call: constants of the structures, and tiles of an activation with a draw for every element.

    Args:
        shape: shape of the activation, in logical order.
        dim: axis of the structures, non-negative.
        mu: location μ.
        log_sigma: log σ.
        mask: factor per structure, or None.
        seed: int64 scalar tensor.
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
        lower: float,
        upper: float,
    ) -> None:
        self.lower, self.upper, self.seed = float(lower), float(upper), int(seed)
        self.dtype = mu.dtype
        in_float64 = mu.dtype != torch.float32
        wide = [part.double().contiguous() if in_float64 else part.contiguous() for part in (mu, log_sigma)]
        factors = None if mask is None else mask.double().contiguous()
        self.table = numba_loops.constants_loop(
            *(part.data_ptr() for part in wide),
            in_float64,
            0 if factors is None else factors.data_ptr(),
            mu.numel(),
            self.lower,
            self.upper,
        )
        self.sizes = (math.prod(shape[:dim]), mu.numel(), math.prod(shape[dim + 1 :]))
        self.tile = numba_loops.tile_shape(*self.sizes)
        blocks = [-(-size // tile) for size, tile in zip(self.sizes, self.tile, strict=True)]
        self.num_sums, self.num_tiles = blocks[0] * blocks[2], math.prod(blocks)

    def multiply(self, x: Tensor, activation: str | None) -> Tensor:
        """Return activation(x) · θ · mask, contiguous; x is float32."""
        x = x.contiguous()
        out = torch.empty_like(x)
        loop = numba_loops.forward_loop
        source, target, number = x.data_ptr(), out.data_ptr(), ACTIVATIONS[activation]
        sizes, tile, lower, upper = self.sizes, self.tile, self.lower, self.upper

        def call(first: int, last: int) -> None:
            loop(source, target, self.table, self.seed, sizes, tile, number, first, last, lower, upper)

        in_threads(call, self.num_tiles, seconds=x.numel() * FORWARD_SECONDS)
        return out

    def gradients(self, grad: Tensor, x: Tensor, activation: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ``multiply`` in x, μ and log σ; both are float32."""
        grad, x = grad.contiguous(), x.contiguous()
        grad_x = torch.empty_like(x)
        sums = np.empty((2, self.num_sums, self.sizes[1]))
        loop = numba_loops.backward_loop
        addresses, number = [part.data_ptr() for part in (grad, x, grad_x)], ACTIVATIONS[activation]
        options = (self.table, self.seed, self.sizes, self.tile, number)
        lower, upper = self.lower, self.upper

        def call(first: int, last: int) -> None:
            loop(*addresses, sums, *options, first, last, lower, upper)

        in_threads(call, self.num_tiles, seconds=x.numel() * BACKWARD_SECONDS)
        in_float64 = self.dtype != torch.float32
        dtype = torch.float64 if in_float64 else torch.float32
        grad_mu, grad_log_sigma = (torch.empty(self.sizes[1], dtype=dtype, device="cpu") for _ in range(2))
        numba_loops.sum_loop(sums, self.table, grad_mu.data_ptr(), grad_log_sigma.data_ptr(), in_float64)
        return grad_x, grad_mu.to(self.dtype), grad_log_sigma.to(self.dtype)


class SharedNoise:
    """The noise of one call in which several elements share a draw.

    Args:
        x: the activation, float32.
        draws: shape of the draws, which broadcasts with x.
        dim: axis of the structures, non-negative.
        posterior: μ, log σ, mask, seed, lower and upper, as `Noise` takes them.
    """

    def __init__(self, x: Tensor, draws: Sequence[int], dim: int, posterior: Sequence[Any]) -> None:
        structures = x.shape[dim]
        self.table_shape = (math.prod(draws) // structures, structures)
        # The draws are a small activation themselves: of ones forward, of sums backward.
        self.noise = Noise(self.table_shape, 1, *posterior)
        self.theta = self.noise.multiply(torch.ones(self.table_shape, dtype=x.dtype, device="cpu"), None)
        self.draws, self.shared = draws, [axis for axis, size in enumerate(draws) if size != x.shape[axis]]
        self.length = math.prod(x.shape[dim + 1 :])
        rows = math.prod(x.shape[: dim + 1])
        self.sizes = (rows, self.length, rows // self.theta.numel(), structures)

    def multiply(self, x: Tensor, activation: str | None) -> Tensor:
        """Return activation(x) · θ · mask."""
        if not self._in_rows(x):
            return _activated(x, activation) * self.theta.view(self.draws)
        out = torch.empty_like(x)
        loop = numba_loops.shared_forward_loop
        arguments = (
            x.data_ptr(),
            out.data_ptr(),
            self.theta.data_ptr(),
            *self.sizes,
            ACTIVATIONS[activation],
        )

        def call(first: int, last: int) -> None:
            loop(*arguments, first, last)

        in_threads(call, self.sizes[0], seconds=x.numel() * SCALING_SECONDS)
        return out

    def gradients(self, grad: Tensor, x: Tensor, activation: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ``multiply`` in x, μ and log σ."""
        if self._in_rows(x):
            grad_x, sums = self._gradients_in_rows(grad.contiguous(), x, activation)
        else:
            activated = _activated(x, activation)
            if activation == "relu":
                # Filled and not multiplied, since 0 times infinity is not 0.
                grad = grad.masked_fill(x <= 0, 0.0)
            sums = grad * activated
            sums = sums.sum(self.shared) if self.shared else sums
            grad_x = grad * self.theta.view(self.draws)
            if activation == "tanh":
                grad_x = grad_x * (1.0 - activated * activated)
        sums = sums.reshape(self.table_shape).contiguous()
        _, grad_mu, grad_log_sigma = self.noise.gradients(torch.ones_like(sums), sums, None)
        return grad_x, grad_mu, grad_log_sigma

    def _gradients_in_rows(self, grad: Tensor, x: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
        grad_x, sums = torch.empty_like(x), torch.empty(self.sizes[0], dtype=torch.float64, device="cpu")
        loop = numba_loops.shared_backward_loop
        addresses = [part.data_ptr() for part in (grad, x, grad_x, sums, self.theta)]

        def call(first: int, last: int) -> None:
            loop(*addresses, *self.sizes, ACTIVATIONS[activation], first, last)

        in_threads(call, self.sizes[0], seconds=x.numel() * SCALING_SECONDS)
        groups, structures = self.table_shape
        return grad_x, sums.view(groups, -1, structures).sum(1).to(x.dtype)

    def _in_rows(self, x: Tensor) -> bool:
        """Return whether the elements of a structure lie together, in rows that are worth a loop."""
        return self.length >= numba_loops.SHORTEST_STRIP and x.is_contiguous()


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
    *,
    kept: dict[str, Any] | None = None,
) -> Tensor:
    """Return activation(x) · θ · mask in x's memory layout; what backward needs again is put into ``kept``."""
    if x.dtype == torch.float64:
        arguments = (x, mu, log_sigma, mask, seed, dim, granularity, activation, lower, upper)
        return torch_noise.multiply_noise(*arguments, kept=kept)
    if x.numel() == 0:
        return torch.empty_like(x)
    wide = _widened(x)
    noise = _noise(wide, dim, granularity, (mu, log_sigma, mask, seed, lower, upper))
    if kept is not None:
        kept["noise"] = noise
    return _laid_out(noise.multiply(wide, activation), x)


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
    *,
    kept: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``multiply_noise`` in x, μ and log σ; bitwise the same on every run."""
    if x.dtype == torch.float64:
        arguments = (grad, x, mu, log_sigma, mask, seed, dim, granularity, activation, lower, upper)
        return torch_noise.multiply_noise_backward(*arguments, kept=kept)
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(mu), torch.zeros_like(log_sigma)
    wide = _widened(x)
    posterior = (mu, log_sigma, mask, seed, lower, upper)
    noise = kept["noise"] if kept else _noise(wide, dim, granularity, posterior)
    grad_x, grad_mu, grad_log_sigma = noise.gradients(_widened(grad), wide, activation)
    return _laid_out(grad_x, x), grad_mu, grad_log_sigma


def _noise(x: Tensor, dim: int, granularity: str, posterior: Sequence[Any]) -> Noise | SharedNoise:
    """Return the noise of a call with x in the dtype of the arithmetic."""
    draws = draw_shape(x, dim, granularity)
    if math.prod(draws) == x.numel():
        return Noise(x.shape, dim, *posterior)
    return SharedNoise(x, draws, dim, posterior)


def uniform_stream(seed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` uniforms of a seed as a float32 vector; ``seed`` is an int64 scalar tensor."""
    out = torch.empty(count, dtype=torch.float32, device="cpu")
    number, array = int(seed), _array(out)

    def call(first: int, last: int) -> None:
        numba_loops.uniform_loop(number, array, first, last)

    in_threads(call, count, seconds=count * UNIFORM_SECONDS)
    return out


def _array(tensor: Tensor) -> np.ndarray:
    """Return a contiguous tensor's memory as a vector."""
    array: np.ndarray = tensor.detach().view(-1).numpy()
    return array


def _widened(x: Tensor) -> Tensor:
    """Return a tensor in the dtype of the arithmetic."""
    return x.detach().to(torch.float32)


def _activated(x: Tensor, activation: str | None) -> Tensor:
    """Return activation(x)."""
    return x if activation is None else {"relu": torch.relu, "tanh": torch.tanh}[activation](x)


def _laid_out(value: Tensor, x: Tensor) -> Tensor:
    """Return a result in x's dtype and memory layout."""
    if value.dtype == x.dtype and value.is_contiguous() and x.is_contiguous():
        return value
    out = torch.empty_like(x)
    return value if (out.dtype, out.stride()) == (value.dtype, value.stride()) else out.copy_(value)
