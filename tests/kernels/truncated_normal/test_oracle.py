"""The reference itself: closed forms against numerical quadrature of the definitions, which share no formula."""

from __future__ import annotations

import functools

import mpmath as mp
import pytest

from benchmarks.accuracy import oracle

LOWER, UPPER = -20, 0
POINTS = [
    (0.0, -5.0),
    (-10.0, 0.0),
    (-0.25, -1.0),
    (-20.5, 0.5),
    (3.0, 0.0),
    (12.0, 2.0),
    (-35.0, 4.0),
    (-5.0, 5.0),
    # As far outside as the domain goes, by up to 60,000 σ.
    (-40.0, -8.0),
    (20.0, -8.0),
    (20.0, -1.0),
    (-38.0, 1.5),
    (-40.0, 5.0),
    (20.0, 5.0),
    # Just outside and just inside, by about one σ or less.
    (-20.01, -4.0),
    (-19.99, -4.0),
    (0.001, -7.0),
    (-0.001, -7.0),
    # Sharp and wide in between.
    (-7.5, -8.0),
    (0.0, 2.5),
]
DIGITS = 70
# They agree to 2e-54. The other digits go into differences of moments, most where the mode is 60,000 σ outside.
TOLERANCE = mp.mpf("1e-50")


def close(actual, expected, tolerance=TOLERANCE):
    return abs(actual - expected) <= tolerance * max(abs(expected), mp.mpf("1e-15"))


class Density:
    """A log-concave density on an interval, known up to a constant, and its expectations by quadrature.

    The mean and standard deviation of a normal that resembles it only place the breakpoints.
    """

    # In units of the length within which the density falls by a factor e.
    STEPS = (-200, -60, -20, -6, 0, 6, 20, 60, 200)

    def __init__(self, log_density, mean, std, low=LOWER, high=UPPER):
        self.log_density = log_density
        self.anchor = min(max(mean, low), high)
        self.reach = std / max(1, abs(mean - self.anchor) / std)
        breakpoints = (min(max(self.anchor + step * self.reach, low), high) for step in self.STEPS)
        self.panels = sorted({mp.mpf(low), mp.mpf(high), *breakpoints})
        # Of order one, since mpmath's error estimate is absolute.
        self.top = log_density(self.anchor)
        self.mass = self._integral(lambda x: 1)
        self.log_mass = self.top + mp.log(self.reach * self.mass)

    def _integral(self, function):
        def integrand(t):
            x = self.anchor + self.reach * t
            return mp.exp(self.log_density(x) - self.top) * function(x)

        panels = [(x - self.anchor) / self.reach for x in self.panels]
        return mp.quad(integrand, panels, method="gauss-legendre")

    def expect(self, function):
        return self._integral(function) / self.mass


class Posterior(Density):
    """Normal(μ, σ²) truncated to an interval."""

    def __init__(self, mu, log_sigma, low=LOWER, high=UPPER):
        self.mu, self.sigma = mp.mpf(mu), mp.exp(mp.mpf(log_sigma))
        super().__init__(lambda x: -(self.z(x) ** 2) / 2, self.mu, self.sigma, low, high)

    def z(self, x):
        return (x - self.mu) / self.sigma

    def scores(self, x):
        """Return the derivatives of log density in μ and log σ, but for the normaliser's."""
        return self.z(x) / self.sigma, self.z(x) ** 2

    def mean_scores(self, density):
        """Return the scores' expectations under another density."""
        return [density.expect(lambda x, i=i: self.scores(x)[i]) for i in range(2)]

    @functools.cached_property
    def own_mean_scores(self):
        return self.mean_scores(self)


@functools.lru_cache
def posterior(mu, log_sigma):
    return Posterior(mu, log_sigma)


def parametrised(test):
    return pytest.mark.parametrize(("mu", "log_sigma"), POINTS)(test)


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(DIGITS):
        yield


@parametrised
def test_kl_divergence_is_its_integral(mu, log_sigma):
    q = posterior(mu, log_sigma)
    expected = oracle.quantities(mu, log_sigma)

    def log_density(x):
        return q.log_density(x) - q.log_mass

    assert close(expected.kl, q.expect(log_density) + mp.log(UPPER - LOWER))
    mean_scores = q.own_mean_scores
    gradients = [
        q.expect(lambda x, i=i: log_density(x) * (q.scores(x)[i] - mean_scores[i])) for i in range(2)
    ]
    assert close(expected.kl_grad_mu, gradients[0])
    assert close(expected.kl_grad_log_sigma, gradients[1])


