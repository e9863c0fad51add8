"""The mathematics of the truncated normal in pure torch, float64, without cancellation.

A Gaussian restricted to an interval is described by the distances of its mean to both ends. Its density is
factored at the *anchor*, the point of the interval nearest to the mean, so that every integrand is at most one
and every integral is a sum of positive terms, wherever the mean lies. With v the distance from the anchor and k
the distance from the mean to the anchor, both in units of the scale, the density is proportional to
``exp(-u)``, ``u = k |v| + v² / 2``.

Functions take and return float64 tensors unless they say otherwise; means and scales are those of log θ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bmrs_kernels.dispatch.torch_first_calls import settle_first_calls
from bmrs_kernels.truncated_normal.regimes import NEARLY_CONSTANT, NODES_PER_SIDE, WINDOW_EXPONENT

# A tile of structures x nodes stays in a core's cache, and memory does not grow with the number of structures.
STRUCTURES_PER_TILE = 4096


class Gaussian(NamedTuple):
    """An unnormalised Gaussian on an interval; each field broadcasts against the others."""

    below: Tensor  # mean - lower end
    above: Tensor  # upper end - mean
    scale: Tensor
    width: Tensor  # upper end - lower end, of which below + above would lose digits

    @property
    def anchor(self) -> Tensor:
        """Signed distance from the mean to the nearest point of the interval; 0 where the mean is inside."""
        return self.above.clamp(max=0.0) - self.below.clamp(max=0.0)

    @property
    def outside(self) -> Tensor:
        """Distance from the mean to the interval in units of the scale, k in the module's notation."""
        return self.anchor.abs() / self.scale

    @property
    def left(self) -> Tensor:
        """Length of the interval to the left of the anchor, in units of the scale."""
        return torch.minimum(self.below.clamp(min=0.0), self.width) / self.scale

    @property
    def right(self) -> Tensor:
        """Length of the interval to the right of the anchor, in units of the scale."""
        return torch.minimum(self.above.clamp(min=0.0), self.width) / self.scale


