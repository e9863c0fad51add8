"""E[θ] and E[θ]/sd(θ) in pure torch: the definition that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from bmrs_kernels.truncated_normal import torch_quadrature, torch_special
from bmrs_kernels.truncated_normal.regimes import NARROW_SPREAD
from bmrs_kernels.truncated_normal.torch_quadrature import Differentiable, Gaussian


def noise_mean(
    mu: Tensor, log_sigma: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> Differentiable:
    """Return E[θ] and its gradients in μ and log σ."""

    def compute(mu: Tensor, log_sigma: Tensor) -> Differentiable:
        sigma = torch_special.sigma_from_log(log_sigma)
        posterior = torch_quadrature.gaussian_on(lower, upper, mu, sigma)
        tilted, anchor = torch_quadrature.exponential_tilt(posterior, 1.0)
        expectation = torch_quadrature.log_mass_ratio(
            posterior, tilted, anchor, with_gradients=with_gradients
        )
        value = torch.exp(expectation.value + (mu + anchor))
        if not with_gradients:
            return torch_quadrature.without_gradients(value)
        quadrature = torch_quadrature.window(posterior)
        expectation = torch_quadrature.with_precise_grad_mu(
            expectation, posterior, quadrature, sigma.unsqueeze(-1) * quadrature.distance
        )
        in_range = torch_special.log_sigma_in_range(log_sigma)
        return Differentiable(
            value, value * expectation.grad_mu, value * expectation.grad_log_sigma * in_range
        )

    return torch_quadrature.tile_structures(compute, mu, log_sigma)


def noise_snr(mu: Tensor, log_sigma: Tensor, lower: float, upper: float) -> Tensor:
    """Return E[θ]/sd(θ)."""

    def compute(mu: Tensor, log_sigma: Tensor) -> Differentiable:
        sigma = torch_special.sigma_from_log(log_sigma)
        posterior = torch_quadrature.gaussian_on(lower, upper, mu, sigma)
        spread = torch.minimum(sigma / posterior.outside.clamp(min=1.0), posterior.width)
        snr = torch.where(spread < NARROW_SPREAD, _narrow_snr(posterior), _wide_snr(posterior))
        return torch_quadrature.without_gradients(snr)

    return torch_quadrature.tile_structures(compute, mu, log_sigma).value.reshape(mu.shape)


def _narrow_snr(posterior: Gaussian) -> Tensor:
    quadrature = torch_quadrature.window(posterior)
    # θ over its value at the anchor, minus one. Where the posterior is wide this result is not used.
    relative = torch.expm1((posterior.scale.unsqueeze(-1) * quadrature.distance).clamp(max=80.0))
    return (1.0 + quadrature.mean(relative)) / quadrature.covariance(relative, relative).sqrt()


def _wide_snr(posterior: Gaussian) -> Tensor:
    tilts = [torch_quadrature.exponential_tilt(posterior, power) for power in (1.0, 2.0)]
    (first, first_anchor), (second, second_anchor) = (
        (torch_quadrature.log_mass_ratio(posterior, tilted, anchor, with_gradients=False).value, anchor)
        for tilted, anchor in tilts
    )
    log_ratio = (second - 2.0 * first) + 2.0 * (second_anchor - first_anchor)
    return torch.expm1(log_ratio).rsqrt()