@parametrised
def test_moments_of_theta_are_their_integrals(mu, log_sigma):
    q = posterior(mu, log_sigma)
    expected = oracle.quantities(mu, log_sigma)
    mean = q.expect(mp.exp)
    assert close(expected.mean, mean)
    assert close(expected.snr, mean / mp.sqrt(q.expect(lambda x: (mp.exp(x) - mean) ** 2)))
    mean_scores = q.own_mean_scores
    gradients = [q.expect(lambda x, i=i: mp.exp(x) * (q.scores(x)[i] - mean_scores[i])) for i in range(2)]
    assert close(expected.mean_grad_mu, gradients[0])
    assert close(expected.mean_grad_log_sigma, gradients[1])


@parametrised
@pytest.mark.parametrize("reduced", [(-16, -5), (-20, -19.75), (-0.001, 0)])
def test_delta_f_loguniform_is_its_integral(mu, log_sigma, reduced):
    q, restricted = posterior(mu, log_sigma), Posterior(mu, log_sigma, *reduced)
    value, *gradients = oracle.delta_f_loguniform(mu, log_sigma, *reduced)
    gain = mp.log(UPPER - LOWER) - mp.log(mp.mpf(reduced[1]) - mp.mpf(reduced[0]))
    assert close(value, restricted.log_mass - q.log_mass + gain)
    assert_score_differences(gradients, q, restricted)


@parametrised
@pytest.mark.parametrize(("prior_mean", "prior_std"), [(-15, 2), (-20, 1e-6), (4, 0.5)])
def test_delta_f_lognormal_is_its_integral(mu, log_sigma, prior_mean, prior_std):
    q, prior = posterior(mu, log_sigma), Posterior(prior_mean, mp.log(prior_std))

    def log_product(x):
        return q.log_density(x) + prior.log_density(x)

    precisions = q.sigma**-2, prior.sigma**-2
    centre = (q.mu * precisions[0] + prior.mu * precisions[1]) / sum(precisions)
    product = Density(log_product, centre, 1 / mp.sqrt(sum(precisions)))
    value, *gradients = oracle.delta_f_lognormal(mu, log_sigma, prior_mean, prior_std)
    assert close(value, product.log_mass - q.log_mass - prior.log_mass + mp.log(UPPER - LOWER))
    assert_score_differences(gradients, q, product)


def assert_score_differences(gradients, q, other):
    """The log of ∫ q f dx / ∫ q dx has as its derivative the difference between the two mean scores."""
    for actual, theirs, own in zip(gradients, q.mean_scores(other), q.own_mean_scores, strict=True):
        assert close(actual, theirs - own)


@parametrised
@pytest.mark.parametrize("y", [2.0**-24, 0.3, 0.5, 1 - 2.0**-24])
def test_quantile_inverts_the_integral(mu, log_sigma, y):
    q, sample = posterior(mu, log_sigma), oracle.sample(mu, log_sigma, y)
    x = sample.log_theta
    below, above = Posterior(mu, log_sigma, LOWER, x), Posterior(mu, log_sigma, x, UPPER)
    assert close(mp.exp(below.log_mass - q.log_mass), mp.mpf(y))
    assert close(mp.exp(above.log_mass - q.log_mass), 1 - mp.mpf(y))
    # The probability below x stays: density(x) dx + d(probability) = 0.
    density = mp.exp(q.log_density(x) - q.log_mass)
    gradients = sample.grad_mu, sample.grad_log_sigma
    for actual, theirs, own in zip(gradients, q.mean_scores(below), q.own_mean_scores, strict=True):
        assert close(actual, -mp.mpf(y) * (theirs - own) / density)


@parametrised
def test_gradients_equal_central_differences(mu, log_sigma):
    step = mp.mpf(10) ** -25
    with mp.workdps(oracle.DIGITS):
        mu, log_sigma = mp.mpf(mu), mp.mpf(log_sigma)

        def differences(function):
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
            for actual, expected in zip(differences(function), gradients, strict=True):
                # The error is of the order of the step squared: 1e-45 at worst.
                assert close(actual, expected, mp.mpf("1e-40"))


@pytest.mark.parametrize("log_sigma", [-20, 5])
@pytest.mark.parametrize("mu", [LOWER - 20, LOWER, UPPER, UPPER + 20])
def test_150_digits_are_enough(monkeypatch, mu, log_sigma):
    def everything():
        yield from oracle.quantities.__wrapped__(mu, log_sigma)
        for prior in ((None, 1e-6), (-15, 2)):
            yield from oracle.delta_f_lognormal.__wrapped__(mu, log_sigma, *prior)
        for reduced in ((-16, -5), (-20, -0.001)):
            yield from oracle.delta_f_loguniform.__wrapped__(mu, log_sigma, *reduced)
        for y in (2.0**-24, 0.5, 1 - 2.0**-24):
            yield from oracle.sample.__wrapped__(mu, log_sigma, y)

    assert oracle.DIGITS == 150
    results = list(everything())
    monkeypatch.setattr(oracle, "DIGITS", 300)
    for result, precise in zip(results, everything(), strict=True):
        assert abs(result - precise) <= mp.mpf("1e-40") * abs(precise)
