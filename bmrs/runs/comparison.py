"""Finished runs beside each other: accuracy against what their networks take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from bmrs.files.exporting import check_target
from bmrs.runs.compared import NETWORKS, QUALITIES, ComparedRun, Quantity, costs, read_runs
from bmrs.runs.comparison_picture import draw_comparison
from bmrs.training.comparison_table import Row, Section, show_table, spread


def compare_runs(
    paths: Sequence[Path], *, output: Path, overwrite: bool = False, console: Console | None = None
) -> None:
    """Show finished runs as a table and draw them, those of one data set together.

    Args:
        paths: the runs' folders; one of several seeds counts as one, by means and standard deviations.
        output: the picture, a PNG file.
        overwrite: whether a file there is replaced.
        console: where the table is shown.

    Raises:
        RunError: a run is not finished, its summary is broken, or it is given twice.
        FileExistsError, FileNotFoundError: there is a file already, or no folder.
    """
    console = console or Console()
    if output.exists() and not overwrite and not output.is_dir():
        raise FileExistsError(f"{output} exists: give another --output, or --overwrite to replace it")
    check_target(output, overwrite)
    runs = read_runs(paths)
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        groups.setdefault(run.data, []).append(run)
    for data, group in groups.items():
        _show(group, f"{len(group)} run{'s' * (len(group) > 1)} on {data}", console)
    for note in _notes(runs, groups):
        console.print(Text(note), soft_wrap=not console.is_terminal)
    try:
        draw_comparison(output, groups)
        console.print(f"picture: {output}", soft_wrap=True, markup=False)
    except ModuleNotFoundError:
        console.print("no picture, as matplotlib is missing: pip install matplotlib", soft_wrap=True)


def _show(runs: Sequence[ComparedRun], title: str, console: Console) -> None:
    quantities = [*QUALITIES, *costs(runs[0].latency_batches)]

    def cell(run: ComparedRun, network: str, quantity: Quantity) -> tuple[str, ...]:
        values = run.values(network, quantity)
        return spread(values, quantity.form) if values else ("–",)

    sections = []
    for run in runs:
        seeds = f" ({len(run.summaries)} seeds)" if len(run.summaries) > 1 else ""
        rows = [
            Row(network, [cell(run, network, quantity) for quantity in quantities]) for network in NETWORKS
        ]
        sections.append(Section(rows, title=f"{run.name}{seeds}"))
    columns = [
        quantity.label.replace(" for ", "\nfor ").replace(" per ", "\nper ") for quantity in quantities
    ]
    show_table(console, title, columns, sections)


def _notes(runs: Sequence[ComparedRun], groups: Mapping[str, Any]) -> list[str]:
    notes = []
    if any(len(run.summaries) > 1 for run in runs):
        notes.append("Means ± standard deviations over the seeds of a run.")
    if len(groups) > 1:
        notes.append(
            f"The runs are of different data ({', '.join(groups)}): a table and a row of the picture for each, as "
            "their accuracies mean different things."
        )
    if len(devices := {device for run in runs for device in run.devices}) > 1:
        notes.append(f"Latencies were measured on different devices: {', '.join(sorted(devices))}.")
    notes.append(
        "Latencies are those that each run measured when it ended: compare them only between runs of one machine."
    )
    return notes
