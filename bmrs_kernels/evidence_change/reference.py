"""ΔF of Bayesian model reduction in pure torch: the definition that every other backend is tested against.

ΔF = log E_q[p̃(x)/p(x)] for a reduced prior p̃: the change in log evidence when p is replaced by p̃.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from bmrs_kernels.constants import HALF_LOG_2PI
from bmrs_kernels.truncated_normal import torch_quadrature, torch_special
from bmrs_kernels.truncated_normal.torch_quadrature import Differentiable, Gaussian


class ReducedNormal(NamedTuple):
    """What a truncated normal reduced prior adds to every structure's ΔF."""

    anchor: float  # signed distance from its mean to the nearest point of the interval
    log_gain: (
        float  # log of the interval's length over its mass, whose density at the anchor is the normal's peak
    )


@functools.lru_cache
def reduced_normal(prior_mean: float, prior_std: float, lower: float, upper: float) -> ReducedNormal:
    """Return the reduced prior's constants."""
    mean, std = (torch.tensor(part, dtype=torch.float64, device="cpu") for part in (prior_mean, prior_std))
    prior = torch_quadrature.gaussian_on(lower, upper, mean, std)
    log_mass = float(torch_quadrature.window(prior).log_mass) - HALF_LOG_2PI
    return ReducedNormal(float(prior.anchor), math.log(upper - lower) - log_mass)


def log_density_gain(reduced_lower: float, reduced_upper: float, lower: float, upper: float) -> float:
    """Return the log of a log-uniform reduced prior's density over the original prior's."""
    return math.log(upper - lower) - math.log(reduced_upper - reduced_lower)


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

    def compute(mu: Tensor, log_sigma: Tensor) -> Differentiable:
        sigma = torch_special.sigma_from_log(log_sigma)
        posterior = torch_quadrature.gaussian_on(lower, upper, mu, sigma)
        # q times p̃: a Gaussian whose mean lies between μ and the reduced prior's, weighted by precision.
        total_std = torch.hypot(sigma, sigma.new_full((), prior_std))
        posterior_weight, prior_weight = (prior_std / total_std) ** 2, (sigma / total_std) ** 2
        product = Gaussian(
            posterior_weight * posterior.below + prior_weight * (prior_mean - lower),
            posterior_weight * posterior.above + prior_weight * (upper - prior_mean),
            sigma * (prior_std / total_std),
            posterior.width,
        )
        mean_shift = prior_weight * (prior_mean - mu)
        anchor = torch.minimum(torch.maximum(mean_shift, -posterior.below), posterior.above)
        expectation = torch_quadrature.log_mass_ratio(
            posterior, product, anchor, with_gradients=with_gradients
        )
        if with_gradients:
            quadrature = torch_quadrature.window(posterior)
            # x - μ̃p at the posterior's anchor x: μ, or an end, whose distance must not be rounded by way of μ.
            anchor_from_mean = torch.where(
                posterior.below < 0,
                lower - prior_mean,
                torch.where(posterior.above < 0, upper - prior_mean, mu - prior_mean),
            )
            offset = sigma.unsqueeze(-1) * quadrature.distance
            log_factor = (
                -0.5 * (offset / prior_std) * ((offset + 2.0 * anchor_from_mean.unsqueeze(-1)) / prior_std)
            )
            expectation = torch_quadrature.with_precise_grad_mu(
                expectation, posterior, quadrature, log_factor
            )

        # x - μ̃p at the product's anchor x: at an end, or μ̃p plus its share of the way to μ.
        from_prior_mean = torch.where(
            product.below < 0,
            lower - prior_mean,
            torch.where(product.above < 0, upper - prior_mean, posterior_weight * (mu - prior_mean)),
        )
        value = (
            expectation.value
            - 0.5
            * ((from_prior_mean - prior.anchor) / prior_std)
            * ((from_prior_mean + prior.anchor) / prior_std)
            - total_std.log()
            - HALF_LOG_2PI
            + prior.log_gain
        )
        return _with_clamp(value, expectation, log_sigma)

    return torch_quadrature.tile_structures(compute, mu, log_sigma)


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

    def compute(mu: Tensor, log_sigma: Tensor) -> Differentiable:
        sigma = torch_special.sigma_from_log(log_sigma)
        posterior = torch_quadrature.gaussian_on(lower, upper, mu, sigma)
        restricted = torch_quadrature.gaussian_on(reduced_lower, reduced_upper, mu, sigma)
        expectation = torch_quadrature.log_mass_ratio(
            posterior, restricted, restricted.anchor, with_gradients=with_gradients
        )
        return _with_clamp(expectation.value + gain, expectation, log_sigma)

    return torch_quadrature.tile_structures(compute, mu, log_sigma)


def _with_clamp(value: Tensor, expectation: Differentiable, log_sigma: Tensor) -> Differentiable:
    """Return a value with the gradients of an expectation, zero where log σ is clamped."""
    grad_log_sigma = expectation.grad_log_sigma
    if grad_log_sigma.numel():
        grad_log_sigma = grad_log_sigma * torch_special.log_sigma_in_range(log_sigma)
    return Differentiable(value, expectation.grad_mu, grad_log_sigma)
