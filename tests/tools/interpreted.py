"""Programs run with Triton's interpreter, for the tests of what needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.processes import ROOT


def run_interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with Triton's interpreter on one thread; skip the test without Triton."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
