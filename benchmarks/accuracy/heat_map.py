"""Errors over (μ, log σ) as pictures, the project's beside the plain formulas'."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.contract import BOUNDS, LOG_SIGMA_RANGE, LOWER, MU_RANGE, UPPER
from benchmarks.accuracy.errors import Setting, errors_of_both
from benchmarks.accuracy.points import Points
from benchmarks.accuracy.quantities import Quantity
from benchmarks.accuracy.table import Judged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

# Cells with fewer points show less of what happens at the uniforms.
POINTS_PER_CELL = {False: 1, True: 4}
NOT_FINITE, NO_POINT = "#D55E00", "white"


def cell_errors(where: Points, error: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """Return the largest error in each cell of a map of the domain, shape (log σ, μ); NaN where no point lies."""
    largest = np.full((cells, cells), -1.0)
    index = [
        np.minimum(((where[:, axis] - low) / (high - low) * cells).astype(int), cells - 1)
        for axis, (low, high) in enumerate((MU_RANGE, LOG_SIGMA_RANGE))
    ]
    np.maximum.at(largest, (index[1], index[0]), error)
    return np.where(largest < 0.0, np.nan, largest)


def draw(quantity: Quantity, judged: Judged, setting: Setting, path: Path) -> None:
    """Draw the maps of all outputs of a quantity into a PNG file; needs matplotlib.

    Args:
        quantity: what is drawn.
        judged: points with true values; those spread over the domain are drawn.
        setting: how the project's function is run.
        path: the file.
    """
    from matplotlib.figure import Figure

    spread = judged.of_kind("domain")
    cells = 2 ** int(math.log2(max(1, len(spread.points) // POINTS_PER_CELL[quantity.at_uniforms])) / 2)
    maps = errors_of_both(quantity, spread, setting)
    figure = Figure(figsize=(9, 0.7 + 2.9 * len(maps)), dpi=90, layout="constrained")
    figure.suptitle(f"{quantity.name}, {setting}: error over (μ, log σ)")
    axes = figure.subplots(len(maps), 2, squeeze=False, sharex=True, sharey=True)
    for row, (output, project, plain) in zip(axes, maps, strict=True):
        bound = BOUNDS[quantity.bound_of(output)].of(setting.dtype)
        for axis, title, error in zip(row, ("project", "plain formulas"), (project, plain), strict=True):
            mesh = _draw_map(axis, cell_errors(spread.points, error, cells), bound)
            axis.set_title(f"{output}: {title}", fontsize=10)
        row[0].set_ylabel("log σ")
        figure.colorbar(mesh, ax=list(row), label=f"bound {bound:g}", extend="both")
    for axis in axes[-1]:
        axis.set_xlabel("μ   (orange: not finite; lines: ends of the interval)")
    figure.savefig(path)


def _draw_map(axis: Axes, error: NDArray[np.float64], bound: float) -> QuadMesh:
    """Draw errors in colours that run from a thousandth of the bound to a million times it."""
    import matplotlib as mpl
    from matplotlib.colors import LogNorm

    colours = mpl.colormaps["viridis"].with_extremes(bad=NO_POINT, over="yellow")
    edges = [np.linspace(*limits, len(error) + 1) for limits in (MU_RANGE, LOG_SIGMA_RANGE)]
    lowest = 1e-3 * bound
    shown = np.where(np.isinf(error), np.nan, error.clip(min=lowest))
    mesh = axis.pcolormesh(*edges, shown, norm=LogNorm(lowest, 1e6 * bound), cmap=colours)
    lost = np.where(np.isinf(error), 1.0, np.nan)
    axis.pcolormesh(*edges, lost, cmap=mpl.colors.ListedColormap([NOT_FINITE]))
    for end in (LOWER, UPPER):
        axis.axvline(end, color="white", linewidth=0.6)
    return mesh
