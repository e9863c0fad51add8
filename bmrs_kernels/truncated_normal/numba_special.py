"""Special functions in numba: scalar twins, name by name, of those in triton_special and torch_special.

numba compiles them into the loops that call them, which LLVM then vectorises. Where a number's type decides the
precision, functions come in a float32 and a float64 edition made by one factory: in numba a float32 number times a
Python number is float64.
"""

from __future__ import annotations

import math

import numpy as np

from bmrs_kernels import constants
from bmrs_kernels.dispatch.numba_compile import compiled, polynomial
from bmrs_kernels.truncated_normal import polynomials

QUANTILE_SHIFT, QUANTILE_CENTRE = polynomials.QUANTILE_SHIFT, polynomials.QUANTILE_CENTRE
MILLS_CENTRE = polynomials.MILLS_CENTRE
LOG_SIGMA_MIN, LOG_SIGMA_MAX = constants.LOG_SIGMA_MIN, constants.LOG_SIGMA_MAX
HALF_LOG_2PI = constants.HALF_LOG_2PI
SQRT2 = constants.SQRT2

SQRT_HALF_BITS = np.int32(0x3F3504F3)
EXPONENT_MASK = np.int32(-0x00800000)
EXPONENT_UNIT = np.float32(2.0**-23)
FRACTION_BITS, EXPONENT_BIAS = np.int32(23), np.int32(127)
ONE = np.float32(1.0)

log2_fraction = polynomial(polynomials.LOG2, np.float32)
# The series of eʳ for |r| ≤ ½ log 2; what is left out is below 6e-9.
exp_series = polynomial([1.0 / math.factorial(power) for power in range(7, -1, -1)], np.float32)
mills_fraction = polynomial(polynomials.MILLS, np.float64)

INVERSE_LN2, LN2_HIGH, LN2_LOW = (
    np.float32(part) for part in (1.0 / math.log(2.0), 0.693359375, -2.12194440e-4)
)
# Between them eˣ is a normal number, and beyond the wide ones 0 or infinite.
EXP_LOWEST, EXP_HIGHEST = -87.0, 88.0
WIDE_EXP_LOWEST, WIDE_EXP_HIGHEST = np.float32(-104.0), np.float32(89.0)
# Added to a small number, it leaves no bits for a fraction.
ROUNDING_SHIFT = np.float32(1.5 * 2.0**23)
# The same with |r|¹⁴ left out, below 5e-18; the high part of log 2 has 21 bits, so that its products are exact.
exp_series_float64 = polynomial([1.0 / math.factorial(power) for power in range(13, -1, -1)], np.float64)
INVERSE_LN2_FLOAT64, LN2_HIGH_FLOAT64 = 1.0 / math.log(2.0), 1453635.0 * 2.0**-21
LN2_LOW_FLOAT64 = -1.904654299957768e-09
FRACTION_BITS_FLOAT64, EXPONENT_BIAS_FLOAT64 = np.int64(52), np.int64(1023)
SQRT_HALF_BITS_FLOAT64, EXPONENT_MASK_FLOAT64 = np.int64(0x3FE6A09E667F3BCD), np.int64(-(1 << 52))
# Of the inverse hyperbolic tangent: log((1 + s)/(1 - s)) = 2 s (1 + s²/3 + …) for |s| ≤ 0.172; left out is below 1e-19.
log_series_float64 = polynomial([2.0 / (2 * power + 1) for power in range(12, -1, -1)], np.float64)
TANH_SERIES_LIMIT = np.float32(0.25)
tanh_numerator = polynomial((21.0, 1260.0, 10395.0), np.float32)
tanh_denominator = polynomial((1.0, 210.0, 4725.0, 10395.0), np.float32)


@compiled
def log2(x):
    """Return log₂ x for positive normal float32 numbers; absolute error below 6e-8 + 6e-8 |log₂ x|."""
    bits = np.float32(x).view(np.int32)
    exponent = np.int32(bits - SQRT_HALF_BITS) & EXPONENT_MASK
    fraction = np.int32(bits - exponent).view(np.float32) - ONE
    return fraction * log2_fraction(fraction) + np.float32(exponent) * EXPONENT_UNIT


@compiled
def exp(x):
    """Return eˣ in float32 with a relative error of 1e-7, for x in [EXP_LOWEST, EXP_HIGHEST]."""
    power, value = exp_parts(x)
    # The power of two is added to the exponent; of the sum that rounded it, these are the last bits.
    return np.int32(
        np.float32(value).view(np.int32) + (np.float32(power).view(np.int32) << FRACTION_BITS)
    ).view(np.float32)


