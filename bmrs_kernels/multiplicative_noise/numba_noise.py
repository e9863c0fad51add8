"""Noise multiplied onto an activation by numba: the memory and the tiles that ``numba_loops`` are called with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bmrs_kernels.dispatch.numba_threads import in_threads
from bmrs_kernels.multiplicative_noise import numba_exact_noise, numba_loops, numba_strips
from bmrs_kernels.multiplicative_noise.call import NoiseCall
from bmrs_kernels.options import Activation

ACTIVATIONS = {None: numba_strips.IDENTITY, "relu": numba_strips.RELU, "tanh": numba_strips.TANH}
# 1 in the dtypes of the arithmetic, for which loops are compiled.
ONE = {torch.float32: np.float32(1.0), torch.float64: np.float64(1.0)}
# Of one thread, for an element; for the number of threads, these need not be exact.
FORWARD_SECONDS = {torch.float32: 6e-9, torch.float64: 20e-9}
BACKWARD_SECONDS = {torch.float32: 9e-9, torch.float64: 25e-9}
SCALING_SECONDS, SAMPLING_SECONDS = 1e-9, 25e-9


class NumbaNoise:
    """Noise with a draw for every element: constants of the structures, and tiles of the activation.

    Args:
        call: gives the posterior, its mask and the seed.
        shape: shape of what the noise is multiplied onto, in logical order.
        dim: axis of the structures, non-negative.
    """

    def __init__(self, call: NoiseCall, shape: Sequence[int], dim: int) -> None:
        self.lower, self.upper, self.seed = float(call.lower), float(call.upper), int(call.seed)
        self.dtype = call.mu.dtype
        in_float64 = self.dtype != torch.float32
        wide = [
            part.double().contiguous() if in_float64 else part.contiguous()
            for part in (call.mu, call.log_sigma)
        ]
        factors = None if call.mask is None else call.mask.double().contiguous()
        self.table = numba_loops.constants_loop(
            *(part.data_ptr() for part in wide),
            in_float64,
            0 if factors is None else factors.data_ptr(),
            call.mu.numel(),
            self.lower,
            self.upper,
        )
        self.sizes = (math.prod(shape[:dim]), call.mu.numel(), math.prod(shape[dim + 1 :]))
        self.tile = numba_loops.tile_shape(*self.sizes)
        blocks = [-(-size // tile) for size, tile in zip(self.sizes, self.tile, strict=True)]
        self.num_sums, self.num_tiles = blocks[0] * blocks[2], math.prod(blocks)

    def multiply(self, x: Tensor, activation: Activation | None) -> Tensor:
        """Return activation(x) · θ · mask, contiguous; x is float32 or float64."""
        x = x.contiguous()
        out = torch.empty_like(x)
        loop, one = numba_loops.forward_loop, ONE[x.dtype]
        source, target, number = x.data_ptr(), out.data_ptr(), ACTIVATIONS[activation]
        sizes, tile, lower, upper = self.sizes, self.tile, self.lower, self.upper

        def call(first: int, last: int) -> None:
            loop(one, source, target, self.table, self.seed, sizes, tile, number, first, last, lower, upper)

        in_threads(call, self.num_tiles, seconds=x.numel() * FORWARD_SECONDS[x.dtype])
        return out

    def gradients(
        self, grad: Tensor, x: Tensor, activation: Activation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ``multiply`` in x, μ and log σ; both arguments are float32 or float64."""
        grad, x = grad.contiguous(), x.contiguous()
        grad_x = torch.empty_like(x)
        sums = np.empty((2, self.num_sums, self.sizes[1]))
        loop, one = numba_loops.backward_loop, ONE[x.dtype]
        addresses, number = [part.data_ptr() for part in (grad, x, grad_x)], ACTIVATIONS[activation]
        options = (self.table, self.seed, self.sizes, self.tile, number)
        lower, upper = self.lower, self.upper

        def call(first: int, last: int) -> None:
            loop(one, *addresses, sums, *options, first, last, lower, upper)

        in_threads(call, self.num_tiles, seconds=x.numel() * BACKWARD_SECONDS[x.dtype])
        in_float64 = self.dtype != torch.float32
        dtype = torch.float64 if in_float64 else torch.float32
        grad_mu, grad_log_sigma = (torch.empty(self.sizes[1], dtype=dtype, device="cpu") for _ in range(2))
        numba_loops.sum_loop(sums, self.table, grad_mu.data_ptr(), grad_log_sigma.data_ptr(), in_float64)
        return grad_x, grad_mu.to(self.dtype), grad_log_sigma.to(self.dtype)


