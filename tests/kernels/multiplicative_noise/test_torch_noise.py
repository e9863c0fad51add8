"""The float32 quantile of multiply_noise against the 150-digit reference."""

from __future__ import annotations

import mpmath as mp
import torch
from numerics import assert_within

from benchmarks.accuracy import oracle
from bmrs_kernels.truncated_normal.torch_special import normal_quantile


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
