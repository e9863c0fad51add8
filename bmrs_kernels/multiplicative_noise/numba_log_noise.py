"""θ and the derivatives of log θ in compiled CPU loops, strip by strip: uniforms of one structure each.

The regimes and formulas are those of triton_log_noise, told apart by structure: *inside* and *tail* in float32, and
both in float64 where σ is above WIDE_SIGMA. Each strip branches once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bmrs_kernels.constants import LN2
from bmrs_kernels.dispatch.numba_compile import compiled, polynomial
from bmrs_kernels.dispatch.numba_memory import use_widest_vectors
from bmrs_kernels.multiplicative_noise.inside_constants import Inside
from bmrs_kernels.truncated_normal import polynomials
from bmrs_kernels.truncated_normal.numba_special import (
    EXP_HIGHEST,
    EXP_LOWEST,
    QUANTILE_CENTRE,
    QUANTILE_SHIFT,
    exp,
    log2,
    log_sigma_in_range,
    mills_ratio,
    normal_cdf,
    normal_density,
    normal_mass,
    sigma_from_log,
    wide_exp,
)
from bmrs_kernels.truncated_normal.regimes import TAIL_START, WIDE_SIGMA

TAIL_START_SQUARED = TAIL_START**2
# Keeps the logarithm finite where both tails underflow.
SMALLEST_PRODUCT = 1e-30
NAN = np.float32(math.nan)

TAIL_QUANTILE, TAIL_HAZARD = np.array(polynomials.TAIL_QUANTILE), np.array(polynomials.TAIL_HAZARD)

# Columns of the table of constants.
MU, SIGMA, ALPHA, BETA, IN_RANGE = range(5)
BELOW, ABOVE, MASS, LOWER_DENSITY, UPPER_DENSITY = range(5, 10)
DISTANCE, EPSILON, FAR_SURVIVAL, HAZARD_GAIN = range(10, 14)
FIRST_OF_QUANTILE, FIRST_OF_HAZARD, FACTOR, NUM_CONSTANTS = 14, 22, 32, 33


class Tail(NamedTuple):
    """Constants of a structure whose mode is far outside; see ``triton_constants.tail_constants``."""

    reflected: Any  # whether the mode is above the interval
    distance: Any
    log_scale: Any  # 2 ε log 2
    far_survival: Any
    hazard_gain: Any
    width: Any


@compiled
def structure_constants(mu, log_sigma, lower, upper, row):
    """Fill a structure's row of the table of constants."""
    sigma = sigma_from_log(log_sigma)
    alpha, beta = -(mu - lower) / sigma, -(mu - upper) / sigma
    row[MU], row[SIGMA], row[ALPHA], row[BETA] = mu, sigma, alpha, beta
    row[IN_RANGE] = log_sigma_in_range(log_sigma)
    near = max(alpha, -beta)
    if near < TAIL_START:
        below, above = normal_cdf(alpha), normal_cdf(-beta)
        row[BELOW], row[ABOVE], row[MASS] = below, above, normal_mass(alpha, beta)
        row[LOWER_DENSITY], row[UPPER_DENSITY] = normal_density(alpha), normal_density(beta)
    else:
        width = beta - alpha
        epsilon = 1.0 / (near * near)
        near_mills, far_mills = mills_ratio(near), mills_ratio(near + width)
        row[DISTANCE], row[EPSILON] = near * sigma, epsilon
        row[FAR_SURVIVAL] = math.exp(-width * (near + 0.5 * width)) * (far_mills / near_mills)
        row[HAZARD_GAIN] = near_mills / far_mills - 1.0
        tail_polynomials(epsilon * TAIL_START_SQUARED, row)


@compiled
def tail_polynomials(variable, row):
    """Fill in the coefficients of the tail's polynomials, which are polynomials in ε themselves."""
    for index in range(TAIL_QUANTILE.shape[0]):
        value = 0.0
        for power in range(TAIL_QUANTILE.shape[1]):
            value = value * variable + TAIL_QUANTILE[index, power]
        row[FIRST_OF_QUANTILE + index] = value
    for index in range(TAIL_HAZARD.shape[0]):
        value = 0.0
        for power in range(TAIL_HAZARD.shape[1]):
            value = value * variable + TAIL_HAZARD[index, power]
        row[FIRST_OF_HAZARD + index] = value


