"""Quadrature over a truncated normal in numba: float64 twins, name by name, of the functions in torch_quadrature.

Everything is about one structure; only what is evaluated at the nodes is an array. A ``Gaussian`` and a ``Window``
carry torch_quadrature's fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmrs_kernels.dispatch.numba_compile import REGROUPING, compiled
from bmrs_kernels.dispatch.numba_memory import use_widest_vectors
from bmrs_kernels.dispatch.numba_threads import in_threads
from bmrs_kernels.truncated_normal import regimes, torch_quadrature
from bmrs_kernels.truncated_normal.numba_special import exp_float64
from bmrs_kernels.truncated_normal.torch_quadrature import BoundaryTerms, Differentiable, Gaussian, Window

WINDOW_EXPONENT = regimes.WINDOW_EXPONENT
NEARLY_CONSTANT = regimes.NEARLY_CONSTANT
# Both sides of the anchor: negative nodes to the left, positive ones to the right.
_nodes, _weights = torch_quadrature.gauss_legendre()
SIGNED_NODES, NODE_WEIGHTS = np.concatenate([-_nodes, _nodes]), np.concatenate([_weights, _weights])
NUM_NODES = SIGNED_NODES.size
SECONDS_PER_STRUCTURE = 0.5e-6


def compute_structures(
    loop: Callable[..., Any],
    mu: Tensor,
    log_sigma: Tensor,
    options: tuple[float, ...],
    *,
    with_gradients: bool,
) -> Differentiable:
    """Run a loop over all structures and return flat results in μ's dtype.

    Args:
        loop: takes μ, log σ and the three results, flat and float64, the options, whether to write the derivatives,
            and the range of structures to compute.
        mu: location μ, any shape.
        log_sigma: log σ, shape of ``mu``.
        options: numbers that all structures share.
        with_gradients: whether to compute the derivatives.
    """
    # Contiguous, since numba would compile strided arrays to other code, whose last bits differ.
    arguments = [part.detach().double().contiguous().view(-1).numpy() for part in (mu, log_sigma)]
    count = arguments[0].size
    results = [
        torch.empty(count if wanted else 0, dtype=torch.float64, device="cpu")
        for wanted in (True, with_gradients, with_gradients)
    ]
    arrays = [result.numpy() for result in results]

    def call(first: int, last: int) -> None:
        loop(*arguments, *arrays, options, with_gradients, first, last)

    in_threads(call, count, seconds=count * SECONDS_PER_STRUCTURE)
    return Differentiable(*(result.to(mu.dtype) for result in results))


@compiled
def node_memory():
    """Return memory for a ``Window``: three numbers for each node."""
    return np.empty(NUM_NODES), np.empty(NUM_NODES), np.empty(NUM_NODES)


@compiled
def gaussian_on(lower, upper, mean, scale):
    """Return a Gaussian on an interval."""
    return Gaussian(mean - lower, upper - mean, scale, upper - lower)


@compiled
def gaussian_anchor(gaussian):
    """Return the signed distance from the mean to the nearest point of the interval; 0 where the mean is inside."""
    return min(gaussian.above, 0.0) - min(gaussian.below, 0.0)


@compiled
def gaussian_outside(gaussian):
    """Return the distance from the mean to the interval in units of the scale."""
    return abs(gaussian_anchor(gaussian)) / gaussian.scale


@compiled
def gaussian_left(gaussian):
    """Return the length of the interval to the left of the anchor, in units of the scale."""
    return min(max(gaussian.below, 0.0), gaussian.width) / gaussian.scale


@compiled
def gaussian_right(gaussian):
    """Return the length of the interval to the right of the anchor, in units of the scale."""
    return min(max(gaussian.above, 0.0), gaussian.width) / gaussian.scale


def _window(gaussian, memory):
    """Integrate a Gaussian over its interval on Gauss–Legendre nodes to either side of the anchor."""
    use_widest_vectors()
    distance, exponent, probability = memory
    outside = gaussian_outside(gaussian)
    reach = 2.0 * WINDOW_EXPONENT / (outside + math.sqrt(outside * outside + 2.0 * WINDOW_EXPONENT))
    left, right = min(gaussian_left(gaussian), reach), min(gaussian_right(gaussian), reach)
    mass = 0.0
    for i in range(NUM_NODES):
        length = left if SIGNED_NODES[i] < 0.0 else right
        distance[i] = length * SIGNED_NODES[i]
        magnitude = abs(distance[i])
        exponent[i] = magnitude * (outside + 0.5 * magnitude)
        probability[i] = length * NODE_WEIGHTS[i] * exp_float64(-exponent[i])
        mass += probability[i]
    for i in range(NUM_NODES):
        probability[i] /= mass
    return Window(math.log(mass), distance, exponent, probability)


def _window_mean(quadrature, values):
    """Return the expectation of values given at the nodes."""
    use_widest_vectors()
    total = 0.0
    for i in range(NUM_NODES):
        total += quadrature.probability[i] * values[i]
    return total


def _window_covariance(quadrature, first, second):
    """Return the covariance of two quantities given at the nodes, as a sum of centred products."""
    use_widest_vectors()
    first_mean, second_mean = window_mean(quadrature, first), window_mean(quadrature, second)
    total = 0.0
    for i in range(NUM_NODES):
        total += quadrature.probability[i] * ((first[i] - first_mean) * (second[i] - second_mean))
    return total


window = compiled(_window, inline=False, fastmath=REGROUPING)
window_mean = compiled(_window_mean, inline=False, fastmath=REGROUPING)
window_covariance = compiled(_window_covariance, inline=False, fastmath=REGROUPING)


@compiled
def boundary_terms(gaussian, log_mass):
    """Return what integration by parts leaves at the ends; meant for means inside the interval."""
    left, right = gaussian_left(gaussian), gaussian_right(gaussian)
    lower_density = math.exp(-0.5 * left * left - log_mass)
    upper_density = math.exp(-0.5 * right * right - log_mass)
    return BoundaryTerms(lower_density, upper_density, left, right)


@compiled
def first_moment(gaussian, quadrature):
    """Return E[v], the mean's distance from the anchor in units of the scale."""
    if gaussian_outside(gaussian) > 0.0:
        return window_mean(quadrature, quadrature.distance)
    ends = boundary_terms(gaussian, quadrature.log_mass)
    return ends.lower_density - ends.upper_density


