"""What the theory of the truncated normal says of every public function, at points that Hypothesis searches for."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from functools import partial
from random import Random
from statistics import NormalDist
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numerics import assert_within, single

import bmrs_kernels
from benchmarks.accuracy import oracle
from benchmarks.accuracy.contract import BOUNDS, LOG_SIGMA_RANGE, LOWER, MU_RANGE, SMALLEST_UNIFORM, UPPER

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


# KL divergence.


@DTYPES
@given(points=batches(posterior))
@SETTINGS
def test_kl_is_positive(dtype, points):
    kl = bmrs_kernels.kl_divergence(*tensors(points, dtype))
    assert_everywhere((kl > 0) & kl.isfinite(), kl, points)


@DTYPES
@given(point=drawn(flat_posterior))
@example(point=(-20.001373291015625, 5.0, -20.000457763671875, -19.999542236328125))
@SETTINGS
def test_kl_is_not_negative_on_short_intervals(dtype, point):
    *parameters, lower, upper = point
    kl = bmrs_kernels.kl_divergence(*tensors([parameters], dtype), lower=lower, upper=upper)
    assert_everywhere(kl >= 0, kl, [point])


@DTYPES
@given(points=batches(log_sigma_pair))
@SETTINGS
def test_kl_does_not_increase_with_log_sigma(dtype, points):
    mu, narrow, wide = tensors(points, dtype)
    assert_ascending(bmrs_kernels.kl_divergence(mu, wide), bmrs_kernels.kl_divergence(mu, narrow), points)


@DTYPES
@given(points=batches(location_pair))
@SETTINGS
def test_kl_does_not_decrease_with_distance_from_the_centre(dtype, points):
    """dKL/dμ = -Cov(z², z)/2σ has the sign of μ - (a+b)/2.

    Up to the nearer end's z² both signs of z are equally likely, beyond it only the farther end's remains: E[z | z²]
    does not fall with z² where the upper end is the farther one, and does not rise where the lower end is.
    """
    mu, second, log_sigma, _ = tensors(points, dtype)
    kl, second_kl = (bmrs_kernels.kl_divergence(location, log_sigma) for location in (mu, second))
    farther = (second.double() - CENTRE).abs() >= (mu.double() - CENTRE).abs()
    assert_ascending(torch.where(farther, kl, second_kl), torch.where(farther, second_kl, kl), points)


@DTYPES
@given(points=batches(posterior))
@SETTINGS
def test_signs_of_kl_gradients(dtype, points):
    mu, log_sigma = tensors(points, dtype)
    _, grad_mu, grad_log_sigma = with_gradients(bmrs_kernels.kl_divergence, mu, log_sigma)
    assert_everywhere(grad_mu * (mu.double() - CENTRE).sign() >= 0, grad_mu, points)
    assert_everywhere(grad_log_sigma <= 0, grad_log_sigma, points)


# E[θ].


@DTYPES
@given(points=batches(posterior))
@SETTINGS
def test_noise_mean_is_inside_the_interval(dtype, points):
    mu, log_sigma = tensors(points, dtype)
    mean = bmrs_kernels.noise_mean(mu, log_sigma)
    low, high = interval_of_theta(dtype)
    assert_everywhere((mean >= low) & (mean <= high), mean, points)
    if dtype == torch.float64:
        sigma = log_sigma.exp()
        for outside, strictly_inside in ((LOWER - mu, mean > low), (mu - UPPER, mean < high)):
            # The mean distance from an end is of this order; a float64 holds it beside 1 down to 1e-16.
            distance = sigma / (outside / sigma).clamp(min=1.0)
            assert_everywhere(strictly_inside | (distance < 1e-13), mean, points)


@DTYPES
@given(points=batches(location_pair))
@SETTINGS
def test_noise_mean_increases_with_mu(dtype, points):
    mu, second, log_sigma, _ = tensors(points, dtype)
    low, high = (bmrs_kernels.noise_mean(location, log_sigma) for location in (mu, second))
    assert_ascending(low, high, points, floor=0.0)


@DTYPES
@given(points=batches(posterior))
@SETTINGS
def test_sign_of_the_gradient_of_noise_mean(dtype, points):
    _, grad_mu, _ = with_gradients(bmrs_kernels.noise_mean, *tensors(points, dtype))
    assert_everywhere(grad_mu >= 0, grad_mu, points)


# ΔF.


@DTYPES
@given(points=batches(location_pair), prior_std=prior_stds)
@SETTINGS
def test_delta_f_lognormal_does_not_increase_with_mu(dtype, points, prior_std):
    """The reduced prior's density falls from the lower end on, and q moves away from there."""
    mu, second, log_sigma, _ = tensors(points, dtype)
    low, high = (
        bmrs_kernels.delta_f_lognormal(location, log_sigma, prior_std=prior_std) for location in (second, mu)
    )
    assert_ascending(low, high, points)


