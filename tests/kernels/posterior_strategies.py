"""Points of the numerics contract that Hypothesis searches, and what turns them into arguments."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from numerics import single

from benchmarks.accuracy.contract import LOG_SIGMA_RANGE, LOWER, MU_RANGE, SMALLEST_UNIFORM, UPPER

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=35)

CENTRE = (LOWER + UPPER) / 2
OUTSIDE = MU_RANGE[1] - UPPER
BATCH = 20  # points of one example, evaluated as one tensor
POINT_BYTES = 48  # more than any point reads

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


# Points. All numbers are exact in float32, so that both dtypes are asked for the same point.


class Draws:
    """Numbers read off a string of bytes."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)

    def integer(self, low: int, high: int) -> int:
        """Return one of low to high, both included."""
        return low + int.from_bytes(self.stream.read(3), "big") % (high - low + 1)

    def choice(self, *options):
        return options[self.integer(0, len(options) - 1)]

    def between(self, low: float, high: float) -> float:
        steps = 2**24 - 1
        return single(low + (high - low) * (self.integer(0, steps) / steps))


def batches(point: Callable[[Draws], tuple], size: int = BATCH) -> st.SearchStrategy[list]:
    """Lists of points from one draw of bytes.

    Element by element Hypothesis changes little from one list to the next: a fifth of the points would be new.
    """
    return st.binary(min_size=size * POINT_BYTES, max_size=size * POINT_BYTES).map(
        lambda data: [point(Draws(data[i * POINT_BYTES : (i + 1) * POINT_BYTES])) for i in range(size)]
    )


def ulps_away(value: float, steps: int) -> float:
    for _ in range(abs(steps)):
        value = float(np.nextafter(np.float32(value), np.float32(math.copysign(math.inf, steps))))
    return value


