"""Kernels that draw noise at every element and multiply it onto an activation.

x is seen as [rows, structures, inner] in the order in which it lies in memory; ``inner`` is the size behind the
structure axis. Where inner is 1, and in channels_last, structures lie next to each other: a program of a *columns*
kernel owns tiles [rows, structures]. Elsewhere a program of a *rows* kernel owns tiles [rows, inner] of one structure,
whose constants and regimes are scalars to it.

A uniform's number is the element's row-major index in x's logical shape, four numbers to a Philox counter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bmrs_kernels.multiplicative_noise.triton_constants import (
    load_posterior,
    posterior_constants,
    store_constants,
    table_column,
    tail_constants,
)
from bmrs_kernels.multiplicative_noise.triton_log_noise import (
    exact_log_noise,
    structure_log_noise,
    tile_log_noise,
    tile_regimes,
)
from bmrs_kernels.multiplicative_noise.triton_tiles import (
    activated,
    behind_activation,
    columns_factor,
    columns_posterior,
    columns_words,
    exponential,
    four_column_tiles,
    held_like,
    index_of_next_rows,
    index_of_rows,
    load_four,
    rows_of_block,
    rows_tile,
    store_four,
    widened,
)
from bmrs_kernels.truncated_normal.triton_special import log_sigma_in_range, store
from bmrs_kernels.uniform.triton_philox import uniform_from_word, words_of_counters


@triton.jit
def constants_kernel(
    mu_ptr,
    log_sigma_ptr,
    table_ptr,
    num_structures,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fill the table of constants, whole blocks of it; a program owns BLOCK structures."""
    structure = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = structure < num_structures
    mu = tl.load(mu_ptr + structure, mask=valid, other=0.0)
    log_sigma = tl.load(log_sigma_ptr + structure, mask=valid, other=0.0)
    posterior = posterior_constants(mu, log_sigma, LOWER, UPPER)
    store_constants(table_ptr, structure, posterior, tail_constants(posterior))


