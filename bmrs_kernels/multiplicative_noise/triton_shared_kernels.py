"""Kernels for noise that several elements share: one draw for an example and structure, or for a structure.

``draw_kernel`` fills a table θ · mask [groups, structures]; the others multiply it onto x, seen as [groups, rows,
structures, inner] in the order in which it lies in memory. Backward sums grad · activation(x) over what shares a draw,
and ``sum_partials_kernel`` multiplies that by the draw's derivatives.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bmrs_kernels.multiplicative_noise.triton_log_noise import tile_log_noise, tile_regimes
from bmrs_kernels.multiplicative_noise.triton_tiles import (
    activated,
    behind_activation,
    columns_factor,
    columns_posterior,
    columns_tile,
    exponential,
    rows_of_block,
    structures_words,
    widened,
)
from bmrs_kernels.uniform.triton_philox import uniform_from_word, word_at


@triton.jit
def draw_kernel(
    theta_ptr,
    weight_mu_ptr,
    weight_log_sigma_ptr,
    mu_ptr,
    log_sigma_ptr,
    mask_ptr,
    seed_ptr,
    num_groups,
    num_structures,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
    EXACT: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Fill the tables θ · mask and, if asked for, θ · mask · dx/dμ and · dx/dlog σ, all [groups, structures].

    A program owns a tile [BLOCK_ROWS, BLOCK_STRUCTURES]; the grid is (blocks of groups, blocks of structures).
    x = log θ.
    """
    group = rows_of_block(tl.program_id(0), BLOCK_ROWS, False)
    structure = (tl.program_id(1) * BLOCK_STRUCTURES + tl.arange(0, BLOCK_STRUCTURES))[None, :]
    posterior = columns_posterior(mu_ptr, log_sigma_ptr, None, structure, num_structures, LOWER, UPPER, EXACT)
    factor = columns_factor(mask_ptr, structure, num_structures, EXACT)
    offsets, valid = columns_tile(group, structure, num_groups, num_structures)
    seed = tl.load(seed_ptr)
    if LANES == "structures":
        word = structures_words(group, tl.program_id(1), num_structures, seed, BLOCK_STRUCTURES, False)
    else:
        word = word_at(group[:, None] * num_structures + structure, seed, False)
    y = uniform_from_word(word)
    log_theta, grad_mu, grad_log_sigma = tile_log_noise(
        y,
        posterior,
        tile_regimes(posterior),
        None,
        structure,
        LOWER,
        UPPER,
        EXACT,
        WITH_GRADIENTS,
    )
    theta = exponential(log_theta, EXACT) * factor
    tl.store(theta_ptr + offsets, theta, mask=valid)
    if WITH_GRADIENTS:
        in_range = widened(posterior.log_sigma_in_range, EXACT)
        tl.store(weight_mu_ptr + offsets, theta * grad_mu, mask=valid)
        tl.store(weight_log_sigma_ptr + offsets, theta * grad_log_sigma * in_range, mask=valid)


