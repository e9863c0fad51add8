"""The picture of `bmrs compare`: accuracy against parameters, FLOPs and latency."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bmrs.files.atomic import write_atomically
from bmrs.runs.compared import NETWORKS, QUALITIES, ComparedRun, Quantity, costs
from bmrs.training.picture import layer_styles, limit_accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_comparison(path: Path, groups: Mapping[str, Sequence[ComparedRun]]) -> None:
    """Draw runs, a row of panels for those of each data set, into a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    picture = io.BytesIO()
    figure_of(groups).savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def figure_of(groups: Mapping[str, Sequence[ComparedRun]]) -> Figure:
    """Return the figure that `draw_comparison` writes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 0.6 + 4.6 * len(groups)), dpi=110, layout="constrained")
    figure.suptitle("Dense (hollow) and compacted (filled) networks of finished runs")
    panels = figure.subplots(len(groups), 3, squeeze=False)
    for row, (data, runs) in zip(panels, groups.items(), strict=True):
        parameters, flops, *times = costs(runs[0].latency_batches)
        for axis, cost in zip(row, (parameters, flops, times[-1]), strict=True):
            _draw(axis, runs, cost)
        row[0].set_title(data, loc="left")
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


def _draw(axis: Axes, runs: Sequence[ComparedRun], cost: Quantity) -> None:
    from matplotlib.ticker import MaxNLocator

    accuracy = QUALITIES[0]
    shown = []
    for run, style in zip(runs, layer_styles(len(runs)), strict=True):
        points = {network: (run.values(network, cost), run.values(network, accuracy)) for network in NETWORKS}
        middles = [(statistics.mean(x), statistics.mean(y)) for x, y in points.values()]
        axis.plot(
            *zip(*middles, strict=True), color=style["color"], linestyle=style["linestyle"], linewidth=1
        )
        for (network, (x, y)), middle in zip(points.items(), middles, strict=True):
            several = len(x) > 1
            axis.errorbar(
                *middle,
                xerr=statistics.stdev(x) if several else None,
                yerr=statistics.stdev(y) if several else None,
                color=style["color"],
                marker=style["marker"],
                markersize=9,
                markerfacecolor="none" if network == "dense" else style["color"],
                capsize=3,
                linestyle="",
                label=run.name if network == "compacted" else None,
            )
            shown += y
    limit_accuracy(axis, shown, "test accuracy")
    axis.set_xlim(0, 1.08 * axis.get_xlim()[1])
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter("{x:,.4g}" if cost.label.startswith("ms") else "{x:,.0f}")
    axis.set_xlabel(cost.label)
    axis.grid(alpha=0.3)
