"""Where one formula ends and another begins, and how finely integrals are taken: the same on every backend."""

from __future__ import annotations

from bmrs_kernels.truncated_normal.polynomials import TAIL_START

__all__ = [
    "NARROW_SPREAD",
    "NEARLY_CONSTANT",
    "NODES_PER_SIDE",
    "REFERENCE_TAIL_START",
    "TAIL_START",
    "WIDE_SIGMA",
    "WINDOW_EXPONENT",
]

# Quadrature. Error below 4e-15 on the whole domain; 24 nodes to a side give 2e-14, 20 nodes 1e-10.
NODES_PER_SIDE = 32
# Weights below exp(-44) of the peak are left out: with v⁴ beside them they still count for less than 1e-15.
WINDOW_EXPONENT = 44.0
# A factor whose logarithm changes by less than this over the window moves the mean by a small part of σ.
NEARLY_CONSTANT = 0.5
# Below this standard deviation of log θ the variance of θ is integrated directly: what θ² adds beyond the window's end
# still counts for less than 1e-14. Above, E[θ²]/E[θ]² - 1 is large enough to be a difference.
NARROW_SPREAD = 0.125

# Drawing noise. Above this σ the last digit of a float32 probability is magnified too much: float64 there. The quantile
# has a relative error of 3e-7 and is multiplied by σ.
WIDE_SIGMA = 4.0
# TAIL_START, how many σ the mode lies outside the interval where the tail's own fits begin, comes with the fits.
# The reference solves for the distance from the end instead of for z beyond this many σ, where z would lose digits.
REFERENCE_TAIL_START = 5.0
