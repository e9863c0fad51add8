"""Compiled loops on several threads, torch's own where these are GNU OpenMP's.

After each of torch's parallel operations its threads wait busily for the next one. Other threads would have to share
the cores with them, and loops that come between two such operations would take longer on two threads than on one.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

# Handing over a part takes some 20 µs, mostly for the interpreter's lock, which each thread needs at its start.
WORTH_A_THREAD = 60e-6

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_importing_process = os.getpid()


def in_threads(call: Callable[[int, int], None], count: int, *, seconds: float) -> None:
    """Call ``call(first, last)`` for ranges that make up ``range(count)``, on up to torch's number of threads.

    Args:
        call: does the work of a range without the interpreter's lock; ranges do not depend on each other.
        count: how many parts the work has.
        seconds: about how long all of it takes one thread; short work is not worth a second one.
    """
    threads = max(1, min(torch.get_num_threads(), count, int(seconds / WORTH_A_THREAD)))
    # After a fork torch's threads are gone, and waiting for them would not end.
    if threads == 1 or os.getpid() != _importing_process:
        call(0, count)
        return
    bounds = [count * part // threads for part in range(threads + 1)]
    ranges = list(itertools.pairwise(bounds))
    call(0, 0)  # compiles what is called for the first time: other threads may lack the stack for it
    openmp = _openmp()
    if openmp is None:
        list(_pool().map(lambda part: call(*part), ranges))
    else:
        _in_openmp_threads(openmp, call, ranges)


def _in_openmp_threads(
    openmp: ctypes.CDLL, call: Callable[[int, int], None], ranges: list[tuple[int, int]]
) -> None:
    # A team may be smaller than asked for: who is free takes the next range.
    remaining = iter(ranges)
    errors: list[BaseException] = []

    def body(_: Any) -> None:
        try:
            for part in remaining:
                call(*part)
        except BaseException as error:  # it cannot pass through OpenMP
            errors.append(error)

    openmp.GOMP_parallel(_Body(body), None, len(ranges), 0)
    if errors:
        raise errors[0]
    # An interrupt at the very start of a thread's part is lost, and the part with it.
    body(None)
    if errors:
        raise errors[0]


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch has loaded for everybody, if it is GNU's or behaves as it."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        library = ctypes.CDLL(None)
        library.GOMP_parallel.argtypes = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (AttributeError, OSError, TypeError):  # not on every system
        return None
    return library


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="bmrs_kernels")
