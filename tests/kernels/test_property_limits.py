"""Limits, gradients and additivity of the public functions, at points that Hypothesis searches for."""

from __future__ import annotations

import functools
import math
from functools import partial
from random import Random
from statistics import NormalDist

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import assert_close, assert_equal, assert_everywhere, assert_within
from posterior_strategies import (
    BATCH,
    CENTRE,
    DTYPES,
    SETTINGS,
    Draws,
    anywhere,
    batches,
    clip,
    drawn,
    flat_posterior,
    posterior,
    prior_stds,
    sharp_posterior,
    tensors,
    with_gradients,
)

import bmrs_kernels
from benchmarks.accuracy import oracle
from benchmarks.accuracy.contract import BOUNDS, LOWER, MU_RANGE, SMALLEST_UNIFORM, UPPER

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
