"""The picture of the comparison: accuracy against parameters and FLOPs, before and after fine-tuning."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.peers import table
from benchmarks.experiments.peers.table import NAMES, Row
from benchmarks.picture_files import DIGEST, DPI, digest, digest_in

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

FILE = "accuracy.png"

# Colour, marker and line of each way that is shown; the others are in the table.
_STYLES = {
    "bmrs": ("#0072B2", "o", "-"),
    "scratch": ("#D55E00", "s", "-"),
    "random, uniform": ("#999999", "v", "-"),
    "L2, uniform": ("#009E73", "^", "-"),
    "Taylor, uniform": ("#CC79A7", "D", "-"),
    "L2, global": ("#009E73", "^", ":"),
    "Taylor, global": ("#CC79A7", "D", ":"),
}


def path_of(results: Path) -> Path:
    """Return where the picture of a folder's results is."""
    return results / "peers" / FILE


def is_stale(results: Path) -> bool:
    """Return whether the picture is missing or shows other rows than there are."""
    rows = table.load(results / "peers" / table.RUNS)
    path = path_of(results)
    return bool(rows) and not (path.exists() and digest_in(path) == digest(rows))


def write(results: Path) -> None:
    """Draw the picture, if there are other rows than it shows."""
    if not is_stale(results):
        return
    from matplotlib.figure import Figure

    rows = table.load(results / "peers" / table.RUNS)
    subjects = [
        (data, network)
        for data in NAMES
        for network in table.NETWORKS
        if any((row["data"], row["network"]) == (data, network) for row in rows)
    ]
    figure = Figure(figsize=(15, 3.6 * len(subjects)), layout="constrained")
    axes = figure.subplots(len(subjects), 3, squeeze=False)
    for line, (data, network) in zip(axes, subjects, strict=True):
        own = [row for row in rows if (row["data"], row["network"]) == (data, network)]
        name = f"{NAMES[network]}, {NAMES[data]}"
        _draw(
            line[0], own, cost="parameters", title=f"{name}: no weight trained after pruning", trained=False
        )
        _draw(line[1], own, cost="parameters", title=f"{name}: fine-tuned", trained=True)
        _draw(line[2], own, cost="flops", title=f"{name}: fine-tuned", trained=True)
    shown: dict[str, Artist] = {}
    for axis in (axes[0, 1], axes[0, 0]):
        handles, labels = axis.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path_of(results), dpi=DPI, metadata={DIGEST: digest(rows)})


def _draw(axis: Axes, rows: Sequence[Row], *, cost: str, title: str, trained: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    dense = [row for row in rows if row["method"] == "dense"]
    if dense:
        level = 100 * statistics.mean(row["accuracy"] for row in dense)
        axis.axhline(level, color="black", linewidth=1, linestyle="--", label="dense, all epochs")
    for method, (colour, marker, line) in _STYLES.items():
        kinds = ["accuracy"] if trained else ["pruned_accuracy", "refitted_accuracy"]
        for kind in kinds:
            points = _points([row for row in rows if row["method"] == method and kind in row], cost, kind)
            if points:
                label = table.METHODS[method].strip("*") + (
                    " and refitted" if kind.startswith("refit") else ""
                )
                hollow = kind == "pruned_accuracy" and method == "bmrs"
                costs, means, spreads = zip(*points, strict=True)
                axis.errorbar(
                    costs,
                    means,
                    spreads,
                    color=colour,
                    marker=marker,
                    linestyle=line,
                    capsize=2,
                    label=label,
                    markerfacecolor="white" if hollow else colour,
                )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel({"parameters": "parameters", "flops": "FLOPs of an image"}[cost])
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    if trained:
        axis.set_ylim(bottom=max(0.0, axis.dataLim.ymin - 0.5))


def _points(rows: Sequence[Row], cost: str, kind: str) -> list[tuple[float, float, float]]:
    """Return cost, mean accuracy and its standard deviation in percent at each size, by rising cost."""
    points = []
    for size in table.SIZES:
        found = [row for row in rows if row["size"] == size]
        if found:
            values = [100 * row[kind] for row in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append((statistics.mean(row[cost] for row in found), statistics.mean(values), spread))
    return sorted(points)
