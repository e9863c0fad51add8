"""Special functions in compiled loops, against float64 and against many digits."""

from __future__ import annotations

import mpmath as mp
import numba
import numpy as np
import pytest
import torch
from numerics import assert_within

from benchmarks.accuracy import oracle
from bmrs_kernels.truncated_normal import numba_special


def applied(function, x):
    """Apply a function to each number of an array, compiled."""

    @numba.njit
    def run(x):
        out = np.empty_like(x)
        for i in range(x.size):
            out[i] = function(x[i])
        return out

    return run(x)


@pytest.mark.parametrize(
    ("function", "exact", "low", "high", "relative", "absolute"),
    [
        (numba_special.log2, np.log2, 1e-30, 1.0, 1.2e-7, 1.2e-7),
        (numba_special.exp, np.exp, -87.0, 88.0, 1.2e-7, 0.0),
        (numba_special.tanh, np.tanh, -12.0, 12.0, 4e-7, 0.0),
    ],
)
def test_float32(function, exact, low, high, relative, absolute):
    x = np.linspace(low, high, 100_001).astype(np.float32)
    wanted = exact(x.astype(np.float64))
    error = np.abs(applied(function, x) - wanted)
    assert (error <= relative * np.abs(wanted) + absolute).all()


def test_exp_of_any_float32():
    x = np.array([-np.inf, -200.0, -103.0, -95.0, -87.5, 0.0, 88.5, 89.5, 1e30, np.inf], np.float32)
    with np.errstate(over="ignore"):
        wanted = np.exp(x)
    np.testing.assert_allclose(applied(numba_special.wide_exp, x), wanted, rtol=1.2e-7, atol=1.5e-45)


def test_exp_in_float64():
    x = np.linspace(-699.0, 0.0, 100_001)
    np.testing.assert_allclose(applied(numba_special.exp_float64, x), np.exp(x), rtol=5e-16, atol=0)


def test_log_in_float64():
    x = np.concatenate(
        [np.logspace(-300, 300, 20_001), 1 + np.logspace(-15, -1, 2001), 1 - np.logspace(-15, -1, 2001)]
    )
    wanted = np.log(x)
    error = np.abs(applied(numba_special.log_float64, x) - wanted)
    assert (error <= 4e-16 * np.abs(wanted) + 1e-18).all()


def test_normal_mass():
    ends = [
        (-1.0, 1.0),
        (-30.0, 2.0),
        (3.0, 5.0),
        (-5.0, -3.0),
        (0.0, 0.125),
        (-0.25, 0.0),
        (20.0, 21.0),
        (-1e9, 1e9),
    ]
    actual = [numba_special.normal_mass(alpha, beta) for alpha, beta in ends]
    with mp.workdps(60):
        expected = [oracle.mass(mp.mpf(alpha), mp.mpf(beta)) for alpha, beta in ends]
    # exp(-z²/2) carries half a unit of its argument into the value.
    assert_within(torch.tensor(actual, dtype=torch.float64), expected, ends, 2e-13, scale=0)
