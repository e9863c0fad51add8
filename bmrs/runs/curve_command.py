"""`bmrs curve RUN`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from bmrs.training.options import check_number, checked_texts

HELP = "accuracy against compression, structure by structure"
_DESCRIPTION = """\
Remove the structures of a finished run's network one after the other, in the order of each criterion, without training,
and draw accuracy on validation images against compression, as in Figure 2 of the paper. Where each criterion with a
rule of its own stops is marked, and the knee of each curve; with several seeds, the density of the stops. Writes
curve.png and curve.jsonl into the run's folder.
"""
_EXAMPLES = """\
examples:
  bmrs curve runs/lenet5-fashion-mnist-subset-1               a minute or so; it says how long
  bmrs curve runs/five-seeds --points 15 --images 2000        fewer networks, the first 2,000 validation images
"""


def parser(make: Callable[..., ArgumentParser]) -> ArgumentParser:
    """Return the command's parser, made by a function that takes what `ArgumentParser` does."""
    result = make(description=_DESCRIPTION, epilog=_EXAMPLES)
    result.add_argument("run", type=str, metavar="RUN", help="the folder of a finished run")
    result.add_argument("--points", type=int, metavar="N", help="networks along each curve; default: 30")
    result.add_argument("--images", type=int, metavar="N", help="validation images to look at; default: all")
    result.add_argument("--data-dir", type=str, metavar="DIR", help="folder of the data, if they have moved")
    result.add_argument("--device", type=str, metavar="DEVICE", help="default: the run's --device")
    return result


def action(options: Namespace) -> Callable[[Console], None]:
    """Check the command's options, and return what does what they ask for."""
    checked_texts(vars(options), {"run": "RUN", "data_dir": "--data-dir", "device": "--device"})
    points, images = options.get("points"), options.get("images")
    check_number("points", points, minimum=2, maximum=10_000)
    check_number("images", images, minimum=1)

    def draw(console: Console) -> None:
        from bmrs.runs.curve import draw_curves

        draw_curves(
            Path(options.run),
            points=30 if points is None else points,
            images=images,
            data_dir=options.get("data_dir"),
            device=options.get("device"),
            console=console,
        )

    return draw
