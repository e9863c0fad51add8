"""Memory inside of compiled loops: by address, without reference counts, and in the dtype that a number has.

A loop that is compiled for float32 and for float64 takes a number of that type; ``vector_like`` and its kind decide
by it what to compile.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from bmrs_kernels.dispatch.numba_compile import compiled


@intrinsic
def _pointer(typing_context, address):
    """Return an address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@compiled
def vector_at(address, size, dtype):
    """Return the memory at an address, which a tensor's ``data_ptr`` gives with less ado than its ``numpy``."""
    return numba.carray(_pointer(address), (size,), dtype)


INLINED: Any = {"forceinline": True, "error_model": "numpy"}


def dtype_of(number: types.Type) -> type:
    """Return the NumPy type of a float32 or float64 argument, while numba decides what to compile."""
    return np.float32 if number == types.float32 else np.float64


def vector_like(address: int, size: int, number: float) -> np.ndarray:
    """Return the memory at an address as a vector of the type of ``number``; in compiled code only."""
    raise NotImplementedError("vector_like is compiled by numba and cannot be called from Python")


@overload(vector_like, jit_options=INLINED)
def _(address, size, number):
    dtype = dtype_of(number)
    return lambda address, size, number: vector_at(address, size, dtype)


def zeros_like_number(shape: tuple[int, ...], number: float) -> np.ndarray:
    """Return zeros of the type of ``number``; in compiled code only."""
    raise NotImplementedError("zeros_like_number is compiled by numba and cannot be called from Python")


@overload(zeros_like_number, jit_options=INLINED)
def _(shape, number):
    dtype = dtype_of(number)
    return lambda shape, number: np.zeros(shape, dtype)


def cast_like(value: float, number: float) -> float:
    """Return a value in the type of ``number``; in compiled code only."""
    raise NotImplementedError("cast_like is compiled by numba and cannot be called from Python")


@overload(cast_like, jit_options=INLINED)
def _(value, number):
    dtype = dtype_of(number)
    return lambda value, number: dtype(value)


@compiled
def unmanaged(array):
    """Return an array's memory without its reference count, which costs more to update than a short loop takes.

    The array has to be used again after the last use of the memory.
    """
    return numba.carray(_pointer(array.ctypes.data), array.shape, array.dtype)


@intrinsic
def use_widest_vectors(typing_context):
    """Have LLVM take 512-bit vectors in the function that calls this, where there are any.

    By default it takes half as wide ones on such processors, for the sake of code around that uses none. On a Cascade
    Lake Xeon the loops over noise run 1.7 times as fast.
    """

    def generate(context, builder, signature, arguments):
        # llvmlite checks names against a list that lacks this attribute.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate
