"""The reference itself: closed forms against numerical quadrature of the definitions, which share no formula."""

from __future__ import annotations

import math

import mpmath as mp
import pytest

from benchmarks.accuracy import oracle

POINTS = [
    (0.0, -5.0),
    (-10.0, 0.0),
    (-0.25, -1.0),
    (-20.5, 0.5),
    (3.0, 0.0),
    (12.0, 2.0),
    (-35.0, 4.0),
    (-5.0, 5.0),
]


def integrate(function, mu, log_sigma, lower=-20.0, upper=0.0):
    """Integrate over an interval, with breakpoints where the density lives."""
    sigma = math.exp(log_sigma)
    anchor = min(max(mu, lower), upper)
    reach = sigma / max(1.0, abs(mu - anchor) / sigma)
    steps = (-60, -30, -12, -6, -3, -1, 0, 1, 3, 6, 12, 30, 60)
    cuts = {lower, upper} | {min(max(anchor + step * reach, lower), upper) for step in steps}
    # mpmath's error estimate is absolute: bring the integrand to order one.
    scale = abs(function(mp.mpf(anchor))) or mp.mpf(1)
    return mp.quad(lambda x: function(x) / scale, sorted(cuts)) * scale


@pytest.mark.parametrize(("mu", "log_sigma"), POINTS)
def test_closed_forms_equal_quadrature(mu, log_sigma):
    with mp.workdps(40):
        sigma = mp.exp(mp.mpf(log_sigma))
        anchor = mp.mpf(min(max(mu, -20.0), 0.0))

        def weight(x):
            return mp.exp(((anchor - mu) ** 2 - (x - mu) ** 2) / (2 * sigma**2))

        normaliser = integrate(weight, mu, log_sigma)

        def expect(function):
            return integrate(lambda x: function(x) * weight(x), mu, log_sigma) / normaliser

        expected = oracle.quantities(mu, log_sigma)
        kl = expect(lambda x: mp.log(weight(x) / normaliser * 20))
        mean = expect(mp.exp)
        spread = mp.sqrt(expect(lambda x: (mp.exp(x) - mean) ** 2))
        assert close(expected.kl, kl)
        assert close(expected.mean, mean)
        assert close(expected.snr, mean / spread)

        def log_density(x):
            return mp.log(weight(x) / normaliser)

        z_mean = expect(lambda x: (x - mu) / sigma)
        z_square = expect(lambda x: ((x - mu) / sigma) ** 2)
        assert close(
            expected.kl_grad_mu, expect(lambda x: log_density(x) * ((x - mu) / sigma - z_mean)) / sigma
        )
        assert close(
            expected.kl_grad_log_sigma,
            expect(lambda x: log_density(x) * (((x - mu) / sigma) ** 2 - z_square)),
        )

        share = integrate(weight, mu, log_sigma, -16.0, -5.0) / normaliser
        assert close(oracle.delta_f_loguniform(mu, log_sigma, -16, -5)[0], mp.log(20 * share / 11))

        prior_mean, prior_std = mp.mpf(-15), mp.mpf(2)
        prior_mass = integrate(
            lambda x: mp.exp(-(((x - prior_mean) / prior_std) ** 2) / 2), -15.0, math.log(2)
        )
        ratio = expect(lambda x: 20 * mp.exp(-(((x - prior_mean) / prior_std) ** 2) / 2) / prior_mass)
        assert close(oracle.delta_f_lognormal(mu, log_sigma, -15, 2)[0], mp.log(ratio))

        for y in (0.001, 0.5, 0.99):
            quantile = oracle.sample(mu, log_sigma, y).log_theta
            assert close(integrate(weight, mu, log_sigma, -20.0, quantile) / normaliser, mp.mpf(y))


@pytest.mark.parametrize(("mu", "log_sigma"), POINTS)
def test_gradients_equal_central_differences(mu, log_sigma):
    with mp.workdps(80):
        step = mp.mpf(10) ** -25
        mu, log_sigma = mp.mpf(mu), mp.mpf(log_sigma)

        def difference(function):
            along_mu = (function(mu + step, log_sigma) - function(mu - step, log_sigma)) / (2 * step)
            along_log_sigma = (function(mu, log_sigma + step) - function(mu, log_sigma - step)) / (2 * step)
            return along_mu, along_log_sigma

        cases = [
            (lambda m, s: oracle.quantities(m, s).kl, oracle.quantities(mu, log_sigma)[1:3]),
            (lambda m, s: oracle.quantities(m, s).mean, oracle.quantities(mu, log_sigma)[4:6]),
            (lambda m, s: oracle.delta_f_lognormal(m, s)[0], oracle.delta_f_lognormal(mu, log_sigma)[1:]),
            (
                lambda m, s: oracle.delta_f_loguniform(m, s, -16, -5)[0],
                oracle.delta_f_loguniform(mu, log_sigma, -16, -5)[1:],
            ),
            (lambda m, s: oracle.sample(m, s, 0.3).log_theta, oracle.sample(mu, log_sigma, 0.3)[1:]),
        ]
        for function, gradients in cases:
            for actual, expected in zip(difference(function), gradients, strict=True):
                assert close(actual, expected, 1e-20)


def close(actual, expected, tolerance=1e-15):
    return abs(actual - expected) <= tolerance * max(abs(expected), mp.mpf("1e-15"))
