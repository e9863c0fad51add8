"""Public function for the KL divergence between noise posterior and prior."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from bmrs_kernels.constants import LOWER, UPPER
from bmrs_kernels.dispatch.backend import resolve_backend
from bmrs_kernels.dispatch.registration import structure_op
from bmrs_kernels.dispatch.validation import check_interval, check_parameters
from bmrs_kernels.log_uniform_kl import reference
from bmrs_kernels.options import Backend


def _implementation(backend: str) -> ModuleType:
    # Imported where they are used: Triton and numba may be missing.
    if backend == "triton":
        from bmrs_kernels.log_uniform_kl import triton_kernels

        return triton_kernels
    if backend == "numba":
        from bmrs_kernels.log_uniform_kl import numba_loops

        return numba_loops
    return reference


_kl_divergence = structure_op(
    "kl_divergence",
    lambda backend: _implementation(backend).kl_divergence,
    options="float lower, float upper",
)


def kl_divergence(
    mu: Tensor, log_sigma: Tensor, *, lower: float = LOWER, upper: float = UPPER, backend: Backend = "auto"
) -> Tensor:
    """Return KL(q‖p) of each structure's noise posterior from its log-uniform prior (Eq. 3).

    q is Normal(μ, σ²) truncated to [lower, upper], p uniform on [lower, upper], both for log θ. Differentiable in
    μ and log σ.

    Args:
        mu: location μ of log θ, any shape, floating point.
        log_sigma: log σ, shape and dtype of ``mu``; clamped to [-20, 5], with zero gradient outside.
        lower: a, lower end of log θ.
        upper: b, upper end of log θ.
        backend: "auto", "torch", "triton" or "numba".

    Returns:
        Tensor of the shape and dtype of ``mu``: non-negative, in nats.

    Raises:
        TypeError: ``mu`` or ``log_sigma`` is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, or not lower < upper.
    """
    check_parameters(mu, log_sigma)
    check_interval(lower, upper)
    return _kl_divergence(mu, log_sigma, lower, upper, resolve_backend(backend, mu))
