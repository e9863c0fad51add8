"""Every quantity and gradient against the 150-digit reference, over the whole domain of the contract."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from numerics import (
    LOWER,
    TOLERANCES,
    UNIFORMS,
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
DTYPES = [torch.float64, torch.float32]
BOUNDS = [(-23 * LN2, -8 * LN2), (-23 * LN2, -4 * LN2), (LOWER, -8 * LN2)]


def value_and_gradients(function, points, dtype):
    mu, log_sigma = columns(points, dtype)
    value = function(mu, log_sigma)
    return (value, *torch.autograd.grad(value.sum(), (mu, log_sigma)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_divergence(dtype):
    value, grad_mu, grad_log_sigma = value_and_gradients(bmrs_kernels.kl_divergence, POINTS, dtype)
    expected = [oracle.quantities(*point) for point in POINTS]
    assert_within(value, [q.kl for q in expected], POINTS, TOLERANCES[dtype]["value"])
    bound = TOLERANCES[dtype]["kl_gradient"]
    assert_within(grad_mu, [q.kl_grad_mu for q in expected], POINTS, bound)
    assert_within(grad_log_sigma, [q.kl_grad_log_sigma for q in expected], POINTS, bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_mean(dtype):
    value, grad_mu, grad_log_sigma = value_and_gradients(bmrs_kernels.noise_mean, POINTS, dtype)
    expected = [oracle.quantities(*point) for point in POINTS]
    assert_within(value, [q.mean for q in expected], POINTS, TOLERANCES[dtype]["relative"], scale=0)
    # Not in the contract: a difference of two means over σ, which at σ = e⁻²⁰ has 7 digits left in float64.
    assert_within(grad_mu, [q.mean_grad_mu for q in expected], POINTS, 1e-6)
    assert_within(grad_log_sigma, [q.mean_grad_log_sigma for q in expected], POINTS, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_snr(dtype):
    value = bmrs_kernels.noise_snr(*columns(POINTS, dtype))
    expected = [oracle.quantities(*point).snr for point in POINTS]
    assert_within(value, expected, POINTS, TOLERANCES[dtype]["relative"], scale=0)
    assert not value.requires_grad
    assert_same_decisions(value <= 1, value, [snr - 1 for snr in expected], POINTS, prune_at="negative")


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_f_lognormal(dtype):
    value, grad_mu, grad_log_sigma = value_and_gradients(bmrs_kernels.delta_f_lognormal, POINTS, dtype)
    expected = [oracle.delta_f_lognormal(*point) for point in POINTS]
    assert_within(value, [e[0] for e in expected], POINTS, TOLERANCES[dtype]["value"])
    assert_same_decisions(value >= 0, value, [e[0] for e in expected], POINTS)
    # Not in the contract: at σ = e⁻²⁰ the two posteriors differ by 4e-6 of their spread.
    assert_within(grad_mu, [e[1] for e in expected], POINTS, 1e-6)
    assert_within(grad_log_sigma, [e[2] for e in expected], POINTS, 1e-6)


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
    assert_within(grad_mu, [e[1] for e in expected], points, 1e-6)
    assert_within(grad_log_sigma, [e[2] for e in expected], points, 1e-6)


@pytest.mark.parametrize("bounds", BOUNDS, ids=["u8", "u4", "from-lower"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_f_loguniform(dtype, bounds):
    def function(mu, log_sigma):
        return bmrs_kernels.delta_f_loguniform(
            mu, log_sigma, reduced_lower=bounds[0], reduced_upper=bounds[1]
        )

    value, grad_mu, grad_log_sigma = value_and_gradients(function, POINTS, dtype)
    expected = [oracle.delta_f_loguniform(*point, *bounds) for point in POINTS]
    bound = TOLERANCES[dtype]["value"]
    assert_within(value, [e[0] for e in expected], POINTS, bound)
    assert_same_decisions(value >= 0, value, [e[0] for e in expected], POINTS)
    assert_within(grad_mu, [e[1] for e in expected], POINTS, bound)
    assert_within(grad_log_sigma, [e[2] for e in expected], POINTS, bound)


def assert_same_decisions(decision, value, expected, points, *, prune_at="positive"):
    """Assert that no decision differs where the reference's margin exceeds the contract's."""
    sign = 1 if prune_at == "positive" else -1
    for pruned, got, reference, point in zip(
        decision.tolist(), value.tolist(), expected, points, strict=True
    ):
        if abs(reference) > 1e-5:
            assert pruned == (sign * reference >= 0), f"at {point}: got {got}, margin {float(reference)}"


SAMPLE_POINTS = grid()[::4] + random_points(60, seed=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("y", [single(y) for y in UNIFORMS], ids=lambda y: f"y={y:.3g}")
def test_sample_noise(y, dtype):
    mu, log_sigma = columns(SAMPLE_POINTS, dtype)
    theta = bmrs_kernels.sample_noise(mu, log_sigma, torch.tensor(y, dtype=dtype))
    grad_mu, grad_log_sigma = torch.autograd.grad(theta.sum(), (mu, log_sigma))
    expected = [oracle.sample(*point, y) for point in SAMPLE_POINTS]
    with mp.workdps(50):
        expected_theta = [mp.exp(sample.log_theta) for sample in expected]
    bound = TOLERANCES[dtype]
    assert_within(theta, expected_theta, SAMPLE_POINTS, bound["relative"], scale=0)
    # Gradients of log θ. Their σ-free scale is 1: a shift of μ, or of σ's share in log θ, by one unit.
    theta = theta.detach().double()
    for actual, name in ((grad_mu, "grad_mu"), (grad_log_sigma, "grad_log_sigma")):
        reference = [getattr(sample, name) for sample in expected]
        assert_within(actual.double() / theta, reference, SAMPLE_POINTS, bound["log_theta_gradient"])


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
