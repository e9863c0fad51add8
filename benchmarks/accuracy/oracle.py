"""High-precision reference for every public quantity, from the textbook closed forms in 150 digits.

Independent of the package: no quadrature, no anchors, no regimes; differences of huge numbers are simply carried
with enough digits. Arguments are Python numbers and are taken exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import mpmath as mp

DIGITS = 150

Number: TypeAlias = int | float | mp.mpf

P = ParamSpec("P")
R = TypeVar("R")


def survival(z: Number) -> mp.mpf:
    """Return 1 - Φ(z)."""
    return mp.erfc(z / mp.sqrt(2)) / 2


def density(z: Number) -> mp.mpf:
    """Return φ(z)."""
    return mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)


def mass(alpha: Number, beta: Number) -> mp.mpf:
    """Return Φ(β) - Φ(α), from the tail in which both are small."""
    if alpha + beta < 0:
        alpha, beta = -beta, -alpha
    return survival(alpha) - survival(beta)


class Quantities(NamedTuple):
    """What depends on the posterior alone, with derivatives in μ and log σ."""

    kl: mp.mpf
    kl_grad_mu: mp.mpf
    kl_grad_log_sigma: mp.mpf
    mean: mp.mpf
    mean_grad_mu: mp.mpf
    mean_grad_log_sigma: mp.mpf
    snr: mp.mpf


def _at_precision(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with mp.workdps(DIGITS):
            return function(*args, **kwargs)

    return cast("Callable[P, R]", functools.lru_cache(maxsize=None)(wrapped))


def _standardised(
    mu: Number, log_sigma: Number, lower: Number, upper: Number
) -> tuple[mp.mpf, mp.mpf, mp.mpf, mp.mpf]:
    """Return μ, σ and both ends of the interval in units of σ from μ."""
    mu, sigma = mp.mpf(mu), mp.exp(mp.mpf(log_sigma))
    return mu, sigma, (mp.mpf(lower) - mu) / sigma, (mp.mpf(upper) - mu) / sigma


def moments(alpha: Number, beta: Number) -> tuple[mp.mpf, mp.mpf, mp.mpf, mp.mpf]:
    """Return the first four moments of a standard normal truncated to [α, β]."""
    z = mass(alpha, beta)
    low, high = density(alpha) / z, density(beta) / z
    first = low - high
    second = 1 + alpha * low - beta * high
    third = 2 * first + alpha**2 * low - beta**2 * high
    fourth = 3 * second + alpha**3 * low - beta**3 * high
    return first, second, third, fourth


@_at_precision
def quantities(mu: Number, log_sigma: Number, lower: Number = -20, upper: Number = 0) -> Quantities:
    """Return KL in nats, E[θ], the SNR, and the derivatives of the first two."""
    mu, sigma, alpha, beta = _standardised(mu, log_sigma, lower, upper)
    z = mass(alpha, beta)
    first, second, third, fourth = moments(alpha, beta)
    entropy = mp.log(sigma) + mp.log(z) + mp.log(2 * mp.pi) / 2 + second / 2
    kl = mp.log(mp.mpf(upper) - mp.mpf(lower)) - entropy

    def tilted_mean(power: int) -> mp.mpf:
        shift = power * sigma
        return mp.exp(power * mu + shift**2 / 2) * mass(alpha - shift, beta - shift) / z

    mean, mean_square = tilted_mean(1), tilted_mean(2)
    tilted_first, tilted_second, *_ = moments(alpha - sigma, beta - sigma)
    return Quantities(
        kl=kl,
        kl_grad_mu=-(third - first * second) / 2 / sigma,
        kl_grad_log_sigma=-(fourth - second**2) / 2,
        mean=mean,
        mean_grad_mu=mean * (tilted_first + sigma - first) / sigma,
        mean_grad_log_sigma=mean * (tilted_second + 2 * sigma * tilted_first + sigma**2 - second),
        snr=mean / mp.sqrt(mean_square - mean**2),
    )


@_at_precision
def delta_f_lognormal(
    mu: Number,
    log_sigma: Number,
    prior_mean: Number | None = None,
    prior_std: Number = 1e-6,
    lower: Number = -20,
    upper: Number = 0,
) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """Return (ΔF, dΔF/dμ, dΔF/dlog σ), Eq. 8 as printed with the 2π under the logarithm."""
    mu, sigma, alpha, beta = _standardised(mu, log_sigma, lower, upper)
    mean = mp.mpf(lower if prior_mean is None else prior_mean)
    std = mp.mpf(prior_std)
    precision = 1 / sigma**2 + 1 / std**2
    product_std = 1 / mp.sqrt(precision)
    product_mean = (mu / sigma**2 + mean / std**2) / precision
    ends = [(mp.mpf(end) - product_mean) / product_std for end in (lower, upper)]
    prior_mass = mass((mp.mpf(lower) - mean) / std, (mp.mpf(upper) - mean) / std)
    variance = sigma**2 + std**2
    value = (
        mp.log(mass(*ends) * (mp.mpf(upper) - mp.mpf(lower)) / (mass(alpha, beta) * prior_mass))
        - mp.log(2 * mp.pi * variance) / 2
        - (mu - mean) ** 2 / variance / 2
    )
    first, second, *_ = moments(alpha, beta)
    product_first, product_second, *_ = moments(*ends)
    offset, ratio = (product_mean - mu) / sigma, product_std / sigma
    shifted_first = offset + ratio * product_first
    shifted_second = offset**2 + 2 * offset * ratio * product_first + ratio**2 * product_second
    return value, (shifted_first - first) / sigma, shifted_second - second


@_at_precision
def delta_f_loguniform(
    mu: Number,
    log_sigma: Number,
    reduced_lower: Number,
    reduced_upper: Number,
    lower: Number = -20,
    upper: Number = 0,
) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """Return (ΔF, dΔF/dμ, dΔF/dlog σ)."""
    mu, sigma, alpha, beta = _standardised(mu, log_sigma, lower, upper)
    ends = [(mp.mpf(end) - mu) / sigma for end in (reduced_lower, reduced_upper)]
    gain = (mp.mpf(upper) - mp.mpf(lower)) / (mp.mpf(reduced_upper) - mp.mpf(reduced_lower))
    value = mp.log(gain * mass(*ends) / mass(alpha, beta))
    first, second, *_ = moments(alpha, beta)
    reduced_first, reduced_second, *_ = moments(*ends)
    return value, (reduced_first - first) / sigma, reduced_second - second


class Sample(NamedTuple):
    """x = log θ at a uniform, and its derivatives at fixed uniform."""

    log_theta: mp.mpf
    grad_mu: mp.mpf
    grad_log_sigma: mp.mpf


@_at_precision
def sample(mu: Number, log_sigma: Number, y: Number, lower: Number = -20, upper: Number = 0) -> Sample:
    """Return x = log θ at uniform y and dx/dμ, dx/dlog σ at fixed y."""
    mu, sigma, alpha, beta = _standardised(mu, log_sigma, lower, upper)
    y = mp.mpf(y)
    reflect = alpha + beta < 0
    if reflect:
        alpha, beta, y = -beta, -alpha, 1 - y
    target = (1 - y) * survival(alpha) + y * survival(beta)
    z = inverse_survival(target)
    near, far = (1 - y) * density(alpha) / density(z), y * density(beta) / density(z)
    grad_mu = 1 - near - far
    grad_log_sigma = sigma * (z - alpha * near - beta * far)
    sign = -1 if reflect else 1
    return Sample(mu + sign * sigma * z, grad_mu, sign * grad_log_sigma)


@_at_precision
def exponential(x: Number) -> mp.mpf:
    """Return eˣ."""
    return mp.exp(x)


@_at_precision
def quotient(first: Number, second: Number) -> mp.mpf:
    """Return first / second."""
    return first / second


def inverse_survival(target: Number) -> mp.mpf:
    """Solve survival(z) = target by Newton on log survival, which is concave: monotone from the right."""
    if target > mp.mpf(1) / 2:
        return -inverse_survival(1 - target)
    log_target = mp.log(target)
    z = mp.sqrt(-2 * (log_target + mp.log(2)))  # survival(z) <= exp(-z²/2)/2
    for _ in range(100):
        current = survival(z)
        step = (mp.log(current) - log_target) * current / density(z)
        z += step
        if abs(step) <= mp.mpf(10) ** (10 - mp.mp.dps) * max(1, abs(z)):
            return z
    raise ArithmeticError(f"quantile did not converge for log survival {log_target}")
