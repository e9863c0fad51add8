"""Pictures of the committed speeds, a file for each machine and kind.

A picture carries a digest of the rows that it shows, which says whether it is of the present results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import records
from benchmarks.granularities import GRANULARITIES
from benchmarks.picture_files import DIGEST, DPI, digest, digest_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Colours that the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLOUR_OF_COMPETITOR = {
    "triton": COLOURS[0],
    "numba": COLOURS[0],
    "torch": COLOURS[5],
    "plain": COLOURS[1],
    "compiled": COLOURS[4],
    "copy": "#666666",
}
HATCHES = {"compiled": "//", "cuda graph": ".."}


@dataclass(frozen=True)
class Plot:
    """A kind of picture.

    Attributes:
        name: its part of the file name.
        title: what it shows.
        suite: whose results.
        chosen: whether it shows a row.
        draw: draws rows into a figure.
    """

    name: str
    title: str
    suite: str
    chosen: Callable[[Row], bool]
    draw: Callable[[Figure, Sequence[Row]], None]

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that the picture shows."""
        return [row for row in rows if self.chosen(row)]

    def file_name(self, machine: str) -> str:
        """Return the name of a machine's file."""
        return f"{machine}-{self.name}.png"


def write(results: Path) -> list[Path]:
    """Draw what the results of a folder ask for, into the folder, and remove what they do not; return what changed."""
    stale = stale_files(results)
    for path, (plot, machine, rows) in wanted(results).items():
        if path in stale:
            _save(path, plot, machine, rows)
    for path in set(stale) - set(wanted(results)):
        path.unlink()
    return stale


def stale_files(results: Path) -> list[Path]:
    """Return the pictures that are missing, show other rows than the results of the folder, or show none of them."""
    needed = wanted(results)
    other = [path for path in needed if not path.exists() or digest_in(path) != digest(needed[path][2])]
    endings = tuple(plot.file_name("") for plot in PLOTS)
    surplus = [path for path in results.glob("*.png") if path.name.endswith(endings) and path not in needed]
    return sorted([*other, *surplus])


def wanted(results: Path) -> dict[Path, tuple[Plot, str, list[Row]]]:
    """Return the pictures of a folder's results: kind, machine and rows by file."""
    return {
        results / plot.file_name(machine): (plot, machine, plot.rows(rows))
        for plot in PLOTS
        for machine, rows in records.load(plot.suite, results).items()
        if plot.rows(rows)
    }


def draw_overhead(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw the time of training steps over those without noise: bars by network, with the rounds' spread."""
    axis = figure.subplots()
    settings = list(dict.fromkeys((row["network"], row["granularity"]) for row in rows))
    bars = list(dict.fromkeys((row["way"], row["mode"]) for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    width = 0.8 / len(bars)
    for number, (way, mode) in enumerate(bars):
        shown = [row for row in rows if (row["way"], row["mode"]) == (way, mode)]
        ratios = [row["ratio"] for row in shown]
        # The median of all calls may lie outside the range of the rounds' medians.
        below = [max(0.0, each["value"] - each["low"]) for each in ratios]
        above = [max(0.0, each["high"] - each["value"]) for each in ratios]
        axis.bar(
            [_place(settings, row) + (number + 0.5) * width - 0.4 for row in shown],
            [each["value"] for each in ratios],
            width,
            yerr=[below, above],
            capsize=2,
            color=COLOURS[ways.index(way) % len(COLOURS)],
            hatch=HATCHES.get(mode),
            edgecolor="white",
            label=f"{way}, {mode}",
        )
    _draw_paper(axis, settings, rows)
    labels = [f"{network}\n{granularity}" for network, granularity in settings]
    axis.set_xticks(range(len(settings)), labels, fontsize=8, rotation=30, ha="right")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_ylabel("time of a training step / the same without noise")
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)


def _draw_paper(axis: Axes, settings: Sequence[tuple[str, str]], rows: Sequence[Row]) -> None:
    """Mark what the paper measured with its code, for the networks that are the paper's own."""
    found = {
        _place(settings, row): row["paper_ratio"]
        for row in rows
        if row["paper_ratio"] and not row["stand_in"] and row["granularity"] == "element"
    }
    if found:
        axis.plot(list(found), list(found.values()), "k_", markersize=22, label="in the paper")


def _place(settings: Sequence[tuple[str, str]], row: Row) -> int:
    return settings.index((row["network"], row["granularity"]))


def draw_throughput(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw GB/s against size, forward and backward, with the copy as the ceiling: a panel for each granularity."""
    granularities = [each for each in GRANULARITIES if any(row["granularity"] == each for row in rows)]
    axes = figure.subplots(1, len(granularities), sharey=True, squeeze=False)[0]
    for axis, granularity in zip(axes, granularities, strict=True):
        panel = [row for row in rows if row["granularity"] == granularity]
        for competitor in dict.fromkeys(row["competitor"] for row in panel):
            points = sorted(
                (row["bytes_moved"], row["gb_per_s"]) for row in panel if row["competitor"] == competitor
            )
            is_copy = competitor == "copy"
            axis.plot(
                *zip(*points, strict=True),
                marker="" if is_copy else "o",
                markersize=3.5,
                linestyle="--" if is_copy else "-",
                color=COLOUR_OF_COMPETITOR.get(competitor),
                label=competitor,
            )
        _logarithmic(axis, "bytes to move", granularity)
    axes[0].set_ylabel("GB/s")
    axes[0].legend(fontsize=8)


def draw_scaling(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw time against size, with the slopes in the legend: a panel for each unit."""
    units = list(dict.fromkeys(row["unit"] for row in rows))
    axes = figure.subplots(1, len(units), squeeze=False)[0]
    for axis, unit in zip(axes, units, strict=True):
        for number, row in enumerate(row for row in rows if row["unit"] == unit):
            axis.plot(
                row["sizes"],
                [each["median"] for each in row["milliseconds"]],
                marker="o",
                markersize=3.5,
                color=COLOURS[number % len(COLOURS)],
                label=f"{row['name']} ({row['backend']}): {row['slope']:.2f}",
            )
        _logarithmic(axis, unit, "")
        axis.legend(fontsize=7, title="slope over the upper half", title_fontsize=7)
    axes[0].set_ylabel("ms")


def _logarithmic(axis: Axes, label: str, title: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(label)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)


def _save(path: Path, plot: Plot, machine: str, rows: Sequence[Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=DPI, layout="constrained")
    figure.suptitle(f"{plot.title}\n{machine}", fontsize=11)
    plot.draw(figure, rows)
    figure.savefig(path, metadata={DIGEST: digest(rows)})


PLOTS = (
    Plot(
        "overhead",
        "Time of a training step with noise, over the same network without",
        "step",
        lambda row: row["way"] != "no noise" and row["dtype"] == "float32",
        draw_overhead,
    ),
    Plot(
        "throughput",
        "multiply_noise, forward and backward, float32",
        "functions",
        lambda row: (
            (row["function"], row["direction"], row["dtype"]) == ("multiply_noise", "both", "float32")
        ),
        draw_throughput,
    ),
    Plot("scaling", "Time against size", "scaling", lambda row: True, draw_scaling),
)
