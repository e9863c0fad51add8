"""KL(q‖p) as a Triton kernel: the twin of ``reference``."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from bmrs_kernels.truncated_normal.torch_quadrature import Differentiable
from bmrs_kernels.truncated_normal.triton_quadrature import (
    boundary_terms,
    empty_results,
    gauss_legendre,
    gaussian_on,
    gaussian_outside,
    launch_structures,
    load_structures,
    program_structures,
    store_results,
    window,
    window_covariance,
    window_mean,
    without_gradients,
)
from bmrs_kernels.truncated_normal.triton_special import log_sigma_in_range, maximum, sigma_from_log


def kl_divergence(
    mu: Tensor, log_sigma: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> Differentiable:
    """Return the KL divergence in nats and its gradients in μ and log σ, in one launch."""
    results = empty_results(mu, with_gradients=with_gradients)
    launch_structures(
        kl_divergence_kernel,
        mu,
        log_sigma,
        results,
        LOWER=lower,
        UPPER=upper,
        LOG_WIDTH=math.log(upper - lower),
        WITH_GRADIENTS=with_gradients,
    )
    return results


@triton.jit(do_not_specialize=["num_structures"])
def kl_divergence_kernel(
    mu_ptr,
    log_sigma_ptr,
    value_ptr,
    grad_mu_ptr,
    grad_log_sigma_ptr,
    num_structures,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    LOG_WIDTH: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    STRUCTURES: tl.constexpr,
):
    """KL = log(b-a) - log σ - log ∫ exp(-u) dv - E[u], Eq. 3.

    Parameters and results have shape [num_structures]; a program computes STRUCTURES of them. The gradients are
    written only if WITH_GRADIENTS.
    """
    index, exists = program_structures(num_structures, STRUCTURES)
    result = compute_kl_divergence(
        load_structures(mu_ptr, index, exists),
        load_structures(log_sigma_ptr, index, exists),
        gauss_legendre(),
        LOWER,
        UPPER,
        LOG_WIDTH,
        WITH_GRADIENTS,
    )
    store_results(value_ptr, grad_mu_ptr, grad_log_sigma_ptr, index, exists, result, WITH_GRADIENTS)


@triton.jit
def compute_kl_divergence(
    mu,
    log_sigma,
    rule,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    LOG_WIDTH: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Return the divergence and its gradients, dKL/dμ = -Cov(u, v)/σ and dKL/dlog σ = -2 Var(u)."""
    sigma = sigma_from_log(log_sigma)
    posterior = gaussian_on(LOWER, UPPER, mu, sigma)
    quadrature = window(posterior, rule)
    value = LOG_WIDTH - tl.log(sigma) - quadrature.log_mass - window_mean(quadrature, quadrature.exponent)
    value = maximum(value, 0.0)
    if not WITH_GRADIENTS:
        return without_gradients(value)
    grad_mu = -tl.where(
        gaussian_outside(posterior) > 0.0,
        window_covariance(quadrature, quadrature.exponent, quadrature.distance),
        covariance_inside(posterior, quadrature.log_mass),
    )
    grad_log_sigma = -2.0 * window_covariance(quadrature, quadrature.exponent, quadrature.exponent)
    return Differentiable(value, grad_mu / sigma, grad_log_sigma * log_sigma_in_range(log_sigma))


@triton.jit
def covariance_inside(posterior, log_mass):
    """Return Cov(v²/2, v) for means inside the interval, from the density at its ends."""
    lower, upper, left, right = boundary_terms(posterior, log_mass)
    odd = (left * left + 1.0) * lower - (right * right + 1.0) * upper
    return 0.5 * (odd + (lower - upper) * (left * lower + right * upper))
