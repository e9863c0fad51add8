"""Compiled CPU loops that multiply noise onto activations, forward and backward, in one pass.

The activation is seen as [outer, structures, inner] in logical order and cut into tiles that stay in a core's cache:
the uniforms of a tile are drawn at once, then each of its structures is a strip. Where ``inner`` is short, the elements
of a strip lie apart and are gathered. What a tile computes depends on nothing outside it, and sums are kept by tile:
results do not depend on which thread computes which tiles.
"""

from __future__ import annotations

import math

import numpy as np

from bmrs_kernels.loop_math import LANES, ONE, REGROUPING, compiled, fill_uniform, kernel, tanh
from bmrs_kernels.multiplicative_noise.loop_noise import (
    IN_RANGE,
    NUM_CONSTANTS,
    exact_log_noise,
    strip_noise,
    structure_constants,
)

# Activations by number.
IDENTITY, RELU, TANH = range(3)
ZERO = np.float32(0.0)
# Whole counters are drawn: up to this many uniforms more than a row of a tile has.
SLACK = 2 * LANES

# Elements of a tile whose strips lie in memory as they are, and rows and elements a row of one whose strips do not.
ELEMENTS_PER_TILE = 1024
GATHERED_ROWS, GATHERED_ROW = 64, 256
SHORTEST_STRIP = 16


