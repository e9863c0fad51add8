"""The numerics contract: one table of tolerances, the same everywhere, and the points at which it is asserted."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import numpy as np
import torch

LOWER, UPPER = -20.0, 0.0

# Error bounds by dtype. "absolute" is scaled by max(1, |value|), "relative" by |value|.
TOLERANCES = {
    torch.float32: {"value": 2e-6, "kl_gradient": 1e-5, "relative": 1e-5, "log_theta_gradient": 1e-5},
    torch.float64: {"value": 1e-12, "kl_gradient": 1e-12, "relative": 1e-12, "log_theta_gradient": 1e-12},
}

UNIFORMS = (2.0**-24, 1e-5, 1e-3, 0.1, 0.3125, 0.5, 0.6875, 0.9, 1 - 2.0**-10, 1 - 2.0**-17, 1 - 2.0**-24)


def single(value: float) -> float:
    """Return the float32 nearest to a number, as a Python float."""
    return float(np.float32(value))


def grid() -> list[tuple[float, float]]:
    """Return (μ, log σ) exact in float32: both ends, both far tails, regime switches, the whole range of σ."""
    log_sigmas = (
        -20.0,
        -14.5,
        -10.0,
        -7.0,
        -5.0,
        -3.0,
        -1.5,
        -0.5,
        0.0,
        0.5,
        1.0,
        1.5,
        2.0,
        2.5,
        3.0,
        4.0,
        5.0,
    )
    points = set()
    for mu, log_sigma in itertools.product(
        (-40, -30, -22, -20, -19, -12, -10, -5, -1, 0, 2, 10, 20), log_sigmas
    ):
        points.add((float(mu), log_sigma))
    # Multiples of σ from both ends; ±5 is where the quantile switches regime, 0 where the mode leaves the interval.
    for log_sigma, multiple in itertools.product(
        log_sigmas, (-40, -13.3, -8, -5, -3, -1, -1e-3, 1e-3, 1, 3, 5, 9)
    ):
        for end, sign in ((UPPER, 1), (LOWER, -1)):
            mu = single(end + sign * multiple * math.exp(log_sigma))
            if LOWER - 20 <= mu <= UPPER + 20:
                points.add((mu, log_sigma))
    # One representable step to either side of the ends and of the clamps' insides.
    for end in (UPPER, LOWER):
        for neighbour in (-np.inf, np.inf):
            points.add((float(np.nextafter(np.float32(end), np.float32(neighbour))), -20.0))
            points.add((float(np.nextafter(np.float32(end), np.float32(neighbour))), -5.0))
    return sorted(points)


def random_points(count: int, seed: int = 0) -> list[tuple[float, float]]:
    """Return (μ, log σ) exact in float32, uniform over the domain of the contract."""
    generator = np.random.default_rng(seed)
    mu = generator.uniform(LOWER - 20, UPPER + 20, count).astype(np.float32)
    log_sigma = generator.uniform(-20, 5, count).astype(np.float32)
    return list(zip(mu.tolist(), log_sigma.tolist(), strict=True))


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
