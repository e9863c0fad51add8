"""Other processes: programs with a time limit, and workers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
_running: set[subprocess.Popen[str]] = set()


class Finished(NamedTuple):
    """How a program ended, and what it printed."""

    returncode: int | None  # None if it was stopped at its limit
    output: str

    def tail(self, characters: int = 4000) -> str:
        """Return the end of the output."""
        return self.output[-characters:]

    def problems(self) -> list[str]:
        """Return why the program did not end well: one line, or none."""
        if self.returncode == 0:
            return []
        lines = [line for line in self.output.splitlines() if line.strip()]
        ending = "out of time" if self.returncode is None else f"exit code {self.returncode}"
        return [f"{ending}; last line: {lines[-1].strip() if lines else 'none'}"]


def run(
    command: Sequence[str],
    limit_s: float,
    *,
    cwd: Path,
    settings: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
) -> Finished:
    """Run a program and the processes that it starts for at most so many seconds.

    Args:
        command: program and arguments.
        limit_s: time limit.
        cwd: folder to run in.
        settings: environment variables to add.
        without: environment variables to leave out.
    """
    environment = {name: value for name, value in os.environ.items() if name not in without}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment | dict(settings or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _running.add(process)
    try:
        output, _ = process.communicate(timeout=max(0.0, limit_s))
        return Finished(process.returncode, output)
    except subprocess.TimeoutExpired:
        _stop(process)
        output, _ = process.communicate()
        return Finished(None, output)
    finally:
        _running.discard(process)


def stop_all() -> None:
    """Stop the programs that are still running."""
    for process in list(_running):
        _stop(process)


@contextlib.contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Provide processes of one thread each; if the block is left by an exception, what has not begun is dropped.

    They are spawned, since a process that has used several threads or a GPU cannot safely be forked.
    """
    spawning = get_context("spawn")
    with ProcessPoolExecutor(count, spawning, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
