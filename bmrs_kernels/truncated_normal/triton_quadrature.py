"""Quadrature over a truncated normal in Triton: float64 twins, name by name, of the functions in torch_quadrature.

What belongs to a structure is a vector [STRUCTURES], what is evaluated at the nodes a tile [NODES, STRUCTURES]; a
``Gaussian`` and a ``Window`` carry the same fields. With the structures along the lanes, most of a sum over the nodes
stays inside a thread, and arithmetic on vectors is not repeated in every lane.

A number beside a float64 tensor is taken in float64 by arithmetic and by ``tl.where``, but ``tl.minimum`` and
``tl.maximum`` may round it to float32, as any operation does with numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bmrs_kernels.dispatch.triton_launch import ceil_div, launch
from bmrs_kernels.truncated_normal import regimes, torch_quadrature
from bmrs_kernels.truncated_normal.torch_quadrature import BoundaryTerms, Differentiable, Gaussian, Window
from bmrs_kernels.truncated_normal.triton_special import maximum, minimum, store

# A program is one warp, which adds up without waiting for others: 8 threads a structure, 8 nodes a thread. Twice the
# structures take all the registers that a thread can have.
STRUCTURES_PER_PROGRAM = 4

WINDOW_EXPONENT = tl.constexpr(regimes.WINDOW_EXPONENT)
NODES_PER_SIDE = tl.constexpr(regimes.NODES_PER_SIDE)
UNIT_NODES, UNIT_WEIGHTS = (tl.constexpr(tuple(part.tolist())) for part in torch_quadrature.gauss_legendre())
NEARLY_CONSTANT = tl.constexpr(regimes.NEARLY_CONSTANT)
# Below this magnitude exp(x) - 1 has lost more than a bit, and 14 terms of the series leave less than 5e-17.
EXPM1_SERIES_LIMIT = tl.constexpr(0.5)
EXPM1_SERIES_TERMS = tl.constexpr(14)


class Rule(NamedTuple):
    """Gauss–Legendre quadrature to both sides of the anchor; each field is a column [NODES, 1]."""

    node: Any  # in units of the side's length: negative to the left, positive to the right
    weight: Any


def empty_results(mu: Tensor, *, with_gradients: bool) -> Differentiable:
    """Return memory for a value per structure and, if asked for, its derivatives."""
    shape = mu.shape if with_gradients else (0,)
    return Differentiable(mu.new_empty(mu.shape), mu.new_empty(shape), mu.new_empty(shape))


def launch_structures(
    kernel: Any, mu: Tensor, log_sigma: Tensor, outputs: Sequence[Tensor], **options: Any
) -> None:
    """Run a kernel over all structures.

    Args:
        kernel: takes pointers to μ, log σ and the outputs, the number of structures, and the options.
        mu: location μ, any shape and layout.
        log_sigma: log σ, shape of ``mu``.
        outputs: what the kernel writes, contiguous.
        options: the kernel's constexpr arguments.
    """
    launch(
        kernel,
        (ceil_div(mu.numel(), STRUCTURES_PER_PROGRAM),),
        mu.contiguous(),
        log_sigma.contiguous(),
        *outputs,
        mu.numel(),
        STRUCTURES=STRUCTURES_PER_PROGRAM,
        num_warps=1,
        **options,
    )


@triton.jit
def program_structures(num_structures, STRUCTURES: tl.constexpr):
    """Return the indices of the program's structures and which of them exist."""
    index = tl.program_id(0).to(tl.int64) * STRUCTURES + tl.arange(0, STRUCTURES)
    return index, index < num_structures


@triton.jit
def load_structures(ptr, index, exists):
    """Load one number for each structure, any floating dtype, as float64."""
    return tl.load(ptr + index, mask=exists, other=0.0).to(tl.float64)


@triton.jit
def store_results(
    value_ptr, grad_mu_ptr, grad_log_sigma_ptr, index, exists, result, WITH_GRADIENTS: tl.constexpr
):
    """Store a value and, if asked for, its derivatives."""
    store(value_ptr + index, result.value, exists)
    if WITH_GRADIENTS:
        store(grad_mu_ptr + index, result.grad_mu, exists)
        store(grad_log_sigma_ptr + index, result.grad_log_sigma, exists)


@triton.jit
def gauss_legendre():
    """Return the quadrature rule.

    From constants in the code: a table in device memory would have to be made outside of any CUDA graph, also of
    those that torch.compile makes by itself, before the first kernel is launched.
    """
    index = tl.arange(0, 2 * NODES_PER_SIDE)[:, None]
    distance = tl.full(index.shape, 0.0, tl.float64)
    weight = distance
    for i in tl.static_range(NODES_PER_SIDE):
        chosen = index % NODES_PER_SIDE == i
        distance = tl.where(chosen, UNIT_NODES[i], distance)
        weight = tl.where(chosen, UNIT_WEIGHTS[i], weight)
    return Rule(tl.where(index < NODES_PER_SIDE, -distance, distance), weight)


@triton.jit
def full_like(x, value):
    """Return a float64 tensor of x's shape filled with a number."""
    return tl.full(x.shape, value, tl.float64)


@triton.jit
def hypot(x, y):
    """Return √(x² + y²) of two positive numbers whose squares may overflow."""
    larger = maximum(x, y)
    ratio = minimum(x, y) / larger
    return larger * tl.sqrt(1.0 + ratio * ratio)


@triton.jit
def expm1(x):
    """Return exp(x) - 1 to a relative error of 5e-16."""
    return tl.where(tl.abs(x) < EXPM1_SERIES_LIMIT, expm1_near_zero(x), tl.exp(x) - 1.0)


