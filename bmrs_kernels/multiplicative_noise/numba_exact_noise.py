"""θ and the derivatives of log θ in float64, to full precision, strip by strip: the twin of ``exact_log_noise``.

A strip is computed in passes over arrays that stay in a core's cache, each of plain arithmetic, so that LLVM vectorises
it: a start, Halley's steps on the logarithm of a tail probability, and θ with its derivatives.
"""

from __future__ import annotations

import math

import numpy as np

from bmrs_kernels.constants import HALF_LOG_2PI, LN2, SQRT2
from bmrs_kernels.dispatch.numba_compile import compiled, loop, polynomial
from bmrs_kernels.dispatch.numba_memory import use_widest_vectors
from bmrs_kernels.multiplicative_noise.numba_log_noise import (
    ABOVE,
    ALPHA,
    BELOW,
    BETA,
    FAR_SURVIVAL,
    IN_RANGE,
    LOWER_DENSITY,
    MASS,
    MU,
    NUM_CONSTANTS,
    SIGMA,
    UPPER_DENSITY,
    fill_with_nan,
    structure_constants,
)
from bmrs_kernels.truncated_normal import polynomials
from bmrs_kernels.truncated_normal.numba_special import (
    QUANTILE_CENTRE,
    QUANTILE_SHIFT,
    exp_float64,
    log_float64,
    mills_ratio,
    normal_density,
)
from bmrs_kernels.truncated_normal.regimes import TAIL_START, WIDE_SIGMA

QUANTILE_LIMIT = polynomials.QUANTILE_LIMIT
quantile_ratio = polynomial(polynomials.QUANTILE, np.float64)
# From a start good to 4e-7, one step is enough; each triples the digits. Beyond the fit's range it is good to 1e-1.
STEPS_FROM_FIT, STEPS_BEYOND_FIT, STEPS_IN_TAIL = 1, 3, 3
# Keeps logarithms finite at uniforms of 0 and 1, and where a tail underflows.
TINY = 1e-300
ELEMENTS_PER_STRIP = 1024


@compiled
def smaller_tail(y, below, above, mass):
    """Return Φ(z) - ½ up to a positive factor, and the smaller of Φ(z) and 1 - Φ(z), at a uniform."""
    p, q = below + mass * y, above + mass * (1.0 - y)
    return p - q, min(p, q) + TINY


def _start_inside(y, row, t):
    """Write starts of |Φ⁻¹|; return the largest variable of the fit, 4 bits a unit, which tells whether it held."""
    use_widest_vectors()
    below, above, mass = row[BELOW], row[ABOVE], row[MASS]
    hardest = 0.0
    for i in range(y.size):
        p, q = below + mass * y[i], above + mass * (1.0 - y[i])
        level = max(-log_float64(4.0 * p * q + TINY) / LN2, 0.0)
        variable = math.sqrt(min(level, QUANTILE_LIMIT) + QUANTILE_SHIFT) - QUANTILE_CENTRE
        fitted = abs(2.0 * (p - q)) * quantile_ratio(variable)
        square = 2.0 * (max(level, 2.0) - 1.0) * LN2
        t[i] = fitted if level < QUANTILE_LIMIT else math.sqrt(square - log_float64(square))
        hardest = max(hardest, level)
    return hardest


def _step_inside(y, row, t):
    """Improve t by a step of Halley's method for log S(t) = log of the smaller tail probability."""
    use_widest_vectors()
    below, above, mass = row[BELOW], row[ABOVE], row[MASS]
    for i in range(y.size):
        probability = smaller_tail(y[i], below, above, mass)[1]
        mills = mills_ratio(t[i])
        newton = (log_float64(mills / probability) - 0.5 * t[i] * t[i] - HALF_LOG_2PI) * mills
        t[i] += newton / (1.0 + 0.5 * newton * (1.0 / mills - t[i]))


def _refine_inside(y, row, t):
    """Improve t by Newton's method on the error function, whose last digit is right; not vectorised."""
    below, above, mass = row[BELOW], row[ABOVE], row[MASS]
    for i in range(y.size):
        side, probability = smaller_tail(y[i], below, above, mass)
        if abs(side) < 0.5:
            excess = 0.5 * (math.erf(t[i] / SQRT2) - abs(side))
        else:
            excess = probability - 0.5 * math.erfc(t[i] / SQRT2)
        t[i] -= excess / normal_density(t[i])


def _finish_inside(y, row, lower, upper, theta, grad_mu, grad_log_sigma, with_gradients):
    """Write θ in place of t, and the derivatives of log θ if asked for."""
    use_widest_vectors()
    mu, sigma = row[MU], row[SIGMA]
    below, above, mass = row[BELOW], row[ABOVE], row[MASS]
    from_lower, from_upper = mu - lower, mu - upper
    for i in range(y.size):
        side, probability = smaller_tail(y[i], below, above, mass)
        t = theta[i]
        offset = sigma * (t if side > 0.0 else -t)
        x = min(max(mu + offset, lower), upper)
        x = lower if y[i] <= 0.0 else (upper if y[i] >= 1.0 else x)
        theta[i] = exp_float64(x)
        if with_gradients:
            inverse_density = mills_ratio(t) / probability
            near_lower = (1.0 - y[i]) * inverse_density * row[LOWER_DENSITY]
            near_upper = y[i] * inverse_density * row[UPPER_DENSITY]
            grad_mu[i] = 1.0 - near_lower - near_upper
            grad_log_sigma[i] = offset + from_lower * near_lower + from_upper * near_upper


