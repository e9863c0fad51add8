"""Programs that benchmarks start: their limits, their environment and what they leave."""

from __future__ import annotations

import sys

from benchmarks import processes


def test_programs_are_stopped_at_their_limit(tmp_path):
    program = "import os, time; print(os.environ['A'], os.environ.get('B'), flush=True); time.sleep(60)"
    finished = processes.run(
        [sys.executable, "-c", program], 2.0, cwd=tmp_path, settings={"A": "set", "B": "set"}
    )
    assert finished == processes.Finished(None, "set set\n")
    done = processes.run([sys.executable, "-c", "raise SystemExit(3)"], 60.0, cwd=tmp_path, without=("PATH",))
    assert done == processes.Finished(3, "")
    assert finished.problems() == ["out of time; last line: set set"]
    assert done.problems() == ["exit code 3; last line: none"]
    assert processes.Finished(0, "words\n").problems() == []
