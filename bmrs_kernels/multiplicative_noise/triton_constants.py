"""A structure's constants inside kernels: computed in float64, kept in a table, and read back.

The table holds TABLE_BLOCK structures at a time: their constants in float64, [constants, TABLE_BLOCK], and then once
more in float32. Kernels read what a regime needs. As the distance of two constants is known when a kernel is compiled,
a structure's are read from one address; with one for each, addresses would take half of the registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from bmrs_kernels.multiplicative_noise.inside_constants import Inside
from bmrs_kernels.truncated_normal import polynomials
from bmrs_kernels.truncated_normal.triton_special import (
    log_sigma_in_range,
    maximum,
    mills_ratio,
    normal_cdf,
    normal_density,
    normal_mass,
    polynomial_of_row,
    sigma_from_log,
)

TAIL_START = tl.constexpr(polynomials.TAIL_START)
TAIL_START_SQUARED = tl.constexpr(polynomials.TAIL_START**2)
TAIL_QUANTILE = tl.constexpr(polynomials.TAIL_QUANTILE)
TAIL_HAZARD = tl.constexpr(polynomials.TAIL_HAZARD)


class Posterior(NamedTuple):
    """Constants of structures in every regime, in the order in which the table holds them."""

    mu: Any
    sigma: Any
    alpha: Any  # (lower - μ)/σ
    beta: Any  # (upper - μ)/σ
    below: Any  # Φ(α)
    above: Any  # 1 - Φ(β)
    mass: Any  # Φ(β) - Φ(α)
    lower_density: Any  # φ(α)
    upper_density: Any  # φ(β)
    log_sigma_in_range: Any  # 1, or 0 where log σ is clamped


# Constants of the tail regime by number: they are read one by one, since all of them would fill the registers.
DISTANCE, EPSILON, FAR_SURVIVAL, HAZARD_GAIN = (tl.constexpr(number) for number in range(4))
FIRST_OF_QUANTILE, FIRST_OF_HAZARD = tl.constexpr(4), tl.constexpr(12)
QUANTILE_TERMS, HAZARD_TERMS = tl.constexpr(8), tl.constexpr(10)

NUM_POSTERIOR = tl.constexpr(len(Posterior._fields))
NUM_TAIL = tl.constexpr(FIRST_OF_HAZARD.value + HAZARD_TERMS.value)
TABLE_BLOCK = tl.constexpr(64)
FLOAT64_PART = tl.constexpr((NUM_POSTERIOR.value + NUM_TAIL.value) * TABLE_BLOCK.value)
BLOCK_STRIDE = tl.constexpr(FLOAT64_PART.value * 3 // 2)  # in float64 numbers


@triton.jit
def posterior_constants(mu, log_sigma, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """Return the float64 constants of structures."""
    mu, log_sigma = mu.to(tl.float64), log_sigma.to(tl.float64)
    sigma = sigma_from_log(log_sigma)
    alpha, beta = -(mu - LOWER) / sigma, -(mu - UPPER) / sigma
    return Posterior(
        mu,
        sigma,
        alpha,
        beta,
        normal_cdf(alpha),
        normal_cdf(-beta),
        normal_mass(alpha, beta),
        normal_density(alpha),
        normal_density(beta),
        log_sigma_in_range(log_sigma),
    )


@triton.jit
def inside_constants(posterior, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """Return the float32 constants of the inside regime."""
    return Inside(
        posterior.mu.to(tl.float32),
        posterior.sigma.to(tl.float32),
        (2.0 * posterior.below).to(tl.float32),
        (2.0 * posterior.above).to(tl.float32),
        (2.0 * posterior.mass).to(tl.float32),
        posterior.lower_density.to(tl.float32),
        posterior.upper_density.to(tl.float32),
        (posterior.mu - LOWER).to(tl.float32),
        (posterior.mu - UPPER).to(tl.float32),
    )


@triton.jit
def tail_constants(posterior):
    """Return the constants of the tail regime in float64; meaningful where the mode is TAIL_START σ outside.

    Distance D from μ to the nearest end; ε = σ²/D²; far survival R = S(far end)/S(near end); h(far)/h(near) - 1 for the
    hazard h; the coefficients in ascending order of ``TAIL_QUANTILE`` at ε, and of ``TAIL_HAZARD``.
    """
    near = maximum(maximum(posterior.alpha, -posterior.beta), TAIL_START)
    width = posterior.beta - posterior.alpha
    epsilon = 1.0 / (near * near)
    near_mills, far_mills = mills_ratio(near), mills_ratio(near + width)
    far_survival = tl.exp(-width * (near + 0.5 * width)) * (far_mills / near_mills)
    variable = epsilon * TAIL_START_SQUARED
    return (
        near * posterior.sigma,
        epsilon,
        far_survival,
        near_mills / far_mills - 1.0,
        polynomial_of_row(variable, TAIL_QUANTILE, 0),
        polynomial_of_row(variable, TAIL_QUANTILE, 1),
        polynomial_of_row(variable, TAIL_QUANTILE, 2),
        polynomial_of_row(variable, TAIL_QUANTILE, 3),
        polynomial_of_row(variable, TAIL_QUANTILE, 4),
        polynomial_of_row(variable, TAIL_QUANTILE, 5),
        polynomial_of_row(variable, TAIL_QUANTILE, 6),
        polynomial_of_row(variable, TAIL_QUANTILE, 7),
        polynomial_of_row(variable, TAIL_HAZARD, 0),
        polynomial_of_row(variable, TAIL_HAZARD, 1),
        polynomial_of_row(variable, TAIL_HAZARD, 2),
        polynomial_of_row(variable, TAIL_HAZARD, 3),
        polynomial_of_row(variable, TAIL_HAZARD, 4),
        polynomial_of_row(variable, TAIL_HAZARD, 5),
        polynomial_of_row(variable, TAIL_HAZARD, 6),
        polynomial_of_row(variable, TAIL_HAZARD, 7),
        polynomial_of_row(variable, TAIL_HAZARD, 8),
        polynomial_of_row(variable, TAIL_HAZARD, 9),
    )


@triton.jit
def tail_constant(tail, index: tl.constexpr, IN_TABLE: tl.constexpr):
    """Return one of ``tail_constants``: of the tuple, or read from a structure's column in the table."""
    if IN_TABLE:
        value = tl.load(tail + (NUM_POSTERIOR + index) * TABLE_BLOCK)
    else:
        value = tail[index]
    return value


