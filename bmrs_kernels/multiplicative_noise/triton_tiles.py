"""What the kernels that multiply noise share: a tile's place in memory and in the noise's stream, and activations."""

from __future__ import annotations

import triton
import triton.language as tl

from bmrs_kernels.multiplicative_noise.triton_constants import (
    load_posterior,
    posterior_constants,
    table_column,
)
from bmrs_kernels.truncated_normal.triton_special import tanh
from bmrs_kernels.uniform.triton_philox import halves, philox_4x32, word_at, words_of_counters

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def held_like(word, x):
    """Return a uint32 tile as it is, held by the threads that hold x, float32 or float64.

    Layouts spread from what is loaded to what is computed from it. Without this tie, which compiles to nothing, Triton
    would hold noise in another layout and exchange each result of the regimes' branches through shared memory.
    """
    bits = x.to(tl.uint64 if x.dtype == tl.float64 else tl.uint32, bitcast=True).to(tl.uint32)
    return word | ((bits & 1) >> 1)


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
def rows_of_block(block, BLOCK_ROWS: tl.constexpr, WIDE_INDEX: tl.constexpr):
    """Return the numbers of a block's rows."""
    if WIDE_INDEX:
        block = block.to(tl.int64)
    return block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)


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
    row = rows_of_block(row_block, BLOCK_ROWS, WIDE_INDEX)
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
def columns_tile(row, structure, num_rows, num_structures):
    """Return offsets [rows, structures] in memory and which of them are valid; ``structure`` is [1, structures]."""
    valid = (row < num_rows)[:, None] & (structure < num_structures)
    return row[:, None] * num_structures + structure, valid


@triton.jit
def columns_words(
    x,
    row,
    structure,
    structure_block,
    num_structures,
    spatial,
    seed,
    LANES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
):
    """Return the noise's words for rows of structures, a tile [rows, structures] for each lane.

    LANES says where a counter's four words lie: in neighbouring "structures", in neighbouring "rows", which ``row``
    then counts in fours, or "scattered". Only "rows" has four lanes; the others' tile is there four times. Words are
    held like x, the first lane's tile of the activation, unless that is None.
    """
    if LANES == "structures":
        quarter = structure_block * (BLOCK_STRUCTURES // 4) + tl.arange(0, BLOCK_STRUCTURES // 4)
        counter = row[:, None] * (num_structures // 4) + quarter[None, :]
        word = words_of_counters(counter, seed, WIDE_INDEX)
        if x is not None:
            word = held_like(word, x)
        return word, word, word, word
    if CHANNELS_LAST:
        rows_of_example = spatial // 4 if LANES == "rows" else spatial
        example, position = row // rows_of_example, row % rows_of_example
        index = (example[:, None] * num_structures + structure) * rows_of_example + position[:, None]
    else:
        index = row[:, None] * num_structures + structure
    if LANES == "rows":
        low, high = halves(index, WIDE_INDEX)
        return philox_4x32(held_like(low, x), high, seed)
    word = word_at(index, seed, WIDE_INDEX)
    if x is not None:
        word = held_like(word, x)
    return word, word, word, word


@triton.jit
def columns_posterior(
    mu_ptr,
    log_sigma_ptr,
    table_ptr,
    structure,
    num_structures,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Return the constants of a tile's structures: from the table, float64 if EXACT; computed, if there is none."""
    if table_ptr is None:
        valid = structure < num_structures
        mu = tl.load(mu_ptr + structure, mask=valid, other=0.0)
        log_sigma = tl.load(log_sigma_ptr + structure, mask=valid, other=0.0)
        posterior = posterior_constants(mu, log_sigma, LOWER, UPPER)
    else:
        posterior = load_posterior(table_column(table_ptr, structure, EXACT))
    return posterior


@triton.jit
def columns_factor(factor_ptr, structure, num_structures, EXACT: tl.constexpr):
    """Return a factor for each structure, in the shape of ``structure``; 1 if there is none."""
    if factor_ptr is None:
        factor = tl.full(structure.shape, 1.0, tl.float32)
    else:
        factor = tl.load(factor_ptr + structure, mask=structure < num_structures, other=0.0)
    return widened(factor, EXACT)