@triton.jit
def inner_tile(
    num_draws,
    inner,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
):
    """Return a program's rows, a row for each structure of each entry before it, their block, offsets and validity."""
    num_inner_blocks = tl.cdiv(inner, BLOCK_INNER)
    inner_block = tl.program_id(0) % num_inner_blocks
    row = (tl.program_id(0) // num_inner_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = inner_block * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    valid = (row < num_draws)[:, None] & (column < inner)[None, :]
    if WIDE_INDEX:
        row = row.to(tl.int64)
    return row, inner_block, row[:, None] * inner + column[None, :], valid


@triton.jit
def theta_of_rows(theta_ptr, row, num_rows, num_structures, rows_per_group):
    """Return θ · mask for rows of structures, [rows, 1]."""
    draw = (row // num_structures // rows_per_group) * num_structures + row % num_structures
    return tl.load(theta_ptr + draw, mask=row < num_rows, other=0.0)[:, None]


@triton.jit
def scale_rows_forward_kernel(
    x_ptr,
    out_ptr,
    theta_ptr,
    num_rows,
    num_structures,
    rows_per_group,
    inner_units,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Compute out = activation(x) · θ · mask for x [num_rows, inner], a row for each structure in turn."""
    row, _, offsets, valid = inner_tile(
        num_rows, inner_units * ALIGNMENT, BLOCK_ROWS, BLOCK_INNER, WIDE_INDEX
    )
    theta = theta_of_rows(theta_ptr, row, num_rows, num_structures, rows_per_group)
    # What is masked is not read, and may be infinite.
    x = widened(tl.load(x_ptr + offsets, mask=valid & (theta != 0), other=0.0), EXACT)
    tl.store(out_ptr + offsets, activated(x, ACTIVATION) * theta, mask=valid)


@triton.jit
def scale_rows_backward_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    partial_ptr,
    theta_ptr,
    num_rows,
    num_structures,
    rows_per_group,
    inner_units,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradient of the forward kernel in x, and sums of grad · activation(x) over the part of each row in a tile.

    The sums are [num_rows / structures, blocks of inner, structures].
    """
    inner = inner_units * ALIGNMENT
    row, inner_block, offsets, valid = inner_tile(num_rows, inner, BLOCK_ROWS, BLOCK_INNER, WIDE_INDEX)
    theta = theta_of_rows(theta_ptr, row, num_rows, num_structures, rows_per_group)
    kept = valid & (theta != 0)
    grad = widened(tl.load(grad_ptr + offsets, mask=kept, other=0.0), EXACT)
    x = widened(tl.load(x_ptr + offsets, mask=kept, other=0.0), EXACT)
    value = activated(x, ACTIVATION)
    grad_x = behind_activation(grad, x, value, ACTIVATION)
    tl.store(grad_x_ptr + offsets, grad_x * theta, mask=valid)
    weight = (grad_x if ACTIVATION == "relu" else grad) * value
    partial = (row // num_structures) * tl.cdiv(inner, BLOCK_INNER) + inner_block
    partial = partial * num_structures + row % num_structures
    tl.store(partial_ptr + partial, tl.sum(weight, 1), mask=row < num_rows)


@triton.jit
def group_tile(
    row_block,
    group,
    structure,
    rows_per_group,
    num_structures,
    BLOCK_ROWS: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
):
    """Return the offsets [rows, structures] of a block of a group's rows, and which of them are valid."""
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = (row < rows_per_group)[:, None] & (structure < num_structures)[None, :]
    first_row = group * rows_per_group
    if WIDE_INDEX:
        first_row, row = first_row.to(tl.int64), row.to(tl.int64)
    return (first_row + row)[:, None] * num_structures + structure[None, :], valid


@triton.jit
def scale_columns_forward_kernel(
    x_ptr,
    out_ptr,
    theta_ptr,
    rows_per_group,
    num_structures,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Compute out = activation(x) · θ · mask for x [groups, rows, structures].

    A program owns a tile [BLOCK_ROWS, BLOCK_STRUCTURES] of one group; the grid is (blocks of rows times groups, blocks
    of structures).
    """
    num_row_blocks = tl.cdiv(rows_per_group, BLOCK_ROWS)
    group, row_block = tl.program_id(0) // num_row_blocks, tl.program_id(0) % num_row_blocks
    structure = tl.program_id(1) * BLOCK_STRUCTURES + tl.arange(0, BLOCK_STRUCTURES)
    theta = columns_factor(theta_ptr + group * num_structures, structure[None, :], num_structures, EXACT)
    offsets, valid = group_tile(
        row_block, group, structure, rows_per_group, num_structures, BLOCK_ROWS, WIDE_INDEX
    )
    x = widened(tl.load(x_ptr + offsets, mask=valid, other=0.0), EXACT)
    # Selected and not multiplied, since 0 times infinity is not 0.
    value = tl.where(theta == 0, 0.0, activated(x, ACTIVATION))
    tl.store(out_ptr + offsets, value * theta, mask=valid)


@triton.jit
def scale_columns_backward_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    partial_ptr,
    theta_ptr,
    rows_per_group,
    num_structures,
    num_steps,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradient of the forward kernel in x, and sums of grad · activation(x) over a program's rows.

    A program owns num_steps tiles below each other of one group. The sums are [groups, programs of a group,
    structures].
    """
    num_row_programs = tl.cdiv(rows_per_group, BLOCK_ROWS * num_steps)
    group, row_program = tl.program_id(0) // num_row_programs, tl.program_id(0) % num_row_programs
    structure = tl.program_id(1) * BLOCK_STRUCTURES + tl.arange(0, BLOCK_STRUCTURES)
    theta = columns_factor(theta_ptr + group * num_structures, structure[None, :], num_structures, EXACT)
    total = tl.zeros([BLOCK_ROWS, BLOCK_STRUCTURES], tl.float64 if EXACT else tl.float32)
    for step in range(num_steps):
        row_block = row_program * num_steps + step
        offsets, valid = group_tile(
            row_block, group, structure, rows_per_group, num_structures, BLOCK_ROWS, WIDE_INDEX
        )
        grad = widened(tl.load(grad_ptr + offsets, mask=valid, other=0.0), EXACT)
        x = widened(tl.load(x_ptr + offsets, mask=valid, other=0.0), EXACT)
        value = activated(x, ACTIVATION)
        grad_x = behind_activation(grad, x, value, ACTIVATION)
        weight = (grad_x if ACTIVATION == "relu" else grad) * value
        # Selected and not multiplied, since 0 times infinity is not 0.
        tl.store(grad_x_ptr + offsets, tl.where(theta == 0, 0.0, grad_x) * theta, mask=valid)
        total += tl.where(theta == 0, 0.0, weight)
    partial = tl.program_id(0) * num_structures + structure
    tl.store(partial_ptr + partial, tl.sum(total, 0), mask=structure < num_structures)
