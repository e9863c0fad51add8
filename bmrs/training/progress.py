"""Progress of training: a live bar on a terminal, one line an epoch elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows one network's training; a context manager.

    Args:
        console: where to show it.
        title: what is trained.
        epochs: number of epochs.
        done: epochs that were finished before.
    """

    def __init__(self, console: Console, title: str, *, epochs: int, done: int) -> None:
        self._console = console
        self.title = title
        self._epochs = epochs
        self._kept = self._accuracy = ""
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("epoch"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=epochs, completed=done, status="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, *, epoch: int, step: int, steps: int, loss: float, kl: float) -> None:
        """Show a step."""
        status = f"step {step}/{steps} loss {loss:.3f} KL {kl:.3f}{self._kept}{self._accuracy}"
        self._bar.update(self._task, completed=epoch - 1 + step / steps, status=status)

    def epoch(self, row: dict[str, Any]) -> None:
        """Show a finished epoch."""
        self._accuracy = f" accuracy {row['validation_accuracy']:.1%}"
        if "kept" in row:
            self._kept = f" kept {'/'.join(map(str, row['kept'].values()))}"
            if "unsettled" in row:
                self._kept += f" unsettled {row['unsettled']:.1%}"
        if not self._console.is_terminal:
            self._console.print(
                f"{self.title}: epoch {row['epoch']}/{self._epochs} ({row['phase']}) loss {row['loss']:.3f} "
                f"KL {row['kl']:.3f}{self._kept}{self._accuracy} {row['seconds']:.1f} s",
                soft_wrap=True,
            )
