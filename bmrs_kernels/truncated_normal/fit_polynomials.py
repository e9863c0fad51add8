"""Fit the coefficients of ``polynomials`` again and print them, with the errors of both.

``python -m bmrs_kernels.truncated_normal.fit_polynomials``. Weighted least squares in a Chebyshev basis, the weights
raised where the error is large until it is nearly level (Lawson's algorithm). Refitted coefficients differ from the
committed ones, their errors hardly.
"""

from __future__ import annotations

from collections.abc import Sequence

import mpmath as mp
import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from scipy.special import erfcx, ndtri_exp

from bmrs_kernels.truncated_normal import polynomials

Array = NDArray[np.floating]
ITERATIONS = 400


def main() -> None:
    """Print every fit."""
    level = chebyshev_points(0.0, polynomials.QUANTILE_LIMIT, 1200, in_root=polynomials.QUANTILE_SHIFT)
    variable = np.sqrt(level + polynomials.QUANTILE_SHIFT) - polynomials.QUANTILE_CENTRE
    ratio, inverse_density = quantile_values(level)
    fit("QUANTILE", variable, ratio, 1 / ratio, polynomials.QUANTILE)
    fit("INVERSE_DENSITY", variable, inverse_density, 1 / inverse_density, polynomials.INVERSE_DENSITY)

    fraction = chebyshev_points(np.sqrt(0.5) - 1, np.sqrt(2) - 1, 1000)
    fit("LOG2", fraction, np.log1p(fraction) / np.log(2) / fraction, np.abs(fraction), polynomials.LOG2)

    position = chebyshev_points(-1.0, 1 - 1e-9, 400)
    argument = polynomials.MILLS_CENTRE * (1 + position) / (1 - position)
    mills = (1 + argument) * np.sqrt(np.pi / 2) * erfcx(argument / np.sqrt(2))
    fit("MILLS", position, mills, 1 / mills, polynomials.MILLS)
    fit_tail()


def chebyshev_points(low: float, high: float, count: int, *, in_root: float | None = None) -> Array:
    """Return points dense at both ends of an interval; ``in_root`` takes them in √(x + in_root)."""
    cosine = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    if in_root is None:
        return (low + high) / 2 + (high - low) / 2 * cosine
    root = chebyshev_points(float(np.sqrt(low + in_root)), float(np.sqrt(high + in_root)), count)
    return np.maximum(root**2 - in_root, 1e-9)


def quantile_values(level: Array) -> tuple[Array, Array]:
    """Return z / (2p - 2q) and 4pq / φ(z) at levels -log₂(4pq)."""
    product = 2.0**-level
    difference = np.sqrt(-np.expm1(-level * np.log(2)))
    z = -ndtri_exp(np.log(product / 2 / (1 + difference)))
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    return z / (2 * difference), product / density


def level_fit(basis: Array, values: Array, weight: Array) -> tuple[Array, float]:
    """Return the coefficients of the smallest weighted largest error that was met, and that error."""
    emphasis = np.ones(len(values))
    best: Array = np.zeros(basis.shape[1])
    smallest = np.inf
    for _ in range(ITERATIONS):
        scale = np.sqrt(emphasis) * weight
        coefficients = np.linalg.lstsq(basis * scale[:, None], values * scale, rcond=1e-14)[0]
        error = np.abs(basis @ coefficients - values) * weight
        if error.max() < smallest:
            best, smallest = coefficients, float(error.max())
        emphasis *= error / error.max() + 1e-9
        emphasis /= emphasis.mean()
    return best, smallest


def fit(name: str, x: Array, values: Array, weight: Array, committed: Sequence[float]) -> None:
    """Fit a polynomial of the committed degree and print it, highest power first."""
    low, high = x.min(), x.max()
    basis = chebyshev.chebvander((2 * x - low - high) / (high - low), len(committed) - 1)
    coefficients, error = level_fit(basis, values, weight)
    committed_error = float((np.abs(np.polyval(committed, x) - values) * weight).max())
    print(f"{name}: error {error:.2g}, of the committed {committed_error:.2g}")
    print("   ", ", ".join(f"{c:.9g}" for c in power_basis(coefficients, low, high)))


def power_basis(coefficients: Array, low: float, high: float) -> list[float]:
    """Return the coefficients of powers of x, highest first, of a Chebyshev series on [low, high]."""
    with mp.workdps(40):
        slope, shift = mp.mpf(2) / (high - low), -mp.mpf(high + low) / (high - low)
        previous, current = [mp.mpf(1)], [shift, slope]
        total = [mp.mpf(0)] * len(coefficients)
        for order, coefficient in enumerate(coefficients):
            for power, value in enumerate(previous):
                total[power] += mp.mpf(float(coefficient)) * value
            following = [mp.mpf(0)] * (len(current) + 1)
            for power, value in enumerate(current):
                following[power] += 2 * shift * value
                following[power + 1] += 2 * slope * value
            for power, value in enumerate(previous):
                following[power] -= value
            previous, current = current, following
            assert order + 1 == len(previous) - 1
        return [float(value) for value in reversed(total)]


def hazard(z: Array) -> Array:
    """Return φ(z) / S(z)."""
    return np.sqrt(2 / np.pi) / erfcx(z / np.sqrt(2))


def fit_tail() -> None:
    """Fit the polynomials of the tail regime in U and ε and print their errors and those of the committed ones."""
    largest_epsilon = polynomials.TAIL_START**-2
    largest_u = np.sqrt(1 + 2 * polynomials.TAIL_LEVEL * largest_epsilon) - 1
    share = 0.5 + 0.5 * chebyshev_points(-1, 1, 60)
    epsilon = np.repeat(largest_epsilon * share, len(share))
    u = np.maximum(np.tile(share, len(share)), 1e-4) * (np.sqrt(1 + 2 * polynomials.TAIL_LEVEL * epsilon) - 1)
    start = 1 / np.sqrt(epsilon)
    level = u * (1 + u / 2) / epsilon
    v = start * u
    for _ in range(60):  # Halley steps on log S(start) - log S(start + v) = level
        excess = v * (start + v / 2) + np.log(hazard(start + v) / hazard(start)) - level
        newton = excess / hazard(start + v)
        v = v - newton / (1 - newton * (hazard(start + v) - start - v) / 2)
    targets = {"TAIL_QUANTILE": v / start / u, "TAIL_HAZARD": (1 - hazard(start) / hazard(start + v)) / u}
    for name, values in targets.items():
        table = np.array(getattr(polynomials, name))
        in_u = chebyshev.chebvander(2 * u / largest_u - 1, len(table) - 1)
        in_epsilon = chebyshev.chebvander(2 * epsilon / largest_epsilon - 1, table.shape[1] - 1)
        basis = (in_u[:, :, None] * in_epsilon[:, None, :]).reshape(len(u), -1)
        _, error = level_fit(basis, values, u)
        rows = [np.polyval(row, epsilon / largest_epsilon) for row in table]
        committed = sum(row * u**power for power, row in enumerate(rows))
        committed_error = float((np.abs(committed - values) * u).max())
        print(f"{name}: error {error:.2g}, of the committed {committed_error:.2g}")


if __name__ == "__main__":
    main()
