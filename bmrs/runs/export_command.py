"""`bmrs export RUN`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from bmrs.checks import shown
from bmrs.names import FORMATS
from bmrs.training.options import ConfigError, checked_texts

HELP = "write a run's network for ONNX, torch.export or TorchScript"
_DESCRIPTION = """\
Write a network of a finished run in the format of another runtime, once that runtime has run it and its outputs agree,
and time it there beside the dense network. ONNX needs pip install onnx onnxscript onnxruntime.
"""
_EXAMPLES = """\
examples:
  bmrs export runs/lenet5-fashion-mnist-subset-1                      writes compacted.onnx into the run's folder
  bmrs export runs/lenet5-fashion-mnist-subset-1 --format pt2         a program for torch.export.load
  bmrs export runs/five-seeds/seed-0 --network refitted --output small.onnx --overwrite
"""


def parser(make: Callable[..., ArgumentParser]) -> ArgumentParser:
    """Return the command's parser, made by a function that takes what `ArgumentParser` does."""
    result = make(description=_DESCRIPTION, epilog=_EXAMPLES)
    result.add_argument("run", type=str, metavar="RUN", help="the folder of a finished run, of one seed")
    result.add_argument(
        "--format",
        type=str,
        metavar=f"{{{','.join(FORMATS)}}}",
        help="default: onnx; torchscript is deprecated by torch",
    )
    result.add_argument(
        "--output",
        type=str,
        metavar="FILE",
        help="default: called as the network, in the run's folder",
    )
    result.add_argument(
        "--network",
        type=str,
        metavar="NAME",
        help="compacted (default), dense, pruned, refitted, random or scratch",
    )
    result.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    result.add_argument("--data-dir", type=str, metavar="DIR", help="folder of the data, if they have moved")
    return result


def action(options: Namespace) -> Callable[[Console], None]:
    """Check the command's options, and return what does what they ask for."""
    names = {name: f"--{name.replace('_', '-')}" for name in ("output", "network", "data_dir")}
    checked_texts(vars(options), {"run": "RUN", **names})
    given = options.get("format") or "onnx"
    chosen = next((known for known in FORMATS if known == given), None)
    if chosen is None:
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}, got {shown(given)}")
    network = options.get("network") or "compacted"
    if not network.isidentifier():
        raise ConfigError(f"--network must be the name of a network such as compacted, got {shown(network)}")
    output = options.get("output")

    def write(console: Console) -> None:
        from bmrs.runs.exported_run import export_run

        export_run(
            Path(options.run),
            format=chosen,
            output=None if output is None else Path(output),
            network=network,
            overwrite=bool(options.get("overwrite")),
            data_dir=options.get("data_dir"),
            console=console,
        )

    return write