@triton.jit
def table_column(table_ptr, structure, IN_FLOAT64: tl.constexpr):
    """Return where the table's constants of structures begin, TABLE_BLOCK numbers apart from each other."""
    block_ptr = table_ptr + structure // TABLE_BLOCK * BLOCK_STRIDE
    if not IN_FLOAT64:
        block_ptr = (block_ptr + FLOAT64_PART).to(tl.pointer_type(tl.float32), bitcast=True)
    return block_ptr + structure % TABLE_BLOCK


@triton.jit
def store_constants(table_ptr, structure, posterior, tail):
    """Write the constants of structures into both parts of the table."""
    exact_ptr, narrow_ptr = (
        table_column(table_ptr, structure, True),
        table_column(table_ptr, structure, False),
    )
    for index in tl.static_range(NUM_POSTERIOR):
        tl.store(exact_ptr + index * TABLE_BLOCK, posterior[index])
        tl.store(narrow_ptr + index * TABLE_BLOCK, posterior[index].to(tl.float32))
    for index in tl.static_range(NUM_TAIL):
        tl.store(exact_ptr + (NUM_POSTERIOR + index) * TABLE_BLOCK, tail[index])
        tl.store(narrow_ptr + (NUM_POSTERIOR + index) * TABLE_BLOCK, tail[index].to(tl.float32))


@triton.jit
def load_posterior(column_ptr):
    """Read what ``posterior_constants`` returned from a column of the table."""
    return Posterior(
        tl.load(column_ptr),
        tl.load(column_ptr + TABLE_BLOCK),
        tl.load(column_ptr + 2 * TABLE_BLOCK),
        tl.load(column_ptr + 3 * TABLE_BLOCK),
        tl.load(column_ptr + 4 * TABLE_BLOCK),
        tl.load(column_ptr + 5 * TABLE_BLOCK),
        tl.load(column_ptr + 6 * TABLE_BLOCK),
        tl.load(column_ptr + 7 * TABLE_BLOCK),
        tl.load(column_ptr + 8 * TABLE_BLOCK),
        tl.load(column_ptr + 9 * TABLE_BLOCK),
    )
