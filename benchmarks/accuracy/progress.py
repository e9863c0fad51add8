"""A progress bar on the terminal's error stream, where rich is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[], None]]:
    """Show a bar while it lasts; yields the function that advances it by a step."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield lambda: None
        return
    console = Console(stderr=True)
    # In a log file a bar would leave a line for each step.
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda: bar.advance(task)
