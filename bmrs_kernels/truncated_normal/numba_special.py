"""Special functions in numba: scalar twins, name by name, of those in triton_special and torch_special.

numba compiles them into the loops that call them, which LLVM then vectorises. Where a number's type decides the
precision, functions come in a float32 and a float64 edition made by one factory: in numba a float32 number times a
Python number is float64.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from bmrs_kernels.truncated_normal import polynomials, torch_quadrature
from bmrs_kernels.uniform import torch_philox

# Sums and products may be regrouped, so that loops vectorise; NaN and infinity keep their meaning.
REGROUPING = {"contract", "nsz", "reassoc"}
ROUNDING_AS_WRITTEN = {"contract"}

ROUNDS = torch_philox.ROUNDS
MULTIPLIER_0, MULTIPLIER_1 = (np.uint64(part) for part in torch_philox.MULTIPLIERS)
INCREMENT_0, INCREMENT_1 = (np.uint32(part) for part in torch_philox.KEY_INCREMENTS)
UNUSED_BITS = np.uint32(32 - torch_philox.UNIFORM_BITS)
HALF_WORD = np.uint64(32)
LANES = torch_philox.LANES
UNIFORM_STEP = np.float32(2.0**-torch_philox.UNIFORM_BITS)
HALF = np.float32(0.5)

QUANTILE_SHIFT, QUANTILE_CENTRE = polynomials.QUANTILE_SHIFT, polynomials.QUANTILE_CENTRE
MILLS_CENTRE = polynomials.MILLS_CENTRE
LOG_SIGMA_MIN, LOG_SIGMA_MAX = torch_quadrature.LOG_SIGMA_MIN, torch_quadrature.LOG_SIGMA_MAX
HALF_LOG_2PI = torch_quadrature.HALF_LOG_2PI
SQRT2 = torch_quadrature.SQRT2

SQRT_HALF_BITS = np.int32(0x3F3504F3)
EXPONENT_MASK = np.int32(-0x00800000)
EXPONENT_UNIT = np.float32(2.0**-23)
FRACTION_BITS, EXPONENT_BIAS = np.int32(23), np.int32(127)
ONE = np.float32(1.0)


def compiled(
    function: Callable[..., Any], *, inline: bool = True, fastmath: set[str] = ROUNDING_AS_WRITTEN
) -> Callable[..., Any]:
    """Compile a function that loops call.

    Args:
        function: to be compiled.
        inline: whether it becomes a part of each caller, without which a loop that calls it is not vectorised.
        fastmath: what LLVM may do with its arithmetic.
    """
    made: Callable[..., Any] = numba.njit(
        function, fastmath=fastmath, error_model="numpy", forceinline=inline
    )
    return made


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that Python calls; the interpreter's lock is free while it runs, its code is kept on disk."""
    made: Any = numba.njit(function, fastmath=ROUNDING_AS_WRITTEN, error_model="numpy", nogil=True)
    # Where no folder can be written, every process compiles anew.
    with contextlib.suppress(RuntimeError):
        made._cache = _Cache(function)
    kept: Callable[..., Any] = made
    return kept


class _Cache(FunctionCache):
    """numba's cache on disk, which would not notice a change in a function that a loop calls."""

    def _index_key(self, signature: Any, code_generator: Any) -> tuple[Any, ...]:
        return (*super()._index_key(signature, code_generator), _fingerprint())


@functools.cache
def _fingerprint() -> str:
    """Return a hash of the package: loops hold the numbers and functions that they were compiled with."""
    folder = Path(__file__).parent
    sources = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


@intrinsic
def _pointer(typing_context, address):
    """Return an address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@compiled
def vector_at(address, size, dtype):
    """Return the memory at an address, which a tensor's ``data_ptr`` gives with less ado than its ``numpy``."""
    return numba.carray(_pointer(address), (size,), dtype)


@compiled
def unmanaged(array):
    """Return an array's memory without its reference count, which costs more to update than a short loop takes.

    The array has to be used again after the last use of the memory.
    """
    return numba.carray(_pointer(array.ctypes.data), array.shape, array.dtype)


@intrinsic
def use_widest_vectors(typing_context):
    """Have LLVM take 512-bit vectors in the function that calls this, where there are any.

    By default it takes half as wide ones on such processors, for the sake of code around that uses none. On a Cascade
    Lake Xeon the loops over noise run 1.7 times as fast.
    """

    def generate(context, builder, signature, arguments):
        # llvmlite checks names against a list that lacks this attribute.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate


def polynomial(coefficients: Sequence[float], real: type) -> Callable[..., Any]:
    """Return the function that evaluates a polynomial by Horner's rule, highest power first, in a dtype."""
    # One expression: numba does not unroll a loop over a tuple, and what is not unrolled is not vectorised.
    names = {f"c{power}": real(coefficient) for power, coefficient in enumerate(coefficients)}
    first, *others = names
    expression = "(" * len(others) + first + "".join(f" * x + {name})" for name in others)
    return compiled(eval(f"lambda x: {expression}", names))


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
TANH_SERIES_LIMIT = np.float32(0.25)
tanh_numerator = polynomial((21.0, 1260.0, 10395.0), np.float32)
tanh_denominator = polynomial((1.0, 210.0, 4725.0, 10395.0), np.float32)


@compiled
def fill_uniform(seed, start, count, out):
    """Write the uniforms number ``start`` and following of a seed; return where in ``out`` the first one lies.

    Whole counters are written: ``out`` needs room for ``count`` and 2 · LANES more.
    """
    first = start // LANES
    skipped = start - first * LANES
    low, high = np.uint32(seed), np.uint32(np.uint64(seed) >> HALF_WORD)
    for step in range((skipped + count + LANES - 1) // LANES):
        counter = np.uint64(first + step)
        c0, c1 = np.uint32(counter), np.uint32(counter >> HALF_WORD)
        c2, c3 = np.uint32(0), np.uint32(0)
        key_0, key_1 = low, high
        for _ in range(ROUNDS):
            product_0, product_1 = np.uint64(c0) * MULTIPLIER_0, np.uint64(c2) * MULTIPLIER_1
            c0 = np.uint32(product_1 >> HALF_WORD) ^ c1 ^ key_0
            c2 = np.uint32(product_0 >> HALF_WORD) ^ c3 ^ key_1
            c1, c3 = np.uint32(product_1), np.uint32(product_0)
            key_0, key_1 = np.uint32(key_0 + INCREMENT_0), np.uint32(key_1 + INCREMENT_1)
        out[LANES * step] = uniform_from_word(c0)
        out[LANES * step + 1] = uniform_from_word(c1)
        out[LANES * step + 2] = uniform_from_word(c2)
        out[LANES * step + 3] = uniform_from_word(c3)
    return skipped


@compiled
def uniform_from_word(word):
    """Return (⌊word / 2⁹⌋ + ½) 2⁻²³ in float32, exactly, for a uint32 word."""
    return (np.float32(np.int32(word >> UNUSED_BITS)) + HALF) * UNIFORM_STEP


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
    """Return eˣ in float64 with a relative error of 3e-16, for x ≤ 0; below e⁻⁷⁰⁰ it stays there."""
    x = max(x, -700.0)
    power = np.floor(x * INVERSE_LN2_FLOAT64 + 0.5)
    rest = (x - power * LN2_HIGH_FLOAT64) - power * LN2_LOW_FLOAT64
    bits = np.int64(np.int64(power) + EXPONENT_BIAS_FLOAT64) << FRACTION_BITS_FLOAT64
    return exp_series_float64(rest) * np.int64(bits).view(np.float64)


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
