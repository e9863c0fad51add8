"""The only place that decides which implementation runs."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Backend = Literal["auto", "torch", "triton"]


def resolve_backend(backend: Backend, tensor: Tensor) -> str:
    """Return the name of the implementation that serves ``tensor``.

    Raises:
        ValueError: ``backend`` is not one of "auto", "torch" and "triton".
        RuntimeError: ``backend`` is named and cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if backend == "triton":
        raise RuntimeError('backend="triton" is not available in this version; use backend="torch" or "auto"')
    return "torch"
