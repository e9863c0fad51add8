"""Compiled CPU loops that multiply noise onto activations, forward and backward, in one pass.

The activation is seen as [outer, structures, inner] in logical order and cut into tiles that stay in a core's cache:
the uniforms of a tile are drawn at once, then each of its structures is a strip. Where ``inner`` is short, the elements
of a strip lie apart and are gathered. What a tile computes depends on nothing outside it, and sums are kept by tile:
results do not depend on which thread computes which tiles.

Loops are compiled for float32 and for float64, as the argument ``one`` says.
"""

from __future__ import annotations

import numpy as np

from bmrs_kernels.dispatch.numba_compile import compiled, loop
from bmrs_kernels.dispatch.numba_memory import (
    cast_like,
    unmanaged,
    use_widest_vectors,
    vector_at,
    vector_like,
    zeros_like_number,
)
from bmrs_kernels.multiplicative_noise.numba_log_noise import (
    FACTOR,
    IN_RANGE,
    NUM_CONSTANTS,
    structure_constants,
)
from bmrs_kernels.multiplicative_noise.numba_strips import (
    ZERO,
    backward_strip,
    dot,
    forward_strip,
    scale_strip,
    typed_strip_noise,
    unscale_strip,
)
from bmrs_kernels.uniform.numba_philox import LANES, fill_uniform

ELEMENTS_PER_VECTOR = 16
# Whole counters are drawn, and whole vectors computed: room beyond the uniforms of a tile's row.
SLACK = 2 * LANES + ELEMENTS_PER_VECTOR

# Elements of a tile whose strips lie in memory as they are, and rows and elements a row of one whose strips do not.
ELEMENTS_PER_TILE = 1024
GATHERED_ROWS, GATHERED_ROW = 64, 256
SHORTEST_STRIP = 16