@compiled
def wide_exp(x):
    """Return eˣ in float32 for all x; below e⁻¹⁰³ it is 0, above e⁸⁹ infinite."""
    power, value = exp_parts(min(max(x, WIDE_EXP_LOWEST), WIDE_EXP_HIGHEST))
    whole = np.int32(power - ROUNDING_SHIFT)
    # In two factors, since the power of two alone may lie outside float32's range.
    half = whole >> np.int32(1)
    return value * power_of_two(half) * power_of_two(np.int32(whole - half))


@compiled
def exp_parts(x):
    """Return n + ROUNDING_SHIFT and eˣ 2⁻ⁿ, for the integer n nearest to x / log 2."""
    power = x * INVERSE_LN2 + ROUNDING_SHIFT
    whole = power - ROUNDING_SHIFT
    return power, exp_series((x - whole * LN2_HIGH) - whole * LN2_LOW)


@compiled
def exp_float64(x):
    """Return eˣ in float64 with a relative error of 3e-16, for |x| ≤ 700; beyond, it stays where it is there."""
    x = min(max(x, -700.0), 700.0)
    power = np.floor(x * INVERSE_LN2_FLOAT64 + 0.5)
    rest = (x - power * LN2_HIGH_FLOAT64) - power * LN2_LOW_FLOAT64
    bits = np.int64(np.int64(power) + EXPONENT_BIAS_FLOAT64) << FRACTION_BITS_FLOAT64
    return exp_series_float64(rest) * np.int64(bits).view(np.float64)


@compiled
def log_float64(x):
    """Return log x in float64 for positive normal numbers; error below 3e-16 of the larger of |log x| and |x - 1|."""
    bits = np.float64(x).view(np.int64)
    exponent = np.int64(bits - SQRT_HALF_BITS_FLOAT64) & EXPONENT_MASK_FLOAT64
    fraction = np.int64(bits - exponent).view(np.float64) - 1.0
    power = np.float64(exponent >> FRACTION_BITS_FLOAT64)
    s = fraction / (2.0 + fraction)
    return power * LN2_HIGH_FLOAT64 + (s * log_series_float64(s * s) + power * LN2_LOW_FLOAT64)


@compiled
def power_of_two(exponent):
    """Return 2 to an int32 power in float32's range."""
    return np.int32(np.int32(exponent + EXPONENT_BIAS) << FRACTION_BITS).view(np.float32)


@compiled
def tanh(x):
    """Return tanh x in float32, with full relative precision near 0."""
    square = min(x * x, ONE)
    small = x * tanh_numerator(square) / tanh_denominator(square)
    magnitude = abs(x)
    large = ONE - (ONE + ONE) / (wide_exp(magnitude + magnitude) + ONE)
    return small if magnitude < TANH_SERIES_LIMIT else (-large if x < 0 else large)


@compiled
def sigma_from_log(log_sigma):
    """Return σ, with log σ clamped to the range in which the posterior is defined; float64."""
    if math.isnan(log_sigma):
        return log_sigma
    return math.exp(min(max(log_sigma, LOG_SIGMA_MIN), LOG_SIGMA_MAX))


@compiled
def log_sigma_in_range(log_sigma):
    """Return 1 where log σ has a gradient, or is NaN, and 0 where it is clamped."""
    return 0.0 if log_sigma < LOG_SIGMA_MIN or log_sigma > LOG_SIGMA_MAX else 1.0


@compiled
def normal_cdf(z):
    """Return Φ(z) with full relative precision in the lower tail; float64."""
    return 0.5 * math.erfc(-z / SQRT2)


@compiled
def normal_density(z):
    """Return φ(z); float64."""
    return math.exp(-0.5 * z * z - HALF_LOG_2PI)


@compiled
def mills_ratio(t):
    """Return S(t)/φ(t), survival over density of a standard normal, for t ≥ 0; float64."""
    return mills_fraction((t - MILLS_CENTRE) / (t + MILLS_CENTRE)) / (1.0 + t)


@compiled
def normal_mass(alpha, beta):
    """Return Φ(β) - Φ(α), in either tail with the relative precision of the tail; float64."""
    if max(alpha, -beta) > 0.0:
        return normal_cdf(-max(alpha, -beta)) - normal_cdf(min(alpha, -beta))
    return 1.0 - normal_cdf(alpha) - normal_cdf(-beta)
