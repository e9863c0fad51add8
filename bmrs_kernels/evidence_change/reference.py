"""ΔF of Bayesian model reduction in pure torch: the definition that every other backend is tested against.

ΔF = log E_q[p̃(x)/p(x)] for a reduced prior p̃: the change in log evidence when p is replaced by p̃.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmrs_kernels import torch_math
from bmrs_kernels.torch_math import HALF_LOG_2PI, Differentiable, Gaussian


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
    ends = (prior_mean - lower, upper - prior_mean, prior_std)
    prior = Gaussian(*(torch.tensor(part, dtype=torch.float64) for part in ends))
    prior_anchor = float(prior.anchor)
    log_prior_mass = float(torch_math.window(prior).log_mass) - HALF_LOG_2PI

    def compute(mu: Tensor, log_sigma: Tensor) -> Differentiable:
        sigma = torch_math.sigma_from_log(log_sigma)
        posterior = Gaussian(mu - lower, upper - mu, sigma)
        # q times p̃: a Gaussian whose mean lies between μ and the reduced prior's, weighted by precision.
        total_std = torch.hypot(sigma, sigma.new_full((), prior_std))
        posterior_weight, prior_weight = (prior_std / total_std) ** 2, (sigma / total_std) ** 2
        product = Gaussian(
            posterior_weight * posterior.below + prior_weight * (prior_mean - lower),
            posterior_weight * posterior.above + prior_weight * (upper - prior_mean),
            sigma * (prior_std / total_std),
        )
        mean_shift = prior_weight * (prior_mean - mu)
        anchor = torch.minimum(torch.maximum(mean_shift, -posterior.below), posterior.above)
        expectation = torch_math.log_mass_ratio(posterior, product, anchor, with_gradients=with_gradients)

        # x - μ̃p at the product's anchor x: at an end, or μ̃p plus its share of the way to μ.
        from_prior_mean = torch.where(
            product.below < 0,
            lower - prior_mean,
            torch.where(product.above < 0, upper - prior_mean, posterior_weight * (mu - prior_mean)),
        )
        value = (
            expectation.value
            - 0.5
            * ((from_prior_mean - prior_anchor) / prior_std)
            * ((from_prior_mean + prior_anchor) / prior_std)
            - total_std.log()
            - HALF_LOG_2PI
            + (math.log(upper - lower) - log_prior_mass)
        )
        return _with_clamp(value, expectation, log_sigma)

    return torch_math.tile_structures(compute, mu, log_sigma)


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
    log_density_gain = math.log(upper - lower) - math.log(reduced_upper - reduced_lower)

    def compute(mu: Tensor, log_sigma: Tensor) -> Differentiable:
        sigma = torch_math.sigma_from_log(log_sigma)
        posterior = Gaussian(mu - lower, upper - mu, sigma)
        restricted = Gaussian(mu - reduced_lower, reduced_upper - mu, sigma)
        expectation = torch_math.log_mass_ratio(
            posterior, restricted, restricted.anchor, with_gradients=with_gradients
        )
        return _with_clamp(expectation.value + log_density_gain, expectation, log_sigma)

    return torch_math.tile_structures(compute, mu, log_sigma)


def _with_clamp(value: Tensor, expectation: Differentiable, log_sigma: Tensor) -> Differentiable:
    """Return a value with the gradients of an expectation, zero where log σ is clamped."""
    grad_log_sigma = expectation.grad_log_sigma
    if grad_log_sigma.numel():
        grad_log_sigma = grad_log_sigma * torch_math.log_sigma_in_range(log_sigma)
    return Differentiable(value, expectation.grad_mu, grad_log_sigma)
