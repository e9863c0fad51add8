"""Progress of training: a live bar on a terminal, one line an epoch elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

_WIDE = 100  # columns from which on there is room for a bar


class TrainingProgress:
    """Shows one network's training; a context manager.

    Where there is little room, what a step came to is cut off first; what is trained, the epoch and the time left stay.

    Args:
        console: where to show it.
        title: what is trained.
        epochs: number of epochs.
        done: epochs that were finished before.
        before_the_first_step: what to say until the first step is done, if that takes long.
    """

    def __init__(
        self, console: Console, title: str, *, epochs: int, done: int, before_the_first_step: str = ""
    ) -> None:
        self._console = console
        self.title = title
        self._epochs = epochs
        self._kept = self._accuracy = ""
        # A dumb terminal cannot move its cursor back.
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        columns: list[ProgressColumn] = [
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            TextColumn("epoch", table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[status]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
        ]
        if console.width >= _WIDE:
            columns.insert(1, BarColumn(bar_width=24))
        self._bar = Progress(*columns, console=console, disable=not self._is_live, expand=True)
        self._task = self._bar.add_task(title, total=epochs, completed=done, status=before_the_first_step)
        if before_the_first_step and not self._is_live and done < epochs:
            console.print(f"{title}: {before_the_first_step}", soft_wrap=True, markup=False)

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
        if not self._is_live:
            self._console.print(
                f"{self.title}: epoch {row['epoch']}/{self._epochs} ({row['phase']}) loss {row['loss']:.3f} "
                f"KL {row['kl']:.3f}{self._kept}{self._accuracy} {row['seconds']:.1f} s",
                soft_wrap=True,
                markup=False,
            )


class ReadingProgress:
    """Shows how many image files have been read, once there are any to read; a context manager."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._shown = False

    def __enter__(self) -> ReadingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that so many files have been read."""
        console = self._console
        if console is None:
            return
        if not self._shown:
            self._shown = True
            line = f"reading {total:,} image files; the next run finds them in the cache"
            console.print(line, soft_wrap=True)
            if console.is_terminal and not console.is_dumb_terminal:
                self._bar = Progress(console=console, transient=True)
                self._bar.add_task("reading", total=total)
                self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
