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
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bmrs_kernels.truncated_normal.polynomials import (
    INVERSE_DENSITY,
    QUANTILE,
    QUANTILE_CENTRE,
    QUANTILE_SHIFT,
)

LOG_SIGMA_MIN = -20.0
LOG_SIGMA_MAX = 5.0

# Quadrature error below 4e-15 on the whole domain; 24 nodes an end give 2e-14, 20 nodes 1e-10.
NODES_PER_SIDE = 32
# Weights below exp(-44) of the peak are left out: with v⁴ beside them they still count for less than 1e-15.
WINDOW_EXPONENT = 44.0
# A tile of structures x nodes stays in a core's cache, and memory does not grow with the number of structures.
STRUCTURES_PER_TILE = 4096
# A factor whose logarithm changes by less than this over the window moves the mean by a small part of σ.
NEARLY_CONSTANT = 0.5

SQRT2 = math.sqrt(2.0)
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


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


def normal_cdf(z: Tensor) -> Tensor:
    """Return Φ(z) with full relative precision in the lower tail, where ``torch.special.ndtr`` has none."""
    return 0.5 * torch.erfc(-z / SQRT2)


def normal_density(z: Tensor) -> Tensor:
    """Return φ(z)."""
    return torch.exp(-0.5 * z * z - HALF_LOG_2PI)


def normal_mass(alpha: Tensor, beta: Tensor) -> Tensor:
    """Return Φ(β) - Φ(α), in either tail with the relative precision of the tail; 0 where that underflows."""
    low, high = (
        torch.minimum(alpha, -beta),
        torch.maximum(alpha, -beta),
    )  # high > 0 where the interval is one-sided
    one_sided = normal_cdf(-high) - normal_cdf(low)
    return torch.where(high > 0, one_sided, 0.5 * (torch.erf(beta / SQRT2) - torch.erf(alpha / SQRT2)))


def mills_ratio(t: Tensor) -> Tensor:
    """Return S(t)/φ(t), survival over density of a standard normal."""
    return math.sqrt(math.pi / 2.0) * torch.special.erfcx(t / SQRT2)


def quantile_variable(product: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return √(4 - log₂ product) - 3.5 for product = 4pq, the variable of the quantile's polynomials; float32."""
    variable = torch.log2(product, out=out)
    return variable.neg_().add_(QUANTILE_SHIFT).sqrt_().sub_(QUANTILE_CENTRE)


def quantile_ratio(variable: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return Φ⁻¹(p) / (2p - 2q) for p = 1 - q; float32."""
    return _polynomial(QUANTILE, variable, out=torch.empty_like(variable) if out is None else out)


def inverse_density_ratio(variable: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return 4pq / φ(Φ⁻¹(p)) for p = 1 - q; float32."""
    return _polynomial(INVERSE_DENSITY, variable, out=torch.empty_like(variable) if out is None else out)


def normal_quantile(
    below: Tensor, above: Tensor, scratch: tuple[Tensor, Tensor, Tensor], *, with_density: bool
) -> tuple[Tensor, Tensor | None]:
    """Return Φ⁻¹(below) and, if asked for, 1/φ there, in float32 from both tail probabilities down to 4e-10.

    One expression serves both tails, since it takes their difference and their product (the variable of M. Giles,
    "Approximating the erfinv function", 2012). Relative errors are below 4e-7. All arguments are overwritten: fresh
    memory for each step would cost more than the arithmetic.
    """
    product, variable, ratio = scratch
    torch.mul(below, above, out=product).mul_(4.0)
    quantile_variable(product, out=variable)
    z = torch.sub(below, above, out=below).mul_(quantile_ratio(variable, out=ratio)).mul_(2.0)
    if not with_density:
        return z, None
    return z, inverse_density_ratio(variable, out=ratio).div_(product)


def _polynomial(coefficients: tuple[float, ...], x: Tensor, *, out: Tensor) -> Tensor:
    """Evaluate a polynomial by Horner's rule, highest power first."""
    torch.mul(x, coefficients[0], out=out)
    for coefficient in coefficients[1:-1]:
        out.add_(coefficient).mul_(x)
    return out.add_(coefficients[-1])


def sigma_from_log(log_sigma: Tensor) -> Tensor:
    """Return σ, with log σ clamped to the range in which the posterior is defined."""
    return log_sigma.clamp(LOG_SIGMA_MIN, LOG_SIGMA_MAX).exp()


def log_sigma_in_range(log_sigma: Tensor) -> Tensor:
    """Return 1 where log σ has a gradient and 0 where it is clamped."""
    return ((log_sigma >= LOG_SIGMA_MIN) & (log_sigma <= LOG_SIGMA_MAX)).to(log_sigma.dtype)


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