@DTYPES
@given(points=batches(location_pair), reduced=drawn(draw_reduced))
@SETTINGS
def test_delta_f_loguniform_from_the_lower_end_does_not_increase_with_mu(dtype, points, reduced):
    mu, second, log_sigma, _ = tensors(points, dtype)
    low, high = (
        bmrs_kernels.delta_f_loguniform(location, log_sigma, reduced_lower=LOWER, reduced_upper=reduced[1])
        for location in (second, mu)
    )
    assert_ascending(low, high, points)


@DTYPES
@given(points=batches(posterior), reduced=drawn(draw_reduced))
@SETTINGS
def test_a_probability_is_at_most_one(dtype, points, reduced):
    value = bmrs_kernels.delta_f_loguniform(
        *tensors(points, dtype), reduced_lower=reduced[0], reduced_upper=reduced[1]
    )
    largest = math.log((UPPER - LOWER) / (reduced[1] - reduced[0]))
    assert_ascending(value, torch.zeros_like(value), points, shift=largest)


@DTYPES
@given(points=batches(posterior))
@SETTINGS
def test_the_prior_itself_is_no_reduction(dtype, points):
    value = bmrs_kernels.delta_f_loguniform(*tensors(points, dtype), reduced_lower=LOWER, reduced_upper=UPPER)
    assert_equal(value, torch.zeros_like(value), points)


@DTYPES
@given(
    points=batches(posterior),
    reduced=drawn(draw_reduced),
    share=drawn(lambda draws: draws.between(0.0, 1.0)),
)
@SETTINGS
def test_probability_grows_with_the_reduced_upper_end(dtype, points, reduced, share):
    reduced_lower, reduced_upper = reduced
    larger = reduced_upper + share * (UPPER - reduced_upper)
    low, high = (
        bmrs_kernels.delta_f_loguniform(
            *tensors(points, dtype), reduced_lower=reduced_lower, reduced_upper=end
        )
        for end in (reduced_upper, larger)
    )
    growth = math.log((larger - reduced_lower) / (reduced_upper - reduced_lower))
    assert_ascending(low, high, points, shift=growth)


# θ.


@DTYPES
@given(points=batches(uniform_pair))
@SETTINGS
def test_theta_increases_with_y(dtype, points):
    mu, log_sigma, y, second_y = tensors(points, dtype)
    low, high = (bmrs_kernels.sample_noise(mu, log_sigma, uniform) for uniform in (y, second_y))
    assert_ascending(low, high, points, floor=0.0)


@DTYPES
@given(points=batches(location_pair))
@SETTINGS
def test_theta_increases_with_mu(dtype, points):
    mu, second, log_sigma, y = tensors(points, dtype)
    low, high = (bmrs_kernels.sample_noise(location, log_sigma, y) for location in (mu, second))
    assert_ascending(low, high, points, floor=0.0)


