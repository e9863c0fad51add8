"""The authors' functions of one posterior, q = Normal(mu, exp(logsigma)²) of log θ truncated to [a, b]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import bmrs_kernels
from bmrs_kernels.constants import LOG_SIGMA_MAX, LOG_SIGMA_MIN, LOWER, UPPER


def phi(x: Tensor) -> Tensor:
    """Return the density of the standard normal distribution."""
    return torch.exp(-0.5 * x.square()) / math.sqrt(2.0 * math.pi)


def Phi(x: Tensor) -> Tensor:
    """Return the cumulative distribution function of the standard normal distribution, exact in the left tail too."""
    return torch.special.ndtr(x)


def reparameterize(mu: Tensor, logsigma: Tensor, u: Tensor, a: float = LOWER, b: float = UPPER) -> Tensor:
    """Return θ at uniforms u in (0, 1), which broadcast with ``mu``; differentiable in ``mu`` and ``logsigma``."""
    return bmrs_kernels.sample_noise(mu, logsigma, u, lower=a, upper=b)


def kldiv(mu: Tensor, logsigma: Tensor, a: float = LOWER, b: float = UPPER) -> Tensor:
    """Return KL(posterior‖prior) of every structure, in nats and in the shape of ``mu``."""
    return bmrs_kernels.kl_divergence(mu, logsigma, lower=a, upper=b)


def SNR(mu: Tensor, logsigma: Tensor, a: float = LOWER, b: float = UPPER) -> Tensor:
    """Return E[θ]/sd(θ) of every structure, in the shape of ``mu``."""
    return bmrs_kernels.noise_snr(mu, logsigma, lower=a, upper=b)


def Etheta(mu: Tensor, logsigma: Tensor, a: float = LOWER, b: float = UPPER) -> Tensor:
    """Return E[θ] of every structure, in the shape of ``mu``."""
    return bmrs_kernels.noise_mean(mu, logsigma, lower=a, upper=b)


def LogN_cdf(theta: Tensor, mu: Tensor, logsigma: Tensor, a: float = LOWER, b: float = UPPER) -> Tensor:
    """Return the posterior's probability of values up to θ, in float64; the arguments broadcast."""
    mu, sigma = mu.double(), logsigma.double().clamp(LOG_SIGMA_MIN, LOG_SIGMA_MAX).exp()
    point = theta.double().log().clamp(a, b)
    start, end, point = (a - mu) / sigma, (b - mu) / sigma, (point - mu) / sigma
    return (_log_mass(start, point) - _log_mass(start, end)).exp()


def LogU_cdf(theta: Tensor, a: float = LOWER, b: float = UPPER) -> Tensor:
    """Return the prior's probability of values up to θ: log θ is uniform on [a, b]."""
    return ((theta.log() - a) / (b - a)).clamp(0.0, 1.0)


def _log_mass(start: Tensor, end: Tensor) -> Tensor:
    """Return the log of Φ(end) - Φ(start), taken on the side of 0 where both are small."""
    right = start > 0
    low, high = torch.where(right, -end, start), torch.where(right, -start, end)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_low - log_high))
