"""Ranges of work on several threads."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from bmrs_kernels.dispatch import numba_threads
from bmrs_kernels.dispatch.numba_threads import in_threads

LONG = 1.0  # second: enough work for every thread


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["OpenMP", "Python's own"])
def threads(request, monkeypatch):
    if request.param == "OpenMP":
        assert numba_threads._openmp() is not None or sys.platform != "linux"
    else:
        monkeypatch.setattr(numba_threads, "_openmp", lambda: None)
    return request.param


def ranges_of(count, seconds):
    """Return the ranges that were called, in order."""
    found = []
    in_threads(lambda first, last: found.append((first, last)), count, seconds=seconds)
    return sorted(part for part in found if part != (0, 0))


def test_every_part_is_done_once(threads):
    for count in (1, 2, 3, 10, 1000):
        found = ranges_of(count, LONG)
        assert [part for first, last in found for part in range(first, last)] == list(range(count))
        assert len(found) == min(count, 3)


def test_short_work_stays_with_the_caller():
    caller = threading.get_ident()
    seen = []
    in_threads(lambda first, last: seen.append((first, last, threading.get_ident())), 10, seconds=1e-6)
    assert seen == [(0, 10, caller)]


def test_a_forked_process_takes_one_thread(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert ranges_of(10, LONG) == [(0, 10)]


def test_an_error_reaches_the_caller(threads):
    def fail(first, last):
        if last == 10:
            raise FloatingPointError("part failed")

    with pytest.raises(FloatingPointError, match="part failed"):
        in_threads(fail, 10, seconds=LONG)


def test_without_openmp_there_are_pythons_threads(monkeypatch):
    def no_library(name):
        raise OSError

    numba_threads._openmp.cache_clear()
    monkeypatch.setattr(numba_threads.ctypes, "CDLL", no_library)
    try:
        assert numba_threads._openmp() is None
    finally:
        numba_threads._openmp.cache_clear()