class SharedNumbaNoise:
    """Noise of which several elements share a draw.

    Args:
        call: the call.
        dtype: dtype of the arithmetic, float32 or float64.
    """

    def __init__(self, call: NoiseCall, dtype: torch.dtype) -> None:
        shape, dim = call.x.shape, call.dim
        structures = shape[dim]
        self.draws = call.draw_shape
        self.table_shape = (math.prod(self.draws) // structures, structures)
        # The draws are a small activation themselves: of ones forward, of sums backward.
        self.noise = NumbaNoise(call, self.table_shape, 1)
        self.theta = self.noise.multiply(torch.ones(self.table_shape, dtype=dtype, device="cpu"), None)
        self.shared = [axis for axis, size in enumerate(self.draws) if size != shape[axis]]
        self.length = math.prod(shape[dim + 1 :])
        rows = math.prod(shape[: dim + 1])
        self.sizes = (rows, self.length, rows // self.theta.numel(), structures)

    def multiply(self, x: Tensor, activation: Activation | None) -> Tensor:
        """Return activation(x) · θ · mask."""
        if not self._in_rows(x):
            return _activated(x, activation) * self.theta.view(self.draws)
        out = torch.empty_like(x)
        loop = numba_loops.shared_forward_loop
        arguments = (
            ONE[x.dtype],
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

    def gradients(
        self, grad: Tensor, x: Tensor, activation: Activation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
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

    def _gradients_in_rows(
        self, grad: Tensor, x: Tensor, activation: Activation | None
    ) -> tuple[Tensor, Tensor]:
        grad_x, sums = torch.empty_like(x), torch.empty(self.sizes[0], dtype=torch.float64, device="cpu")
        loop = numba_loops.shared_backward_loop
        addresses = [part.data_ptr() for part in (grad, x, grad_x, sums, self.theta)]

        def call(first: int, last: int) -> None:
            loop(ONE[x.dtype], *addresses, *self.sizes, ACTIVATIONS[activation], first, last)

        in_threads(call, self.sizes[0], seconds=x.numel() * SCALING_SECONDS)
        groups, structures = self.table_shape
        return grad_x, sums.view(groups, -1, structures).sum(1).to(x.dtype)

    def _in_rows(self, x: Tensor) -> bool:
        """Return whether the elements of a structure lie together, in rows that are worth a loop."""
        return self.length >= numba_loops.SHORTEST_STRIP and x.is_contiguous()


def prepare(call: NoiseCall) -> NumbaNoise | SharedNumbaNoise | None:
    """Return the constants of the structures and, where elements share draws, θ; None for an empty activation."""
    if call.x.numel() == 0:
        return None
    if math.prod(call.draw_shape) == call.x.numel():
        return NumbaNoise(call, call.x.shape, call.dim)
    return SharedNumbaNoise(call, torch.float64 if call.x.dtype == torch.float64 else torch.float32)


def multiply_noise(call: NoiseCall, noise: NumbaNoise | SharedNumbaNoise | None) -> Tensor:
    """Return activation(x) · θ · mask in x's memory layout."""
    if noise is None:
        return torch.empty_like(call.x)
    return _laid_out(noise.multiply(_widened(call.x), call.activation), call.x)


def multiply_noise_backward(
    call: NoiseCall, noise: NumbaNoise | SharedNumbaNoise | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``multiply_noise`` in x, μ and log σ; bitwise the same on every run."""
    if noise is None:
        return torch.empty_like(call.x), torch.zeros_like(call.mu), torch.zeros_like(call.log_sigma)
    grad_x, grad_mu, grad_log_sigma = noise.gradients(_widened(grad), _widened(call.x), call.activation)
    return _laid_out(grad_x, call.x), grad_mu, grad_log_sigma


def sample_noise(
    mu: Tensor, log_sigma: Tensor, uniform: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return θ at given uniforms and its derivatives in μ and log σ, in the broadcast shape and μ's dtype."""
    shape = torch.broadcast_shapes(mu.shape, uniform.shape)
    # Axes along which the structures differ first, those that share a structure after them.
    sizes = [1] * (len(shape) - mu.dim()) + list(mu.shape)
    own = [axis for axis, size in enumerate(sizes) if size == shape[axis]]
    order = own + [axis for axis in range(len(shape)) if axis not in own]
    parameters = [part.detach().double().contiguous().view(-1).numpy() for part in (mu, log_sigma)]
    ordered = uniform.detach().double().expand(shape).permute(order).contiguous()
    y = ordered.view(mu.numel(), -1) if ordered.numel() else ordered.view(0, 1)
    results = [
        torch.empty_like(y) if wanted else y.new_empty(0, 0) for wanted in (True, *[with_gradients] * 2)
    ]
    arrays = [part.numpy() for part in (y, *results)]

    def call(first: int, last: int) -> None:
        numba_exact_noise.sample_loop(
            *parameters, *arrays, float(lower), float(upper), with_gradients, first, last
        )

    strips = y.shape[0] * -(-y.shape[1] // numba_exact_noise.ELEMENTS_PER_STRIP)
    in_threads(call, strips, seconds=y.numel() * SAMPLING_SECONDS)
    back = [order.index(axis) for axis in range(len(shape))]
    theta, *derivatives = (
        part.view(ordered.shape).permute(back).to(mu.dtype).contiguous()
        if part.shape == y.shape
        else mu.new_empty(0)
        for part in results
    )
    return theta, derivatives[0], derivatives[1]


def _widened(x: Tensor) -> Tensor:
    """Return a tensor in the dtype of the arithmetic."""
    return x.detach() if x.dtype == torch.float64 else x.detach().to(torch.float32)


def _activated(x: Tensor, activation: Activation | None) -> Tensor:
    """Return activation(x)."""
    return x if activation is None else {"relu": torch.relu, "tanh": torch.tanh}[activation](x)


def _laid_out(value: Tensor, x: Tensor) -> Tensor:
    """Return a result in x's dtype and memory layout."""
    if value.dtype == x.dtype and value.is_contiguous() and x.is_contiguous():
        return value
    out = torch.empty_like(x)
    return value if (out.dtype, out.stride()) == (value.dtype, value.stride()) else out.copy_(value)
