"""`bmrs compare RUN ...`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from bmrs.training.options import checked_texts

HELP = "a table and a picture of several finished runs"
_DESCRIPTION = """\
Show the dense and the compacted network of several finished runs beside each other: accuracy, NLL and calibration
error, parameters, FLOPs and latency, from their summaries. Nothing is measured anew. A run of several seeds counts as
one, with means and standard deviations; runs of different data get a table each.
"""
_EXAMPLES = """\
examples:
  bmrs compare runs/lenet5-fashion-mnist-subset-1 runs/lenet5-fashion-mnist-subset-2
  bmrs compare runs/* --output all.png --overwrite
"""


def parser(make: Callable[..., ArgumentParser]) -> ArgumentParser:
    """Return the command's parser, made by a function that takes what `ArgumentParser` does."""
    result = make(description=_DESCRIPTION, epilog=_EXAMPLES)
    result.add_argument("runs", type=str, nargs="+", metavar="RUN", help="folders of finished runs")
    result.add_argument(
        "--output", type=str, metavar="FILE", help="the picture; default: comparison.png in this folder"
    )
    result.add_argument("--overwrite", action="store_true", help="replace a picture that exists")
    return result


def action(options: Namespace) -> Callable[[Console], None]:
    """Check the command's options, and return what does what they ask for."""
    checked_texts(vars(options), {"runs": "RUN", "output": "--output"})

    def compare(console: Console) -> None:
        from bmrs.runs.comparison import compare_runs

        compare_runs(
            [Path(path) for path in options.runs],
            output=Path(options.get("output") or "comparison.png"),
            overwrite=bool(options.get("overwrite")),
            console=console,
        )

    return compare
