"""Programs that benchmarks start: their limits, their environment and what they leave."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

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


def test_workers_are_spawned_with_one_thread_each():
    with processes.workers(2) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert pool.submit(os.getpid).result() != os.getpid()


def test_workers_drop_what_has_not_begun_when_the_block_fails(tmp_path):
    def fail() -> None:
        with processes.workers(1) as pool:
            pool.submit(time.sleep, 0.5)
            left = [pool.submit(Path(tmp_path, str(number)).touch) for number in range(20)]
            # Of these a few are already handed to the process.
            raise KeyboardInterrupt(left)

    with pytest.raises(KeyboardInterrupt) as stopped:
        fail()
    assert sum(future.cancelled() for future in stopped.value.args[0]) > 10
