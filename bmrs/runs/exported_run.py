"""A finished run's network for another runtime, and how fast it is there beside the dense one."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from bmrs.files.exporting import (
    SUFFIXES,
    ExportFormat,
    ExportReport,
    check_packages,
    check_target,
    export,
    open_exported,
)
from bmrs.runs.finished import FinishedRun, finished_seeds
from bmrs.training.comparison_table import Row, Section, show_table
from bmrs.training.evaluation import latency
from bmrs.training.run_folder import RunError
from bmrs.training.summary import LATENCY_BATCHES


def export_run(
    path: Path,
    *,
    format: ExportFormat,
    output: Path | None = None,
    network: str = "compacted",
    overwrite: bool = False,
    data_dir: str | None = None,
    console: Console | None = None,
) -> ExportReport:
    """Export a network of a finished run, and measure it beside the dense network, in torch and in the format.

    All of it happens on the CPU.

    Args:
        path: the run's folder, of a single seed.
        format: see `bmrs.export`.
        output: the file; None for one in the run's folder, called as the network.
        network: "dense", or the name of a file of the run that `bmrs.load` reads, such as "compacted".
        overwrite: whether a file there is replaced.
        data_dir: where the data lie now, if not where they were; they are the examples.
        console: where the result is shown.

    Raises:
        RunError: the run is not finished, has several seeds or no such network, the network cannot be exported, or
            packages are missing.
        FileExistsError, FileNotFoundError: there is a file already, or no folder.
        DataError: the data cannot be read.
    """
    console = console or Console()
    seeds = finished_seeds(path, data_dir=data_dir, device="cpu")
    if len(seeds) > 1:
        raise RunError(
            f"{path} has {len(seeds)} seeds: give the folder of one, such as {seeds[0].folder.path}"
        )
    (run,) = seeds
    output = output or run.folder.path / f"{network}{SUFFIXES[format]}"
    if output.exists() and not overwrite and not output.is_dir():
        raise FileExistsError(f"{output} exists: give another --output, or --overwrite to replace it")
    check_target(output, overwrite)
    if network != "dense" and not run.folder.network(network).is_file():
        raise RunError(
            f"--network {network}: {run.folder.path} has no {run.folder.network(network).name}, expected "
            f"{', '.join(networks_of(run))}"
        )
    try:
        if format == "onnx":
            check_packages()
        data, device = run.data()
        images = data.test.examples(max(LATENCY_BATCHES))
        chosen, dense = run.network(network, data, device), run.network("dense", data, device)
        report = export(chosen, images[:2], output, format=format, overwrite=overwrite)
        _show(report, network, chosen, dense, images, console)
    except (ModuleNotFoundError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{network} of {path} cannot be exported as {format}: {error}") from error
    return report


def networks_of(run: FinishedRun) -> list[str]:
    """Return the names of a run's networks without noise."""
    names = ("compacted", "pruned", "refitted", "random", "scratch")
    return ["dense", *(name for name in names if run.folder.network(name).is_file())]


def _show(
    report: ExportReport, name: str, chosen: nn.Module, dense: nn.Module, images: Tensor, console: Console
) -> None:
    networks = {"dense": dense, name: chosen}
    with tempfile.TemporaryDirectory() as folder:
        contents = {name: report.path.read_bytes()}
        if name != "dense":
            file = Path(folder) / "dense"
            export(dense, images[:2], file, format=report.format)  # type: ignore[arg-type]
            contents["dense"] = file.read_bytes()
    timed: dict[str, nn.Module] = {f"{key}, torch": network for key, network in networks.items()}
    timed |= {f"{key}, {report.format}": open_exported(contents[key], report.format) for key in networks}
    turns = [latency(list(timed.values()), images[:size]) for size in LATENCY_BATCHES]
    rows = [
        Row(label, [(f"{1e3 * time:.3f}",) for time in times])
        for label, times in zip(timed, zip(*turns, strict=True), strict=True)
    ]
    columns = [f"ms for {size} image{'s' * (size > 1)}" for size in LATENCY_BATCHES]
    show_table(console, f"{name} in the format {report.format}, beside dense", columns, [Section(rows)])
    console.print(Text(str(report)), soft_wrap=True)
    console.print(
        Text("Times are medians of turns that all four take in the same minutes, with one CPU thread."),
        soft_wrap=True,
    )
