"""ΔF of Bayesian model reduction in compiled CPU loops: the twin of ``reference``."""

from __future__ import annotations

import math

from torch import Tensor

from bmrs_kernels.constants import HALF_LOG_2PI
from bmrs_kernels.dispatch.numba_compile import compiled, loop
from bmrs_kernels.evidence_change.reference import log_density_gain, reduced_normal
from bmrs_kernels.truncated_normal.numba_quadrature import (
    compute_structures,
    gaussian_anchor,
    gaussian_on,
    log_mass_ratio,
    node_memory,
    precise_grad_mu,
    window,
)
from bmrs_kernels.truncated_normal.numba_special import log_sigma_in_range, sigma_from_log
from bmrs_kernels.truncated_normal.torch_quadrature import Differentiable, Gaussian


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
    """Return ΔF for a reduced prior that is a truncated log-normal (Eq. 8), and its gradients."""
    prior = reduced_normal(prior_mean, prior_std, lower, upper)
    options = tuple(float(part) for part in (prior_mean, prior_std, *prior, lower, upper))
    return compute_structures(delta_f_lognormal_loop, mu, log_sigma, options, with_gradients=with_gradients)


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
    """Return ΔF for a reduced prior that is log-uniform on a smaller interval, and its gradients."""
    gain = log_density_gain(reduced_lower, reduced_upper, lower, upper)
    options = tuple(float(part) for part in (reduced_lower, reduced_upper, gain, lower, upper))
    return compute_structures(delta_f_loguniform_loop, mu, log_sigma, options, with_gradients=with_gradients)


@loop
def delta_f_lognormal_loop(
    mu, log_sigma, value, grad_mu, grad_log_sigma, options, with_gradients, first, last
):
    """Compute Eq. 8; options are (prior mean, prior std, ``ReducedNormal``'s fields, lower, upper)."""
    prior_mean, prior_std, prior_anchor, prior_log_gain, lower, upper = options
    memory, product_memory = node_memory(), node_memory()
    for i in range(first, last):
        sigma = sigma_from_log(log_sigma[i])
        posterior = gaussian_on(lower, upper, mu[i], sigma)
        # q times p̃: a Gaussian whose mean lies between μ and the reduced prior's, weighted by precision.
        total_std = math.hypot(sigma, prior_std)
        posterior_weight, prior_weight = (prior_std / total_std) ** 2, (sigma / total_std) ** 2
        product = Gaussian(
            posterior_weight * posterior.below + prior_weight * (prior_mean - lower),
            posterior_weight * posterior.above + prior_weight * (upper - prior_mean),
            sigma * (prior_std / total_std),
            posterior.width,
        )
        anchor = min(max(prior_weight * (prior_mean - mu[i]), -posterior.below), posterior.above)
        quadrature = window(posterior, memory)
        expectation = log_mass_ratio(
            posterior, quadrature, product, window(product, product_memory), anchor, with_gradients
        )
        inside = posterior_weight * (mu[i] - prior_mean)
        from_mean = anchor_from(product, prior_mean, inside, lower, upper)
        value[i] = (
            expectation.value
            - 0.5 * ((from_mean - prior_anchor) / prior_std) * ((from_mean + prior_anchor) / prior_std)
            - math.log(total_std)
            - HALF_LOG_2PI
            + prior_log_gain
        )
        if with_gradients:
            offset = sigma * quadrature.distance
            from_mean = anchor_from(posterior, prior_mean, mu[i] - prior_mean, lower, upper)
            log_factor = -0.5 * (offset / prior_std) * ((offset + 2.0 * from_mean) / prior_std)
            grad_mu[i] = precise_grad_mu(expectation, posterior, quadrature, log_factor)
            grad_log_sigma[i] = expectation.grad_log_sigma * log_sigma_in_range(log_sigma[i])


@loop
def delta_f_loguniform_loop(
    mu, log_sigma, value, grad_mu, grad_log_sigma, options, with_gradients, first, last
):
    """Compute log Q of the reduced interval; options are (its ends, log gain of the density, lower, upper)."""
    reduced_lower, reduced_upper, gain, lower, upper = options
    memory, restricted_memory = node_memory(), node_memory()
    for i in range(first, last):
        sigma = sigma_from_log(log_sigma[i])
        posterior = gaussian_on(lower, upper, mu[i], sigma)
        restricted = gaussian_on(reduced_lower, reduced_upper, mu[i], sigma)
        expectation = log_mass_ratio(
            posterior,
            window(posterior, memory),
            restricted,
            window(restricted, restricted_memory),
            gaussian_anchor(restricted),
            with_gradients,
        )
        value[i] = expectation.value + gain
        if with_gradients:
            grad_mu[i] = expectation.grad_mu
            grad_log_sigma[i] = expectation.grad_log_sigma * log_sigma_in_range(log_sigma[i])


@compiled
def anchor_from(gaussian, prior_mean, inside, lower, upper):
    """Return x - μ̃p at a Gaussian's anchor x: at an end, whose distance must not be rounded, or as given."""
    if gaussian.below < 0.0:
        return lower - prior_mean
    if gaussian.above < 0.0:
        return upper - prior_mean
    return inside
