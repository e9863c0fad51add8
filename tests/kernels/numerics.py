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
    "assert_ascending",
    "assert_close",
    "assert_equal",
    "assert_everywhere",
    "assert_within",
    "columns",
    "grid",
    "random_points",
    "single",
    "slack",
    "worst",
]

# "value" is relative to max(1, |value|), "relative" to |value|.
_NAMES = {
    "value": "log evidence",
    "kl_gradient": "gradient of KL",
    "relative": "factor",
    "log_theta_gradient": "gradient of log θ",
    "drawn": "drawn factor",
    "drawn_gradient": "gradient of log drawn θ",
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


# What rounding may do to order and equality.


def slack(value: torch.Tensor, floor: float) -> torch.Tensor:
    """Every result is computed in float64 within the contract's bound, then rounded once to its dtype."""
    size = value.abs().double()
    return BOUNDS["log evidence"].float64 * size.clamp(min=floor) + torch.finfo(value.dtype).eps / 2 * size


def assert_ascending(
    low: torch.Tensor, high: torch.Tensor, points: list, *, floor: float = 1.0, shift: float = 0.0
) -> None:
    """Assert low <= high + shift, up to the rounding of both."""
    low, high = low.detach(), high.detach()
    allowed = slack(low, floor) + slack(high, floor)
    holds = low.double() - high.double() - shift <= allowed
    assert_everywhere(holds, torch.stack([low, high], 1), points)


def assert_equal(first: torch.Tensor, second: torch.Tensor, points: list) -> None:
    """Assert equality up to the rounding of both."""
    assert_ascending(first, second, points)
    assert_ascending(second, first, points)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound, points: list, *, floor=1.0) -> None:
    """Assert |actual - expected| <= bound · max(floor, |expected|)."""
    actual = actual.detach().double()
    holds = (actual - expected).abs() <= bound * expected.abs().clamp(min=floor)
    assert_everywhere(holds, torch.stack([actual, expected], 1), points)


def assert_everywhere(holds: torch.Tensor, values: torch.Tensor, points: list) -> None:
    """Assert that a comparison holds, which it does not for NaN; the message names a point where it does not."""
    failures = (~holds).nonzero().flatten().tolist()
    assert not failures, f"{values[failures[0]].tolist()!r} at {points[failures[0]]!r}"
