"""Compiled loops on several threads: they hold no interpreter lock, so that Python's own threads do."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# What handing over a part takes, with room to spare.
WORTH_A_THREAD = 50e-6


def in_threads(call: Callable[[int, int], None], count: int, *, seconds: float) -> None:
    """Call ``call(first, last)`` for ranges that make up ``range(count)``, on up to torch's number of threads.

    Args:
        call: does the work of a range; ranges do not depend on each other.
        count: how many parts the work has.
        seconds: about how long all of it takes one thread; short work is not worth a second one.
    """
    threads = max(1, min(torch.get_num_threads(), count, int(seconds / WORTH_A_THREAD)))
    bounds = [count * part // threads for part in range(threads + 1)]
    if threads == 1:
        call(0, count)
        return
    pool = _pool(os.getpid())
    others = [pool.submit(call, first, last) for first, last in itertools.pairwise(bounds[1:])]
    call(0, bounds[1])
    for other in others:
        other.result()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process: after a fork those of the parent are gone."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="bmrs_kernels")
