"""log θ and its derivatives inside kernels, from uniforms and a structure's constants.

Three regimes, told apart by structure. *Inside*: the mode is inside the interval or less than TAIL_START σ outside;
float32. *Wide*: the same with σ above WIDE_SIGMA, which would magnify the last digit of a probability; the products
with σ are float64. *Tail*: the mode is further outside; log θ is found from the end nearest to the mode, in float32.
float64 activations take ``exact_log_noise``, which refines either to full precision.

A program that owns one structure branches; one with a tile of structures computes the inside regime and replaces the
rest where a structure needs it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bmrs_kernels import constants
from bmrs_kernels.multiplicative_noise.triton_constants import (
    DISTANCE,
    EPSILON,
    FAR_SURVIVAL,
    FIRST_OF_HAZARD,
    FIRST_OF_QUANTILE,
    HAZARD_GAIN,
    HAZARD_TERMS,
    QUANTILE_TERMS,
    TAIL_START,
    inside_constants,
    load_posterior,
    table_column,
    tail_constant,
    tail_constants,
)
from bmrs_kernels.truncated_normal import polynomials, regimes
from bmrs_kernels.truncated_normal.triton_special import (
    HALF_LOG_2PI,
    QUANTILE_CENTRE,
    QUANTILE_SHIFT,
    float64_reciprocal,
    float64_sqrt,
    inverse_density_ratio,
    log2,
    maximum,
    mills_ratio,
    minimum,
    quantile_ratio,
    quantile_variable,
)

WIDE_SIGMA = tl.constexpr(regimes.WIDE_SIGMA)
LN2 = tl.constexpr(constants.LN2)
# From a starting value good to 1e-7, or to 1e-1 beyond the range of the fits; each step triples the digits.
HALLEY_STEPS = tl.constexpr(3)
# The exact path's start is clamped to where the fits hold.
LARGEST_VARIABLE = tl.constexpr(
    (polynomials.QUANTILE_LIMIT + polynomials.QUANTILE_SHIFT) ** 0.5 - polynomials.QUANTILE_CENTRE
)

# Keeps logarithms finite where a uniform is 0 or 1, which multiply_noise never draws.
TINY = tl.constexpr(1e-300)
# The same for tails that underflow, in structures whose result comes from another regime.
SMALLEST_PRODUCT = tl.constexpr(1e-30)


@triton.jit
def inside_log_noise(y, inside, LOWER: tl.constexpr, UPPER: tl.constexpr, WITH_GRADIENTS: tl.constexpr):
    """Return x = log θ, dx/dμ and dx/dlog σ at float32 uniforms where the mode is inside or not far outside.

    z = Φ⁻¹(Φ(α) + y Z) from both tail probabilities, which are carried doubled. Without gradients the last two are x.
    """
    complement = 1.0 - y
    below = inside.below + inside.mass * y
    above = inside.above + inside.mass * complement
    product = below * above + SMALLEST_PRODUCT
    variable = quantile_variable(product)
    z = (below - above) * quantile_ratio(variable)
    offset = inside.sigma * z
    x = minimum(maximum(inside.mu + offset, LOWER), UPPER)
    if WITH_GRADIENTS:
        inverse_density = inverse_density_ratio(variable) / product
        near_lower = complement * inverse_density * inside.lower_density
        near_upper = y * inverse_density * inside.upper_density
        grad_log_sigma = offset + inside.from_lower * near_lower + inside.from_upper * near_upper
        return x, 1.0 - near_lower - near_upper, grad_log_sigma
    return x, x, x


@triton.jit
def wide_log_noise(y, posterior, LOWER: tl.constexpr, UPPER: tl.constexpr, WITH_GRADIENTS: tl.constexpr):
    """Return what ``inside_log_noise`` does where σ is large: the difference of the tails is taken in float64."""
    y = y.to(tl.float64)
    p, q = posterior.below + posterior.mass * y, posterior.above + posterior.mass * (1.0 - y)
    product = 4.0 * p * q + SMALLEST_PRODUCT
    level = -log2(product.to(tl.float32)).to(tl.float64)
    variable = float64_sqrt(level + QUANTILE_SHIFT) - QUANTILE_CENTRE
    offset = posterior.sigma * (2.0 * (p - q)) * quantile_ratio(variable)
    x = (posterior.mu + offset).to(tl.float32)
    x = minimum(maximum(x, LOWER), UPPER)
    if WITH_GRADIENTS:
        inverse_density = inverse_density_ratio(variable) * float64_reciprocal(product)
        near_lower = (1.0 - y) * inverse_density * posterior.lower_density
        near_upper = y * inverse_density * posterior.upper_density
        from_lower, from_upper = posterior.mu - LOWER, posterior.mu - UPPER
        grad_log_sigma = offset + from_lower * near_lower + from_upper * near_upper
        return x, (1.0 - near_lower - near_upper).to(tl.float32), grad_log_sigma.to(tl.float32)
    return x, x, x


@triton.jit
def tail_log_noise(
    y,
    reflected,
    tail,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    IN_TABLE: tl.constexpr,
    IN_FLOAT64: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Return what ``inside_log_noise`` does where the mode is far outside, from the end nearest to it.

    The survival at the quantile, relative to that end's, is m = 1 - y + y R; the quantile follows from log m. A mode
    above the interval is ``reflected`` to below. IN_FLOAT64 is for wide structures, and takes only the logarithm in
    float32.
    """
    real: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    distance = tail_constant(tail, DISTANCE, IN_TABLE).to(real)
    epsilon = tail_constant(tail, EPSILON, IN_TABLE)
    far_survival = tail_constant(tail, FAR_SURVIVAL, IN_TABLE).to(real)
    y = y.to(real)
    y, complement = tl.where(reflected, 1.0 - y, y), tl.where(reflected, y, 1.0 - y)
    survival = complement + y * far_survival
    # 1 + 2 ε l for l = -log m
    square = 1.0 - (2.0 * epsilon * LN2).to(real) * log2(survival.to(tl.float32)).to(real)
    u = (float64_sqrt(square) if IN_FLOAT64 else tl.sqrt(square)) - 1.0
    value = tail_constant(tail, FIRST_OF_QUANTILE + QUANTILE_TERMS - 1, IN_TABLE).to(real)
    for lower_term in tl.static_range(2, QUANTILE_TERMS + 1):
        value = value * u + tail_constant(tail, FIRST_OF_QUANTILE + QUANTILE_TERMS - lower_term, IN_TABLE).to(
            real
        )
    step = distance * (value * u)
    x = tl.where(reflected, -step + UPPER, step + LOWER).to(tl.float32)
    x = minimum(maximum(x, LOWER), UPPER)
    if WITH_GRADIENTS:
        value = tail_constant(tail, FIRST_OF_HAZARD + HAZARD_TERMS - 1, IN_TABLE).to(real)
        for lower_term in tl.static_range(2, HAZARD_TERMS + 1):
            value = value * u + tail_constant(tail, FIRST_OF_HAZARD + HAZARD_TERMS - lower_term, IN_TABLE).to(
                real
            )
        one_less_ratio = value * u  # 1 - h(near end)/h(quantile)
        if IN_FLOAT64:
            far_share = y * far_survival * float64_reciprocal(survival)
        else:
            far_share = y * far_survival / survival
        share = (1.0 - one_less_ratio) * far_share
        gain = share * tail_constant(tail, HAZARD_GAIN, IN_TABLE).to(real)
        grad_mu = one_less_ratio - gain
        grad_log_sigma = distance * grad_mu + step - (share + gain) * (UPPER - LOWER)
        grad_log_sigma = tl.where(reflected, -grad_log_sigma, grad_log_sigma)
        return x, grad_mu.to(tl.float32), grad_log_sigma.to(tl.float32)
    return x, x, x


