"""What the kernels that multiply noise share: a tile's place in memory and in the noise's stream, and activations."""

from __future__ import annotations

import triton
import triton.language as tl

from bmrs_kernels.device_math import philox_4x32, tanh, uniform_from_word
from bmrs_kernels.multiplicative_noise.device_noise import posterior_constants

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def interleave(first, second, third, fourth):
    """Return the four values of each entry of a tile one after the other along the last axis."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, [first.shape[0], 4 * first.shape[1]])


@triton.jit
def halves(index, WIDE_INDEX: tl.constexpr):
    """Return the low and the high 32 bits of a non-negative index."""
    low = index.to(tl.uint32)
    if WIDE_INDEX:
        high = (index >> 32).to(tl.uint32)
    else:
        high = tl.zeros_like(low)
    return low, high


@triton.jit
def uniforms_of_counters(counter, seed, WIDE_INDEX: tl.constexpr):
    """Return the uniforms of neighbouring counters, four each, one after the other along the last axis."""
    low, high = halves(counter, WIDE_INDEX)
    first, second, third, fourth = philox_4x32(low, high, seed)
    return interleave(
        uniform_from_word(first),
        uniform_from_word(second),
        uniform_from_word(third),
        uniform_from_word(fourth),
    )


@triton.jit
def uniforms_at(index, seed, WIDE_INDEX: tl.constexpr):
    """Return the uniforms of any numbers, each with a counter of its own: four times the arithmetic."""
    low, high = halves(index >> 2, WIDE_INDEX)
    first, second, third, fourth = philox_4x32(low, high, seed)
    lane = index & 3
    word = tl.where(lane < 2, tl.where(lane == 0, first, second), tl.where(lane == 2, third, fourth))
    return uniform_from_word(word)


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """Return exp(x): float64 if EXACT, else float32."""
    return tl.exp(x) if EXACT else tl.exp2(x * LOG2_E)


@triton.jit
def widened(x, EXACT: tl.constexpr):
    """Return x in the dtype of the arithmetic."""
    return x.to(tl.float64) if EXACT else x.to(tl.float32)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Return activation(x)."""
    if ACTIVATION == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    return x


@triton.jit
def behind_activation(grad, x, value, ACTIVATION: tl.constexpr):
    """Return the gradient in x from the gradient in value = activation(x)."""
    if ACTIVATION == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "tanh":
        grad = grad * (1.0 - value * value)
    return grad


@triton.jit
def rows_tile(
    row_block,
    inner_block,
    structure,
    num_rows,
    num_structures,
    inner,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
):
    """Return offsets [rows, inner] in memory, which of them are valid, and the noise's counters [rows, inner / 4].

    Offsets are the logical ones too. Unless ALIGNED, a row's tile starts at the last multiple of four before the row.
    """
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if WIDE_INDEX:
        row = row.to(tl.int64)
    start = (row * num_structures + structure) * inner
    column = inner_block * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    if ALIGNED:
        first = start
        offsets = first[:, None] + column[None, :]
        valid = (row < num_rows)[:, None] & (column < inner)[None, :]
    else:
        first = start & -4
        offsets = first[:, None] + column[None, :]
        in_row = (offsets >= start[:, None]) & (offsets < (start + inner)[:, None])
        valid = (row < num_rows)[:, None] & in_row
    quarter = inner_block * (BLOCK_INNER // 4) + tl.arange(0, BLOCK_INNER // 4)
    counters = (first >> 2)[:, None] + quarter[None, :]
    return offsets, valid, counters


@triton.jit
def columns_tile(
    row,
    structure,
    num_rows,
    num_structures,
    spatial,
    seed,
    lane: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
):
    """Return offsets [rows, structures] in memory, which of them are valid, and their uniforms.

    LANES says where a counter's four numbers lie: in neighbouring "structures", in neighbouring "rows", of which the
    tile then holds every fourth, starting at ``lane``, or "scattered".
    """
    valid = (row < num_rows)[:, None] & (structure < num_structures)[None, :]
    if WIDE_INDEX:
        row = row.to(tl.int64)
    offsets = row[:, None] * num_structures + structure[None, :]
    if LANES == "structures":
        quarter = tl.program_id(0) * (BLOCK_STRUCTURES // 4) + tl.arange(0, BLOCK_STRUCTURES // 4)
        counters = row[:, None] * (num_structures // 4) + quarter[None, :]
        return offsets, valid, uniforms_of_counters(counters, seed, WIDE_INDEX)
    if CHANNELS_LAST:
        example, position = row // spatial, row % spatial
        index = (example[:, None] * num_structures + structure[None, :]) * spatial + position[:, None]
    else:
        index = offsets
    if LANES == "rows":
        low, high = halves(index >> 2, WIDE_INDEX)
        words = philox_4x32(low, high, seed)
        return offsets, valid, uniform_from_word(words[lane])
    return offsets, valid, uniforms_at(index, seed, WIDE_INDEX)


@triton.jit
def columns_constants(
    mu_ptr, log_sigma_ptr, structure, num_structures, LOWER: tl.constexpr, UPPER: tl.constexpr
):
    """Return the constants of a tile's structures, each [1, structures]."""
    valid = (structure < num_structures)[None, :]
    mu = tl.load(mu_ptr + structure[None, :], mask=valid, other=0.0)
    log_sigma = tl.load(log_sigma_ptr + structure[None, :], mask=valid, other=0.0)
    return posterior_constants(mu, log_sigma, LOWER, UPPER)


@triton.jit
def columns_factor(factor_ptr, structure, num_structures, EXACT: tl.constexpr):
    """Return a factor for each structure, [1, structures]; 1 if there is none."""
    valid = (structure < num_structures)[None, :]
    if factor_ptr is None:
        factor = tl.full(valid.shape, 1.0, tl.float32)
    else:
        factor = tl.load(factor_ptr + structure[None, :], mask=valid, other=0.0)
    return widened(factor, EXACT)
