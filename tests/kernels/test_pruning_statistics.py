"""The pruning statistics against the four functions that they unite."""

from __future__ import annotations

import pytest
import torch
from numerics import columns, grid

import bmrs_kernels
from bmrs_kernels.pruning_statistics.op import pruning_statistics

OPTIONS = {"prior_mean": -19.0, "prior_std": 1e-2, "reduced_lower": -18.0, "reduced_upper": -4.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_four_functions(dtype):
    mu, log_sigma = (parameter.detach().reshape(1, -1).T for parameter in columns(grid(), dtype))
    interval = {"lower": -19.5, "upper": 0.5}
    normal, uniform = dict(list(OPTIONS.items())[:2]), dict(list(OPTIONS.items())[2:])
    statistics = pruning_statistics(mu, log_sigma, **OPTIONS, **interval)
    expected = {
        "delta_f_lognormal": bmrs_kernels.delta_f_lognormal(mu, log_sigma, **normal, **interval),
        "delta_f_loguniform": bmrs_kernels.delta_f_loguniform(mu, log_sigma, **uniform, **interval),
        "mean": bmrs_kernels.noise_mean(mu, log_sigma, **interval),
        "signal_to_noise": bmrs_kernels.noise_snr(mu, log_sigma, **interval),
    }
    assert statistics._fields == tuple(expected)
    for name, value in expected.items():
        assert torch.equal(getattr(statistics, name), value), name


def test_defaults_are_those_of_the_four_functions():
    mu, log_sigma = columns(grid(), torch.float32)
    statistics = pruning_statistics(mu, log_sigma)
    functions = (bmrs_kernels.delta_f_lognormal, bmrs_kernels.delta_f_loguniform)
    functions += (bmrs_kernels.noise_mean, bmrs_kernels.noise_snr)
    for value, function in zip(statistics, functions, strict=True):
        assert torch.equal(value, function(mu, log_sigma))
        assert not value.requires_grad


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_shapes(shape):
    for value in pruning_statistics(torch.zeros(shape), torch.zeros(shape)):
        assert value.shape == shape


def test_opcheck():
    mu, log_sigma = torch.linspace(-21, 1, 6), torch.linspace(-6, 3, 6)
    operator = torch.ops.bmrs_kernels.pruning_statistics.default
    torch.library.opcheck(operator, (mu, log_sigma, *OPTIONS.values(), -20.0, 0.0, "torch"))


def test_compiles_without_graph_breaks():
    mu, log_sigma = torch.linspace(-21, 1, 6), torch.linspace(-6, 3, 6)
    compiled = torch.compile(pruning_statistics, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(mu, log_sigma), pruning_statistics(mu, log_sigma), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower": 1.0}, "lower must be less than upper"),
        ({"prior_std": 0.0}, "prior_std must be positive"),
        ({"reduced_upper": 1.0}, "reduced_lower and reduced_upper must satisfy"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        pruning_statistics(torch.zeros(2), torch.zeros(2), **options)
