"""Options away from their defaults against the 150-digit reference; the defaults are in test_accuracy."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from numerics import (
    LOWER,
    TOLERANCES,
    UPPER,
    assert_within,
    columns,
    grid,
    random_points,
    single,
)

import bmrs_kernels
from benchmarks.accuracy import oracle

LN2 = math.log(2.0)
POINTS = grid() + random_points(100)


def value_and_gradients(function, points, dtype):
    mu, log_sigma = columns(points, dtype)
    value = function(mu, log_sigma)
    return (value, *torch.autograd.grad(value.sum(), (mu, log_sigma)))


@pytest.mark.parametrize(
    ("prior_mean", "prior_std"),
    [(None, 1e-4), (None, 1.0), (-15.0, 0.5), (-3.0, 1e-3), (-30.0, 1e-6), (4.0, 0.1)],
)
def test_delta_f_lognormal_options(prior_mean, prior_std):
    points = random_points(60, seed=1)

    def function(mu, log_sigma):
        return bmrs_kernels.delta_f_lognormal(mu, log_sigma, prior_mean=prior_mean, prior_std=prior_std)

    value, grad_mu, grad_log_sigma = value_and_gradients(function, points, torch.float64)
    expected = [oracle.delta_f_lognormal(*point, prior_mean, prior_std) for point in points]
    assert_within(value, [e[0] for e in expected], points, TOLERANCES[torch.float64]["value"])
    assert_within(grad_mu, [e[1] for e in expected], points, 1e-12)
    assert_within(grad_log_sigma, [e[2] for e in expected], points, 1e-12)


@pytest.mark.parametrize("bounds", [(LOWER, -8 * LN2), (-1e-3, UPPER)], ids=["from-lower", "to-upper"])
def test_delta_f_loguniform_options(bounds):
    points = grid()[::4] + random_points(60, seed=1)

    def function(mu, log_sigma):
        return bmrs_kernels.delta_f_loguniform(
            mu, log_sigma, reduced_lower=bounds[0], reduced_upper=bounds[1]
        )

    results = value_and_gradients(function, points, torch.float64)
    expected = [oracle.delta_f_loguniform(*point, *bounds) for point in points]
    for result, reference in zip(results, zip(*expected, strict=True), strict=True):
        assert_within(result, reference, points, TOLERANCES[torch.float64]["value"])


@pytest.mark.parametrize(
    "function",
    [
        bmrs_kernels.kl_divergence,
        bmrs_kernels.delta_f_lognormal,
        bmrs_kernels.delta_f_loguniform,
        bmrs_kernels.noise_mean,
        bmrs_kernels.noise_snr,
    ],
)
def test_float32_results_are_the_rounded_float64_results(function):
    """Per-structure results in float32 are right to the last digit: at most one unit from the rounded truth."""
    mu, log_sigma = columns(POINTS, torch.float32)
    narrow, wide = function(mu, log_sigma), function(mu.double(), log_sigma.double())
    torch.testing.assert_close(narrow, wide.float(), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize(("lower", "upper"), [(-8.0, 2.0), (-1.0, 0.0), (3.0, 3.5)])
def test_other_intervals(lower, upper):
    width = upper - lower
    points = [
        (single(lower + share * width), log_sigma)
        for share in (-3.0, -0.5, 0.0, 0.3, 0.5, 0.9, 1.0, 2.0)
        for log_sigma in (-12.0, -5.0, -1.0, 0.5, 3.0)
    ]
    options = {"lower": lower, "upper": upper}
    mu, log_sigma = columns(points, torch.float64)
    quantities = [oracle.quantities(*point, lower, upper) for point in points]
    bound = TOLERANCES[torch.float64]
    kl = bmrs_kernels.kl_divergence(mu, log_sigma, **options)
    assert_within(kl, [q.kl for q in quantities], points, bound["value"])
    mean = bmrs_kernels.noise_mean(mu, log_sigma, **options)
    assert_within(mean, [q.mean for q in quantities], points, bound["relative"], scale=0)
    snr = bmrs_kernels.noise_snr(mu, log_sigma, **options)
    assert_within(snr, [q.snr for q in quantities], points, bound["relative"], scale=0)
    normal = bmrs_kernels.delta_f_lognormal(mu, log_sigma, **options)
    reference = [oracle.delta_f_lognormal(*p, None, 1e-6, lower, upper)[0] for p in points]
    assert_within(normal, reference, points, bound["value"])
    reduced = (lower + 0.1 * width, lower + 0.4 * width)
    uniform = bmrs_kernels.delta_f_loguniform(
        mu, log_sigma, reduced_lower=reduced[0], reduced_upper=reduced[1], **options
    )
    reference = [oracle.delta_f_loguniform(*p, *reduced, lower, upper)[0] for p in points]
    assert_within(uniform, reference, points, bound["value"])
    for y in (2.0**-24, 0.25, 0.75):
        theta = bmrs_kernels.sample_noise(mu, log_sigma, torch.tensor(y, dtype=torch.float64), **options)
        with mp.workdps(50):
            reference = [mp.exp(oracle.sample(*p, y, lower, upper).log_theta) for p in points]
        assert_within(theta, reference, points, bound["relative"], scale=0)


@pytest.mark.parametrize("prior_std", [1e-6, 1e-9])
@pytest.mark.parametrize(("lower", "upper"), [(-5.3, 0.0), (-8.1, 2.0), (3.0, 3.5), (-0.25, 0.0)])
def test_gradients_on_other_intervals(lower, upper, prior_std):
    generator = np.random.default_rng(5)
    log_sigma = generator.uniform(-20, 2, 60)
    ends = generator.choice([lower, upper], 60)
    mu = ends + generator.uniform(-15, 15, 60) * np.exp(log_sigma)
    mu[::3] = generator.uniform(lower - 20, upper + 20, 20)
    points = list(zip(mu.tolist(), log_sigma.tolist(), strict=True))
    options = {"lower": lower, "upper": upper}

    def delta_f(mu, log_sigma):
        return bmrs_kernels.delta_f_lognormal(mu, log_sigma, prior_std=prior_std, **options)

    def log_mean(mu, log_sigma):
        return bmrs_kernels.noise_mean(mu, log_sigma, **options).log()

    cases = [
        (delta_f, [oracle.delta_f_lognormal(*point, None, prior_std, lower, upper)[1] for point in points]),
        (
            log_mean,
            [(q := oracle.quantities(*point, lower, upper)).mean_grad_mu / q.mean for point in points],
        ),
    ]
    for function, expected in cases:
        _, grad_mu, _ = value_and_gradients(function, points, torch.float64)
        assert_within(grad_mu, expected, points, 1e-12)


def test_log_sigma_is_clamped_with_zero_gradient_outside():
    log_sigma = torch.tensor([-30.0, -20.0, 5.0, 9.0], dtype=torch.float64, requires_grad=True)
    mu = torch.full((4,), -1.0, dtype=torch.float64)
    inside = log_sigma.detach().clamp(-20, 5)
    uniform = torch.tensor(0.3, dtype=torch.float64)
    for function in (
        bmrs_kernels.kl_divergence,
        bmrs_kernels.delta_f_lognormal,
        bmrs_kernels.delta_f_loguniform,
        bmrs_kernels.noise_mean,
        lambda mu, log_sigma: bmrs_kernels.sample_noise(mu, log_sigma, uniform),
    ):
        value = function(mu, log_sigma)
        torch.testing.assert_close(value, function(mu, inside), rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(value.sum(), log_sigma)
        assert gradient[0] == 0
        assert gradient[3] == 0
        assert gradient[2] != 0


def test_limits():
    wide = torch.tensor([5.0], dtype=torch.float64)
    mu = torch.tensor([-10.0], dtype=torch.float64)
    assert 0 <= bmrs_kernels.kl_divergence(mu, wide) < 1e-6
    assert abs(bmrs_kernels.delta_f_loguniform(mu, wide)) < 1e-3
    sharp = torch.tensor([-20.0], dtype=torch.float64)
    assert bmrs_kernels.noise_mean(mu, sharp).item() == pytest.approx(math.exp(-10), rel=1e-12)
    # A reduced prior as wide as a flat line is no reduction at all.
    assert abs(bmrs_kernels.delta_f_lognormal(mu, wide * 0, prior_std=1e8)) < 1e-9