def tile_shape(outer: int, structures: int, inner: int) -> tuple[int, int, int]:
    """Return a tile's (outer, structures, inner)."""
    if inner >= SHORTEST_STRIP:
        return 1, min(structures, max(1, ELEMENTS_PER_TILE // inner)), min(inner, ELEMENTS_PER_TILE)
    return min(outer, GATHERED_ROWS), min(structures, GATHERED_ROW // inner), inner


@kernel
def constants_kernel(mu, log_sigma, lower, upper):
    """Return the table of constants, float64 [structures, NUM_CONSTANTS]."""
    table = np.zeros((mu.size, NUM_CONSTANTS))
    for structure in range(mu.size):
        structure_constants(
            np.float64(mu[structure]), np.float64(log_sigma[structure]), lower, upper, table[structure]
        )
    return table


@kernel
def forward_kernel(x, out, table, mask, seed, sizes, tile_sizes, activation, first, last, lower, upper):
    """Write activation(x) · θ · mask for the tiles from ``first`` to before ``last``.

    Args:
        x: float32 or float64, flat.
        out: the same dtype, flat, to be written.
        table: constants of the structures.
        mask: factor per structure, in x's dtype.
        seed: int64.
        sizes: (outer, structures, inner).
        tile_sizes: the same of a tile.
        activation: its number.
        first: see above.
        last: see above.
        lower: lower end of log θ.
        upper: upper end of log θ.
    """
    uniform, starts = tile_memory(tile_sizes)
    # Each its own: where memory may overlap, loops are not vectorised.
    strip_y, strip_x = strip_memory(tile_sizes, np.float32), strip_memory(tile_sizes, x.dtype)
    strip_out, theta = strip_memory(tile_sizes, x.dtype), strip_memory(tile_sizes, x.dtype)
    noise = (theta, theta, theta)
    stride = sizes[1] * sizes[2]
    for number in range(first, last):
        begin, end = tile_bounds(number, sizes, tile_sizes)
        fill_tile(seed, begin, end, sizes, uniform, starts)
        rows, length = end[0] - begin[0], end[2] - begin[2]
        count = rows * length
        for structure in range(begin[1], end[1]):
            offset = (structure - begin[1]) * length
            origin = (begin[0] * sizes[1] + structure) * sizes[2] + begin[2]
            if rows == 1:
                y, strip, target = uniform[starts[0] + offset :], x[origin:], out[origin:]
            else:
                y, strip, target = strip_y, strip_x, strip_out
                gather_uniform(uniform[offset:], starts, rows, length, y)
                gather(x[origin:], stride, rows, length, strip)
            if mask[structure] != ZERO:
                strip_noise(y[:count], table[structure], lower, upper, noise, False)
            forward_strip(strip[:count], target, theta, mask[structure], activation)
            if rows > 1:
                scatter(target, stride, rows, length, out[origin:])


@kernel
def backward_kernel(
    grad, x, grad_x, sums, table, mask, seed, sizes, tile_sizes, activation, first, last, lower, upper
):
    """Write the gradient in x, and each tile's sums of the gradients in μ and log σ.

    Args:
        grad: gradient of the result, flat, in x's dtype.
        x: float32 or float64, flat.
        grad_x: flat, to be written, in x's dtype.
        sums: float64 [2, tiles of one structure, structures], to be written.
        table: constants of the structures.
        mask: factor per structure, in x's dtype.
        seed: int64.
        sizes: (outer, structures, inner).
        tile_sizes: the same of a tile.
        activation: its number.
        first: number of the first tile.
        last: number after that of the last tile.
        lower: lower end of log θ.
        upper: upper end of log θ.
    """
    uniform, starts = tile_memory(tile_sizes)
    strip_y, strip_x = strip_memory(tile_sizes, np.float32), strip_memory(tile_sizes, x.dtype)
    strip_grad, strip_out = strip_memory(tile_sizes, x.dtype), strip_memory(tile_sizes, x.dtype)
    noise = (
        strip_memory(tile_sizes, x.dtype),
        strip_memory(tile_sizes, x.dtype),
        strip_memory(tile_sizes, x.dtype),
    )
    theta, grad_mu, grad_log_sigma = noise
    stride = sizes[1] * sizes[2]
    tiles_across = -(-sizes[1] // tile_sizes[1])
    for number in range(first, last):
        begin, end = tile_bounds(number, sizes, tile_sizes)
        fill_tile(seed, begin, end, sizes, uniform, starts)
        rows, length = end[0] - begin[0], end[2] - begin[2]
        count = rows * length
        block = number // tiles_across
        for structure in range(begin[1], end[1]):
            offset = (structure - begin[1]) * length
            origin = (begin[0] * sizes[1] + structure) * sizes[2] + begin[2]
            if rows == 1:
                y, strip = uniform[starts[0] + offset :], x[origin:]
                upstream, target = grad[origin:], grad_x[origin:]
            else:
                y, strip, upstream, target = strip_y, strip_x, strip_grad, strip_out
                gather_uniform(uniform[offset:], starts, rows, length, y)
                gather(x[origin:], stride, rows, length, strip)
                gather(grad[origin:], stride, rows, length, upstream)
            alive = mask[structure] != ZERO
            if alive:
                strip_noise(y[:count], table[structure], lower, upper, noise, True)
            backward_strip(upstream[:count], strip, target, theta, mask[structure], activation)
            if rows > 1:
                scatter(target, stride, rows, length, grad_x[origin:])
            # A pruned structure takes no part, whatever its activations are.
            sums[0, block, structure] = dot(theta[:count], grad_mu) if alive else 0.0
            sums[1, block, structure] = dot(theta[:count], grad_log_sigma) if alive else 0.0


@kernel
def sum_kernel(sums, table, grad_mu, grad_log_sigma):
    """Add up the tiles' sums in their order; log σ has no gradient where it is clamped."""
    for structure in range(table.shape[0]):
        total_mu, total_log_sigma = 0.0, 0.0
        for across in range(sums.shape[1]):
            total_mu += sums[0, across, structure]
            total_log_sigma += sums[1, across, structure]
        grad_mu[structure] = total_mu
        grad_log_sigma[structure] = total_log_sigma if table[structure, IN_RANGE] != 0.0 else 0.0


@compiled
def tile_memory(tile_sizes):
    """Return memory for the uniforms of a tile and for the place of each row's first."""
    row = tile_sizes[1] * tile_sizes[2] + SLACK
    return np.empty(tile_sizes[0] * row, np.float32), np.empty(tile_sizes[0], np.int64)


@kernel
def sample_kernel(
    mu, log_sigma, uniform, lower, upper, theta, grad_mu, grad_log_sigma, with_gradients, first, last
):
    """Write θ at given float64 uniforms and its derivatives, float64; all arrays are flat and of one length."""
    row = np.zeros(NUM_CONSTANTS)
    for i in range(first, last):
        structure_constants(mu[i], log_sigma[i], lower, upper, row)
        x, slope_mu, slope_log_sigma = exact_log_noise(uniform[i], row, lower, upper)
        theta[i] = math.exp(x)
        if with_gradients:
            grad_mu[i] = theta[i] * slope_mu
            grad_log_sigma[i] = theta[i] * slope_log_sigma * row[IN_RANGE]


@kernel
def uniform_kernel(seed, out, first, last):
    """Write the uniforms number ``first`` to ``last - 1`` of a seed to their places."""
    memory = np.empty(ELEMENTS_PER_TILE + SLACK, np.float32)
    for start in range(first, last, ELEMENTS_PER_TILE):
        count = min(ELEMENTS_PER_TILE, last - start)
        skipped = fill_uniform(seed, start, count, memory)
        out[start : start + count] = memory[skipped : skipped + count]


@compiled
def strip_memory(tile_sizes, dtype):
    """Return memory for a number for each element of a strip."""
    return np.empty(tile_sizes[0] * tile_sizes[2], dtype)


@compiled
def tile_bounds(number, sizes, tile_sizes):
    """Return the first indices of a tile and those after its last; structures vary fastest with the number."""
    tiles_across = -(-sizes[1] // tile_sizes[1])
    tiles_inner = -(-sizes[2] // tile_sizes[2])
    block = number // tiles_across
    begin = (
        block // tiles_inner * tile_sizes[0],
        number % tiles_across * tile_sizes[1],
        block % tiles_inner * tile_sizes[2],
    )
    end = (
        min(begin[0] + tile_sizes[0], sizes[0]),
        min(begin[1] + tile_sizes[1], sizes[1]),
        min(begin[2] + tile_sizes[2], sizes[2]),
    )
    return begin, end


@compiled
def fill_tile(seed, begin, end, sizes, uniform, starts):
    """Draw the uniforms of a tile row by row, and note where each row's first one lies."""
    count = (end[1] - begin[1]) * (end[2] - begin[2])
    for row in range(end[0] - begin[0]):
        element = ((begin[0] + row) * sizes[1] + begin[1]) * sizes[2] + begin[2]
        place = row * (count + SLACK)
        starts[row] = place + fill_uniform(seed, element, count, uniform[place:])


@compiled
def gather_uniform(uniform, starts, rows, length, strip):
    """Copy a structure's uniforms from the rows of a tile."""
    if length == 1:
        for row in range(rows):
            strip[row] = uniform[np.uint64(starts[row])]
        return
    for row in range(rows):
        for i in range(length):
            strip[row * length + i] = uniform[starts[row] + i]


@compiled
def gather(source, stride, rows, length, strip):
    """Copy a structure's elements, which lie in rows ``stride`` apart, to one place."""
    if length == 1:
        for row in range(rows):
            strip[row] = source[np.uint64(row * stride)]
        return
    for row in range(rows):
        for i in range(length):
            strip[row * length + i] = source[row * stride + i]


@compiled
def scatter(strip, stride, rows, length, target):
    """Copy a structure's elements back to rows ``stride`` apart."""
    if length == 1:
        for row in range(rows):
            target[np.uint64(row * stride)] = strip[row]
        return
    for row in range(rows):
        for i in range(length):
            target[row * stride + i] = strip[row * length + i]


def _forward_strip(x, out, theta, factor, activation):  # type: ignore[no-untyped-def]
    """Write activation(x) · θ · factor of a strip; θ need not be known where the factor is 0."""
    if factor == ZERO:
        theta[: x.size] = ONE
    if activation == RELU:
        for i in range(x.size):
            # A NaN stays.
            value = ZERO if x[i] <= ZERO else x[i]
            out[i] = value * (theta[i] * factor)
    elif activation == TANH:
        for i in range(x.size):
            out[i] = tanh(x[i]) * (theta[i] * factor)
    else:
        for i in range(x.size):
            out[i] = x[i] * (theta[i] * factor)


def _backward_strip(grad, x, grad_x, theta, factor, activation):  # type: ignore[no-untyped-def]
    """Write the gradient in x of a strip, and in place of θ the products grad · activation(x) · θ · factor."""
    if factor == ZERO:
        theta[: grad.size] = ONE
    if activation == RELU:
        for i in range(grad.size):
            value, upstream, scale = x[i], grad[i], theta[i] * factor
            # Chosen and not multiplied, since 0 times infinity is not 0.
            dead = value <= ZERO
            grad_x[i] = ZERO if dead else upstream * scale
            theta[i] = ZERO if dead else upstream * value * scale
    elif activation == TANH:
        for i in range(grad.size):
            value, upstream, scale = tanh(x[i]), grad[i], theta[i] * factor
            grad_x[i] = upstream * (ONE - value * value) * scale
            theta[i] = upstream * value * scale
    else:
        for i in range(grad.size):
            value, upstream, scale = x[i], grad[i], theta[i] * factor
            grad_x[i] = upstream * scale
            theta[i] = upstream * value * scale


def _dot(first, second):  # type: ignore[no-untyped-def]
    """Return the sum of products over the length of ``first``; the order of float32 additions depends on it alone."""
    total = ZERO
    for i in range(first.size):
        total += first[i] * second[i]
    return np.float64(total)


forward_strip, backward_strip = (
    compiled(_forward_strip, inline=False),
    compiled(_backward_strip, inline=False),
)
dot = compiled(_dot, inline=False, fastmath=REGROUPING)
