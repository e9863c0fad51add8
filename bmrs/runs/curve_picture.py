"""The picture of `bmrs curve`: accuracy against compression, where criteria stop, and where curves bend."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmrs.files.atomic import write_atomically
from bmrs.runs.points import Point
from bmrs.training.picture import layer_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HOLLOW = {"markerfacecolor": "none", "markeredgewidth": 1.8}
_LEAST_BANDWIDTH = 1.0
"""Percentage points of compression."""


def draw(path: Path, points: Sequence[Point], title: str) -> None:
    """Draw curves into a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    picture = io.BytesIO()
    figure_of(points, title).savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def figure_of(points: Sequence[Point], title: str) -> Figure:
    """Return the figure that `draw` writes; with several seeds it has a panel of where criteria stop."""
    from matplotlib.figure import Figure

    seeds = list(dict.fromkeys(point.seed for point in points))
    names = list(dict.fromkeys(point.criterion for point in points))
    styles = dict(zip(names, layer_styles(len(names)), strict=True))
    several = len(seeds) > 1
    figure = Figure(figsize=(10, 9 if several else 6.5), dpi=110, layout="constrained")
    figure.suptitle(title)
    ratios = [3, 1] if several else [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for name in names:
        for seed in seeds:
            curve = [point for point in points if (point.criterion, point.seed) == (name, seed)]
            _draw_curve(panels[0], curve, styles[name], label=name if seed == seeds[0] else None)
    panels[0].plot([], [], "k", marker="o", linestyle="", **_HOLLOW, label="(any shape) where a rule stops")
    panels[0].plot([], [], "kx", label="knee: farthest above the chord")
    panels[0].set_ylabel("accuracy on validation images (%)")
    panels[0].set_ylim(0, 100)
    panels[0].legend(loc="lower left", fontsize=9)
    if several:
        _draw_stops(panels[1], points, styles)
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel(
        "compression (%), as the paper counts it: parameters that are gone, μ and log σ too"
    )
    return figure


def _draw_curve(axis: Axes, curve: Sequence[Point], style: Mapping[str, Any], label: str | None) -> None:
    x = [point.compression_percent for point in curve]
    y = [100 * point.accuracy for point in curve]
    stops = [place for place, point in enumerate(curve) if point.stop]
    # Of a shape and size of their own, and hollow, as rules stop on each other.
    axis.plot(x, y, **{**style, **_HOLLOW}, linewidth=1.3, markevery=stops, label=label)
    knees = [place for place, point in enumerate(curve) if point.knee]
    axis.plot(x, y, color=style["color"], linestyle="", marker="x", markersize=8, markevery=knees)


def _draw_stops(axis: Axes, points: Sequence[Point], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw Gaussian kernel densities of where criteria stop (Silverman's bandwidth), and the stops themselves."""
    grid = [value / 2 for value in range(201)]
    for name, style in styles.items():
        stops = [point.compression_percent for point in points if point.stop and point.criterion == name]
        if not stops:
            continue
        spread = statistics.stdev(stops) if len(stops) > 1 else 0.0
        kernel = statistics.NormalDist(0, max(1.06 * spread * len(stops) ** -0.2, _LEAST_BANDWIDTH))
        density = [statistics.mean(kernel.pdf(x - stop) for stop in stops) for x in grid]
        axis.plot(grid, density, color=style["color"], linestyle=style["linestyle"])
        axis.plot(stops, [0] * len(stops), marker="|", markersize=10, color=style["color"], linestyle="")
    axis.set_ylabel("density of stops\n(per point)")
    axis.set_ylim(bottom=0)
