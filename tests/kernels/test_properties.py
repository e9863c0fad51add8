"""What the theory of the truncated normal says of every public function, at points that Hypothesis searches for."""

from __future__ import annotations

import math
from functools import partial

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import assert_ascending, assert_close, assert_equal, assert_everywhere
from posterior_strategies import (
    CENTRE,
    DTYPES,
    SETTINGS,
    anywhere,
    batches,
    draw_reduced,
    drawn,
    flat_posterior,
    interval_of_theta,
    location_pair,
    log_sigma_pair,
    posterior,
    posterior_and_uniform,
    prior_stds,
    tensors,
    uniform_pair,
    with_gradients,
)

import bmrs_kernels
from benchmarks.accuracy.contract import BOUNDS, LOWER, SMALLEST_UNIFORM, UPPER

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
        assert_close(row, expected_row, BOUNDS["drawn factor"].of(dtype), where, floor=0.0)
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
