"""The float32 path of multiply_noise against the 150-digit reference, with the contract's bounds."""

from __future__ import annotations

import mpmath as mp
import pytest
import torch
from numerics import TOLERANCES, UNIFORMS, assert_within, grid, random_points, single

from benchmarks.accuracy import oracle
from bmrs_kernels.multiplicative_noise.eager import NUM_BUFFERS, Noise
from bmrs_kernels.torch_math import normal_quantile

POINTS = grid()[1::4] + random_points(60, seed=3)
BOUND = TOLERANCES[torch.float32]


@pytest.mark.parametrize("y", [single(y) for y in UNIFORMS], ids=lambda y: f"y={y:.3g}")
def test_noise_and_gradients_meet_the_contract(y):
    mu, log_sigma = torch.tensor(POINTS).T.contiguous()
    x = torch.ones(1, len(POINTS))
    noise = Noise(mu, log_sigma, x, 1, -20.0, 0.0)
    assert 0 < noise.hard.numel() < len(POINTS)
    buffers = torch.full((NUM_BUFFERS, *x.shape), torch.nan).unbind()
    log_theta = noise.log(torch.full_like(x, y), buffers, with_gradients=True)
    expected = [oracle.sample(*point, y) for point in POINTS]
    with mp.workdps(50):
        theta = [mp.exp(sample.log_theta) for sample in expected]
    assert log_theta.value.dtype == torch.float32
    assert_within(log_theta.value.exp(), theta, POINTS, BOUND["relative"], scale=0)
    for name in ("grad_mu", "grad_log_sigma"):
        reference = [getattr(sample, name) for sample in expected]
        assert_within(getattr(log_theta, name), reference, POINTS, BOUND["log_theta_gradient"])


def test_normal_quantile_over_its_whole_range():
    tail = torch.logspace(-9.4, -0.3011, 2001, dtype=torch.float64).float()
    complement = (1 - tail.double()).float()
    points = [(p,) for p in tail.tolist()]
    # Both float32 tails are given; the smaller one determines z.
    with mp.workdps(40):
        expected = [-oracle.inverse_survival(mp.mpf(p)) for p in tail.tolist()]
        inverse_density = [1 / oracle.density(z) for z in expected]
    z, inverse = quantile(tail, complement)
    # Near the median z inherits the absolute error of the tails' difference; elsewhere the error is relative.
    assert_within(z, expected, points, 5e-7)
    assert_within(inverse, inverse_density, points, 6e-7, scale=0)
    mirrored, mirrored_inverse = quantile(complement, tail)
    assert torch.equal(mirrored, -z)
    assert torch.equal(mirrored_inverse, inverse)


def quantile(below, above):
    """Return z and 1/φ(z) of copies, since the function works in place; its scratch memory starts as NaN."""
    scratch = tuple(torch.full_like(below, torch.nan) for _ in range(3))
    z, inverse_density = normal_quantile(below.clone(), above.clone(), scratch, with_density=True)
    assert inverse_density is not None
    return z, inverse_density