def _second_moment(quadrature):
    """Return E[v²]."""
    use_widest_vectors()
    total = 0.0
    for i in range(NUM_NODES):
        total += quadrature.probability[i] * (quadrature.distance[i] * quadrature.distance[i])
    return total


second_moment = compiled(_second_moment, inline=False, fastmath=REGROUPING)


@compiled
def log_mass_ratio(posterior, quadrature, other, other_quadrature, other_anchor, with_gradients):
    """Compare the masses of the posterior and of the posterior times a factor, as torch_quadrature says."""
    sigma = posterior.scale
    anchor = gaussian_anchor(posterior)
    shift = (other_anchor - anchor) / sigma
    square_gain = shift * ((other_anchor + anchor) / sigma)
    value = other_quadrature.log_mass - quadrature.log_mass - 0.5 * square_gain
    if not with_gradients:
        return Differentiable(value, 0.0, 0.0)
    ratio = other.scale / sigma
    mean, other_mean = first_moment(posterior, quadrature), ratio * first_moment(other, other_quadrature)
    grad_mu = (shift + other_mean - mean) / sigma
    grad_log_sigma = (
        square_gain
        + 2.0 * (other_anchor / sigma * other_mean - anchor / sigma * mean)
        + (ratio * ratio * second_moment(other_quadrature) - second_moment(quadrature))
    )
    return Differentiable(value, grad_mu, grad_log_sigma)


@compiled
def precise_grad_mu(expectation, posterior, quadrature, log_factor):
    """Return d/dμ of the log of a factor's expectation, without a difference where the factor is nearly constant."""
    largest = 0.0
    for i in range(NUM_NODES):
        largest = max(largest, abs(log_factor[i]))
    if not largest < NEARLY_CONSTANT:
        return expectation.grad_mu
    relative = np.expm1(log_factor)
    covariance = window_covariance(quadrature, relative, quadrature.distance)
    return covariance / (1.0 + window_mean(quadrature, relative)) / posterior.scale


@compiled
def exponential_tilt(posterior, power):
    """Return q · exp(power · x) before normalisation, and x - μ at its anchor."""
    shift = power * posterior.scale * posterior.scale
    tilted = Gaussian(posterior.below + shift, posterior.above - shift, posterior.scale, posterior.width)
    return tilted, min(max(shift, -posterior.below), posterior.above)
