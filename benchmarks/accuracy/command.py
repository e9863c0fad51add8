"""Measure the error of every public quantity and gradient: ``python -m benchmarks accuracy``.

Over the whole domain of the numerics contract, against 150-digit arithmetic, beside the paper's formulas evaluated as
printed. The exit code is 0, or 1 if the contract or the committed report's figures are missed, or 2 if the backend
cannot run. A report that misses them does not replace the committed one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import processes
from benchmarks.accuracy.attack import attack, keep
from benchmarks.accuracy.errors import Setting, failures, measure
from benchmarks.accuracy.heat_map import draw
from benchmarks.accuracy.narrow import measure_narrow
from benchmarks.accuracy.points import DOMAIN_POINTS
from benchmarks.accuracy.progress import progress
from benchmarks.accuracy.quantities import QUANTITIES
from benchmarks.accuracy.report import ACCURACY_RESULTS, as_json, as_markdown, committed_report, regressions
from benchmarks.accuracy.table import Judged, judged
from benchmarks.environment import environment
from benchmarks.options import positive
from bmrs_kernels.dispatch import backend

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    options = parse(arguments)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    device = options.device or default_device(options.backend)
    if obstacle := why_not(options.backend, device):
        print(f"accuracy: {obstacle}", file=sys.stderr)
        return 2
    setting = Setting(options.backend, DTYPES[options.dtype], device)
    with ExitStack() as stack:
        needs_pool = options.attack > 0 or options.points > DOMAIN_POINTS
        pool = stack.enter_context(processes.workers(options.jobs)) if needs_pool else None
        table = [judged(quantity, options.points, pool) for quantity in QUANTITIES]
        measured = []
        with progress("measuring", len(QUANTITIES)) as advance:
            for quantity, points in zip(QUANTITIES, table, strict=True):
                measured += measure(quantity, points, setting)
                advance()
        narrow = measure_narrow(setting)
        attacked = []
        if options.attack > 0:
            attacked = attack(measured, setting, options.attack, pool, seed=options.seed)
    broken = [
        f"{one.name}: the attack found an error of {one.error:.3g} with a bound of {one.bound:.3g} at {one.point}"
        for one in attacked
        if one.breaks_the_contract
    ]
    compared = committed_report(setting).exists()
    objections = [
        *failures(measured),
        *filter(None, (one.failure() for one in narrow)),
        *(regressions(measured, setting) if compared else []),
        *broken,
    ]
    about = {"setting": str(setting), **environment(options.commit, device)}
    markdown = as_markdown(measured, narrow, attacked, objections, about)
    if options.output is not None and not (
        objections and options.output.resolve() == ACCURACY_RESULTS.resolve()
    ):
        (options.output / f"{setting}.md").write_text(markdown, "utf-8")
        (options.output / f"{setting}.json").write_text(as_json(measured, narrow, attacked, about), "utf-8")
        if not options.no_maps:
            draw_maps(table, setting, options.output)
    print(markdown)
    if not compared:
        print(f"There is no committed report of {setting} to compare with.")
    if options.keep:
        print(f"{keep(attacked, measured)} points added to those that were found before")
    return 1 if objections else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", choices=("torch", "triton", "numba"), default="torch")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the parameters (default: float32)"
    )
    parser.add_argument(
        "--points",
        type=positive,
        default=DOMAIN_POINTS,
        metavar="N",
        help=f"points over the domain (default: {DOMAIN_POINTS}, those of the table; more are computed), beside the "
        "ones near its ends and the adversarial ones",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for Markdown, JSON and heat maps")
    parser.add_argument("--no-maps", action="store_true", help="draw no heat maps, which needs matplotlib")
    parser.add_argument(
        "--attack", type=float, default=0.0, metavar="SECONDS", help="search so long for larger errors"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the attack (default: 0)")
    parser.add_argument(
        "--keep", action="store_true", help="add what the attack found to the adversarial points"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda for compiled kernels, else cpu"
    )
    parser.add_argument(
        "--jobs", type=positive, default=os.cpu_count() or 1, help="processes for the reference"
    )
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    options = parser.parse_args(arguments)
    if options.keep and options.attack <= 0:
        parser.error("--keep needs --attack")
    return options


def default_device(name: str) -> str:
    """Return where a backend runs by default."""
    return "cuda" if name == "triton" and not backend.INTERPRETING else "cpu"


def why_not(name: str, device: str) -> str | None:
    """Return why a backend cannot run on a device here, or None."""
    if name == "triton" and not backend.TRITON_IS_INSTALLED:
        return "Triton is not installed"
    if name == "numba" and not backend.NUMBA_IS_INSTALLED:
        return "numba is not installed"
    if name == "numba" and device != "cpu":
        return "numba compiles loops for the CPU alone"
    if device == "cuda" and not torch.cuda.is_available():
        hint = "; TRITON_INTERPRET=1 interprets the kernels on the CPU" if name == "triton" else ""
        return f"no GPU that torch can use was found{hint}"
    if name == "triton" and device == "cpu" and not backend.INTERPRETING:
        return "kernels run on the CPU only with TRITON_INTERPRET=1 in the environment"
    return None


def draw_maps(table: Sequence[Judged], setting: Setting, folder: Path) -> None:
    """Draw a heat map for every quantity, where matplotlib is installed."""
    with progress("heat maps", len(QUANTITIES)) as advance:
        for quantity, points in zip(QUANTITIES, table, strict=True):
            name = quantity.name.replace(", p1 = ", "_p1_")
            try:
                draw(quantity, points, setting, folder / f"{setting}-{name}.png")
            except ModuleNotFoundError as error:
                print(f"accuracy: no heat maps, as {error.name} is missing", file=sys.stderr)
                return
            advance()