@triton.jit
def expm1_near_zero(x):
    """Return exp(x) - 1 for |x| below EXPM1_SERIES_LIMIT."""
    series = full_like(x, 1.0)
    for term in tl.static_range(EXPM1_SERIES_TERMS - 1):
        series = 1.0 + series * x * (1.0 / (EXPM1_SERIES_TERMS - term))
    return x * series


@triton.jit
def gaussian_on(LOWER: tl.constexpr, UPPER: tl.constexpr, mean, scale):
    """Return a Gaussian on an interval."""
    return Gaussian(mean - LOWER, UPPER - mean, scale, full_like(mean, UPPER - LOWER))


@triton.jit
def gaussian_anchor(gaussian):
    """Return the signed distance from the mean to the nearest point of the interval; 0 where the mean is inside."""
    return minimum(gaussian.above, 0.0) - minimum(gaussian.below, 0.0)


@triton.jit
def gaussian_outside(gaussian):
    """Return the distance from the mean to the interval in units of the scale."""
    return tl.abs(gaussian_anchor(gaussian)) / gaussian.scale


@triton.jit
def gaussian_left(gaussian):
    """Return the length of the interval to the left of the anchor, in units of the scale."""
    return minimum(maximum(gaussian.below, 0.0), gaussian.width) / gaussian.scale


@triton.jit
def gaussian_right(gaussian):
    """Return the length of the interval to the right of the anchor, in units of the scale."""
    return minimum(maximum(gaussian.above, 0.0), gaussian.width) / gaussian.scale


@triton.jit
def window_mean(quadrature, values):
    """Return the expectation of values given at the nodes."""
    return tl.sum(quadrature.probability * values, axis=0)


@triton.jit
def window_covariance(quadrature, first, second):
    """Return the covariance of two quantities given at the nodes, as a sum of centred products."""
    first = first - window_mean(quadrature, first)[None, :]
    second = second - window_mean(quadrature, second)[None, :]
    return window_mean(quadrature, first * second)


@triton.jit
def window(gaussian, rule):
    """Integrate a Gaussian over its interval on Gauss–Legendre nodes to either side of the anchor."""
    outside = gaussian_outside(gaussian)
    reach = 2.0 * WINDOW_EXPONENT / (outside + tl.sqrt(outside * outside + 2.0 * WINDOW_EXPONENT))
    left = minimum(gaussian_left(gaussian), reach)[None, :]
    right = minimum(gaussian_right(gaussian), reach)[None, :]
    length = tl.where(rule.node < 0.0, left, right)
    distance = length * rule.node
    magnitude = tl.abs(distance)
    exponent = magnitude * (outside[None, :] + 0.5 * magnitude)
    weight = length * rule.weight * tl.exp(-exponent)
    mass = tl.sum(weight, axis=0)
    return Window(tl.log(mass), distance, exponent, weight * (1.0 / mass)[None, :])


@triton.jit
def boundary_terms(gaussian, log_mass):
    """Return what integration by parts leaves at the ends; meant for means inside the interval."""
    left, right = gaussian_left(gaussian), gaussian_right(gaussian)
    lower_density = tl.exp(-0.5 * left * left - log_mass)
    upper_density = tl.exp(-0.5 * right * right - log_mass)
    return BoundaryTerms(lower_density, upper_density, left, right)


@triton.jit
def first_moment(gaussian, quadrature):
    """Return E[v], the mean's distance from the anchor in units of the scale."""
    ends = boundary_terms(gaussian, quadrature.log_mass)
    inside = ends.lower_density - ends.upper_density
    return tl.where(gaussian_outside(gaussian) > 0.0, window_mean(quadrature, quadrature.distance), inside)


@triton.jit
def second_moment(quadrature):
    """Return E[v²]."""
    return window_mean(quadrature, quadrature.distance * quadrature.distance)


@triton.jit
def log_mass_ratio(posterior, other, other_anchor, rule, WITH_GRADIENTS: tl.constexpr):
    """Compare the masses of the posterior and of the posterior times a factor, as torch_quadrature says."""
    sigma = posterior.scale
    quadrature, other_quadrature = window(posterior, rule), window(other, rule)
    anchor = gaussian_anchor(posterior)
    shift = (other_anchor - anchor) / sigma
    square_gain = shift * ((other_anchor + anchor) / sigma)
    value = other_quadrature.log_mass - quadrature.log_mass - 0.5 * square_gain
    if not WITH_GRADIENTS:
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


@triton.jit
def with_precise_grad_mu(expectation, posterior, quadrature, log_factor):
    """Replace d/dμ of the log of a factor's expectation where the factor is nearly constant over the posterior."""
    tl.static_assert(NEARLY_CONSTANT <= EXPM1_SERIES_LIMIT)
    relative = expm1_near_zero(log_factor)
    covariance = window_covariance(quadrature, relative, quadrature.distance)
    covariance = covariance / (1.0 + window_mean(quadrature, relative))
    nearly_constant = tl.max(tl.abs(log_factor), axis=0) < NEARLY_CONSTANT
    grad_mu = tl.where(nearly_constant, covariance / posterior.scale, expectation.grad_mu)
    return Differentiable(expectation.value, grad_mu, expectation.grad_log_sigma)


@triton.jit
def exponential_tilt(posterior, POWER: tl.constexpr):
    """Return q · exp(power · x) before normalisation, and x - μ at its anchor."""
    shift = POWER * posterior.scale * posterior.scale
    tilted = Gaussian(posterior.below + shift, posterior.above - shift, posterior.scale, posterior.width)
    return tilted, minimum(maximum(shift, -posterior.below), posterior.above)


@triton.jit
def without_gradients(value):
    """Return a value and, where its derivatives would be, anything: they are not stored."""
    return Differentiable(value, value, value)
