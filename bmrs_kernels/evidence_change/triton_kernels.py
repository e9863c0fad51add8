"""ΔF of Bayesian model reduction as Triton kernels: the twins of ``reference``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bmrs_kernels import constants
from bmrs_kernels.evidence_change import reference
from bmrs_kernels.truncated_normal.torch_quadrature import Differentiable, Gaussian
from bmrs_kernels.truncated_normal.triton_quadrature import (
    empty_results,
    full_like,
    gauss_legendre,
    gaussian_anchor,
    gaussian_on,
    hypot,
    launch_structures,
    load_structures,
    log_mass_ratio,
    program_structures,
    store_results,
    window,
    with_precise_grad_mu,
)
from bmrs_kernels.truncated_normal.triton_special import (
    log_sigma_in_range,
    maximum,
    minimum,
    sigma_from_log,
)

HALF_LOG_2PI = tl.constexpr(constants.HALF_LOG_2PI)


def delta_f_lognormal(
    mu: Tensor,
    log_sigma: Tensor,
    prior_mean: float,
    prior_std: float,
    lower: float,
    upper: float,
    *,
    with_gradients: bool,
) -> Differentiable:
    """Return ΔF for a reduced prior that is a truncated log-normal, and its gradients, in one launch."""
    results = empty_results(mu, with_gradients=with_gradients)
    launch_structures(
        delta_f_lognormal_kernel,
        mu,
        log_sigma,
        results,
        **lognormal_options(prior_mean, prior_std, lower, upper),
        LOWER=lower,
        UPPER=upper,
        WITH_GRADIENTS=with_gradients,
    )
    return results


def delta_f_loguniform(
    mu: Tensor,
    log_sigma: Tensor,
    reduced_lower: float,
    reduced_upper: float,
    lower: float,
    upper: float,
    *,
    with_gradients: bool,
) -> Differentiable:
    """Return ΔF for a reduced prior that is log-uniform, and its gradients, in one launch."""
    results = empty_results(mu, with_gradients=with_gradients)
    launch_structures(
        delta_f_loguniform_kernel,
        mu,
        log_sigma,
        results,
        **loguniform_options(reduced_lower, reduced_upper, lower, upper),
        LOWER=lower,
        UPPER=upper,
        WITH_GRADIENTS=with_gradients,
    )
    return results


def lognormal_options(prior_mean: float, prior_std: float, lower: float, upper: float) -> dict[str, float]:
    """Return what kernels take of a truncated log-normal reduced prior."""
    prior = reference.reduced_normal(prior_mean, prior_std, lower, upper)
    return {
        "PRIOR_MEAN": prior_mean,
        "PRIOR_STD": prior_std,
        "PRIOR_ANCHOR": prior.anchor,
        "PRIOR_LOG_GAIN": prior.log_gain,
    }


def loguniform_options(
    reduced_lower: float, reduced_upper: float, lower: float, upper: float
) -> dict[str, float]:
    """Return what kernels take of a log-uniform reduced prior."""
    return {
        "REDUCED_LOWER": reduced_lower,
        "REDUCED_UPPER": reduced_upper,
        "LOG_DENSITY_GAIN": reference.log_density_gain(reduced_lower, reduced_upper, lower, upper),
    }


@triton.jit(do_not_specialize=["num_structures"])
def delta_f_lognormal_kernel(
    mu_ptr,
    log_sigma_ptr,
    value_ptr,
    grad_mu_ptr,
    grad_log_sigma_ptr,
    num_structures,
    PRIOR_MEAN: tl.constexpr,
    PRIOR_STD: tl.constexpr,
    PRIOR_ANCHOR: tl.constexpr,
    PRIOR_LOG_GAIN: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    STRUCTURES: tl.constexpr,
):
    """ΔF = log E_q[p̃(x)/p(x)] for p̃ = Normal(PRIOR_MEAN, PRIOR_STD²) on [LOWER, UPPER], Eq. 8.

    Parameters and results have shape [num_structures]; a program computes STRUCTURES of them. The gradients are
    written only if WITH_GRADIENTS.
    """
    index, exists = program_structures(num_structures, STRUCTURES)
    result = compute_delta_f_lognormal(
        load_structures(mu_ptr, index, exists),
        load_structures(log_sigma_ptr, index, exists),
        gauss_legendre(),
        PRIOR_MEAN,
        PRIOR_STD,
        PRIOR_ANCHOR,
        PRIOR_LOG_GAIN,
        LOWER,
        UPPER,
        WITH_GRADIENTS,
    )
    store_results(value_ptr, grad_mu_ptr, grad_log_sigma_ptr, index, exists, result, WITH_GRADIENTS)


@triton.jit(do_not_specialize=["num_structures"])
def delta_f_loguniform_kernel(
    mu_ptr,
    log_sigma_ptr,
    value_ptr,
    grad_mu_ptr,
    grad_log_sigma_ptr,
    num_structures,
    REDUCED_LOWER: tl.constexpr,
    REDUCED_UPPER: tl.constexpr,
    LOG_DENSITY_GAIN: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    STRUCTURES: tl.constexpr,
):
    """ΔF = log E_q[p̃(x)/p(x)] for p̃ uniform on [REDUCED_LOWER, REDUCED_UPPER].

    Parameters and results have shape [num_structures]; a program computes STRUCTURES of them. The gradients are
    written only if WITH_GRADIENTS.
    """
    index, exists = program_structures(num_structures, STRUCTURES)
    result = compute_delta_f_loguniform(
        load_structures(mu_ptr, index, exists),
        load_structures(log_sigma_ptr, index, exists),
        gauss_legendre(),
        REDUCED_LOWER,
        REDUCED_UPPER,
        LOG_DENSITY_GAIN,
        LOWER,
        UPPER,
        WITH_GRADIENTS,
    )
    store_results(value_ptr, grad_mu_ptr, grad_log_sigma_ptr, index, exists, result, WITH_GRADIENTS)


@triton.jit
def compute_delta_f_lognormal(
    mu,
    log_sigma,
    rule,
    PRIOR_MEAN: tl.constexpr,
    PRIOR_STD: tl.constexpr,
    PRIOR_ANCHOR: tl.constexpr,
    PRIOR_LOG_GAIN: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Return ΔF for a truncated log-normal reduced prior and its gradients."""
    sigma = sigma_from_log(log_sigma)
    posterior = gaussian_on(LOWER, UPPER, mu, sigma)
    total_std = hypot(sigma, full_like(sigma, PRIOR_STD))
    posterior_share, prior_share = PRIOR_STD / total_std, sigma / total_std
    posterior_weight, prior_weight = posterior_share * posterior_share, prior_share * prior_share
    product = Gaussian(
        posterior_weight * posterior.below + prior_weight * (PRIOR_MEAN - LOWER),
        posterior_weight * posterior.above + prior_weight * (UPPER - PRIOR_MEAN),
        sigma * posterior_share,
        posterior.width,
    )
    mean_shift = prior_weight * (PRIOR_MEAN - mu)
    anchor = minimum(maximum(mean_shift, -posterior.below), posterior.above)
    expectation = log_mass_ratio(posterior, product, anchor, rule, WITH_GRADIENTS)
    if WITH_GRADIENTS:
        quadrature = window(posterior, rule)
        offset = sigma[None, :] * quadrature.distance
        anchor_from_mean = tl.where(
            posterior.below < 0.0,
            LOWER - PRIOR_MEAN,
            tl.where(posterior.above < 0.0, UPPER - PRIOR_MEAN, mu - PRIOR_MEAN),
        )
        inverse_std: tl.constexpr = 1.0 / PRIOR_STD
        log_factor = (
            offset * inverse_std * ((offset + 2.0 * anchor_from_mean[None, :]) * (-0.5 * inverse_std))
        )
        expectation = with_precise_grad_mu(expectation, posterior, quadrature, log_factor)

    # x - μ̃p at the product's anchor x: at an end, or μ̃p plus its share of the way to μ.
    from_prior_mean = tl.where(
        product.below < 0.0,
        LOWER - PRIOR_MEAN,
        tl.where(product.above < 0.0, UPPER - PRIOR_MEAN, posterior_weight * (mu - PRIOR_MEAN)),
    )
    value = (
        expectation.value
        - 0.5
        * ((from_prior_mean - PRIOR_ANCHOR) / PRIOR_STD)
        * ((from_prior_mean + PRIOR_ANCHOR) / PRIOR_STD)
        - tl.log(total_std)
        - HALF_LOG_2PI
        + PRIOR_LOG_GAIN
    )
    return with_clamp(value, expectation, log_sigma)


@triton.jit
def compute_delta_f_loguniform(
    mu,
    log_sigma,
    rule,
    REDUCED_LOWER: tl.constexpr,
    REDUCED_UPPER: tl.constexpr,
    LOG_DENSITY_GAIN: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Return ΔF for a log-uniform reduced prior and its gradients."""
    sigma = sigma_from_log(log_sigma)
    posterior = gaussian_on(LOWER, UPPER, mu, sigma)
    restricted = gaussian_on(REDUCED_LOWER, REDUCED_UPPER, mu, sigma)
    expectation = log_mass_ratio(posterior, restricted, gaussian_anchor(restricted), rule, WITH_GRADIENTS)
    return with_clamp(expectation.value + LOG_DENSITY_GAIN, expectation, log_sigma)


@triton.jit
def with_clamp(value, expectation, log_sigma):
    """Return a value with the gradients of an expectation, zero where log σ is clamped."""
    grad_log_sigma = expectation.grad_log_sigma * log_sigma_in_range(log_sigma)
    return Differentiable(value, expectation.grad_mu, grad_log_sigma)
