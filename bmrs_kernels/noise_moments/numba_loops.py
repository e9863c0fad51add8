"""E[θ] and E[θ]/sd(θ) in compiled CPU loops: the twin of ``reference``."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from bmrs_kernels.dispatch.numba_compile import compiled, loop
from bmrs_kernels.truncated_normal.numba_quadrature import (
    compute_structures,
    exponential_tilt,
    gaussian_on,
    gaussian_outside,
    log_mass_ratio,
    node_memory,
    precise_grad_mu,
    window,
    window_covariance,
    window_mean,
)
from bmrs_kernels.truncated_normal.numba_special import log_sigma_in_range, sigma_from_log
from bmrs_kernels.truncated_normal.regimes import NARROW_SPREAD
from bmrs_kernels.truncated_normal.torch_quadrature import Differentiable


def noise_mean(
    mu: Tensor, log_sigma: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> Differentiable:
    """Return E[θ] and its gradients in μ and log σ."""
    options = (float(lower), float(upper))
    return compute_structures(noise_mean_loop, mu, log_sigma, options, with_gradients=with_gradients)


def noise_snr(mu: Tensor, log_sigma: Tensor, lower: float, upper: float) -> Tensor:
    """Return E[θ]/sd(θ)."""
    options = (float(lower), float(upper))
    snr = compute_structures(noise_snr_loop, mu, log_sigma, options, with_gradients=False).value
    return snr.reshape(mu.shape)


@loop
def noise_mean_loop(mu, log_sigma, value, grad_mu, grad_log_sigma, options, with_gradients, first, last):
    """Compute E[θ] as a ratio of masses; options are (lower, upper)."""
    lower, upper = options
    memory, tilted_memory = node_memory(), node_memory()
    for i in range(first, last):
        sigma = sigma_from_log(log_sigma[i])
        posterior = gaussian_on(lower, upper, mu[i], sigma)
        tilted, anchor = exponential_tilt(posterior, 1.0)
        quadrature = window(posterior, memory)
        expectation = log_mass_ratio(
            posterior, quadrature, tilted, window(tilted, tilted_memory), anchor, with_gradients
        )
        mean = math.exp(expectation.value + (mu[i] + anchor))
        value[i] = mean
        if with_gradients:
            slope = precise_grad_mu(expectation, posterior, quadrature, sigma * quadrature.distance)
            grad_mu[i] = mean * slope
            grad_log_sigma[i] = mean * expectation.grad_log_sigma * log_sigma_in_range(log_sigma[i])


@loop
def noise_snr_loop(mu, log_sigma, value, grad_mu, grad_log_sigma, options, with_gradients, first, last):
    """Compute E[θ]/sd(θ), narrow posteriors by their variance; options are (lower, upper)."""
    lower, upper = options
    memory, tilted_memory = node_memory(), node_memory()
    for i in range(first, last):
        sigma = sigma_from_log(log_sigma[i])
        posterior = gaussian_on(lower, upper, mu[i], sigma)
        spread = min(sigma / max(gaussian_outside(posterior), 1.0), posterior.width)
        quadrature = window(posterior, memory)
        if spread < NARROW_SPREAD:
            value[i] = narrow_snr(posterior, quadrature)
        else:
            value[i] = wide_snr(posterior, quadrature, tilted_memory)


@compiled
def narrow_snr(posterior, quadrature):
    """Return the ratio from the variance of θ over its value at the anchor."""
    relative = np.expm1(posterior.scale * quadrature.distance)
    return (1.0 + window_mean(quadrature, relative)) / math.sqrt(
        window_covariance(quadrature, relative, relative)
    )


@compiled
def wide_snr(posterior, quadrature, memory):
    """Return the ratio from E[θ²]/E[θ]²."""
    tilted, first_anchor = exponential_tilt(posterior, 1.0)
    first = log_mass_ratio(posterior, quadrature, tilted, window(tilted, memory), first_anchor, False).value
    tilted, second_anchor = exponential_tilt(posterior, 2.0)
    second = log_mass_ratio(posterior, quadrature, tilted, window(tilted, memory), second_anchor, False).value
    return 1.0 / math.sqrt(math.expm1((second - 2.0 * first) + 2.0 * (second_anchor - first_anchor)))
