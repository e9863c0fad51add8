"""Special functions of the standard normal in pure torch, and the meaning of log σ.

float64 unless a function says otherwise; in triton_special and numba_special each has a twin of the same name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmrs_kernels.constants import HALF_LOG_2PI, LOG_SIGMA_MAX, LOG_SIGMA_MIN, SQRT2
from bmrs_kernels.truncated_normal.polynomials import (
    INVERSE_DENSITY,
    QUANTILE,
    QUANTILE_CENTRE,
    QUANTILE_SHIFT,
)


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
