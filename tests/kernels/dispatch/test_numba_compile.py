"""Compiled loops on disk."""

from __future__ import annotations

import errno

import numba
import pytest

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


def doubled(x):
    return x + x


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where compiled loops are kept, with one in it."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert numba_compile.loop(doubled)(21) == 42
    return tmp_path


@pytest.mark.parametrize("damaged", ["nbi", "nbc"])
def test_damaged_files_are_replaced(folder, damaged):
    (path,) = folder.rglob(f"*.{damaged}")
    path.write_bytes(path.read_bytes()[:50] + bytes(50))
    loop = numba_compile.loop(doubled)
    with pytest.warns(
        RuntimeWarning, match=r"cannot be read \(\w+\) and are compiled anew; make room"
    ) as warned:
        assert loop(21) == 42
    assert str(folder) in str(warned[0].message)
    again = numba_compile.loop(doubled)
    assert again(21) == 42
    assert sum(again.stats.cache_hits.values()) == 1


def test_a_full_disk_ends_nothing(folder, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", f"file of {arguments[0]}")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_save_data", full)
    loop = numba_compile.loop(doubled)
    with pytest.warns(
        RuntimeWarning, match=r"cannot be written \(No space left on device\) and are compiled"
    ):
        assert loop(21.5) == 43