def _in_tail(y, row, lower, upper, theta, grad_mu, grad_log_sigma, with_gradients):
    """Write θ and the derivatives of log θ where the mode is far outside, from the end nearest to it.

    The survival at the quantile, relative to that end's, is m = 1 - y + y R; Halley's steps on log m find the distance
    v from the end, in units of σ.
    """
    use_widest_vectors()
    sigma, reflected = row[SIGMA], row[BETA] < 0.0
    near, width = max(row[ALPHA], -row[BETA]), row[BETA] - row[ALPHA]
    far_survival = row[FAR_SURVIVAL]
    near_mills = mills_ratio(near)
    far_decay = math.exp(-width * (near + 0.5 * width))  # φ(far end)/φ(near end)
    hazard = 1.0 / near_mills
    slope = 2.0 * hazard * (hazard - near)
    for i in range(y.size):
        uniform, rest = y[i], 1.0 - y[i]
        share, complement = (rest, uniform) if reflected else (uniform, rest)
        survival = complement + share * far_survival + TINY
        level = -log_float64(survival)
        # The hazard at the end and its slope give the start.
        v = 2.0 * level / (hazard + math.sqrt(hazard * hazard + slope * level))
        mills = near_mills
        for _ in range(STEPS_IN_TAIL):
            mills = mills_ratio(near + v)
            newton = (v * (near + 0.5 * v) + log_float64(near_mills / mills) - level) * mills
            v -= newton / (1.0 - 0.5 * newton * (1.0 / mills - (near + v)))
        step = sigma * min(max(v, 0.0), width)
        x = upper - step if reflected else lower + step
        x = min(max(x, lower), upper)
        x = lower if y[i] <= 0.0 else (upper if y[i] >= 1.0 else x)
        theta[i] = exp_float64(x)
        if with_gradients:
            density_ratio = mills_ratio(near + v) / (near_mills * survival)  # φ(near end)/φ(quantile)
            far = share * density_ratio * far_decay
            slope_mu = 1.0 - complement * density_ratio - far
            # z - α near - β far with z = α + v: α multiplies one small number.
            slope_log_sigma = sigma * (near * slope_mu + v - width * far)
            grad_mu[i] = slope_mu
            grad_log_sigma[i] = -slope_log_sigma if reflected else slope_log_sigma


start_inside = compiled(_start_inside, inline=False)
step_inside = compiled(_step_inside, inline=False)
refine_inside = compiled(_refine_inside, inline=False)
finish_inside = compiled(_finish_inside, inline=False)
in_tail = compiled(_in_tail, inline=False)


@compiled
def exact_strip_noise(y, row, lower, upper, noise, with_gradients):
    """Write θ and, if asked for, the derivatives of log θ at a strip of uniforms, in float64.

    Args:
        y: the strip's uniforms, float32 or float64.
        row: the structure's row of the table of constants.
        lower: lower end of log θ.
        upper: upper end of log θ.
        noise: three float64 arrays no shorter than ``y``, to be written: θ, d log θ / dμ and d log θ / d log σ.
        with_gradients: whether to write the last two.
    """
    theta, grad_mu, grad_log_sigma = noise
    if math.isnan(row[ALPHA]):
        fill_with_nan(y.size, theta, grad_mu, grad_log_sigma)
        return
    if max(row[ALPHA], -row[BETA]) >= TAIL_START:
        in_tail(y, row, lower, upper, theta, grad_mu, grad_log_sigma, with_gradients)
        return
    hardest = start_inside(y, row, theta)
    for _ in range(STEPS_FROM_FIT if hardest < QUANTILE_LIMIT else STEPS_BEYOND_FIT):
        step_inside(y, row, theta)
    if row[SIGMA] > WIDE_SIGMA:  # which multiplies the rounding errors of the steps
        refine_inside(y, row, theta)
    finish_inside(y, row, lower, upper, theta, grad_mu, grad_log_sigma, with_gradients)


@loop
def sample_loop(
    mu, log_sigma, uniform, theta, grad_mu, grad_log_sigma, lower, upper, with_gradients, first, last
):
    """Write θ and its derivatives in μ and log σ for the strips from ``first`` to before ``last``.

    Args:
        mu: location of each structure, float64.
        log_sigma: log σ of each structure, float64.
        uniform: float64 [structures, uniforms of each], cut into strips of ELEMENTS_PER_STRIP.
        theta: of the same shape, to be written.
        grad_mu: dθ/dμ, of the same shape if wanted.
        grad_log_sigma: dθ/dlog σ, of the same shape if wanted.
        lower: lower end of log θ.
        upper: upper end of log θ.
        with_gradients: whether the derivatives are wanted.
        first: number of the first strip; those of a structure follow each other.
        last: number after that of the last strip.
    """
    row = np.zeros(NUM_CONSTANTS)
    strips = -(-uniform.shape[1] // ELEMENTS_PER_STRIP)
    known = -1
    for number in range(first, last):
        structure, start = number // strips, number % strips * ELEMENTS_PER_STRIP
        stop = min(start + ELEMENTS_PER_STRIP, uniform.shape[1])
        if structure != known:
            structure_constants(mu[structure], log_sigma[structure], lower, upper, row)
            known = structure
        value = theta[structure, start:stop]
        slope_mu, slope_log_sigma = value, value
        if with_gradients:
            slope_mu, slope_log_sigma = (
                grad_mu[structure, start:stop],
                grad_log_sigma[structure, start:stop],
            )
        noise = (value, slope_mu, slope_log_sigma)
        exact_strip_noise(uniform[structure, start:stop], row, lower, upper, noise, with_gradients)
        if with_gradients:
            for i in range(value.size):
                slope_mu[i] *= value[i]
                slope_log_sigma[i] *= value[i] * row[IN_RANGE]
