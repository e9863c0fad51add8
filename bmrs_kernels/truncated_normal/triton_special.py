"""Special functions for Triton kernels, in plain arithmetic: exp2, exp, log, sqrt and multiplications.

Each has a twin of the same name in ``torch_special``. Functions of log θ's tails are float64; those that run once
for each element of an activation are float32. They work on tensors of any shape.
In arithmetic a constexpr stands on the right of a tensor: Triton's interpreter mistakes the result otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bmrs_kernels import constants
from bmrs_kernels.truncated_normal import polynomials

LOG_SIGMA_MIN = tl.constexpr(constants.LOG_SIGMA_MIN)
LOG_SIGMA_MAX = tl.constexpr(constants.LOG_SIGMA_MAX)
HALF_LOG_2PI = tl.constexpr(constants.HALF_LOG_2PI)

LOG2 = tl.constexpr(polynomials.LOG2)
QUANTILE = tl.constexpr(polynomials.QUANTILE)
INVERSE_DENSITY = tl.constexpr(polynomials.INVERSE_DENSITY)
QUANTILE_SHIFT = tl.constexpr(polynomials.QUANTILE_SHIFT)
QUANTILE_CENTRE = tl.constexpr(polynomials.QUANTILE_CENTRE)
MILLS = tl.constexpr(polynomials.MILLS)
MILLS_CENTRE = tl.constexpr(polynomials.MILLS_CENTRE)

SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
EXPONENT_MASK = tl.constexpr(-0x00800000)
EXPONENT_UNIT = tl.constexpr(2.0**-23)


@triton.constexpr_function
def length(values):
    """Return the length of a constexpr tuple."""
    return len(values)


@triton.jit
def polynomial(x, coefficients: tl.constexpr):
    """Evaluate a polynomial by Horner's rule, highest power first."""
    value = x * coefficients[0] + coefficients[1]
    for power in tl.static_range(2, length(coefficients)):
        value = value * x + coefficients[power]
    return value


@triton.jit
def polynomial_of_row(x, table: tl.constexpr, row: tl.constexpr):
    """Evaluate the polynomial in one row of a table of coefficients."""
    value = x * table[row][0] + table[row][1]
    for power in tl.static_range(2, length(table[row])):
        value = value * x + table[row][power]
    return value


@triton.jit
def log2(x):
    """Return log₂ x for positive normal float32 numbers; absolute error below 6e-8 + 6e-8 |log₂ x|."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) & EXPONENT_MASK
    fraction = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    return fraction * polynomial(fraction, LOG2) + exponent.to(tl.float32) * EXPONENT_UNIT


@triton.jit
def float64_sqrt(x):
    """Return √x to 1e-14 for float64 x in float32's range, without the branches of float64's root."""
    root = tl.sqrt(x.to(tl.float32))
    wide_root = root.to(tl.float64)
    return wide_root + (x - wide_root * wide_root) * (0.5 / root).to(tl.float64)


@triton.jit
def float64_reciprocal(x):
    """Return 1/x to 1e-13 for float64 x in float32's range, without the branches of float64's division."""
    start = (1.0 / x.to(tl.float32)).to(tl.float64)
    return start * (2.0 - x * start)


@triton.jit
def tanh(x):
    """Return tanh x in x's dtype, with full relative precision near 0."""
    square = tl.minimum(x * x, 1.0)
    small = (
        x
        * (10395.0 + square * (1260.0 + 21.0 * square))
        / (10395.0 + square * (4725.0 + square * (210.0 + square)))
    )
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def quantile_variable(product):
    """Return √(4 - log₂ product) - 3.5 for product = 4pq, the variable of the quantile's polynomials; float32."""
    return tl.sqrt(-log2(product) + QUANTILE_SHIFT) - QUANTILE_CENTRE


@triton.jit
def quantile_ratio(variable):
    """Return Φ⁻¹(p) / (2p - 2q) for p = 1 - q; float32."""
    return polynomial(variable, QUANTILE)


@triton.jit
def inverse_density_ratio(variable):
    """Return 4pq / φ(Φ⁻¹(p)) for p = 1 - q; float32."""
    return polynomial(variable, INVERSE_DENSITY)


@triton.jit
def minimum(x, y):
    """Return the smaller of both, and NaN where either is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(x, y):
    """Return the larger of both, and NaN where either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store(ptr, value, valid):
    """Store float32 or float64 values in the pointers' dtype, rounded as torch rounds: from float64 in two steps."""
    dtype = ptr.dtype.element_ty
    if dtype != tl.float64:
        value = value.to(tl.float32)
    tl.store(ptr, value.to(dtype), mask=valid)


@triton.jit
def sigma_from_log(log_sigma):
    """Return σ, with log σ clamped to the range in which the posterior is defined."""
    return tl.exp(minimum(maximum(log_sigma, LOG_SIGMA_MIN), LOG_SIGMA_MAX))


@triton.jit
def log_sigma_in_range(log_sigma):
    """Return 1 where log σ has a gradient and 0 where it is clamped."""
    return ((log_sigma >= LOG_SIGMA_MIN) & (log_sigma <= LOG_SIGMA_MAX)).to(tl.float64)


@triton.jit
def mills_ratio(t):
    """Return S(t)/φ(t), survival over density of a standard normal, for t ≥ 0; float64."""
    return polynomial((t - MILLS_CENTRE) / (t + MILLS_CENTRE), MILLS) / (1.0 + t)


@triton.jit
def normal_density(z):
    """Return φ(z); float64."""
    return tl.exp(-0.5 * z * z - HALF_LOG_2PI)


@triton.jit
def normal_cdf(z):
    """Return Φ(z) with full relative precision in the lower tail; float64."""
    magnitude = tl.abs(z)
    tail = normal_density(magnitude) * mills_ratio(magnitude)
    return tl.where(z < 0, tail, 1.0 - tail)


@triton.jit
def normal_mass(alpha, beta):
    """Return Φ(β) - Φ(α), in either tail with the relative precision of the tail; float64."""
    low, high = tl.minimum(alpha, -beta), tl.maximum(alpha, -beta)
    one_sided = normal_cdf(-high) - normal_cdf(low)
    return tl.where(high > 0, one_sided, 1.0 - normal_cdf(alpha) - normal_cdf(-beta))
