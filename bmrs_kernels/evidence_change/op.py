"""Public functions for the change in log evidence, the criterion by which BMRS prunes."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from bmrs_kernels.constants import LOWER, PRIOR_STD, REDUCED_LOWER, REDUCED_UPPER, UPPER
from bmrs_kernels.dispatch.backend import resolve_backend
from bmrs_kernels.dispatch.registration import structure_op
from bmrs_kernels.dispatch.validation import (
    check_interval,
    check_parameters,
    check_reduced_interval,
    check_reduced_normal,
)
from bmrs_kernels.evidence_change import reference
from bmrs_kernels.options import Backend


def _implementation(backend: str) -> ModuleType:
    # Imported where they are used: Triton and numba may be missing.
    if backend == "triton":
        from bmrs_kernels.evidence_change import triton_kernels

        return triton_kernels
    if backend == "numba":
        from bmrs_kernels.evidence_change import numba_loops

        return numba_loops
    return reference


_delta_f_lognormal = structure_op(
    "delta_f_lognormal",
    lambda backend: _implementation(backend).delta_f_lognormal,
    options="float prior_mean, float prior_std, float lower, float upper",
)
_delta_f_loguniform = structure_op(
    "delta_f_loguniform",
    lambda backend: _implementation(backend).delta_f_loguniform,
    options="float reduced_lower, float reduced_upper, float lower, float upper",
)


def delta_f_lognormal(
    mu: Tensor,
    log_sigma: Tensor,
    *,
    prior_mean: float | None = None,
    prior_std: float = PRIOR_STD,
    lower: float = LOWER,
    upper: float = UPPER,
    backend: Backend = "auto",
) -> Tensor:
    """Return ΔF for a truncated log-normal reduced prior: BMRS_N (Eq. 8).

    The reduced prior is Normal(prior_mean, prior_std²) truncated to [lower, upper], a spike that shrinks θ to
    e^lower by default. A structure whose ΔF is at least 0 can be pruned: the evidence for the model does not fall.
    Differentiable in μ and log σ.

    Args:
        mu: location μ of log θ, any shape, floating point.
        log_sigma: log σ, shape and dtype of ``mu``; clamped to [-20, 5], with zero gradient outside.
        prior_mean: μ̃p, location of the reduced prior; ``lower`` if None.
        prior_std: σ̃p, its standard deviation before truncation.
        lower: a, lower end of log θ.
        upper: b, upper end of log θ.
        backend: "auto", "torch", "triton" or "numba".

    Returns:
        Tensor of the shape and dtype of ``mu``, in nats.

    Raises:
        TypeError: ``mu`` or ``log_sigma`` is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, not lower < upper, ``prior_std`` not positive, or a non-finite option.
    """
    check_parameters(mu, log_sigma)
    check_interval(lower, upper)
    prior_mean = lower if prior_mean is None else prior_mean
    check_reduced_normal(prior_mean, prior_std)
    return _delta_f_lognormal(
        mu, log_sigma, prior_mean, prior_std, lower, upper, resolve_backend(backend, mu)
    )


def delta_f_loguniform(
    mu: Tensor,
    log_sigma: Tensor,
    *,
    reduced_lower: float = REDUCED_LOWER,
    reduced_upper: float = REDUCED_UPPER,
    lower: float = LOWER,
    upper: float = UPPER,
    backend: Backend = "auto",
) -> Tensor:
    """Return ΔF for a log-uniform reduced prior: BMRS_U.

    The reduced prior is uniform on [reduced_lower, reduced_upper] for log θ; the defaults are BMRS_U-8, the range
    of θ that 8-bit arithmetic rounds to 0. A structure whose ΔF is at least 0 can be pruned. With
    ``reduced_lower > lower`` a posterior that sits between the two counts as one to keep; pass
    ``reduced_lower=lower`` to avoid that. Differentiable in μ and log σ.

    Args:
        mu: location μ of log θ, any shape, floating point.
        log_sigma: log σ, shape and dtype of ``mu``; clamped to [-20, 5], with zero gradient outside.
        reduced_lower: a', lower end of the reduced prior.
        reduced_upper: b', upper end of the reduced prior.
        lower: a, lower end of log θ.
        upper: b, upper end of log θ.
        backend: "auto", "torch", "triton" or "numba".

    Returns:
        Tensor of the shape and dtype of ``mu``, in nats; at most log((b-a)/(b'-a')).

    Raises:
        TypeError: ``mu`` or ``log_sigma`` is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, not lower < upper, or the reduced interval is empty or outside.
    """
    check_parameters(mu, log_sigma)
    check_interval(lower, upper)
    check_reduced_interval(reduced_lower, reduced_upper, lower, upper)
    return _delta_f_loguniform(
        mu, log_sigma, reduced_lower, reduced_upper, lower, upper, resolve_backend(backend, mu)
    )
