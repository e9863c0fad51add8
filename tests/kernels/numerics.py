"""Assertions of the numerics contract, whose bounds and points stand in ``benchmarks.accuracy``."""

from __future__ import annotations

import math

import mpmath as mp
import torch

from benchmarks.accuracy.contract import BOUNDS, LOWER, UPPER
from benchmarks.accuracy.points import UNIFORMS, grid, random_points, single

__all__ = [
    "LOWER",
    "TOLERANCES",
    "UNIFORMS",
    "UPPER",
    "assert_within",
    "columns",
    "grid",
    "random_points",
    "single",
    "worst",
]

# "value" is relative to max(1, |value|), "relative" to |value|.
_NAMES = {
    "value": "log evidence",
    "kl_gradient": "gradient of KL",
    "relative": "factor",
    "log_theta_gradient": "gradient of log θ",
}
TOLERANCES = {
    dtype: {name: BOUNDS[bound].of(dtype) for name, bound in _NAMES.items()}
    for dtype in (torch.float32, torch.float64)
}


def columns(points: list[tuple[float, float]], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the points as leaf tensors μ and log σ that require gradients."""
    mu, log_sigma = torch.tensor(points, dtype=dtype).T
    return mu.clone().requires_grad_(), log_sigma.clone().requires_grad_()


def worst(actual: torch.Tensor, expected: list, points: list, scale: float = 1.0) -> tuple[float, str]:
    """Return the largest error over max(scale, |expected|) and a description of where it is.

    ``scale=0`` gives the relative error. A non-finite result counts as an infinite error.
    """
    worst_error, where = 0.0, "exact everywhere"
    for value, reference, point in zip(actual.detach().flatten().tolist(), expected, points, strict=True):
        if math.isfinite(value):
            error = abs(mp.mpf(value) - reference)
            error = float(error / max(scale, abs(reference))) if error else 0.0
        else:
            error = math.inf
        if error > worst_error:
            worst_error, where = error, f"at {point}: got {value!r}, expected {mp.nstr(reference, 12)}"
    return worst_error, where


def assert_within(
    actual: torch.Tensor, expected: list, points: list, tolerance: float, *, scale: float = 1.0
) -> None:
    """Assert the contract's bound at every point; the message names the worst one."""
    error, where = worst(actual, expected, points, scale)
    assert error <= tolerance, f"error {error:.3g} exceeds {tolerance:.3g} {where}"
