"""What is said where a run stops before its end."""

from __future__ import annotations

import shlex
from pathlib import Path


class InterruptedRunError(Exception):
    """Training was interrupted by the user; `path` is the run's folder, from which it can be resumed."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"interrupted; continue with: {command_to_resume(path)}")
        self.path = path


def command_to_resume(path: Path) -> str:
    """Return the command that brings a run to its end, as a shell takes it."""
    return f"bmrs train --resume {shlex.quote(str(path))}"
