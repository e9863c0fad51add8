"""What the kernels that multiply noise share: a tile's place in memory and in the noise's stream, and activations."""

from __future__ import annotations

import triton
import triton.language as tl

from bmrs_kernels.multiplicative_noise.triton_constants import (
    load_posterior,
    posterior_constants,
    table_column,
)
from bmrs_kernels.multiplicative_noise.triton_joined import joined, parted
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
def four_column_tiles(quad, column, num_rows, num_structures, LANES: tl.constexpr):
    """Return what ``columns_tile`` does for the rows 4 · quad + 0, 1, 2 and 3: four offsets and four validities."""
    structure, stride = column[None, :], num_structures
    first, valid_0 = columns_tile(4 * quad, structure, num_rows, num_structures)
    if LANES == "rows":  # the number of rows is a multiple of four
        valid_1, valid_2, valid_3 = valid_0, valid_0, valid_0
    else:
        in_width = structure < num_structures
        valid_1 = (4 * quad + 1 < num_rows)[:, None] & in_width
        valid_2 = (4 * quad + 2 < num_rows)[:, None] & in_width
        valid_3 = (4 * quad + 3 < num_rows)[:, None] & in_width
    return (first, first + stride, first + 2 * stride, first + 3 * stride), (
        valid_0,
        valid_1,
        valid_2,
        valid_3,
    )


@triton.jit
def load_four(pointer, offsets, valid, EXACT: tl.constexpr):
    """Return four tiles, ``joined``, in the dtype of the arithmetic, and 0 where they are not valid."""
    return joined(
        widened(tl.load(pointer + offsets[0], mask=valid[0], other=0.0), EXACT),
        widened(tl.load(pointer + offsets[1], mask=valid[1], other=0.0), EXACT),
        widened(tl.load(pointer + offsets[2], mask=valid[2], other=0.0), EXACT),
        widened(tl.load(pointer + offsets[3], mask=valid[3], other=0.0), EXACT),
    )


@triton.jit
def store_four(pointer, offsets, value, valid):
    """Write what is ``joined`` of four tiles."""
    first, second, third, fourth = parted(value)
    tl.store(pointer + offsets[0], first, mask=valid[0])
    tl.store(pointer + offsets[1], second, mask=valid[1])
    tl.store(pointer + offsets[2], third, mask=valid[2])
    tl.store(pointer + offsets[3], fourth, mask=valid[3])


@triton.jit
def structures_words(
    row, structure_block, num_structures, seed, BLOCK_STRUCTURES: tl.constexpr, WIDE_INDEX: tl.constexpr
):
    """Return the noise's words for rows of structures, whose number is a multiple of four: as many share a counter."""
    quarter = structure_block * (BLOCK_STRUCTURES // 4) + tl.arange(0, BLOCK_STRUCTURES // 4)
    counter = row[:, None] * (num_structures // 4) + quarter[None, :]
    return words_of_counters(counter, seed, WIDE_INDEX)


@triton.jit
def columns_words(
    x,
    block,
    index,
    column,
    structure_block,
    num_structures,
    spatial,
    seed,
    LANES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
):
    """Return the noise's words for a block's rows 4 · q + 0, 1, 2 and 3 of structures, ``joined`` and held like x.

    LANES says where a counter's four words lie: in neighbouring "structures", in neighbouring "rows", whose counters
    are ``index``, or "scattered".
    """
    if LANES == "structures":
        rows = rows_of_block(block, 4 * BLOCK_ROWS, WIDE_INDEX)
        words = structures_words(rows, structure_block, num_structures, seed, BLOCK_STRUCTURES, WIDE_INDEX)
        # From threads with four structures of a row to threads with four rows of a structure.
        words = tl.permute(tl.reshape(words, [BLOCK_ROWS, 4, BLOCK_STRUCTURES]), [0, 2, 1])
    elif LANES == "rows":
        low, high = halves(index, WIDE_INDEX)
        first, second, third, fourth = philox_4x32(low, high, seed)
        words = joined(first, second, third, fourth)
    else:
        row = 4 * rows_of_block(block, BLOCK_ROWS, WIDE_INDEX)[:, None] + tl.arange(0, 4)[None, :]
        if CHANNELS_LAST:
            example, position = row // spatial, row % spatial
            index = (example[:, None, :] * num_structures + column[None, :, None]) * spatial + position[
                :, None, :
            ]
        else:
            index = row[:, None, :] * num_structures + column[None, :, None]
        words = word_at(index, seed, WIDE_INDEX)
    return held_like(words, x)


@triton.jit
def index_of_rows(row, column, num_structures, rows_of_example):
    """Return where rows of a tensor in channels_last lie in the logical order, and each row's place in its example."""
    example, position = row // rows_of_example, row % rows_of_example
    index = (example[:, None] * num_structures + column[None, :]) * rows_of_example + position[:, None]
    return index, position


@triton.jit
def index_of_next_rows(index, position, num_structures, rows_of_example, BLOCK_ROWS: tl.constexpr):
    """Return what ``index_of_rows`` does for the next block's rows.

    A division for each row takes as long as a tenth of the noise.
    """
    ended = position >= rows_of_example - BLOCK_ROWS
    position += tl.where(ended, BLOCK_ROWS - rows_of_example, BLOCK_ROWS)
    behind = tl.cast(num_structures - 1, index.dtype) * rows_of_example + BLOCK_ROWS
    index += tl.where(ended, behind, BLOCK_ROWS)[:, None]
    return index, position


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
