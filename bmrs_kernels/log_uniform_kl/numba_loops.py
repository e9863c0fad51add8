"""KL(q‖p) in compiled CPU loops: the twin of ``reference``."""

from __future__ import annotations

import math

from torch import Tensor

from bmrs_kernels.dispatch.numba_compile import compiled, loop
from bmrs_kernels.truncated_normal.numba_quadrature import (
    boundary_terms,
    compute_structures,
    gaussian_on,
    gaussian_outside,
    node_memory,
    window,
    window_covariance,
    window_mean,
)
from bmrs_kernels.truncated_normal.numba_special import log_sigma_in_range, sigma_from_log
from bmrs_kernels.truncated_normal.torch_quadrature import Differentiable


def kl_divergence(
    mu: Tensor, log_sigma: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> Differentiable:
    """Return the KL divergence in nats and its gradients in μ and log σ."""
    options = (float(lower), float(upper), math.log(upper - lower))
    return compute_structures(kl_divergence_loop, mu, log_sigma, options, with_gradients=with_gradients)


@loop
def kl_divergence_loop(mu, log_sigma, value, grad_mu, grad_log_sigma, options, with_gradients, first, last):
    """KL = log(b-a) - log σ - log ∫ exp(-u) dv - E[u], Eq. 3; options are (lower, upper, log(upper - lower))."""
    lower, upper, log_width = options
    memory = node_memory()
    for i in range(first, last):
        sigma = sigma_from_log(log_sigma[i])
        posterior = gaussian_on(lower, upper, mu[i], sigma)
        quadrature = window(posterior, memory)
        divergence = log_width - math.log(sigma) - quadrature.log_mass
        divergence -= window_mean(quadrature, quadrature.exponent)
        value[i] = 0.0 if divergence < 0.0 else divergence
        if with_gradients:
            if gaussian_outside(posterior) > 0.0:
                covariance = window_covariance(quadrature, quadrature.exponent, quadrature.distance)
            else:
                covariance = covariance_inside(posterior, quadrature.log_mass)
            variance = window_covariance(quadrature, quadrature.exponent, quadrature.exponent)
            grad_mu[i] = -covariance / sigma
            grad_log_sigma[i] = -2.0 * variance * log_sigma_in_range(log_sigma[i])


@compiled
def covariance_inside(posterior, log_mass):
    """Return Cov(v²/2, v) for means inside the interval, from the density at its ends."""
    lower, upper, left, right = boundary_terms(posterior, log_mass)
    odd = (left * left + 1.0) * lower - (right * right + 1.0) * upper
    return 0.5 * (odd + (lower - upper) * (left * lower + right * upper))
