"""The only place that decides which implementation runs."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

from torch import Tensor

Backend = Literal["auto", "torch", "triton"]

TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads it once, when it defines the kernels, and then runs them on CPU tensors.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y", "t")


def resolve_backend(backend: Backend, tensor: Tensor) -> str:
    """Return the name of the implementation that serves ``tensor``: "torch" or "triton".

    "auto" takes Triton for GPU tensors, if it is installed, and torch elsewhere.

    Raises:
        ValueError: ``backend`` is not one of "auto", "torch" and "triton".
        RuntimeError: ``backend`` is "triton" and Triton cannot serve the tensor.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    # torch's name for CUDA and ROCm devices alike.
    on_gpu = tensor.device.type == "cuda"
    if backend == "auto":
        return "triton" if on_gpu and TRITON_IS_INSTALLED else "torch"
    if backend == "torch":
        return "torch"
    if not TRITON_IS_INSTALLED:
        raise RuntimeError(
            'backend="triton" needs Triton, which is not installed: pip install "bmrs-kernels[triton]", or use '
            'backend="torch"'
        )
    if not on_gpu and not INTERPRETING:
        raise RuntimeError(
            f'backend="triton" needs a GPU tensor, got one on {tensor.device}: move it with .to("cuda"), use '
            'backend="torch" or "auto", or start Python with TRITON_INTERPRET=1 to interpret the kernels'
        )
    return "triton"
