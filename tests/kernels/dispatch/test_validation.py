"""Bad input to the public functions: what is named, what it was, what was expected."""

from __future__ import annotations

import pytest
import torch

import bmrs_kernels
from bmrs_kernels import (
    delta_f_lognormal,
    delta_f_loguniform,
    kl_divergence,
    multiply_noise,
    noise_mean,
    noise_snr,
    sample_noise,
)

MU, LOG_SIGMA = torch.full((3,), -1.0), torch.zeros(3)
PER_STRUCTURE = [kl_divergence, delta_f_lognormal, delta_f_loguniform, noise_mean, noise_snr]


def sample(mu, log_sigma, **options):
    return sample_noise(mu, log_sigma, torch.tensor(0.5), **options)


def multiply(mu, log_sigma, **options):
    return multiply_noise(torch.ones(2, 3), mu, log_sigma, **options)


@pytest.mark.parametrize("function", [*PER_STRUCTURE, sample, multiply])
class TestParameters:
    def test_shapes_differ(self, function):
        with pytest.raises(ValueError, match=r"mu and log_sigma must have one shape, got \(3,\) and \(2,\)"):
            function(MU, LOG_SIGMA[:2])

    def test_integer_dtype(self, function):
        with pytest.raises(TypeError, match=r"mu must have a floating-point dtype, got torch.int64"):
            function(MU.long(), LOG_SIGMA)
        with pytest.raises(TypeError, match=r"log_sigma must have a floating-point dtype, got torch.int32"):
            function(MU, LOG_SIGMA.int())

    def test_dtypes_differ(self, function):
        with pytest.raises(TypeError, match=r"one dtype, got torch.float32 and torch.float64"):
            function(MU, LOG_SIGMA.double())

    def test_not_a_tensor(self, function):
        with pytest.raises(TypeError, match="mu must be a tensor, got float"):
            function(0.5, LOG_SIGMA)

    def test_devices_differ(self, function):
        with pytest.raises(ValueError, match=r"log_sigma must be on the device of mu \(cpu\), got meta"):
            function(MU, LOG_SIGMA.to("meta"))

    @pytest.mark.parametrize("ends", [(0.0, 0.0), (1.0, -1.0), (float("nan"), 0.0), (-20.0, float("inf"))])
    def test_empty_or_infinite_interval(self, function, ends):
        with pytest.raises(ValueError, match="lower must be less than upper and both finite, got lower="):
            function(MU, LOG_SIGMA, lower=ends[0], upper=ends[1])

    def test_unknown_backend(self, function):
        with pytest.raises(ValueError, match=r"backend must be one of .*'torch'.*, got 'cuda'"):
            function(MU, LOG_SIGMA, backend="cuda")

    def test_backend_that_cannot_run_is_never_replaced(self, function):
        with pytest.raises(RuntimeError, match='backend="triton"'):
            function(MU, LOG_SIGMA, backend="triton")


@pytest.mark.parametrize("bounds", [(-21.0, -5.0), (-10.0, 1.0), (-5.0, -5.0), (-5.0, -8.0)])
def test_reduced_interval_outside_or_empty(bounds):
    with pytest.raises(ValueError, match="must satisfy lower <= reduced_lower < reduced_upper <= upper, got"):
        delta_f_loguniform(MU, LOG_SIGMA, reduced_lower=bounds[0], reduced_upper=bounds[1])


def test_reduced_normal():
    with pytest.raises(ValueError, match="prior_std must be positive and finite, got 0"):
        delta_f_lognormal(MU, LOG_SIGMA, prior_std=0.0)
    with pytest.raises(ValueError, match="prior_mean must be finite, got nan"):
        delta_f_lognormal(MU, LOG_SIGMA, prior_mean=float("nan"))


def test_uniforms():
    with pytest.raises(TypeError, match="uniform must be a tensor, got float"):
        sample_noise(MU, LOG_SIGMA, 0.5)
    with pytest.raises(TypeError, match=r"uniform must have a floating-point dtype, got torch.int64"):
        sample_noise(MU, LOG_SIGMA, torch.tensor(1))
    with pytest.raises(
        ValueError, match=r"uniform of shape \(2,\) does not broadcast with mu of shape \(3,\)"
    ):
        sample_noise(MU, LOG_SIGMA, torch.rand(2))
    with pytest.raises(ValueError, match="uniform must be on the device of mu"):
        sample_noise(MU, LOG_SIGMA, torch.rand(3, device="meta"))


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x must be a tensor, got list"),
        (X.long(), {}, TypeError, "x must have a floating-point dtype, got torch.int64"),
        (X.to("meta"), {}, ValueError, r"x must be on the device of mu \(cpu\), got meta"),
        (X, {"dim": 2}, ValueError, "dim must be an axis of x, which has 2 dimensions, got 2"),
        (X, {"dim": -3}, ValueError, "dim must be an axis of x, which has 2 dimensions, got -3"),
        (X, {"dim": 0}, ValueError, r"x must have 3 structures along dim 0, as mu has, got shape \(2, 3\)"),
        (X, {"granularity": "pixel"}, ValueError, "granularity must be one of .*, got 'pixel'"),
        (X, {"activation": "gelu"}, ValueError, "activation must be None or one of .*, got 'gelu'"),
        (X, {"mask": torch.ones(2)}, ValueError, r"mask must have the shape of mu, \(3,\), got \(2,\)"),
        (X, {"mask": [True] * 3}, TypeError, "mask must be a tensor, got list"),
        (X, {"mask": torch.ones(3).long()}, TypeError, "mask must have a bool or floating-point dtype"),
        (X, {"mask": torch.ones(3, device="meta")}, ValueError, "mask must be on the device of mu"),
        (X, {"seed": "now"}, TypeError, "seed must be an int or an int64 tensor, got str"),
    ],
)
def test_multiply_noise(x, options, error, message):
    with pytest.raises(error, match=message):
        multiply_noise(x, MU, LOG_SIGMA, **options)


def test_multiply_noise_needs_a_vector_of_structures_and_an_axis_of_examples():
    with pytest.raises(ValueError, match=r"mu must have shape \(structures,\), got \(3, 1\)"):
        multiply_noise(X, MU[:, None], LOG_SIGMA[:, None])
    with pytest.raises(ValueError, match="dim must not be 0 with granularity"):
        multiply_noise(X.T, MU, LOG_SIGMA, dim=0, granularity="sample")


def test_half_precision_parameters_keep_their_dtype():
    for function in PER_STRUCTURE:
        narrow = function(MU.bfloat16(), LOG_SIGMA.bfloat16())
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow, function(MU, LOG_SIGMA).bfloat16())


@pytest.mark.parametrize("function", [*PER_STRUCTURE, sample])
def test_empty_and_scalar_shapes(function):
    assert function(MU[:0], LOG_SIGMA[:0]).shape == (0,)
    assert function(MU[0], LOG_SIGMA[0]).shape == ()
    assert function(MU.reshape(3, 1), LOG_SIGMA.reshape(3, 1)).shape == (3, 1)


def test_public_names():
    assert sorted(bmrs_kernels.__all__) == [
        "delta_f_lognormal",
        "delta_f_loguniform",
        "kl_divergence",
        "multiply_noise",
        "noise_mean",
        "noise_snr",
        "philox_uniform",
        "sample_noise",
    ]