def tile_shape(outer: int, structures: int, inner: int) -> tuple[int, int, int]:
    """Return a tile's (outer, structures, inner)."""
    if inner >= SHORTEST_STRIP:
        return 1, min(structures, max(1, ELEMENTS_PER_TILE // inner)), min(inner, ELEMENTS_PER_TILE)
    return min(outer, GATHERED_ROWS), min(structures, GATHERED_ROW // inner), inner


@loop
def constants_loop(mu, log_sigma, in_float64, mask, structures, lower, upper):
    """Return the table of constants, float64 [structures, NUM_CONSTANTS].

    Args:
        mu: address of float32 or float64.
        log_sigma: address of the same dtype.
        in_float64: whether they are float64.
        mask: address of a float64 factor per structure, 0 for none.
        structures: their number.
        lower: lower end of log θ.
        upper: upper end of log θ.
    """
    table = np.zeros((structures, NUM_CONSTANTS))
    narrow_mu, wide_mu = vector_at(mu, structures, np.float32), vector_at(mu, structures, np.float64)
    narrow_scale = vector_at(log_sigma, structures, np.float32)
    wide_scale = vector_at(log_sigma, structures, np.float64)
    factors = vector_at(mask, structures, np.float64)
    for structure in range(structures):
        row = table[structure]
        if in_float64:
            structure_constants(wide_mu[structure], wide_scale[structure], lower, upper, row)
        else:
            location, scale = np.float64(narrow_mu[structure]), np.float64(narrow_scale[structure])
            structure_constants(location, scale, lower, upper, row)
        row[FACTOR] = factors[structure] if mask != 0 else 1.0
    return table


@loop
def forward_loop(one, x, out, table, seed, sizes, tile_sizes, activation, first, last, lower, upper):
    """Write activation(x) · θ · mask for the tiles from ``first`` to before ``last``.

    Args:
        one: 1 in the dtype of the activation and of the arithmetic, float32 or float64.
        x: address of the activation, contiguous.
        out: address of the result, to be written.
        table: constants of the structures.
        seed: int64.
        sizes: (outer, structures, inner).
        tile_sizes: the same of a tile.
        activation: its number.
        first: number of the first tile.
        last: number after that of the last tile.
        lower: lower end of log θ.
        upper: upper end of log θ.
    """
    use_widest_vectors()
    elements = sizes[0] * sizes[1] * sizes[2]
    x, out, rows_of = (
        vector_like(x, elements, one),
        vector_like(out, elements, one),
        unmanaged(table),
    )
    longest = padded(tile_sizes[0] * tile_sizes[2])
    # Zeros, since strips are computed to the end of a vector: what lies there must be a number.
    memory, uniform_memory = zeros_like_number((3, longest), one), np.zeros((2, room(tile_sizes)), np.float32)
    strip_x, strip_out, theta = unmanaged(memory[0]), unmanaged(memory[1]), unmanaged(memory[2])
    uniform, strip_y = unmanaged(uniform_memory[0]), unmanaged(uniform_memory[1])
    starts = np.empty(tile_sizes[0], np.int64)
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
            row = rows_of[structure]
            factor = cast_like(row[FACTOR], one)
            if factor != ZERO:
                typed_strip_noise(y[: padded(count)], row, lower, upper, noise, False)
            forward_strip(strip[:count], target, theta, factor, activation)
            if rows > 1:
                scatter(target, stride, rows, length, out[origin:])
    # Used last, so that the memory of the arrays above lives until here.
    memory[0, 0], uniform_memory[0, 0] = ZERO, ZERO


@loop
def backward_loop(
    one, grad, x, grad_x, sums, table, seed, sizes, tile_sizes, activation, first, last, lower, upper
):
    """Write the gradient in x, and each tile's sums of the gradients in μ and log σ.

    Args:
        one: 1 in the dtype of the activation and of the arithmetic, float32 or float64.
        grad: address of the gradient of the result, contiguous.
        x: address of the activation, contiguous.
        grad_x: address of its gradient, to be written.
        sums: float64 [2, tiles of one structure, structures], to be written.
        table: constants of the structures.
        seed: int64.
        sizes: (outer, structures, inner).
        tile_sizes: the same of a tile.
        activation: its number.
        first: number of the first tile.
        last: number after that of the last tile.
        lower: lower end of log θ.
        upper: upper end of log θ.
    """
    use_widest_vectors()
    elements = sizes[0] * sizes[1] * sizes[2]
    grad, x = vector_like(grad, elements, one), vector_like(x, elements, one)
    grad_x, rows_of = vector_like(grad_x, elements, one), unmanaged(table)
    longest = padded(tile_sizes[0] * tile_sizes[2])
    memory, uniform_memory = zeros_like_number((6, longest), one), np.zeros((2, room(tile_sizes)), np.float32)
    strip_x, strip_grad, strip_out = unmanaged(memory[0]), unmanaged(memory[1]), unmanaged(memory[2])
    theta, grad_mu, grad_log_sigma = unmanaged(memory[3]), unmanaged(memory[4]), unmanaged(memory[5])
    uniform, strip_y = unmanaged(uniform_memory[0]), unmanaged(uniform_memory[1])
    starts = np.empty(tile_sizes[0], np.int64)
    noise = (theta, grad_mu, grad_log_sigma)
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
            row = rows_of[structure]
            factor = cast_like(row[FACTOR], one)
            alive = factor != ZERO
            if alive:
                typed_strip_noise(y[: padded(count)], row, lower, upper, noise, True)
            backward_strip(upstream[:count], strip, target, theta, factor, activation)
            if rows > 1:
                scatter(target, stride, rows, length, grad_x[origin:])
            # A pruned structure takes no part, whatever its activations are.
            sums[0, block, structure] = dot(theta[:count], grad_mu) if alive else 0.0
            sums[1, block, structure] = dot(theta[:count], grad_log_sigma) if alive else 0.0
    memory[0, 0], uniform_memory[0, 0] = ZERO, ZERO


@loop
def shared_forward_loop(one, x, out, theta, rows, length, rows_of_draw, structures, activation, first, last):
    """Write activation(x) · θ for rows ``first`` to ``last - 1``.

    Args:
        one: 1 in the dtype of the activation and of the arithmetic, float32 or float64.
        x: address of the activation [rows, length], contiguous, structures varying fastest along the rows.
        out: address of the result, to be written.
        theta: address of θ · mask [draws of a structure, structures].
        rows: their number.
        length: elements of a row.
        rows_of_draw: how many of a structure's rows in succession share a draw.
        structures: their number.
        activation: its number.
        first: number of the first row to compute.
        last: number after that of the last one.
    """
    x, out = vector_like(x, rows * length, one), vector_like(out, rows * length, one)
    theta = vector_like(theta, rows // rows_of_draw, one)
    for row in range(first, last):
        factor = theta[row // structures // rows_of_draw * structures + row % structures]
        scale_strip(x[row * length :][:length], out[row * length :], factor, activation)


@loop
def shared_backward_loop(
    one, grad, x, grad_x, sums, theta, rows, length, rows_of_draw, structures, activation, first, last
):
    """Write the gradient in x, and each row's sum of grad · activation(x).

    Args:
        one: 1 in the dtype of the activation and of the arithmetic, float32 or float64.
        grad: address of the gradient of the result [rows, length], contiguous.
        x: address of the activation.
        grad_x: address of its gradient, to be written.
        sums: address of float64 [rows], to be written.
        theta: address of θ · mask [draws of a structure, structures].
        rows: their number.
        length: elements of a row.
        rows_of_draw: how many of a structure's rows in succession share a draw.
        structures: their number.
        activation: its number.
        first: number of the first row to compute.
        last: number after that of the last one.
    """
    grad, x = vector_like(grad, rows * length, one), vector_like(x, rows * length, one)
    grad_x, sums = vector_like(grad_x, rows * length, one), vector_at(sums, rows, np.float64)
    theta = vector_like(theta, rows // rows_of_draw, one)
    for row in range(first, last):
        factor = theta[row // structures // rows_of_draw * structures + row % structures]
        # In pieces, since float32 sums of many terms lose their last ones.
        total = 0.0
        for begin in range(row * length, (row + 1) * length, ELEMENTS_PER_TILE):
            piece = min(ELEMENTS_PER_TILE, (row + 1) * length - begin)
            total += unscale_strip(grad[begin:][:piece], x[begin:], grad_x[begin:], factor, activation)
        sums[row] = total


@loop
def sum_loop(sums, table, grad_mu, grad_log_sigma, in_float64):
    """Add up the tiles' sums in their order; log σ has no gradient where it is clamped.

    Args:
        sums: what ``backward_loop`` wrote.
        table: constants of the structures.
        grad_mu: address of the result, to be written.
        grad_log_sigma: address of the result, to be written.
        in_float64: whether the results are float64 and not float32.
    """
    structures = table.shape[0]
    for structure in range(structures):
        total_mu, total_log_sigma = 0.0, 0.0
        for block in range(sums.shape[1]):
            total_mu += sums[0, block, structure]
            total_log_sigma += sums[1, block, structure]
        total_log_sigma = total_log_sigma if table[structure, IN_RANGE] != 0.0 else 0.0
        if in_float64:
            vector_at(grad_mu, structures, np.float64)[structure] = total_mu
            vector_at(grad_log_sigma, structures, np.float64)[structure] = total_log_sigma
        else:
            vector_at(grad_mu, structures, np.float32)[structure] = total_mu
            vector_at(grad_log_sigma, structures, np.float32)[structure] = total_log_sigma


@compiled
def padded(count):
    """Return a number of elements that fills whole vectors: the rest of a loop would take one element at a time."""
    return -(-count // ELEMENTS_PER_VECTOR) * ELEMENTS_PER_VECTOR


@compiled
def room(tile_sizes):
    """Return how much memory the uniforms of a tile need, as rows and as strips."""
    row = tile_sizes[1] * tile_sizes[2] + SLACK
    return max(tile_sizes[0] * row, padded(tile_sizes[0] * tile_sizes[2]))


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