@DTYPES
@given(points=batches(posterior_and_uniform))
@SETTINGS
def test_theta_is_inside_the_interval_and_moves_no_faster_than_mu(dtype, points):
    """dx/dμ = 1 - [(1-y) φ(α) + y φ(β)]/φ(z), and the density is a concave function of the probability."""
    mu, log_sigma, y = tensors(points, dtype)
    theta, grad_mu, _ = with_gradients(partial(bmrs_kernels.sample_noise, uniform=y), mu, log_sigma)
    low, high = interval_of_theta(dtype)
    assert_everywhere((theta >= low) & (theta <= high), theta, points)
    log_gradient = grad_mu.double() / theta.double()
    bound = BOUNDS["gradient of log θ"].of(dtype)
    assert_everywhere((log_gradient >= -bound) & (log_gradient <= 1 + bound), log_gradient, points)


@given(points=batches(anywhere, size=4))
@SETTINGS
def test_theta_inverts_the_probability_of_an_interval(points):
    """ΔF_U of [a, x] holds P(log θ <= x), and so for [x, b]: at x a little to either side of log θ(y) it brackets y."""
    for mu, log_sigma, y, (lower, upper) in points:
        parameters = tensors([(mu, log_sigma)], torch.float64)
        options = {"lower": lower, "upper": upper}
        function = partial(bmrs_kernels.delta_f_loguniform, *parameters, **options)

        def log_probability(low: float, high: float, function=function, width=upper - lower) -> float:
            if low >= high:
                return -math.inf
            return function(reduced_lower=low, reduced_upper=high).item() - math.log(width / (high - low))

        uniform = torch.tensor([y], dtype=torch.float64)
        x = math.log(bmrs_kernels.sample_noise(*parameters, uniform, **options).item())
        margin = BOUNDS["factor"].float64
        below, above = max(x - margin, lower), min(x + margin, upper)
        for target, least, most in (
            (math.log(y), log_probability(lower, below), log_probability(lower, above)),
            (math.log1p(-y), log_probability(above, upper), log_probability(below, upper)),
        ):
            allowed = BOUNDS["log evidence"].float64 * (1 + abs(target))
            assert least - allowed <= target <= most + allowed, (mu, log_sigma, y, lower, upper)


@DTYPES
@given(points=batches(posterior), seed=st.integers(0, 2**63 - 1))
@SETTINGS
def test_multiply_noise_draws_theta_at_its_uniforms(dtype, points, seed):
    """Its float32 arithmetic is not that of ``sample_noise``."""
    mu, log_sigma = tensors(points, dtype)
    x = torch.ones(2, len(points), dtype=dtype)
    theta = bmrs_kernels.multiply_noise(x, mu, log_sigma, seed=seed)
    uniform = bmrs_kernels.philox_uniform(seed, x.shape, device="cpu")
    expected = bmrs_kernels.sample_noise(mu.double(), log_sigma.double(), uniform)
    low, high = interval_of_theta(dtype)
    for row, expected_row, y in zip(theta, expected, uniform.tolist(), strict=True):
        where = [(*point, at) for point, at in zip(points, y, strict=True)]
        assert_close(row, expected_row, BOUNDS["factor"].of(dtype), where, floor=0.0)
        assert_everywhere((row >= low) & (row <= high), row, where)


# Reflection about the centre of the interval.