@triton.jit
def multiply_rows_forward_kernel(
    x_ptr,
    out_ptr,
    table_ptr,
    mask_ptr,
    seed_ptr,
    num_rows,
    num_structures,
    inner_units,
    num_inner_blocks,
    num_steps,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Compute out = activation(x) · θ · mask (Eq. 1) for x [rows, structures, inner_units · ALIGNMENT].

    A program owns num_steps tiles [BLOCK_ROWS, BLOCK_INNER] of one structure below each other. The grid is (structures
    times blocks of inner, blocks of rows).
    """
    structure = tl.program_id(0) // num_inner_blocks
    inner_block = tl.program_id(0) % num_inner_blocks
    factor = 1.0 if mask_ptr is None else widened(tl.load(mask_ptr + structure), EXACT)
    posterior = load_posterior(table_column(table_ptr, structure, EXACT))
    seed = tl.load(seed_ptr)
    for step in range(num_steps):
        offsets, valid, counters = rows_tile(
            tl.program_id(1) * num_steps + step,
            inner_block,
            structure,
            num_rows,
            num_structures,
            inner_units * ALIGNMENT,
            ALIGNMENT % 4 == 0,
            BLOCK_ROWS,
            BLOCK_INNER,
            WIDE_INDEX,
        )
        # What is masked is neither read nor computed.
        if factor == 0:
            tl.store(out_ptr + offsets, tl.zeros([BLOCK_ROWS, BLOCK_INNER], tl.float32), mask=valid)
        else:
            x = widened(tl.load(x_ptr + offsets, mask=valid, other=0.0), EXACT)
            y = uniform_from_word(held_like(words_of_counters(counters, seed, WIDE_INDEX), x))
            log_theta, _grad_mu, _grad_log_sigma = structure_log_noise(
                y, posterior, table_ptr, structure, LOWER, UPPER, EXACT, False
            )
            theta = exponential(log_theta, EXACT) * factor
            tl.store(out_ptr + offsets, activated(x, ACTIVATION) * theta, mask=valid)


@triton.jit
def multiply_rows_backward_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    partial_mu_ptr,
    partial_log_sigma_ptr,
    table_ptr,
    mask_ptr,
    seed_ptr,
    num_rows,
    num_structures,
    inner_units,
    num_inner_blocks,
    num_steps,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradients of the forward kernel: of x, and a program's sums that make up those of μ and log σ.

    The partial sums [programs of a structure, structures] are of grad · activation(x) · θ · mask times dx/dμ and
    dx/dlog σ, for x = log θ at fixed uniforms.
    """
    structure = tl.program_id(0) // num_inner_blocks
    inner_block = tl.program_id(0) % num_inner_blocks
    factor = 1.0 if mask_ptr is None else widened(tl.load(mask_ptr + structure), EXACT)
    posterior = load_posterior(table_column(table_ptr, structure, EXACT))
    seed = tl.load(seed_ptr)
    sum_mu = tl.zeros([BLOCK_ROWS, BLOCK_INNER], tl.float64 if EXACT else tl.float32)
    sum_log_sigma = sum_mu
    for step in range(num_steps):
        offsets, valid, counters = rows_tile(
            tl.program_id(1) * num_steps + step,
            inner_block,
            structure,
            num_rows,
            num_structures,
            inner_units * ALIGNMENT,
            ALIGNMENT % 4 == 0,
            BLOCK_ROWS,
            BLOCK_INNER,
            WIDE_INDEX,
        )
        # What is masked is neither read nor computed.
        if factor == 0:
            tl.store(grad_x_ptr + offsets, tl.zeros([BLOCK_ROWS, BLOCK_INNER], tl.float32), mask=valid)
        else:
            grad = widened(tl.load(grad_ptr + offsets, mask=valid, other=0.0), EXACT)
            x = widened(tl.load(x_ptr + offsets, mask=valid, other=0.0), EXACT)
            value = activated(x, ACTIVATION)
            grad_x = behind_activation(grad, x, value, ACTIVATION)
            y = uniform_from_word(held_like(words_of_counters(counters, seed, WIDE_INDEX), x))
            log_theta, grad_mu, grad_log_sigma = structure_log_noise(
                y, posterior, table_ptr, structure, LOWER, UPPER, EXACT, True
            )
            theta = exponential(log_theta, EXACT) * factor
            tl.store(grad_x_ptr + offsets, grad_x * theta, mask=valid)
            weight = (grad_x if ACTIVATION == "relu" else grad) * value * theta
            sum_mu += weight * grad_mu
            sum_log_sigma += weight * grad_log_sigma
    partial = (tl.program_id(1) * num_inner_blocks + inner_block) * num_structures + structure
    in_range = widened(posterior.log_sigma_in_range, EXACT)
    store(partial_mu_ptr + partial, tl.sum(sum_mu), True)
    store(partial_log_sigma_ptr + partial, tl.sum(sum_log_sigma) * in_range, True)


@triton.jit
def multiply_columns_forward_kernel(
    x_ptr,
    out_ptr,
    mu_ptr,
    log_sigma_ptr,
    table_ptr,
    mask_ptr,
    seed_ptr,
    num_rows,
    num_structures,
    spatial,
    num_steps,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SHORT_EXAMPLES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Compute out = activation(x) · θ · mask (Eq. 1) for x [rows, structures].

    A program owns num_steps tiles [4 · BLOCK_ROWS, BLOCK_STRUCTURES] below each other; a thread has four rows of one
    structure or two, so that it keeps few constants. The grid is (blocks of structures, blocks of rows). Constants are
    from the table, if there is one.
    """
    column = tl.program_id(0) * BLOCK_STRUCTURES + tl.arange(0, BLOCK_STRUCTURES)
    structure = column[None, :, None]
    factor = columns_factor(mask_ptr, structure, num_structures, EXACT)
    posterior = columns_posterior(
        mu_ptr, log_sigma_ptr, table_ptr, structure, num_structures, LOWER, UPPER, EXACT
    )
    regimes = tile_regimes(posterior)
    seed = tl.load(seed_ptr)
    quad = rows_of_block(tl.program_id(1) * num_steps, BLOCK_ROWS, WIDE_INDEX)
    index, position = quad, quad
    if LANES == "rows":
        index, position = index_of_rows(quad, column, num_structures, spatial // 4)
    for step in range(num_steps):
        block = tl.program_id(1) * num_steps + step
        quad = rows_of_block(block, BLOCK_ROWS, WIDE_INDEX)
        if LANES == "rows" and SHORT_EXAMPLES:
            index, position = index_of_rows(quad, column, num_structures, spatial // 4)
        offsets, valid = four_column_tiles(quad, column, num_rows, num_structures, LANES)
        # All at once: a load behind a store would wait for it.
        x = load_four(x_ptr, offsets, valid, EXACT)
        words = columns_words(
            x,
            block,
            index,
            column,
            tl.program_id(0),
            num_structures,
            spatial,
            seed,
            LANES,
            CHANNELS_LAST,
            BLOCK_ROWS,
            BLOCK_STRUCTURES,
            WIDE_INDEX,
        )
        log_theta, _grad_mu, _grad_log_sigma = tile_log_noise(
            uniform_from_word(words), posterior, regimes, table_ptr, structure, LOWER, UPPER, EXACT, False
        )
        theta = exponential(log_theta, EXACT) * factor
        # Selected and not multiplied, since 0 times infinity is not 0.
        value = tl.where(factor == 0, 0.0, activated(x, ACTIVATION))
        store_four(out_ptr, offsets, value * theta, valid)
        if LANES == "rows" and not SHORT_EXAMPLES:
            index, position = index_of_next_rows(index, position, num_structures, spatial // 4, BLOCK_ROWS)


@triton.jit
def multiply_columns_backward_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    partial_mu_ptr,
    partial_log_sigma_ptr,
    mu_ptr,
    log_sigma_ptr,
    table_ptr,
    mask_ptr,
    seed_ptr,
    num_rows,
    num_structures,
    spatial,
    num_steps,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SHORT_EXAMPLES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradients of the forward kernel: of x, and the sums over a program's rows that make up those of μ and log σ.

    The partial sums [programs of a structure, structures] are of grad · activation(x) · θ · mask times dx/dμ and
    dx/dlog σ, for x = log θ at fixed uniforms.
    """
    column = tl.program_id(0) * BLOCK_STRUCTURES + tl.arange(0, BLOCK_STRUCTURES)
    structure = column[None, :, None]
    factor = columns_factor(mask_ptr, structure, num_structures, EXACT)
    posterior = columns_posterior(
        mu_ptr, log_sigma_ptr, table_ptr, structure, num_structures, LOWER, UPPER, EXACT
    )
    regimes = tile_regimes(posterior)
    seed = tl.load(seed_ptr)
    sum_mu = tl.zeros([BLOCK_ROWS, BLOCK_STRUCTURES], tl.float64 if EXACT else tl.float32)
    sum_log_sigma = sum_mu
    quad = rows_of_block(tl.program_id(1) * num_steps, BLOCK_ROWS, WIDE_INDEX)
    index, position = quad, quad
    if LANES == "rows":
        index, position = index_of_rows(quad, column, num_structures, spatial // 4)
    for step in range(num_steps):
        block = tl.program_id(1) * num_steps + step
        quad = rows_of_block(block, BLOCK_ROWS, WIDE_INDEX)
        if LANES == "rows" and SHORT_EXAMPLES:
            index, position = index_of_rows(quad, column, num_structures, spatial // 4)
        offsets, valid = four_column_tiles(quad, column, num_rows, num_structures, LANES)
        # All at once: a load behind a store would wait for it.
        x = load_four(x_ptr, offsets, valid, EXACT)
        grad = load_four(grad_ptr, offsets, valid, EXACT)
        words = columns_words(
            x,
            block,
            index,
            column,
            tl.program_id(0),
            num_structures,
            spatial,
            seed,
            LANES,
            CHANNELS_LAST,
            BLOCK_ROWS,
            BLOCK_STRUCTURES,
            WIDE_INDEX,
        )
        value = activated(x, ACTIVATION)
        grad_x = behind_activation(grad, x, value, ACTIVATION)
        weight = (grad_x if ACTIVATION == "relu" else grad) * value
        log_theta, grad_mu, grad_log_sigma = tile_log_noise(
            uniform_from_word(words), posterior, regimes, table_ptr, structure, LOWER, UPPER, EXACT, True
        )
        theta = exponential(log_theta, EXACT) * factor
        # Selected and not multiplied, since 0 times infinity is not 0.
        store_four(grad_x_ptr, offsets, tl.where(factor == 0, 0.0, grad_x) * theta, valid)
        weight = tl.where(factor == 0, 0.0, weight) * theta
        sum_mu += tl.sum(weight * grad_mu, 2)
        sum_log_sigma += tl.sum(weight * grad_log_sigma, 2)
        if LANES == "rows" and not SHORT_EXAMPLES:
            index, position = index_of_next_rows(index, position, num_structures, spatial // 4, BLOCK_ROWS)
    partial = tl.program_id(1) * num_structures + column
    valid = column < num_structures
    # Not kept from the start, where registers are scarce.
    log_sigma = tl.load(log_sigma_ptr + column, mask=valid, other=0.0)
    in_range = widened(log_sigma_in_range(log_sigma.to(tl.float64)), EXACT)
    store(partial_mu_ptr + partial, tl.sum(sum_mu, 0), valid)
    store(partial_log_sigma_ptr + partial, tl.sum(sum_log_sigma, 0) * in_range, valid)


@triton.jit
def sum_partials_kernel(
    partial_mu_ptr,
    partial_log_sigma_ptr,
    weight_mu_ptr,
    weight_log_sigma_ptr,
    grad_mu_ptr,
    grad_log_sigma_ptr,
    num_partials,
    partials_per_group,
    num_structures,
    WEIGHTED: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_STRUCTURES: tl.constexpr,
):
    """Add up partial sums [partials, structures] in a fixed order, in float64.

    If WEIGHTED, those of a group are first multiplied by the group's row of the weights [groups, structures].
    """
    structure = tl.program_id(0) * BLOCK_STRUCTURES + tl.arange(0, BLOCK_STRUCTURES)
    sum_mu = tl.zeros([BLOCK_PARTIALS, BLOCK_STRUCTURES], tl.float64)
    sum_log_sigma = sum_mu
    for first in range(0, num_partials, BLOCK_PARTIALS):
        partial = first + tl.arange(0, BLOCK_PARTIALS)
        valid = (partial < num_partials)[:, None] & (structure < num_structures)[None, :]
        offsets = partial[:, None] * num_structures + structure[None, :]
        term_mu = tl.load(partial_mu_ptr + offsets, mask=valid, other=0.0).to(tl.float64)
        term_log_sigma = term_mu
        if WEIGHTED:
            group = (partial // partials_per_group)[:, None] * num_structures + structure[None, :]
            term_mu *= tl.load(weight_mu_ptr + group, mask=valid, other=0.0).to(tl.float64)
            term_log_sigma *= tl.load(weight_log_sigma_ptr + group, mask=valid, other=0.0).to(tl.float64)
        else:
            term_log_sigma = tl.load(partial_log_sigma_ptr + offsets, mask=valid, other=0.0).to(tl.float64)
        sum_mu += term_mu
        sum_log_sigma += term_log_sigma
    valid = structure < num_structures
    store(grad_mu_ptr + structure, tl.sum(sum_mu, 0), valid)
    store(grad_log_sigma_ptr + structure, tl.sum(sum_log_sigma, 0), valid)


@triton.jit
def sample_kernel(
    mu_ptr,
    log_sigma_ptr,
    uniform_ptr,
    theta_ptr,
    grad_mu_ptr,
    grad_log_sigma_ptr,
    num_elements,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """θ at given uniforms and dθ/dμ, dθ/dlog σ; all vectors of one length, float64 inside."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = element < num_elements
    mu = tl.load(mu_ptr + element, mask=valid, other=0.0)
    log_sigma = tl.load(log_sigma_ptr + element, mask=valid, other=0.0)
    y = tl.load(uniform_ptr + element, mask=valid, other=0.5)
    posterior = posterior_constants(mu, log_sigma, LOWER, UPPER)
    log_theta, grad_mu, grad_log_sigma = exact_log_noise(y, posterior, LOWER, UPPER, WITH_GRADIENTS)
    theta = tl.exp(log_theta)
    store(theta_ptr + element, theta, valid)
    if WITH_GRADIENTS:
        store(grad_mu_ptr + element, theta * grad_mu, valid)
        store(grad_log_sigma_ptr + element, theta * grad_log_sigma * posterior.log_sigma_in_range, valid)
