"""Public functions for the moments of θ."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bmrs_kernels.constants import LOWER, UPPER
from bmrs_kernels.dispatch.backend import resolve_backend, running_backend
from bmrs_kernels.dispatch.registration import register_vmap_by_example, structure_op
from bmrs_kernels.dispatch.shards import is_sharded, on_shards_elementwise
from bmrs_kernels.dispatch.validation import check_interval, check_parameters
from bmrs_kernels.noise_moments import reference
from bmrs_kernels.options import Backend


def _implementation(backend: str) -> ModuleType:
    # Imported where they are used: Triton and numba may be missing.
    if backend == "triton":
        from bmrs_kernels.noise_moments import triton_kernels

        return triton_kernels
    if backend == "numba":
        from bmrs_kernels.noise_moments import numba_loops

        return numba_loops
    return reference


_noise_mean = structure_op(
    "noise_mean", lambda backend: _implementation(backend).noise_mean, options="float lower, float upper"
)


@torch.library.custom_op("bmrs_kernels::noise_snr", mutates_args=())
def _noise_snr(mu: Tensor, log_sigma: Tensor, lower: float, upper: float, backend: str) -> Tensor:
    return _implementation(running_backend(backend, mu)).noise_snr(mu, log_sigma, lower, upper)


@_noise_snr.register_fake
def _(mu: Tensor, log_sigma: Tensor, lower: float, upper: float, backend: str) -> Tensor:
    return mu.new_empty(mu.shape)


register_vmap_by_example(_noise_snr)


def noise_mean(
    mu: Tensor, log_sigma: Tensor, *, lower: float = LOWER, upper: float = UPPER, backend: Backend = "auto"
) -> Tensor:
    """Return E[θ], the factor by which a structure is multiplied in evaluation.

    Differentiable in μ and log σ.

    Args:
        mu: location μ of log θ, any shape, floating point.
        log_sigma: log σ, shape and dtype of ``mu``; clamped to [-20, 5], with zero gradient outside.
        lower: a, lower end of log θ.
        upper: b, upper end of log θ.
        backend: "auto", "torch", "triton" or "numba".

    Returns:
        Tensor of the shape and dtype of ``mu``, in [e^lower, e^upper].

    Raises:
        TypeError: ``mu`` or ``log_sigma`` is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, or not lower < upper.
    """
    check_parameters(mu, log_sigma)
    check_interval(lower, upper)
    return _noise_mean(mu, log_sigma, lower, upper, resolve_backend(backend, mu))


def noise_snr(
    mu: Tensor, log_sigma: Tensor, *, lower: float = LOWER, upper: float = UPPER, backend: Backend = "auto"
) -> Tensor:
    """Return the signal-to-noise ratio E[θ]/sd(θ); not differentiable.

    Args:
        mu: location μ of log θ, any shape, floating point.
        log_sigma: log σ, shape and dtype of ``mu``; clamped to [-20, 5].
        lower: a, lower end of log θ.
        upper: b, upper end of log θ.
        backend: "auto", "torch", "triton" or "numba".

    Returns:
        Tensor of the shape and dtype of ``mu``, positive, without gradient.

    Raises:
        TypeError: ``mu`` or ``log_sigma`` is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, or not lower < upper.
    """
    check_parameters(mu, log_sigma)
    check_interval(lower, upper)
    arguments = (lower, upper, resolve_backend(backend, mu))
    if is_sharded(mu) or is_sharded(log_sigma):
        return on_shards_elementwise(
            lambda *local: _noise_snr(*local, *arguments), mu=mu.detach(), log_sigma=log_sigma.detach()
        )
    snr: Tensor = _noise_snr(mu.detach(), log_sigma.detach(), *arguments)
    return snr
