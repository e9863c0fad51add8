"""E[θ] and E[θ]/sd(θ) as Triton kernels: the twins of ``reference``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bmrs_kernels.truncated_normal import regimes
from bmrs_kernels.truncated_normal.torch_quadrature import Differentiable
from bmrs_kernels.truncated_normal.triton_quadrature import (
    empty_results,
    expm1,
    exponential_tilt,
    gauss_legendre,
    gaussian_on,
    gaussian_outside,
    launch_structures,
    load_structures,
    log_mass_ratio,
    program_structures,
    store_results,
    window,
    window_covariance,
    window_mean,
    with_precise_grad_mu,
    without_gradients,
)
from bmrs_kernels.truncated_normal.triton_special import (
    log_sigma_in_range,
    maximum,
    minimum,
    sigma_from_log,
    store,
)

NARROW_SPREAD = tl.constexpr(regimes.NARROW_SPREAD)


def noise_mean(
    mu: Tensor, log_sigma: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> Differentiable:
    """Return E[θ] and its gradients in μ and log σ, in one launch."""
    results = empty_results(mu, with_gradients=with_gradients)
    launch_structures(
        noise_mean_kernel,
        mu,
        log_sigma,
        results,
        LOWER=lower,
        UPPER=upper,
        WITH_GRADIENTS=with_gradients,
    )
    return results


def noise_snr(mu: Tensor, log_sigma: Tensor, lower: float, upper: float) -> Tensor:
    """Return E[θ]/sd(θ), in one launch."""
    snr = mu.new_empty(mu.shape)
    launch_structures(noise_snr_kernel, mu, log_sigma, [snr], LOWER=lower, UPPER=upper)
    return snr


@triton.jit(do_not_specialize=["num_structures"])
def noise_mean_kernel(
    mu_ptr,
    log_sigma_ptr,
    value_ptr,
    grad_mu_ptr,
    grad_log_sigma_ptr,
    num_structures,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    STRUCTURES: tl.constexpr,
):
    """E[θ] = E_q[exp(x)].

    Parameters and results have shape [num_structures]; a program computes STRUCTURES of them. The gradients are
    written only if WITH_GRADIENTS.
    """
    index, exists = program_structures(num_structures, STRUCTURES)
    result = compute_noise_mean(
        load_structures(mu_ptr, index, exists),
        load_structures(log_sigma_ptr, index, exists),
        gauss_legendre(),
        LOWER,
        UPPER,
        WITH_GRADIENTS,
    )
    store_results(value_ptr, grad_mu_ptr, grad_log_sigma_ptr, index, exists, result, WITH_GRADIENTS)


@triton.jit(do_not_specialize=["num_structures"])
def noise_snr_kernel(
    mu_ptr,
    log_sigma_ptr,
    snr_ptr,
    num_structures,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    STRUCTURES: tl.constexpr,
):
    """E[θ]/sd(θ) = E_q[exp(x)] / √Var_q[exp(x)].

    Parameters and results have shape [num_structures]; a program computes STRUCTURES of them.
    """
    index, exists = program_structures(num_structures, STRUCTURES)
    snr = compute_noise_snr(
        load_structures(mu_ptr, index, exists),
        load_structures(log_sigma_ptr, index, exists),
        gauss_legendre(),
        LOWER,
        UPPER,
    )
    store(snr_ptr + index, snr, exists)


@triton.jit
def compute_noise_mean(
    mu, log_sigma, rule, LOWER: tl.constexpr, UPPER: tl.constexpr, WITH_GRADIENTS: tl.constexpr
):
    """Return E[θ] and its gradients."""
    posterior = gaussian_on(LOWER, UPPER, mu, sigma_from_log(log_sigma))
    tilted, anchor = exponential_tilt(posterior, 1.0)
    expectation = log_mass_ratio(posterior, tilted, anchor, rule, WITH_GRADIENTS)
    value = tl.exp(expectation.value + (mu + anchor))
    if not WITH_GRADIENTS:
        return without_gradients(value)
    quadrature = window(posterior, rule)
    log_factor = posterior.scale[None, :] * quadrature.distance
    expectation = with_precise_grad_mu(expectation, posterior, quadrature, log_factor)
    grad_log_sigma = value * expectation.grad_log_sigma * log_sigma_in_range(log_sigma)
    return Differentiable(value, value * expectation.grad_mu, grad_log_sigma)


@triton.jit
def compute_noise_snr(mu, log_sigma, rule, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """Return E[θ]/sd(θ)."""
    posterior = gaussian_on(LOWER, UPPER, mu, sigma_from_log(log_sigma))
    spread = minimum(posterior.scale / maximum(gaussian_outside(posterior), 1.0), posterior.width)
    return tl.where(spread < NARROW_SPREAD, narrow_snr(posterior, rule), wide_snr(posterior, rule))


@triton.jit
def narrow_snr(posterior, rule):
    """Return E[θ]/sd(θ) where log θ has a small standard deviation."""
    quadrature = window(posterior, rule)
    # θ over its value at the anchor, minus one. Where the posterior is wide this result is not used.
    relative = expm1(minimum(posterior.scale[None, :] * quadrature.distance, 80.0))
    return (1.0 + window_mean(quadrature, relative)) / tl.sqrt(
        window_covariance(quadrature, relative, relative)
    )


@triton.jit
def wide_snr(posterior, rule):
    """Return E[θ]/sd(θ) where log θ has a large standard deviation."""
    first_tilt, first_anchor = exponential_tilt(posterior, 1.0)
    second_tilt, second_anchor = exponential_tilt(posterior, 2.0)
    first = log_mass_ratio(posterior, first_tilt, first_anchor, rule, False).value
    second = log_mass_ratio(posterior, second_tilt, second_anchor, rule, False).value
    log_ratio = (second - 2.0 * first) + 2.0 * (second_anchor - first_anchor)
    # Where the posterior is narrow rounding may leave 0 or less, but this result is not used.
    return 1.0 / tl.sqrt(expm1(maximum(log_ratio, 1e-30)))