def inside_log_noise_in(real: type) -> Callable[..., Any]:
    """Return the function for log θ and its derivatives where the mode is inside or not far outside, in a dtype.

    z = Φ⁻¹(Φ(α) + y Z) from both tail probabilities, which are carried doubled.
    """
    one, smallest = real(1.0), real(SMALLEST_PRODUCT)
    shift, centre = real(QUANTILE_SHIFT), real(QUANTILE_CENTRE)
    quantile_ratio = polynomial(polynomials.QUANTILE, real)
    inverse_density_ratio = polynomial(polynomials.INVERSE_DENSITY, real)

    def evaluate(y, q, lower, upper):
        y = real(y)
        complement = one - y
        below, above = q.below + q.mass * y, q.above + q.mass * complement
        product = below * above + smallest
        variable = np.sqrt(shift - real(log2(np.float32(product)))) - centre
        offset = q.sigma * ((below - above) * quantile_ratio(variable))
        x = min(max(q.mu + offset, lower), upper)
        inverse_density = inverse_density_ratio(variable) / product
        near_lower = complement * inverse_density * q.lower_density
        near_upper = y * inverse_density * q.upper_density
        grad_log_sigma = offset + q.from_lower * near_lower + q.from_upper * near_upper
        return np.float32(x), np.float32(one - near_lower - near_upper), np.float32(grad_log_sigma)

    return compiled(evaluate)


def tail_log_noise_in(real: type) -> Callable[..., Any]:
    """Return the function for log θ and its derivatives where the mode is far outside, in a dtype.

    The survival at the quantile, relative to the end nearest to the mode, is m = 1 - y + y R; the quantile follows
    from log m.
    """
    one = real(1.0)

    def evaluate(y, q, quantile, hazard, lower, upper):
        uniform, rest = real(y), one - real(y)
        y, complement = (rest, uniform) if q.reflected else (uniform, rest)
        survival = complement + y * q.far_survival
        u = np.sqrt(one - q.log_scale * real(log2(np.float32(survival)))) - one
        k0, k1, k2, k3, k4, k5, k6, k7 = quantile
        value = (((((k7 * u + k6) * u + k5) * u + k4) * u + k3) * u + k2) * u + k1
        step = q.distance * ((value * u + k0) * u)
        x = min(max(upper - step if q.reflected else lower + step, lower), upper)
        h0, h1, h2, h3, h4, h5, h6, h7, h8, h9 = hazard
        value = (((((h9 * u + h8) * u + h7) * u + h6) * u + h5) * u + h4) * u + h3
        one_less_ratio = (((value * u + h2) * u + h1) * u + h0) * u  # 1 - h(near end)/h(quantile)
        share = (one - one_less_ratio) * (y * q.far_survival / survival)
        gain = share * q.hazard_gain
        grad_mu = one_less_ratio - gain
        grad_log_sigma = q.distance * grad_mu + step - (share + gain) * q.width
        signed = -grad_log_sigma if q.reflected else grad_log_sigma
        return np.float32(x), np.float32(grad_mu), np.float32(signed)

    return compiled(evaluate)


def _exponentiate(values, count, lower, upper):
    """Replace the first numbers, which lie in [lower, upper], by their exponentials.

    In a loop of its own: together with what computes the numbers, the constants would not fit into registers.
    """
    use_widest_vectors()
    if lower >= EXP_LOWEST and upper <= EXP_HIGHEST:
        for i in range(count):
            values[i] = exp(values[i])
    else:
        for i in range(count):
            values[i] = wide_exp(values[i])


exponentiate = compiled(_exponentiate, inline=False)


