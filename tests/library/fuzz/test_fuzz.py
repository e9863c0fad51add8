"""The fuzzer for a few seconds, always with the same cases; BMRS_FUZZ_SECONDS has it go on for longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).with_name("fuzz.py")


@pytest.mark.slow
def test_nothing_that_is_changed_at_random_breaks_anything(tmp_path):
    seconds = float(os.environ.get("BMRS_FUZZ_SECONDS", "4"))
    last_case = tmp_path / "last"
    # In a process of its own, whose memory is bounded, and which may die.
    done = subprocess.run(
        [sys.executable, FUZZER, f"--seconds={seconds}", f"--last-case={last_case}"],
        capture_output=True,
        text=True,
        timeout=seconds + 300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    case = last_case.read_text() if last_case.exists() else "none"
    assert done.returncode in (0, 1), f"died of {done.returncode} in case {case}:\n{done.stderr[-2000:]}"
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    cases = int(done.stdout.split(" cases")[0].split()[-1])
    assert cases >= 8, "not one case for each target"
