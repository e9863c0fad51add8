from __future__ import annotations

import pytest

from bmrs_kernels.dispatch import backend


@pytest.fixture
def no_kernel_starts(monkeypatch):
    """CPU tensors reach the kernels, none of which runs: what would have been written is left as it is."""
    triton = pytest.importorskip("triton")
    if backend.INTERPRETING:
        pytest.skip("the interpreter has other kernels")
    monkeypatch.setattr(backend, "INTERPRETING", True)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)
