"""Public function for everything that a pruning decision reads about a structure."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bmrs_kernels.backend import Backend, resolve_backend
from bmrs_kernels.evidence_change.op import LN2
from bmrs_kernels.pruning_statistics import reference
from bmrs_kernels.pruning_statistics.reference import PruningStatistics
from bmrs_kernels.validation import (
    check_interval,
    check_parameters,
    check_reduced_interval,
    check_reduced_normal,
)


def _implementation(backend: str) -> ModuleType:
    # Imported where they are used: Triton and numba may be missing.
    if backend == "triton":
        from bmrs_kernels.pruning_statistics import kernels

        return kernels
    if backend == "numba":
        from bmrs_kernels.pruning_statistics import loops

        return loops
    return reference


@torch.library.custom_op("bmrs_kernels::pruning_statistics", mutates_args=())
def _pruning_statistics(
    mu: Tensor,
    log_sigma: Tensor,
    prior_mean: float,
    prior_std: float,
    reduced_lower: float,
    reduced_upper: float,
    lower: float,
    upper: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics: tuple[Tensor, Tensor, Tensor, Tensor] = _implementation(backend).pruning_statistics(
        mu, log_sigma, prior_mean, prior_std, reduced_lower, reduced_upper, lower, upper
    )
    return statistics


@_pruning_statistics.register_fake
def _(mu: Tensor, log_sigma: Tensor, *options: float | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lognormal, loguniform, mean, snr = (mu.new_empty(mu.shape) for _ in PruningStatistics._fields)
    return lognormal, loguniform, mean, snr


def pruning_statistics(
    mu: Tensor,
    log_sigma: Tensor,
    *,
    prior_mean: float | None = None,
    prior_std: float = 1e-6,
    reduced_lower: float = -23.0 * LN2,
    reduced_upper: float = -8.0 * LN2,
    lower: float = -20.0,
    upper: float = 0.0,
    backend: Backend = "auto",
) -> PruningStatistics:
    """Return ΔF for both reduced priors, E[θ] and E[θ]/sd(θ) of each structure; not differentiable.

    The results of ``delta_f_lognormal``, ``delta_f_loguniform``, ``noise_mean`` and ``noise_snr``, from one launch
    on a GPU instead of four.

    Args:
        mu: location μ of log θ, any shape, floating point.
        log_sigma: log σ, shape and dtype of ``mu``; clamped to [-20, 5].
        prior_mean: μ̃p, location of the truncated log-normal reduced prior; ``lower`` if None.
        prior_std: σ̃p, its standard deviation before truncation.
        reduced_lower: a', lower end of the log-uniform reduced prior.
        reduced_upper: b', upper end of the log-uniform reduced prior.
        lower: a, lower end of log θ.
        upper: b, upper end of log θ.
        backend: "auto", "torch", "triton" or "numba".

    Returns:
        ``delta_f_lognormal`` and ``delta_f_loguniform`` in nats, ``mean`` in [e^lower, e^upper] and the positive
        ``signal_to_noise``: tensors of the shape and dtype of ``mu``, without gradients.

    Raises:
        TypeError: ``mu`` or ``log_sigma`` is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, not lower < upper, ``prior_std`` not positive, a non-finite option, or
            the reduced interval is empty or outside.
    """
    check_parameters(mu, log_sigma)
    check_interval(lower, upper)
    prior_mean = lower if prior_mean is None else prior_mean
    check_reduced_normal(prior_mean, prior_std)
    check_reduced_interval(reduced_lower, reduced_upper, lower, upper)
    return PruningStatistics(
        *_pruning_statistics(
            mu.detach(),
            log_sigma.detach(),
            prior_mean,
            prior_std,
            reduced_lower,
            reduced_upper,
            lower,
            upper,
            resolve_backend(backend, mu),
        )
    )
