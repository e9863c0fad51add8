"""KL(q‖p) in pure torch: the definition that every other backend is tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmrs_kernels.truncated_normal import torch_quadrature, torch_special
from bmrs_kernels.truncated_normal.torch_quadrature import Differentiable, Gaussian


def kl_divergence(
    mu: Tensor, log_sigma: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> Differentiable:
    """Return the KL divergence in nats and its gradients in μ and log σ.

    log q(x) = const - u, hence KL = log((b-a)/σ) - log ∫ exp(-u) dv - E[u], and its gradients are covariances with
    the score: dKL/dμ = -Cov(u, v)/σ and dKL/dlog σ = -2 Var(u). None of these subtracts large numbers.
    """

    def compute(mu: Tensor, log_sigma: Tensor) -> Differentiable:
        sigma = torch_special.sigma_from_log(log_sigma)
        posterior = torch_quadrature.gaussian_on(lower, upper, mu, sigma)
        quadrature = torch_quadrature.window(posterior)
        value = (
            math.log(upper - lower) - sigma.log() - quadrature.log_mass - quadrature.mean(quadrature.exponent)
        )
        value = value.clamp(min=0.0)  # rounding leaves less where σ is much longer than the interval
        if not with_gradients:
            return torch_quadrature.without_gradients(value)
        grad_mu = -torch.where(
            posterior.outside > 0,
            quadrature.covariance(quadrature.exponent, quadrature.distance),
            _covariance_inside(posterior, quadrature.log_mass),
        )
        grad_log_sigma = -2.0 * quadrature.covariance(quadrature.exponent, quadrature.exponent)
        in_range = torch_special.log_sigma_in_range(log_sigma)
        return Differentiable(value, grad_mu / sigma, grad_log_sigma * in_range)

    return torch_quadrature.tile_structures(compute, mu, log_sigma)


def _covariance_inside(posterior: Gaussian, log_mass: Tensor) -> Tensor:
    """Return Cov(v²/2, v) for means inside the interval, from the density at its ends."""
    ends = torch_quadrature.boundary_terms(posterior, log_mass)
    lower, upper, left, right = ends
    odd = (left * left + 1.0) * lower - (right * right + 1.0) * upper
    return 0.5 * (odd + (lower - upper) * (left * lower + right * upper))