@triton.jit
def exact_log_noise(y, posterior, LOWER: tl.constexpr, UPPER: tl.constexpr, WITH_GRADIENTS: tl.constexpr):
    """Return what ``inside_log_noise`` does, in float64 to full precision in every regime.

    Halley steps on the logarithm of the smaller tail probability, or, where the mode is far outside, of the survival
    relative to the end nearest to the mode.
    """
    mu, sigma, alpha, beta = posterior.mu, posterior.sigma, posterior.alpha, posterior.beta
    y = y.to(tl.float64)
    complement = 1.0 - y
    p, q = posterior.below + posterior.mass * y, posterior.above + posterior.mass * complement
    probability = tl.minimum(p, q) + TINY
    t = _quantile_start(p, q)
    for _ in tl.static_range(HALLEY_STEPS):
        mills = mills_ratio(t)
        newton = (tl.log(mills / probability) - 0.5 * t * t - HALF_LOG_2PI) * mills
        t += newton / (1.0 + 0.5 * newton * (1.0 / mills - t))
    z = tl.where(p < q, -t, t)
    x = mu + sigma * z
    outside = tl.maximum(alpha, -beta)
    in_tail = outside >= TAIL_START

    reflected = beta < 0
    near = tl.maximum(outside, TAIL_START)
    width = beta - alpha
    tail_y, tail_complement = tl.where(reflected, complement, y), tl.where(reflected, y, complement)
    near_mills = mills_ratio(near)
    log_far = -width * (near + 0.5 * width)
    far_survival = tl.exp(log_far) * (mills_ratio(near + width) / near_mills)
    level = -tl.log(tail_complement + tail_y * far_survival + TINY)
    hazard = 1.0 / near_mills
    # The hazard at the end and its slope give the start.
    v = 2.0 * level / (hazard + tl.sqrt(hazard * hazard + 2.0 * hazard * (hazard - near) * level))
    for _ in tl.static_range(HALLEY_STEPS):
        mills = mills_ratio(near + v)
        newton = (v * (near + 0.5 * v) + tl.log(near_mills / mills) - level) * mills
        v -= newton / (1.0 - 0.5 * newton * (1.0 / mills - (near + v)))
    step = sigma * tl.minimum(tl.maximum(v, 0.0), width)
    x = tl.where(in_tail, tl.where(reflected, -step + UPPER, step + LOWER), x)
    lowest, highest = mu * 0.0 + LOWER, mu * 0.0 + UPPER
    x = minimum(maximum(x, lowest), highest)
    x = tl.where(y <= 0.0, lowest, tl.where(y >= 1.0, highest, x))
    if WITH_GRADIENTS:
        near_lower = complement * tl.exp(0.5 * (z - alpha) * (z + alpha))
        near_upper = y * tl.exp(0.5 * (z - beta) * (z + beta))
        grad_mu = 1.0 - near_lower - near_upper
        grad_log_sigma = sigma * (z - alpha * near_lower - beta * near_upper)
        gap = v * (near + 0.5 * v)
        tail_far = tail_y * tl.exp(gap + log_far)
        tail_grad_mu = 1.0 - tail_complement * tl.exp(gap) - tail_far
        # z - α near - β far with z = α + v: α multiplies one small number.
        tail_grad_log_sigma = sigma * (near * tail_grad_mu + v - width * tail_far)
        tail_grad_log_sigma = tl.where(reflected, -tail_grad_log_sigma, tail_grad_log_sigma)
        return (
            x,
            tl.where(in_tail, tail_grad_mu, grad_mu),
            tl.where(in_tail, tail_grad_log_sigma, grad_log_sigma),
        )
    return x, x, x


