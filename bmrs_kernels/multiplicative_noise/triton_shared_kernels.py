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
    columns_words,
    exponential,
    rows_of_block,
    widened,
)
from bmrs_kernels.uniform.triton_philox import uniform_from_word


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
    words = columns_words(
        None,
        group,
        structure,
        tl.program_id(1),
        num_structures,
        1,
        tl.load(seed_ptr),
        LANES,
        False,
        BLOCK_STRUCTURES,
        False,
    )
    y = uniform_from_word(words[0])
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
    rows_per_group,
    num_structures,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
):
    """Return a program's group, its structures, and offsets [rows, structures] with validity."""
    num_row_blocks = tl.cdiv(rows_per_group, BLOCK_ROWS)
    group = tl.program_id(0) // num_row_blocks
    row_block = tl.program_id(0) % num_row_blocks
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    structure = tl.program_id(1) * BLOCK_STRUCTURES + tl.arange(0, BLOCK_STRUCTURES)
    valid = (row < rows_per_group)[:, None] & (structure < num_structures)[None, :]
    first_row = group * rows_per_group
    if WIDE_INDEX:
        first_row, row = first_row.to(tl.int64), row.to(tl.int64)
    return group, structure, (first_row + row)[:, None] * num_structures + structure[None, :], valid


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
    group, structure, offsets, valid = group_tile(
        rows_per_group, num_structures, BLOCK_ROWS, BLOCK_STRUCTURES, WIDE_INDEX
    )
    theta = columns_factor(theta_ptr + group * num_structures, structure[None, :], num_structures, EXACT)
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
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradient of the forward kernel in x, and sums of grad · activation(x) over a program's rows.

    The sums are [groups, blocks of rows, structures].
    """
    group, structure, offsets, valid = group_tile(
        rows_per_group, num_structures, BLOCK_ROWS, BLOCK_STRUCTURES, WIDE_INDEX
    )
    theta = columns_factor(theta_ptr + group * num_structures, structure[None, :], num_structures, EXACT)
    grad = widened(tl.load(grad_ptr + offsets, mask=valid, other=0.0), EXACT)
    x = widened(tl.load(x_ptr + offsets, mask=valid, other=0.0), EXACT)
    value = activated(x, ACTIVATION)
    grad_x = behind_activation(grad, x, value, ACTIVATION)
    weight = (grad_x if ACTIVATION == "relu" else grad) * value
    # Selected and not multiplied, since 0 times infinity is not 0.
    tl.store(grad_x_ptr + offsets, tl.where(theta == 0, 0.0, grad_x) * theta, mask=valid)
    weight = tl.where(theta == 0, 0.0, weight)
    partial = tl.program_id(0) * num_structures + structure
    tl.store(partial_ptr + partial, tl.sum(weight, 0), mask=structure < num_structures)