def reflectable(points: list, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return μ, a + b - μ and log σ, with μ moved to the nearest multiple of which the reflection is exact too."""
    mu, log_sigma, *_ = tensors(points, torch.float64)
    steps = 2.0**40 if dtype == torch.float64 else 2.0**18
    mu = (mu * steps).round() / steps
    return tuple(part.to(dtype) for part in (mu, LOWER + UPPER - mu, log_sigma))


@DTYPES
@given(points=batches(posterior))
@SETTINGS
def test_kl_is_symmetric(dtype, points):
    mu, reflected, log_sigma = reflectable(points, dtype)
    value, grad_mu, grad_log_sigma = with_gradients(bmrs_kernels.kl_divergence, mu, log_sigma)
    mirrored = with_gradients(bmrs_kernels.kl_divergence, reflected, log_sigma)
    assert_equal(value, mirrored[0], points)
    assert_equal(grad_mu, -mirrored[1], points)
    assert_equal(grad_log_sigma, mirrored[2], points)


@DTYPES
@given(points=batches(posterior_and_uniform))
@SETTINGS
def test_theta_reflects_to_its_inverse(dtype, points):
    mu, reflected, log_sigma = reflectable(points, dtype)
    y = torch.tensor(points, dtype=torch.float64)[:, 2]
    y = ((y / SMALLEST_UNIFORM).round().clamp(min=1) * SMALLEST_UNIFORM).to(dtype)
    theta = bmrs_kernels.sample_noise(mu, log_sigma, y).double()
    mirrored = bmrs_kernels.sample_noise(reflected, log_sigma, 1 - y).double()
    bound = 2 * BOUNDS["factor"].float64 + torch.finfo(dtype).eps
    assert_close(theta * mirrored, torch.full_like(theta, math.exp(LOWER + UPPER)), bound, points, floor=0.0)


@DTYPES
@given(points=batches(posterior), reduced=drawn(draw_reduced))
@SETTINGS
def test_delta_f_loguniform_reflects_with_its_interval(dtype, points, reduced):
    mu, reflected, log_sigma = reflectable(points, dtype)
    mirrored = [LOWER + UPPER - end for end in reversed(reduced)]
    value, mirrored_value = (
        bmrs_kernels.delta_f_loguniform(location, log_sigma, reduced_lower=low, reduced_upper=high)
        for location, (low, high) in ((mu, reduced), (reflected, mirrored))
    )
    assert_equal(value, mirrored_value, points)


# Limits.


def variation(mean: float, std: float, lower: float, upper: float) -> float:
    """Return the largest minus the smallest log density of a normal on an interval."""
    nearest = clip(mean, (lower, upper))
    return (max(mean - lower, upper - mean) ** 2 - (mean - nearest) ** 2) / (2 * std**2)


def mean_square(mu: float, lower: float, upper: float) -> float:
    """Return E[(x - μ)²] for x uniform on an interval."""
    return (upper - lower) ** 2 / 12 + ((lower + upper) / 2 - mu) ** 2


def flat_posterior_and_reduced(draws: Draws) -> tuple[float, ...]:
    """Return (μ, log σ, a, b, a', b')."""
    mu, log_sigma, lower, upper = flat_posterior(draws)
    steps = 1024
    low = draws.integer(0, steps - 1)
    high = draws.integer(low + 1, steps)
    return mu, log_sigma, lower, upper, *(lower + share / steps * (upper - lower) for share in (low, high))


@DTYPES
@given(point=drawn(flat_posterior_and_reduced))
@example(point=(CENTRE, 5.0, LOWER, UPPER, -16.0, -5.0))
@SETTINGS
def test_wide_posteriors_approach_the_prior(dtype, point):
    """KL tends to half the variance of log q under the prior, ΔF_U to a difference of its means.

    Let f be log q but for a constant, R its variation over the interval, and q_s ∝ exp(s f), from the prior at s = 0 to
    q at s = 1. KL(q_s‖p) has the derivative s Var_s(f), and Var_s(f) is Var_0(f) but for a factor between exp(-R) and
    exp(R), as is the density. At the centre of the interval Var_0(f) = ((b-a)/σ)⁴/720, hence KL → ((b-a)/σ)⁴/1440.
    ΔF_U is a difference of log E[exp(f)], which exceeds E[f] by at most R²/8 under any distribution (Hoeffding).
    """
    mu, log_sigma, lower, upper, *reduced = point
    sigma, width, offset = math.exp(log_sigma), upper - lower, mu - (lower + upper) / 2
    spread = variation(mu, sigma, lower, upper)
    parameters = tensors([(mu, log_sigma)], dtype)

    kl = bmrs_kernels.kl_divergence(*parameters, lower=lower, upper=upper).item()
    limit = (width**4 / 180 + offset**2 * width**2 / 3) / (8 * sigma**4)
    tolerance = BOUNDS["log evidence"].float64 + torch.finfo(dtype).eps * limit
    assert limit * math.exp(-spread) - tolerance <= kl <= limit * math.exp(spread) + tolerance

    options = {"reduced_lower": reduced[0], "reduced_upper": reduced[1], "lower": lower, "upper": upper}
    delta_f = bmrs_kernels.delta_f_loguniform(*parameters, **options).item()
    limit = (mean_square(mu, lower, upper) - mean_square(mu, *reduced)) / (2 * sigma**2)
    tolerance = BOUNDS["log evidence"].float64 + torch.finfo(dtype).eps * spread
    assert abs(delta_f - limit) <= spread**2 / 8 + tolerance


@DTYPES
@given(points=batches(sharp_posterior))
@SETTINGS
def test_sharp_posteriors_approach_the_untruncated_log_normal(dtype, points):
    """KL → log (b-a) - log σ - ½ log 2πe at once, E[θ] → e^μ and SNR → 1/σ but for a share of σ², log θ → μ."""
    parameters = tensors(points, dtype)[:2]
    mu, log_sigma, y = tensors(points, torch.float64)
    sigma, factor_bound = log_sigma.exp(), BOUNDS["factor"].of(dtype)

    kl = bmrs_kernels.kl_divergence(*parameters)
    entropy = log_sigma + 0.5 * math.log(2 * math.pi * math.e)
    assert_close(kl, math.log(UPPER - LOWER) - entropy, BOUNDS["log evidence"].of(dtype), points)

    mean = bmrs_kernels.noise_mean(*parameters)
    assert_close(mean, torch.exp(mu + sigma**2 / 2), factor_bound, points, floor=0.0)
    assert_close(mean, mu.exp(), factor_bound + sigma**2, points, floor=0.0)

    snr = bmrs_kernels.noise_snr(*parameters)
    assert_close(snr, torch.expm1(sigma**2).rsqrt(), factor_bound, points, floor=0.0)
    assert_close(snr, 1 / sigma, factor_bound + sigma**2, points, floor=0.0)

    theta = bmrs_kernels.sample_noise(*parameters, y.to(dtype))
    z = torch.tensor([NormalDist().inv_cdf(uniform) for uniform in y.tolist()], dtype=torch.float64)
    assert_close(theta, torch.exp(mu + sigma * z), factor_bound, points, floor=0.0)


@DTYPES
@given(
    points=batches(posterior), prior=drawn(lambda draws: (draws.between(*MU_RANGE), draws.between(4.0, 18.0)))
)
@SETTINGS
def test_a_flat_reduced_prior_is_no_reduction(dtype, points, prior):
    """ΔF = log E_q[exp(g)] - log E_p[exp(g)], g = -(x - μ̃p)²/2σ̃p²: within g's variation R, and ∝ 1/σ̃p² but for R²/8."""
    prior_mean, prior_std = prior[0], math.exp(prior[1])
    value, quarter = (
        bmrs_kernels.delta_f_lognormal(*tensors(points, dtype), prior_mean=prior_mean, prior_std=std).double()
        for std in (prior_std, 2 * prior_std)
    )
    spread, zero = variation(prior_mean, prior_std, LOWER, UPPER), torch.zeros_like(value)
    tolerance = BOUNDS["log evidence"].float64 + torch.finfo(dtype).eps * spread
    assert_close(value, zero, spread + tolerance, points)
    # R²/8 of the value, and four times (R/4)²/8 of the quarter.
    assert_close(value, 4 * quarter, spread**2 / 6.4 + 5 * tolerance, points)


# Gradients.


def assert_gradients(function, reference, point: tuple, bound: str) -> None:
    mu, log_sigma, _, (lower, upper) = point
    expected = central_differences(partial(reference, lower=lower, upper=upper), mu, log_sigma)
    for dtype in (torch.float32, torch.float64):
        parameters = tensors([(mu, log_sigma)], dtype)
        _, *gradients = with_gradients(partial(function, lower=lower, upper=upper), *parameters)
        for actual, derivative in zip(gradients, expected, strict=True):
            assert_within(actual, [derivative], [point], BOUNDS[bound].of(dtype))


def central_differences(function, mu: float, log_sigma: float) -> tuple[mp.mpf, mp.mpf]:
    with mp.workdps(oracle.DIGITS):
        mu, log_sigma, step = mp.mpf(mu), mp.mpf(log_sigma), mp.mpf("1e-25")
        along_mu = function(mu + step, log_sigma) - function(mu - step, log_sigma)
        along_log_sigma = function(mu, log_sigma + step) - function(mu, log_sigma - step)
        return along_mu / (2 * step), along_log_sigma / (2 * step)


@given(point=drawn(anywhere))
@SETTINGS
def test_gradients_of_kl_are_central_differences(point):
    def reference(*at, **interval):
        return oracle.quantities(*at, **interval).kl

    assert_gradients(bmrs_kernels.kl_divergence, reference, point, "gradient of KL")


@given(point=drawn(anywhere))
@SETTINGS
def test_gradients_of_noise_mean_are_central_differences(point):
    def log_mean(mu, log_sigma, **interval):
        return bmrs_kernels.noise_mean(mu, log_sigma, **interval).log()

    def reference(*at, **interval):
        return mp.log(oracle.quantities(*at, **interval).mean)

    assert_gradients(log_mean, reference, point, "gradient of log E[θ]")


@given(point=drawn(anywhere), prior_std=prior_stds | st.just(1e-6))
@SETTINGS
def test_gradients_of_delta_f_lognormal_are_central_differences(point, prior_std):
    options = {"prior_mean": point[3][0], "prior_std": prior_std}

    def reference(*at, **interval):
        return oracle.delta_f_lognormal(*at, **options, **interval)[0]

    assert_gradients(partial(bmrs_kernels.delta_f_lognormal, **options), reference, point, "gradient of ΔF")


@given(point=drawn(anywhere), shares=drawn(lambda draws: (draws.between(0.0, 0.9), draws.between(0.01, 1.0))))
@SETTINGS
def test_gradients_of_delta_f_loguniform_are_central_differences(point, shares):
    lower, upper = point[3]
    reduced_lower = lower + shares[0] * (upper - lower)
    options = {
        "reduced_lower": reduced_lower,
        "reduced_upper": reduced_lower + shares[1] * (upper - reduced_lower),
    }

    def reference(*at, **interval):
        return oracle.delta_f_loguniform(*at, **options, **interval)[0]

    assert_gradients(partial(bmrs_kernels.delta_f_loguniform, **options), reference, point, "gradient of ΔF")


@given(points=batches(anywhere, size=4))
@example(points=[(-3.0, 0.0, 0.75, (3.0, 3.5))])  # 6 σ outside, and both ends count
# Where the iteration of the quantile converges last.
@example(points=[(1.3212933540344238, -1.5483384132385254, SMALLEST_UNIFORM, (LOWER, UPPER))])
@SETTINGS
def test_gradients_of_log_theta_are_central_differences(points):
    for point in points:
        y = point[2]

        def log_theta(mu, log_sigma, y=y, **interval):
            uniform = torch.tensor(y, dtype=mu.dtype)
            return bmrs_kernels.sample_noise(mu, log_sigma, uniform, **interval).log()

        def reference(*at, y=y, **interval):
            return oracle.sample(*at, y, **interval).log_theta

        assert_gradients(log_theta, reference, point, "gradient of log θ")


# Structures do not see each other, and their ΔF add up.

PER_STRUCTURE = {
    "kl_divergence": bmrs_kernels.kl_divergence,
    "delta_f_lognormal": bmrs_kernels.delta_f_lognormal,
    "delta_f_loguniform": bmrs_kernels.delta_f_loguniform,
    "noise_mean": bmrs_kernels.noise_mean,
    "noise_snr": bmrs_kernels.noise_snr,
    "sample_noise": partial(bmrs_kernels.sample_noise, uniform=torch.tensor(0.3, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", PER_STRUCTURE)
@DTYPES
@given(points=batches(posterior), count=st.integers(1, BATCH), random=st.randoms(use_true_random=True))
@example(points=[(7.981626987457275, -13.674661636352539)] * BATCH, count=BATCH, random=Random(0))
@SETTINGS
def test_structures_do_not_depend_on_their_neighbours(dtype, name, points, count, random):
    function, points = PER_STRUCTURE[name], points[:count]
    mu, log_sigma = tensors(points, dtype)
    together = function(mu, log_sigma)

    def assert_same(arranged: torch.Tensor, arrangement: str) -> None:
        where = [(arrangement, *point) for point in points]
        if name == "delta_f_lognormal":  # the last bit of torch.hypot depends on the place in the tensor
            assert_equal(arranged, together, where)
        else:
            assert_everywhere(arranged == together, torch.stack([arranged, together], 1), where)

    alone = [function(*one) for one in zip(mu.split(1), log_sigma.split(1), strict=True)]
    assert_same(torch.cat(alone), "alone")
    assert_same(function(mu.view(-1, 1, 1), log_sigma.view(-1, 1, 1)).flatten(), "in three dimensions")
    assert_same(function(*torch.tensor(points, dtype=dtype).unbind(1)), "strided")
    crowd = [torch.cat([part.flip(0), part]) for part in (mu, log_sigma)]
    assert_same(function(*crowd)[count:], "in a crowd")
    order = random.sample(range(count), count)
    permuted = torch.empty_like(together)
    permuted[order] = function(mu[order], log_sigma[order])
    assert_same(permuted, "permuted")


def two_moderate_structures(draws: Draws) -> tuple[list, tuple[float, float], tuple[float, float]]:
    """Return two (μ, log σ), a reduced normal and a reduced interval, none with details finer than half a unit."""
    structures = [(draws.between(-25.0, 5.0), draws.between(0.0, 2.0)) for _ in range(2)]
    reduced_lower = draws.between(LOWER, UPPER - 1.0)
    reduced = reduced_lower, draws.between(reduced_lower + 0.5, UPPER)
    return structures, (draws.between(-25.0, 5.0), draws.between(0.5, 3.0)), reduced


@given(case=drawn(two_moderate_structures))
@SETTINGS
def test_delta_f_of_two_structures_is_that_of_their_joint_posterior(case):
    """ΔF = log ∬ q p̃/p over [a, b]², with q(x, x') = q(x) q(x') and p, p̃ likewise, summed on a grid of points."""
    structures, (prior_mean, prior_std), reduced = case
    parameters = tensors(structures, torch.float64)

    def log_integral(bounds: tuple[float, float], *normals: list[tuple[float, float]]) -> float:
        """Return log ∫ of a product of unnormalised normal densities, any number of them on every axis."""
        panels = np.linspace(*bounds, 41)
        nodes, weights = np.polynomial.legendre.leggauss(16)
        half = np.diff(panels)[:, None] / 2
        x, weights = (panels[:-1, None] + half * (nodes + 1)).ravel(), (half * weights).ravel()
        exponents = [sum(-(((x - mean) / std) ** 2) / 2 for mean, std in axis) for axis in normals]
        joint = functools.reduce(np.add.outer, exponents)
        volume = functools.reduce(np.multiply.outer, [weights] * len(exponents))
        return joint.max() + math.log((volume * np.exp(joint - joint.max())).sum())

    posteriors = [(mu, math.exp(log_sigma)) for mu, log_sigma in structures]
    prior, interval = (prior_mean, prior_std), (LOWER, UPPER)
    log_evidence = log_integral(interval, *([one] for one in posteriors))
    tolerance = 2 * BOUNDS["log evidence"].float64

    log_gain = math.log((UPPER - LOWER) / (reduced[1] - reduced[0]))
    expected = log_integral(reduced, *([one] for one in posteriors)) - log_evidence + 2 * log_gain
    actual = bmrs_kernels.delta_f_loguniform(*parameters, reduced_lower=reduced[0], reduced_upper=reduced[1])
    assert actual.sum().item() == pytest.approx(expected, rel=tolerance, abs=tolerance)

    log_gain = math.log(UPPER - LOWER) - log_integral(interval, [prior])
    expected = log_integral(interval, *([one, prior] for one in posteriors)) - log_evidence + 2 * log_gain
    actual = bmrs_kernels.delta_f_lognormal(*parameters, prior_mean=prior_mean, prior_std=prior_std)
    assert actual.sum().item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
