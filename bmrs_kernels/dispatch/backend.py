"""The only place that decides which implementation runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton", "numba"]
BACKENDS = get_args(Backend)

TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
NUMBA_IS_INSTALLED = importlib.util.find_spec("numba") is not None
# Triton reads it once, when it defines the kernels, and then runs them on CPU tensors.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y", "t")


def resolve_backend(backend: Backend, tensor: Tensor) -> str:
    """Return the name of the implementation that serves ``tensor``: "torch", "triton" or "numba".

    "auto" takes Triton for GPU tensors and numba for CPU tensors, where they are installed, and torch elsewhere. While
    torch.compile, torch.export or torch.jit trace, it stays "auto", and the operators decide where they run.

    Raises:
        ValueError: ``backend`` is not one of "auto", "torch", "triton" and "numba".
        RuntimeError: ``backend`` is "triton" or "numba" and cannot serve the tensor.
    """
    if backend == "auto" and (torch.compiler.is_compiling() or torch._C._is_tracing()):
        return backend
    return running_backend(backend, tensor)


def running_backend(backend: str, tensor: Tensor) -> str:
    """Return what `resolve_backend` does, now: for the operators, which nothing traces."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    # torch's name for CUDA and ROCm devices alike.
    on_gpu = tensor.device.type == "cuda"
    on_cpu = tensor.device.type == "cpu"
    if backend == "auto":
        if on_gpu:
            return "triton" if TRITON_IS_INSTALLED else "torch"
        return "numba" if on_cpu and numba_is_usable() else "torch"
    if backend == "torch":
        return "torch"
    if backend == "numba":
        if not NUMBA_IS_INSTALLED:
            raise RuntimeError(
                'backend="numba" needs numba, which is not installed: pip install numba, or use '
                'backend="torch"'
            )
        if not on_cpu:
            raise RuntimeError(
                f'backend="numba" needs a CPU tensor, got one on {tensor.device}: move it with .to("cpu"), or use '
                'backend="auto"'
            )
        # An import cannot be traced: the operators look where they run.
        if not torch.compiler.is_compiling() and (fault := _numba_fault()):
            raise RuntimeError(
                f'backend="numba" needs a numba that compiles, but {fault}: mend that, or use backend="torch"'
            )
        return "numba"
    if not TRITON_IS_INSTALLED:
        raise RuntimeError(
            'backend="triton" needs Triton, which is not installed: pip install triton, or use '
            'backend="torch"'
        )
    if not on_gpu and not INTERPRETING:
        raise RuntimeError(
            f'backend="triton" needs a GPU tensor, got one on {tensor.device}: move it with .to("cuda"), use '
            'backend="torch" or "auto", or start Python with TRITON_INTERPRET=1 to interpret the kernels'
        )
    return "triton"


def numba_is_usable() -> bool:
    """Return whether numba is installed and can compile the loops."""
    return NUMBA_IS_INSTALLED and _numba_compiles()


@functools.cache
def _numba_compiles() -> bool:
    """Return whether the loops can be compiled, and warn if not."""
    fault = _numba_fault()
    if fault is not None:
        warnings.warn(
            f"numba is installed but cannot be used, so that CPU tensors take torch: {fault}", stacklevel=2
        )
    return fault is None


@functools.cache
def _numba_fault() -> str | None:
    """Return why the loops cannot be compiled, None if they can: some versions of numba refuse a newer NumPy."""
    try:
        importlib.import_module("bmrs_kernels.dispatch.numba_memory")
        if importlib.import_module("numba").config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
    # A library that cannot be loaded raises OSError; other mismatches raise many kinds of errors.
    except Exception as error:
        return str(error)
    return None