@triton.jit
def _quantile_start(p, q):
    """Return |Φ⁻¹(p)| to 1e-7, or to 1e-1 where the smaller of p and q = 1 - p is below 2e-10."""
    # The float32 logarithm does not hold numbers below 1e-38.
    level = -tl.log(4.0 * p * q + TINY) / LN2
    variable = tl.sqrt(tl.maximum(level, 0.0) + QUANTILE_SHIFT) - QUANTILE_CENTRE
    fitted = tl.abs(2.0 * (p - q)) * quantile_ratio(tl.minimum(variable, LARGEST_VARIABLE))
    square = 2.0 * (tl.maximum(level, 2.0) - 1.0) * LN2
    return tl.where(variable < LARGEST_VARIABLE, fitted, tl.sqrt(square - tl.log(square)))


@triton.jit
def wide_tail_log_noise(
    y,
    reflected,
    tail,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    IN_TABLE: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Return what ``tail_log_noise`` does where σ is large."""
    return tail_log_noise(y, reflected, tail, LOWER, UPPER, IN_TABLE, True, WITH_GRADIENTS)


@triton.jit
def structure_log_noise(
    y,
    posterior,
    table_ptr,
    structure,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    EXACT: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Return log θ and its derivatives at the uniforms of one structure, in the regime that it is in.

    ``posterior`` is from the table, float64 if EXACT and else float32.
    """
    if EXACT:
        x, grad_mu, grad_log_sigma = exact_log_noise(y, posterior, LOWER, UPPER, WITH_GRADIENTS)
    else:
        sigma, alpha, beta = posterior.sigma, posterior.alpha, posterior.beta
        exact_ptr, narrow_ptr = (
            table_column(table_ptr, structure, True),
            table_column(table_ptr, structure, False),
        )
        if tl.maximum(alpha, -beta) >= TAIL_START:
            if sigma > WIDE_SIGMA:
                x, grad_mu, grad_log_sigma = wide_tail_log_noise(
                    y, beta < 0, exact_ptr, LOWER, UPPER, True, WITH_GRADIENTS
                )
            else:
                x, grad_mu, grad_log_sigma = tail_log_noise(
                    y, beta < 0, narrow_ptr, LOWER, UPPER, True, False, WITH_GRADIENTS
                )
        elif sigma > WIDE_SIGMA:
            exact = load_posterior(exact_ptr)
            x, grad_mu, grad_log_sigma = wide_log_noise(y, exact, LOWER, UPPER, WITH_GRADIENTS)
        else:
            inside = inside_constants(posterior, LOWER, UPPER)
            x, grad_mu, grad_log_sigma = inside_log_noise(y, inside, LOWER, UPPER, WITH_GRADIENTS)
    return x, grad_mu, grad_log_sigma


@triton.jit
def tile_regimes(posterior):
    """Return whether structures of a tile are wide, in the tail, or both."""
    wide, in_tail = posterior.sigma > WIDE_SIGMA, tl.maximum(posterior.alpha, -posterior.beta) >= TAIL_START
    return _any(wide & ~in_tail), _any(in_tail & ~wide), _any(in_tail & wide)


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32)) > 0


