"""Compiled loops on disk."""

from __future__ import annotations

import numba

from bmrs_kernels.dispatch import numba_compile
from bmrs_kernels.multiplicative_noise import numba_loops


def test_a_change_of_any_source_is_noticed(monkeypatch):
    cache = numba_loops.sum_loop._cache
    signature = numba_loops.sum_loop.signatures[0] if numba_loops.sum_loop.signatures else ()
    generator = numba.core.registry.cpu_target.target_context.codegen()
    before = cache._index_key(signature, generator)
    assert cache._index_key(signature, generator) == before
    monkeypatch.setattr(numba_compile, "_fingerprint", lambda: "other sources")
    assert cache._index_key(signature, generator) != before


def test_without_a_folder_loops_are_compiled_all_the_same(monkeypatch):
    def no_folder(function):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba_compile, "_Cache", no_folder)
    doubled = numba_compile.loop(lambda x: x + x)
    assert doubled(21) == 42