def inside_strips_in(real: type) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the functions that write log θ, and log θ with its derivatives, of a strip inside, computed in a dtype.

    Functions of their own, since the setting up of a large one costs more than a short strip.
    """
    inside_log_noise = inside_log_noise_in(real)

    def constants(row, lower, upper):
        return Inside(
            real(row[MU]),
            real(row[SIGMA]),
            real(2.0 * row[BELOW]),
            real(2.0 * row[ABOVE]),
            real(2.0 * row[MASS]),
            real(row[LOWER_DENSITY]),
            real(row[UPPER_DENSITY]),
            real(row[MU] - lower),
            real(row[MU] - upper),
        )

    constants_of = compiled(constants)

    def values(y, row, lower, upper, value):
        use_widest_vectors()
        q, low, high = constants_of(row, lower, upper), real(lower), real(upper)
        for i in range(y.size):
            value[i] = inside_log_noise(y[i], q, low, high)[0]

    def gradients(y, row, lower, upper, value, grad_mu, grad_log_sigma):
        use_widest_vectors()
        q, low, high = constants_of(row, lower, upper), real(lower), real(upper)
        for i in range(y.size):
            value[i], grad_mu[i], grad_log_sigma[i] = inside_log_noise(y[i], q, low, high)

    return compiled(values, inline=False), compiled(gradients, inline=False)


def tail_strips_in(real: type) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what ``inside_strips_in`` does for strips of the tail regime."""
    tail_log_noise = tail_log_noise_in(real)

    def constants(row, lower, upper):
        tail = Tail(
            row[BETA] < 0.0,
            real(row[DISTANCE]),
            real(2.0 * LN2 * row[EPSILON]),
            real(row[FAR_SURVIVAL]),
            real(row[HAZARD_GAIN]),
            real(upper - lower),
        )
        quantile = (
            real(row[FIRST_OF_QUANTILE + 0]),
            real(row[FIRST_OF_QUANTILE + 1]),
            real(row[FIRST_OF_QUANTILE + 2]),
            real(row[FIRST_OF_QUANTILE + 3]),
            real(row[FIRST_OF_QUANTILE + 4]),
            real(row[FIRST_OF_QUANTILE + 5]),
            real(row[FIRST_OF_QUANTILE + 6]),
            real(row[FIRST_OF_QUANTILE + 7]),
        )
        hazard = (
            real(row[FIRST_OF_HAZARD + 0]),
            real(row[FIRST_OF_HAZARD + 1]),
            real(row[FIRST_OF_HAZARD + 2]),
            real(row[FIRST_OF_HAZARD + 3]),
            real(row[FIRST_OF_HAZARD + 4]),
            real(row[FIRST_OF_HAZARD + 5]),
            real(row[FIRST_OF_HAZARD + 6]),
            real(row[FIRST_OF_HAZARD + 7]),
            real(row[FIRST_OF_HAZARD + 8]),
            real(row[FIRST_OF_HAZARD + 9]),
        )
        return tail, quantile, hazard

    constants_of = compiled(constants)

    def values(y, row, lower, upper, value):
        use_widest_vectors()
        low, high = real(lower), real(upper)
        q, quantile, hazard = constants_of(row, lower, upper)
        for i in range(y.size):
            value[i] = tail_log_noise(y[i], q, quantile, hazard, low, high)[0]

    def gradients(y, row, lower, upper, value, grad_mu, grad_log_sigma):
        use_widest_vectors()
        low, high = real(lower), real(upper)
        q, quantile, hazard = constants_of(row, lower, upper)
        for i in range(y.size):
            value[i], grad_mu[i], grad_log_sigma[i] = tail_log_noise(y[i], q, quantile, hazard, low, high)

    return compiled(values, inline=False), compiled(gradients, inline=False)


inside_values, inside_gradients = inside_strips_in(np.float32)
wide_inside_values, wide_inside_gradients = inside_strips_in(np.float64)
tail_values, tail_gradients = tail_strips_in(np.float32)
wide_tail_values, wide_tail_gradients = tail_strips_in(np.float64)


@compiled
def strip_noise(y, row, lower, upper, noise, with_gradients):
    """Write θ and, if asked for, the derivatives of log θ at a strip of uniforms, in the structure's regime.

    Args:
        y: the strip's uniforms, float32.
        row: the structure's row of the table of constants.
        lower: lower end of log θ.
        upper: upper end of log θ.
        noise: three arrays no shorter than ``y``, to be written: θ, d log θ / dμ and
            d log θ / d log σ; float32.
        with_gradients: whether to write the last two.
    """
    theta, grad_mu, grad_log_sigma = noise
    in_tail, wide = max(row[ALPHA], -row[BETA]) >= TAIL_START, row[SIGMA] > WIDE_SIGMA
    if math.isnan(row[ALPHA]):
        fill_with_nan(y.size, theta, grad_mu, grad_log_sigma)
        return
    if with_gradients:
        if in_tail and wide:
            wide_tail_gradients(y, row, lower, upper, theta, grad_mu, grad_log_sigma)
        elif in_tail:
            tail_gradients(y, row, lower, upper, theta, grad_mu, grad_log_sigma)
        elif wide:
            wide_inside_gradients(y, row, lower, upper, theta, grad_mu, grad_log_sigma)
        else:
            inside_gradients(y, row, lower, upper, theta, grad_mu, grad_log_sigma)
    elif in_tail and wide:
        wide_tail_values(y, row, lower, upper, theta)
    elif in_tail:
        tail_values(y, row, lower, upper, theta)
    elif wide:
        wide_inside_values(y, row, lower, upper, theta)
    else:
        inside_values(y, row, lower, upper, theta)
    exponentiate(theta, y.size, lower, upper)


def _fill_with_nan(count, *results):
    """Make the noise of a structure NaN, whose μ or log σ is."""
    for result in results:
        for i in range(count):
            result[i] = NAN


fill_with_nan = compiled(_fill_with_nan, inline=False)