def clip(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def draw_log_sigma(draws: Draws) -> float:
    if draws.integer(0, 3):
        return draws.between(*LOG_SIGMA_RANGE)
    return draws.choice(*LOG_SIGMA_RANGE, single(math.log(4.0)))


def draw_mu(draws: Draws, log_sigma: float, lower: float = LOWER, upper: float = UPPER) -> float:
    """Return μ from one of three charts: the domain, multiples of σ around an end, where the code changes regime."""
    chart, end, sigma = draws.integer(0, 2), draws.choice(lower, upper), math.exp(log_sigma)
    domain = lower - OUTSIDE, upper + OUTSIDE
    if chart == 0:
        return draws.between(*domain)
    if chart == 1:
        return clip(single(end + draws.between(-15.0, 15.0) * sigma), domain)
    multiple = draws.choice(0.0, -2.5, 2.5, -5.0, 5.0)
    return clip(ulps_away(single(end + multiple * sigma), draws.integer(-2, 2)), domain)


def posterior(draws: Draws) -> tuple[float, float]:
    """Return (μ, log σ)."""
    log_sigma = draw_log_sigma(draws)
    return draw_mu(draws, log_sigma), log_sigma


def draw_uniform(draws: Draws) -> float:
    """Return y from 2⁻²⁴ to 1 - 2⁻²⁴, uniform, or log-uniformly close to either end."""
    chart = draws.integer(0, 2)
    if chart == 0:
        return draws.integer(1, 2**24 - 1) * SMALLEST_UNIFORM
    close = single(2.0 ** draws.between(-24.0, -1.0))
    return close if chart == 1 else min(single(1.0 - close), 1.0 - SMALLEST_UNIFORM)


def posterior_and_uniform(draws: Draws) -> tuple[float, float, float]:
    """Return (μ, log σ, y)."""
    return *posterior(draws), draw_uniform(draws)


def anywhere(draws: Draws) -> tuple[float, float, float, tuple[float, float]]:
    """Return (μ, log σ, y, (a, b)), half of them on shorter intervals, where both ends may be near a mode outside."""
    interval = draws.choice(
        (LOWER, UPPER), draws.choice((-8.0, 2.0), (-1.0, 0.0), (3.0, 3.5), (-0.125, 0.125))
    )
    like_width = single(math.log(interval[1] - interval[0]) + draws.between(-3.0, 2.0))
    log_sigma = draws.choice(draw_log_sigma(draws), clip(like_width, LOG_SIGMA_RANGE))
    return draw_mu(draws, log_sigma, *interval), log_sigma, draw_uniform(draws), interval


def location_pair(draws: Draws) -> tuple[float, float, float, float]:
    """Return (μ, μ', log σ, y), μ <= μ': anywhere, less than a few σ apart, or neighbours in float32."""
    (mu, log_sigma, y), chart = posterior_and_uniform(draws), draws.integer(0, 2)
    if chart == 0:
        second = draw_mu(draws, log_sigma)
    elif chart == 1:
        second = clip(single(mu + draws.between(-3.0, 3.0) * math.exp(log_sigma)), MU_RANGE)
    else:
        second = clip(ulps_away(mu, draws.integer(-2, 2)), MU_RANGE)
    return min(mu, second), max(mu, second), log_sigma, y


def log_sigma_pair(draws: Draws) -> tuple[float, float, float]:
    """Return (μ, log σ, log σ'), log σ <= log σ': anywhere, or neighbours in float32."""
    mu, log_sigma = posterior(draws)
    second = draws.choice(draw_log_sigma(draws), ulps_away(log_sigma, draws.integer(-2, 2)))
    second = clip(second, LOG_SIGMA_RANGE)
    return mu, min(log_sigma, second), max(log_sigma, second)


def uniform_pair(draws: Draws) -> tuple[float, float, float, float]:
    """Return (μ, log σ, y, y'), y <= y'."""
    mu, log_sigma, y = posterior_and_uniform(draws)
    second = draws.choice(draw_uniform(draws), ulps_away(y, draws.integer(-2, 2)))
    second = clip(second, (SMALLEST_UNIFORM, 1.0 - SMALLEST_UNIFORM))
    return mu, log_sigma, min(y, second), max(y, second)


def draw_reduced(draws: Draws) -> tuple[float, float]:
    """Return [a', b'] inside [a, b], with ends in multiples of 2⁻¹⁰, so that its reflection is exact."""
    steps = int(UPPER - LOWER) * 1024
    low = draws.integer(0, steps - 1) if draws.integer(0, 2) else 0
    high = draws.integer(low + 1, steps) if draws.integer(0, 2) else draws.choice(low + 1, steps)
    return LOWER + low / 1024, LOWER + high / 1024


def flat_posterior(draws: Draws) -> tuple[float, float, float, float]:
    """Return (μ, log σ, a, b) such that the log density varies by at most 0.1 over the interval."""
    width, centre = math.exp(draws.between(-7.0, 3.0)), draws.between(-20.0, 5.0)
    lower, upper = single(centre - width / 2), single(centre + width / 2)
    mu = single(centre + draws.between(-1.5, 1.5) * width)
    farthest = max(abs(mu - lower), abs(mu - upper))
    smallest = math.log(farthest / math.sqrt(0.2)) + 1e-6
    return mu, draws.choice(5.0, draws.between(smallest, 5.0)), lower, upper


def sharp_posterior(draws: Draws) -> tuple[float, float, float]:
    """Return (μ, log σ, y) with both ends at least 10 σ away: what is cut off is below 1e-18 even of θ²."""
    log_sigma, side = draws.between(-20.0, -1.0), draws.integer(0, 2)
    margin = 10.0 * math.exp(log_sigma) + 1e-5  # rounding μ to float32 takes up to 1e-6
    if side == 0:
        mu = draws.between(LOWER + margin, UPPER - margin)
    else:
        distance = draws.between(1.0, 2.0) * margin
        mu = single(LOWER + distance if side == 1 else UPPER - distance)
    return mu, log_sigma, draw_uniform(draws)


def drawn(value: Callable[[Draws], Any]) -> st.SearchStrategy:
    return st.binary(min_size=POINT_BYTES, max_size=POINT_BYTES).map(lambda data: value(Draws(data)))


prior_stds = drawn(lambda draws: math.exp(draws.between(-14.0, 4.0)))


def tensors(points: list, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return the points' components, each contiguous."""
    return tuple(torch.tensor(points, dtype=dtype).T.contiguous())


def with_gradients(function, mu: torch.Tensor, log_sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = mu.clone().requires_grad_(), log_sigma.clone().requires_grad_()
    value = function(*leaves)
    return (value.detach(), *torch.autograd.grad(value.sum(), leaves))


def interval_of_theta(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e^a and e^b, rounded to a dtype."""
    return tuple(torch.tensor([math.exp(LOWER), math.exp(UPPER)], dtype=torch.float64).to(dtype))