class Window(NamedTuple):
    """Quadrature of ``exp(-u)`` over the part of the interval that carries the mass."""

    log_mass: Tensor  # log ∫ exp(-u) dv, shape (...)
    distance: Tensor  # v at the nodes, signed, shape (..., nodes)
    exponent: Tensor  # u at the nodes, shape (..., nodes)
    probability: Tensor  # normalised weights, shape (..., nodes)

    def mean(self, values: Tensor) -> Tensor:
        """Return the expectation of values given at the nodes."""
        return (self.probability * values).sum(-1)

    def covariance(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the covariance of two quantities given at the nodes, as a sum of centred products."""
        first = first - self.mean(first).unsqueeze(-1)
        second = second - self.mean(second).unsqueeze(-1)
        return self.mean(first * second)


def gaussian_on(lower: float, upper: float, mean: Tensor, scale: Tensor) -> Gaussian:
    """Return a Gaussian on an interval."""
    return Gaussian(mean - lower, upper - mean, scale, mean.new_full((), upper - lower))


@functools.lru_cache(maxsize=1)
def gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes and weights of one side, on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES_PER_SIDE)
    return (nodes + 1.0) / 2.0, weights / 2.0


def window(gaussian: Gaussian) -> Window:
    """Integrate a Gaussian over its interval on Gauss–Legendre nodes to either side of the anchor."""
    unit_nodes, unit_weights = (torch.from_numpy(part).to(gaussian.scale.device) for part in gauss_legendre())
    outside = gaussian.outside
    reach = 2.0 * WINDOW_EXPONENT / (outside + torch.sqrt(outside * outside + 2.0 * WINDOW_EXPONENT))
    left = torch.minimum(gaussian.left, reach).unsqueeze(-1)
    right = torch.minimum(gaussian.right, reach).unsqueeze(-1)
    distance = torch.cat([-left * unit_nodes, right * unit_nodes], -1)
    magnitude = distance.abs()
    exponent = magnitude * (outside.unsqueeze(-1) + 0.5 * magnitude)
    weight = torch.cat([left * unit_weights, right * unit_weights], -1) * torch.exp(-exponent)
    mass = weight.sum(-1)
    return Window(mass.log(), distance, exponent, weight / mass.unsqueeze(-1))


class BoundaryTerms(NamedTuple):
    """Density at the ends of the interval over the mass, and the ends' distances from the anchor."""

    lower_density: Tensor
    upper_density: Tensor
    left: Tensor
    right: Tensor


def boundary_terms(gaussian: Gaussian, log_mass: Tensor) -> BoundaryTerms:
    """Return what integration by parts leaves at the ends; meant for means inside the interval.

    Odd moments of a nearly symmetric density are differences of these exponentially small terms. Quadrature
    would leave rounding noise in their place, which 1/σ then magnifies.
    """
    left, right = gaussian.left, gaussian.right
    lower_density = torch.exp(-0.5 * left * left - log_mass)
    upper_density = torch.exp(-0.5 * right * right - log_mass)
    return BoundaryTerms(lower_density, upper_density, left, right)


def first_moment(gaussian: Gaussian, quadrature: Window) -> Tensor:
    """Return E[v], the mean's distance from the anchor in units of the scale."""
    ends = boundary_terms(gaussian, quadrature.log_mass)
    inside = ends.lower_density - ends.upper_density
    return torch.where(gaussian.outside > 0, quadrature.mean(quadrature.distance), inside)


def second_moment(quadrature: Window) -> Tensor:
    """Return E[v²]."""
    return quadrature.mean(quadrature.distance * quadrature.distance)


class Differentiable(NamedTuple):
    """A value per structure and its derivatives, which are empty where they were not asked for."""

    value: Tensor
    grad_mu: Tensor
    grad_log_sigma: Tensor


def log_mass_ratio(
    posterior: Gaussian, other: Gaussian, other_anchor: Tensor, *, with_gradients: bool
) -> Differentiable:
    """Compare the masses of the posterior and of the posterior times a Gaussian or exponential factor.

    Args:
        posterior: q before normalisation.
        other: q times the factor, before normalisation, on its own interval.
        other_anchor: x - μ at the anchor x of ``other``.
        with_gradients: whether to compute the derivatives.

    Returns:
        log ∫ exp(-(x-μ)²/2σ² + log factor(x) - log factor(anchor)) dx / other.scale
        - log ∫ exp(-(x-μ)²/2σ²) dx / σ, each over its interval; and the derivatives in μ and log σ of the log of
        the factor's expectation under q, E'[∂ log q] - E[∂ log q].
    """
    sigma = posterior.scale
    quadrature, other_quadrature = window(posterior), window(other)
    anchor = posterior.anchor
    shift = (other_anchor - anchor) / sigma
    # Both factors have the same sign: the posterior's anchor is the point of its interval nearest to μ.
    square_gain = shift * ((other_anchor + anchor) / sigma)
    value = other_quadrature.log_mass - quadrature.log_mass - 0.5 * square_gain
    if not with_gradients:
        return without_gradients(value)
    ratio = other.scale / sigma
    mean, other_mean = first_moment(posterior, quadrature), ratio * first_moment(other, other_quadrature)
    grad_mu = (shift + other_mean - mean) / sigma
    grad_log_sigma = (
        square_gain
        + 2.0 * (other_anchor / sigma * other_mean - anchor / sigma * mean)
        + (ratio * ratio * second_moment(other_quadrature) - second_moment(quadrature))
    )
    return Differentiable(value, grad_mu, grad_log_sigma)


def with_precise_grad_mu(
    expectation: Differentiable, posterior: Gaussian, quadrature: Window, log_factor: Tensor
) -> Differentiable:
    """Replace d/dμ of the log of a factor's expectation where the factor is nearly constant over the posterior.

    There ``log_mass_ratio`` divides a difference of two nearly equal means by σ. The covariance of the factor and the
    score is the same derivative without a difference.

    Args:
        expectation: what ``log_mass_ratio`` returned.
        posterior: q before normalisation.
        quadrature: the window of ``posterior``.
        log_factor: log factor(x) - log factor(anchor) at the window's nodes.
    """
    relative = torch.expm1(log_factor)
    covariance = quadrature.covariance(relative, quadrature.distance) / (1.0 + quadrature.mean(relative))
    nearly_constant = log_factor.abs().amax(-1) < NEARLY_CONSTANT
    grad_mu = torch.where(nearly_constant, covariance / posterior.scale, expectation.grad_mu)
    return expectation._replace(grad_mu=grad_mu)


def exponential_tilt(posterior: Gaussian, power: float) -> tuple[Gaussian, Tensor]:
    """Return q · exp(power · x) before normalisation, and x - μ at its anchor."""
    shift = power * posterior.scale * posterior.scale
    tilted = Gaussian(posterior.below + shift, posterior.above - shift, posterior.scale, posterior.width)
    anchor = torch.minimum(torch.maximum(shift, -posterior.below), posterior.above)
    return tilted, anchor


def tile_structures(
    compute: Callable[[Tensor, Tensor], Differentiable], mu: Tensor, log_sigma: Tensor
) -> Differentiable:
    """Apply a per-structure computation in float64, tile by tile; return flat results in μ's dtype."""
    settle_first_calls()
    flat_mu, flat_log_sigma = mu.reshape(-1).double(), log_sigma.reshape(-1).double()
    tiles = [
        compute(*tile)
        for tile in zip(
            flat_mu.split(STRUCTURES_PER_TILE), flat_log_sigma.split(STRUCTURES_PER_TILE), strict=True
        )
    ]
    return Differentiable(*(torch.cat(column).to(mu.dtype) for column in zip(*tiles, strict=True)))


def without_gradients(value: Tensor) -> Differentiable:
    """Return a value with empty derivatives."""
    return Differentiable(value, value.new_empty(0), value.new_empty(0))
