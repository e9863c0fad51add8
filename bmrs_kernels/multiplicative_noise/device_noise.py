"""log θ and its derivatives inside kernels, from uniforms and a structure's constants.

Three regimes, told apart by structure. *Inside*: the mode is inside the interval or less than TAIL_START σ outside;
float32. *Wide*: the same with σ above WIDE, which would magnify the last digit of a probability; the products with σ
are float64. *Tail*: the mode is further outside; log θ is found from the end nearest to the mode, in float32.
float64 activations take ``exact_log_noise``, which refines either to full precision.

A kernel whose program owns one structure says ``ONE_STRUCTURE`` and branches; others compute the inside regime and
replace the rest where a structure of the tile needs it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bmrs_kernels import polynomials
from bmrs_kernels.device_math import (
    HALF_LOG_2PI,
    QUANTILE_CENTRE,
    QUANTILE_SHIFT,
    float64_reciprocal,
    float64_sqrt,
    inverse_density_ratio,
    log2,
    log_sigma_in_range,
    maximum,
    mills_ratio,
    minimum,
    normal_cdf,
    normal_density,
    normal_mass,
    polynomial_of_row,
    quantile_ratio,
    quantile_variable,
    sigma_from_log,
)

TAIL_START = tl.constexpr(polynomials.TAIL_START)
TAIL_START_SQUARED = tl.constexpr(polynomials.TAIL_START**2)
TAIL_QUANTILE = tl.constexpr(polynomials.TAIL_QUANTILE)
TAIL_HAZARD = tl.constexpr(polynomials.TAIL_HAZARD)
WIDE = tl.constexpr(4.0)

LN2 = tl.constexpr(0.6931471805599453)
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
def posterior_constants(mu, log_sigma, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """Return the float64 constants (μ, σ, α, β, Φ(α), 1-Φ(β), Φ(β)-Φ(α), φ(α), φ(β), is log σ in range)."""
    mu, log_sigma = mu.to(tl.float64), log_sigma.to(tl.float64)
    sigma = sigma_from_log(log_sigma)
    alpha, beta = -(mu - LOWER) / sigma, -(mu - UPPER) / sigma
    return (
        mu,
        sigma,
        alpha,
        beta,
        normal_cdf(alpha),
        normal_cdf(-beta),
        normal_mass(alpha, beta),
        normal_density(alpha),
        normal_density(beta),
        log_sigma_in_range(log_sigma),
    )


@triton.jit
def tail_constants(sigma, alpha, beta):
    """Return the constants of the tail regime in float64; meaningful where the mode is TAIL_START σ outside.

    (distance D from μ to the nearest end, ε = σ²/D², far survival R = S(far end)/S(near end), h(far)/h(near) - 1 for
    the hazard h), and the coefficients of the two polynomials, ``TAIL_QUANTILE`` and ``TAIL_HAZARD`` at ε.
    """
    near = maximum(maximum(alpha, -beta), TAIL_START)
    width = beta - alpha
    epsilon = 1.0 / (near * near)
    near_mills, far_mills = mills_ratio(near), mills_ratio(near + width)
    far_survival = tl.exp(-width * (near + 0.5 * width)) * (far_mills / near_mills)
    variable = epsilon * TAIL_START_SQUARED
    return (
        (near * sigma, epsilon, far_survival, near_mills / far_mills - 1.0),
        (
            polynomial_of_row(variable, TAIL_QUANTILE, 0),
            polynomial_of_row(variable, TAIL_QUANTILE, 1),
            polynomial_of_row(variable, TAIL_QUANTILE, 2),
            polynomial_of_row(variable, TAIL_QUANTILE, 3),
            polynomial_of_row(variable, TAIL_QUANTILE, 4),
            polynomial_of_row(variable, TAIL_QUANTILE, 5),
            polynomial_of_row(variable, TAIL_QUANTILE, 6),
            polynomial_of_row(variable, TAIL_QUANTILE, 7),
        ),
        (
            polynomial_of_row(variable, TAIL_HAZARD, 0),
            polynomial_of_row(variable, TAIL_HAZARD, 1),
            polynomial_of_row(variable, TAIL_HAZARD, 2),
            polynomial_of_row(variable, TAIL_HAZARD, 3),
            polynomial_of_row(variable, TAIL_HAZARD, 4),
            polynomial_of_row(variable, TAIL_HAZARD, 5),
            polynomial_of_row(variable, TAIL_HAZARD, 6),
            polynomial_of_row(variable, TAIL_HAZARD, 7),
            polynomial_of_row(variable, TAIL_HAZARD, 8),
            polynomial_of_row(variable, TAIL_HAZARD, 9),
        ),
    )


@triton.jit
def inside_log_noise(y, posterior, LOWER: tl.constexpr, UPPER: tl.constexpr, WITH_GRADIENTS: tl.constexpr):
    """Return x = log θ, dx/dμ and dx/dlog σ at float32 uniforms where the mode is inside or not far outside.

    z = Φ⁻¹(Φ(α) + y Z) from both tail probabilities, which are carried doubled. Without gradients the last two are x.
    """
    mu, sigma, _, _, below, above, mass, lower_density, upper_density, _ = posterior
    complement = 1.0 - y
    doubled_mass = (2.0 * mass).to(tl.float32)
    doubled_below = (2.0 * below).to(tl.float32) + doubled_mass * y
    doubled_above = (2.0 * above).to(tl.float32) + doubled_mass * complement
    product = doubled_below * doubled_above + SMALLEST_PRODUCT
    variable = quantile_variable(product)
    z = (doubled_below - doubled_above) * quantile_ratio(variable)
    offset = sigma.to(tl.float32) * z
    x = mu.to(tl.float32) + offset
    x = minimum(maximum(x, LOWER), UPPER)
    if WITH_GRADIENTS:
        inverse_density = inverse_density_ratio(variable) / product
        near_lower = complement * inverse_density * lower_density.to(tl.float32)
        near_upper = y * inverse_density * upper_density.to(tl.float32)
        grad_log_sigma = offset + (mu - LOWER).to(tl.float32) * near_lower
        grad_log_sigma += (mu - UPPER).to(tl.float32) * near_upper
        return x, 1.0 - near_lower - near_upper, grad_log_sigma
    return x, x, x


@triton.jit
def wide_log_noise(y, posterior, LOWER: tl.constexpr, UPPER: tl.constexpr, WITH_GRADIENTS: tl.constexpr):
    """Return what ``inside_log_noise`` does where σ is large: the difference of the tails is taken in float64."""
    mu, sigma, _, _, below, above, mass, lower_density, upper_density, _ = posterior
    y = y.to(tl.float64)
    p, q = below + mass * y, above + mass * (1.0 - y)
    product = 4.0 * p * q + SMALLEST_PRODUCT
    level = -log2(product.to(tl.float32)).to(tl.float64)
    variable = float64_sqrt(level + QUANTILE_SHIFT) - QUANTILE_CENTRE
    offset = sigma * (2.0 * (p - q)) * quantile_ratio(variable)
    x = (mu + offset).to(tl.float32)
    x = minimum(maximum(x, LOWER), UPPER)
    if WITH_GRADIENTS:
        inverse_density = inverse_density_ratio(variable) * float64_reciprocal(product)
        near_lower = (1.0 - y) * inverse_density * lower_density
        near_upper = y * inverse_density * upper_density
        grad_log_sigma = offset + (mu - LOWER) * near_lower + (mu - UPPER) * near_upper
        return x, (1.0 - near_lower - near_upper).to(tl.float32), grad_log_sigma.to(tl.float32)
    return x, x, x


@triton.jit
def tail_log_noise(
    y,
    beta,
    tail,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    IN_FLOAT64: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Return what ``inside_log_noise`` does where the mode is far outside, from the end nearest to it.

    The survival at the quantile, relative to that end's, is m = 1 - y + y R; the quantile follows from log m.
    IN_FLOAT64 is for wide structures, and takes only the logarithm in float32.
    """
    real: tl.constexpr = tl.float64 if IN_FLOAT64 else tl.float32
    scalars, quantile, hazard = tail
    distance, epsilon, far_survival, hazard_gain = scalars
    distance, far_survival = distance.to(real), far_survival.to(real)
    y = y.to(real)
    # A mode above the interval is reflected to below, which exchanges y and 1 - y.
    reflected = beta < 0
    y, complement = tl.where(reflected, 1.0 - y, y), tl.where(reflected, y, 1.0 - y)
    survival = complement + y * far_survival
    # 1 + 2 ε l for l = -log m
    square = 1.0 - (2.0 * epsilon * LN2).to(real) * log2(survival.to(tl.float32)).to(real)
    u = (float64_sqrt(square) if IN_FLOAT64 else tl.sqrt(square)) - 1.0
    k0, k1, k2, k3, k4, k5, k6, k7 = quantile
    value = k7.to(real) * u + k6.to(real)
    value = value * u + k5.to(real)
    value = value * u + k4.to(real)
    value = value * u + k3.to(real)
    value = value * u + k2.to(real)
    value = value * u + k1.to(real)
    value = value * u + k0.to(real)
    step = distance * (value * u)
    x = tl.where(reflected, -step + UPPER, step + LOWER).to(tl.float32)
    x = minimum(maximum(x, LOWER), UPPER)
    if WITH_GRADIENTS:
        h0, h1, h2, h3, h4, h5, h6, h7, h8, h9 = hazard
        value = h9.to(real) * u + h8.to(real)
        value = value * u + h7.to(real)
        value = value * u + h6.to(real)
        value = value * u + h5.to(real)
        value = value * u + h4.to(real)
        value = value * u + h3.to(real)
        value = value * u + h2.to(real)
        value = value * u + h1.to(real)
        value = value * u + h0.to(real)
        one_less_ratio = value * u  # 1 - h(near end)/h(quantile)
        if IN_FLOAT64:
            far_share = y * far_survival * float64_reciprocal(survival)
        else:
            far_share = y * far_survival / survival
        share = (1.0 - one_less_ratio) * far_share
        gain = share * hazard_gain.to(real)
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
    mu, sigma, alpha, beta, below, above, mass, _, _, _ = posterior
    y = y.to(tl.float64)
    complement = 1.0 - y
    p, q = below + mass * y, above + mass * complement
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
def structure_log_noise(
    y,
    posterior,
    table_ptr,
    structure,
    num_structures,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    EXACT: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Return log θ and its derivatives at the uniforms of one structure, in the regime that it is in."""
    if EXACT:
        x, grad_mu, grad_log_sigma = exact_log_noise(y, posterior, LOWER, UPPER, WITH_GRADIENTS)
    else:
        _, sigma, alpha, beta, _, _, _, _, _, _ = posterior
        if tl.maximum(alpha, -beta) >= TAIL_START:
            tail = load_tail(table_ptr, structure, num_structures)
            if sigma > WIDE:
                x, grad_mu, grad_log_sigma = tail_log_noise(y, beta, tail, LOWER, UPPER, True, WITH_GRADIENTS)
            else:
                x, grad_mu, grad_log_sigma = tail_log_noise(
                    y, beta, tail, LOWER, UPPER, False, WITH_GRADIENTS
                )
        elif sigma > WIDE:
            x, grad_mu, grad_log_sigma = wide_log_noise(y, posterior, LOWER, UPPER, WITH_GRADIENTS)
        else:
            x, grad_mu, grad_log_sigma = inside_log_noise(y, posterior, LOWER, UPPER, WITH_GRADIENTS)
    return x, grad_mu, grad_log_sigma


@triton.jit
def tile_log_noise(
    y,
    posterior,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    EXACT: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):
    """Return log θ and its derivatives at uniforms of several structures, whose constants broadcast with them."""
    if EXACT:
        x, grad_mu, grad_log_sigma = exact_log_noise(y, posterior, LOWER, UPPER, WITH_GRADIENTS)
    else:
        _, sigma, alpha, beta, _, _, _, _, _, _ = posterior
        x, grad_mu, grad_log_sigma = inside_log_noise(y, posterior, LOWER, UPPER, WITH_GRADIENTS)
        wide = sigma > WIDE
        if tl.max(wide.to(tl.int32)) > 0:
            wide_x, wide_grad_mu, wide_grad_log_sigma = wide_log_noise(
                y, posterior, LOWER, UPPER, WITH_GRADIENTS
            )
            x = tl.where(wide, wide_x, x)
            grad_mu = tl.where(wide, wide_grad_mu, grad_mu)
            grad_log_sigma = tl.where(wide, wide_grad_log_sigma, grad_log_sigma)
        in_tail = tl.maximum(alpha, -beta) >= TAIL_START
        if tl.max(in_tail.to(tl.int32)) > 0:
            tail = tail_constants(sigma, alpha, beta)
            tail_x, tail_grad_mu, tail_grad_log_sigma = tail_log_noise(
                y, beta, tail, LOWER, UPPER, False, WITH_GRADIENTS
            )
            if tl.max((in_tail & wide).to(tl.int32)) > 0:
                wide_x, wide_grad_mu, wide_grad_log_sigma = tail_log_noise(
                    y, beta, tail, LOWER, UPPER, True, WITH_GRADIENTS
                )
                tail_x = tl.where(wide, wide_x, tail_x)
                tail_grad_mu = tl.where(wide, wide_grad_mu, tail_grad_mu)
                tail_grad_log_sigma = tl.where(wide, wide_grad_log_sigma, tail_grad_log_sigma)
            x = tl.where(in_tail, tail_x, x)
            grad_mu = tl.where(in_tail, tail_grad_mu, grad_mu)
            grad_log_sigma = tl.where(in_tail, tail_grad_log_sigma, grad_log_sigma)
    return x, grad_mu, grad_log_sigma


# The constants of all structures as a float64 table [NUM_CONSTANTS, structures].
NUM_CONSTANTS = 32
FIRST_OF_TAIL, FIRST_OF_QUANTILE, FIRST_OF_HAZARD = tl.constexpr(10), tl.constexpr(14), tl.constexpr(22)


@triton.jit
def store_constants(table_ptr, structure, num_structures, posterior, tail, valid):
    """Write the constants of structures into the table."""
    column_ptr = table_ptr + structure
    scalars, quantile, hazard = tail
    for index in tl.static_range(10):
        tl.store(column_ptr + index * num_structures, posterior[index], mask=valid)
    for index in tl.static_range(4):
        tl.store(column_ptr + (FIRST_OF_TAIL + index) * num_structures, scalars[index], mask=valid)
    for index in tl.static_range(8):
        tl.store(column_ptr + (FIRST_OF_QUANTILE + index) * num_structures, quantile[index], mask=valid)
    for index in tl.static_range(10):
        tl.store(column_ptr + (FIRST_OF_HAZARD + index) * num_structures, hazard[index], mask=valid)


@triton.jit
def load_posterior(table_ptr, structure, num_structures):
    """Read what ``posterior_constants`` returned."""
    column_ptr = table_ptr + structure
    return (
        tl.load(column_ptr),
        tl.load(column_ptr + num_structures),
        tl.load(column_ptr + 2 * num_structures),
        tl.load(column_ptr + 3 * num_structures),
        tl.load(column_ptr + 4 * num_structures),
        tl.load(column_ptr + 5 * num_structures),
        tl.load(column_ptr + 6 * num_structures),
        tl.load(column_ptr + 7 * num_structures),
        tl.load(column_ptr + 8 * num_structures),
        tl.load(column_ptr + 9 * num_structures),
    )


@triton.jit
def load_tail(table_ptr, structure, num_structures):
    """Read what ``tail_constants`` returned."""
    scalar_ptr = table_ptr + structure + FIRST_OF_TAIL * num_structures
    quantile_ptr = table_ptr + structure + FIRST_OF_QUANTILE * num_structures
    hazard_ptr = table_ptr + structure + FIRST_OF_HAZARD * num_structures
    return (
        (
            tl.load(scalar_ptr),
            tl.load(scalar_ptr + num_structures),
            tl.load(scalar_ptr + 2 * num_structures),
            tl.load(scalar_ptr + 3 * num_structures),
        ),
        (
            tl.load(quantile_ptr),
            tl.load(quantile_ptr + num_structures),
            tl.load(quantile_ptr + 2 * num_structures),
            tl.load(quantile_ptr + 3 * num_structures),
            tl.load(quantile_ptr + 4 * num_structures),
            tl.load(quantile_ptr + 5 * num_structures),
            tl.load(quantile_ptr + 6 * num_structures),
            tl.load(quantile_ptr + 7 * num_structures),
        ),
        (
            tl.load(hazard_ptr),
            tl.load(hazard_ptr + num_structures),
            tl.load(hazard_ptr + 2 * num_structures),
            tl.load(hazard_ptr + 3 * num_structures),
            tl.load(hazard_ptr + 4 * num_structures),
            tl.load(hazard_ptr + 5 * num_structures),
            tl.load(hazard_ptr + 6 * num_structures),
            tl.load(hazard_ptr + 7 * num_structures),
            tl.load(hazard_ptr + 8 * num_structures),
            tl.load(hazard_ptr + 9 * num_structures),
        ),
    )