@triton.jit
def tile_log_noise(
    y,
    posterior,
    regimes,
    table_ptr,
    structure,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    EXACT: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Return log θ and its derivatives at uniforms of several structures, whose constants broadcast with them.

    ``posterior`` is as for ``structure_log_noise``, or float64 and computed, if there is no table; ``regimes`` is what
    ``tile_regimes`` says of it.
    """
    if EXACT:
        x, grad_mu, grad_log_sigma = exact_log_noise(y, posterior, LOWER, UPPER, WITH_GRADIENTS)
    else:
        sigma, alpha, beta = posterior.sigma, posterior.alpha, posterior.beta
        any_wide, any_tail, any_wide_tail = regimes
        inside = inside_constants(posterior, LOWER, UPPER)
        x, grad_mu, grad_log_sigma = inside_log_noise(y, inside, LOWER, UPPER, WITH_GRADIENTS)
        wide, in_tail = sigma > WIDE_SIGMA, tl.maximum(alpha, -beta) >= TAIL_START
        in_table: tl.constexpr = table_ptr is not None
        if any_wide:
            if in_table:
                exact = load_posterior(table_column(table_ptr, structure, True))
            else:
                exact = posterior
            wide_x, wide_grad_mu, wide_grad_log_sigma = wide_log_noise(y, exact, LOWER, UPPER, WITH_GRADIENTS)
            x = tl.where(wide, wide_x, x)
            grad_mu = tl.where(wide, wide_grad_mu, grad_mu)
            grad_log_sigma = tl.where(wide, wide_grad_log_sigma, grad_log_sigma)
        if any_tail:
            if in_table:
                tail = table_column(table_ptr, structure, False)
            else:
                tail = tail_constants(posterior)
            tail_x, tail_grad_mu, tail_grad_log_sigma = tail_log_noise(
                y, beta < 0, tail, LOWER, UPPER, in_table, False, WITH_GRADIENTS
            )
            x = tl.where(in_tail, tail_x, x)
            grad_mu = tl.where(in_tail, tail_grad_mu, grad_mu)
            grad_log_sigma = tl.where(in_tail, tail_grad_log_sigma, grad_log_sigma)
        if any_wide_tail:
            if in_table:
                wide_tail = table_column(table_ptr, structure, True)
            else:
                wide_tail = tail_constants(posterior)
            tail_x, tail_grad_mu, tail_grad_log_sigma = wide_tail_log_noise(
                y, beta < 0, wide_tail, LOWER, UPPER, in_table, WITH_GRADIENTS
            )
            both = in_tail & wide
            x = tl.where(both, tail_x, x)
            grad_mu = tl.where(both, tail_grad_mu, grad_mu)
            grad_log_sigma = tl.where(both, tail_grad_log_sigma, grad_log_sigma)
    return x, grad_mu, grad_log_sigma
