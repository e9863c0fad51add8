"""The picture of a run: what it came to on the test images, and how it got there."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmrs.criteria import BMRSNormal, BMRSOdds, BMRSUniform, Mean
from bmrs.files.atomic import write_atomically
from bmrs.noise.lookup import noise_layers
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.run_folder import NetworkName
from bmrs.training.summary import RunSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart; shapes and dashes tell apart what is printed in grey.
_BLUE, _VERMILION = "#0072B2", "#D55E00"
_NETWORKS: dict[str, dict[str, Any]] = {
    "dense": {"label": "dense", "color": "#000000", "marker": "o", "linestyle": "-"},
    "masked": {"label": "masked", "color": "#E69F00", "marker": "D", "linestyle": "--"},
    "compacted": {"label": "compacted", "color": _BLUE, "marker": "s", "linestyle": "-"},
    "scratch": {"label": "its widths from scratch", "color": "#E69F00", "marker": "^", "linestyle": "--"},
    "random": {"label": "random structures", "color": "#CC79A7", "marker": "D", "linestyle": ":"},
}
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", _BLUE, _VERMILION)
_MARKERS, _DASHES = "os^DvPXp", ("-", "--", "-.", ":")
_MOST_NAMES = 8
_LONG_NAME = 16  # letters
"""Layers that are named, of a network of many."""
_LEAST_RANGE = 20
"""Percentage points that an axis of accuracies spans at least, so that a difference looks no larger than it is."""


def draw(
    path: Path, states: Mapping[NetworkName, TrainingState], summary: RunSummary, config: TrainConfig
) -> None:
    """Draw a finished run into a PNG file.

    Args:
        path: the file.
        states: the run's networks with their histories; "noisy" has the noise layers.
        summary: what the run came to.
        config: the run's options.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    picture = io.BytesIO()
    figure_of(states, summary, config).savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def figure_of(
    states: Mapping[NetworkName, TrainingState], summary: RunSummary, config: TrainConfig
) -> Figure:
    """Return the figure that `draw` writes."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    noisy = states["noisy"]
    figure = Figure(figsize=(14, 10), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(
        f"{config.model} on {config.data}: recipe {config.recipe}, pruned by {config.criterion}", fontsize=14
    )
    grid = figure.add_gridspec(4, 6, height_ratios=[1, 0.05, 1, 0.14])
    places = {
        "size": grid[0, :3],
        "epochs": grid[0, 3:],
        "networks": grid[1, 3:],
        "kept": grid[2, :2],
        "noise": grid[2, 2:4],
        "scores": grid[2, 4:],
        "layers": grid[3, :4],
        "decisions": grid[3, 4:],
    }
    axes = {name: figure.add_subplot(place) for name, place in places.items()}
    _draw_size(axes["size"], summary)
    _draw_epochs(axes["epochs"], states, config)
    _draw_kept(axes["kept"], noisy, config)
    _draw_expected_noise(axes["noise"], noisy)
    _draw_scores(axes["scores"], noisy, config)
    # In places of their own, where they hide nothing.
    for of, place in (("epochs", "networks"), ("kept", "layers"), ("scores", "decisions")):
        _put_legend(axes[of], axes[place])
    for axis in axes.values():
        axis.set_title(axis.get_title(), fontsize=10)
    return figure


def _draw_size(axis: Axes, summary: RunSummary) -> None:
    from matplotlib.ticker import MaxNLocator

    networks = summary.networks
    accuracies = {name: 100 * network.accuracy for name, network in networks.items()}
    low, high = limit_accuracy(axis, accuracies.values(), "test accuracy")
    largest = max(network.parameters for network in networks.values())
    axis.set_xlim(0, 1.1 * largest)
    label_heights = _apart(list(accuracies.values()), low, high)
    for (name, network), label_height in zip(networks.items(), label_heights, strict=True):
        style, x, y = _NETWORKS[name], network.parameters, accuracies[name]
        # Networks of one size lie on each other: hollow, they all show.
        axis.plot(x, y, **style, markersize=9, markerfacecolor="none", markeredgewidth=1.8, clip_on=False)
        left = x > 0.55 * largest
        axis.annotate(
            f"{style['label']}: {y:.2f} %",
            (x, y),
            (x + (-0.06 if left else 0.06) * largest, label_height),
            ha="right" if left else "left",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.6", "shrinkB": 6, "relpos": (float(left), 0.5)},
        )
    ratio = networks["dense"].parameters / networks["compacted"].parameters
    axis.set_title(f"Test accuracy and size (parameters, dense / compacted: {ratio:.2f})")
    axis.set_xlabel("parameters")
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.3)


def _draw_epochs(axis: Axes, states: Mapping[NetworkName, TrainingState], config: TrainConfig) -> None:
    if config.recipe == "paper":
        curves = {"dense": states["dense"].history, "masked": states["noisy"].history}
        starts = {"fine-tuning": config.settings.epochs}
    else:
        before, noise = states["trained"].history, states["noisy"].history
        curves = {
            "dense": states["dense"].history,
            "compacted": [*before, *noise, *states["fine-tuned"].history],
        }
        if config.rivals:
            curves |= {
                "scratch": states["scratch"].history,
                "random": [*before, *states["random"].history],
            }
        starts = {"noise": len(before), "fine-tuning": len(before) + len(noise)}
    last = max(map(len, curves.values()))
    for (name, history), first_marker in zip(curves.items(), range(len(curves)), strict=True):
        values = [100 * row["validation_accuracy"] for row in history]
        spacing = max(1, len(values) // 8)
        axis.plot(
            range(1, len(values) + 1),
            values,
            **_NETWORKS[name],
            markerfacecolor="none",
            markevery=(first_marker % spacing, spacing),
        )
    limit_accuracy(
        axis, (100 * row["validation_accuracy"] for history in curves.values() for row in history), "accuracy"
    )
    begun = {name: start for name, start in starts.items() if start < last}
    for start in begun.values():
        axis.axvline(start + 0.5, color="0.5", linestyle=":")
    phases = ", ".join(f"{name} from {start + 1}" for name, start in begun.items())
    axis.set_title("Accuracy on validation images")
    _label_epochs(axis, f"epoch ({phases})" if phases else "epoch")


def _draw_kept(axis: Axes, noisy: TrainingState, config: TrainConfig) -> None:
    layers = noise_layers(noisy.model)
    epochs = [0, *(row["epoch"] for row in noisy.history)]
    for style, (name, layer) in zip(layer_styles(len(layers)), layers.items(), strict=True):
        kept = [layer.num_structures, *(row["kept"][name] for row in noisy.history)]
        axis.plot(
            epochs,
            [100 * number / layer.num_structures for number in kept],
            **style,
            markevery=max(1, len(epochs) // 8),
            label=f"{name} ({int(layer.mask.sum())} of {layer.num_structures})",
        )
    axis.set_title("Structures kept")
    axis.set_ylabel("structures kept (%)")
    if all(layer.mask.all() for layer in layers.values()):
        axis.text(0.5, 0.5, "nothing was pruned", transform=axis.transAxes, ha="center", va="center")
    axis.set_ylim(min(axis.get_ylim()[0], 80), 103)
    _label_epochs(axis, "epoch" if config.recipe == "paper" else "epoch of learning the noise")


def _draw_expected_noise(axis: Axes, noisy: TrainingState) -> None:
    layers = noise_layers(noisy.model)
    for style, layer in zip(layer_styles(len(layers)), layers.values(), strict=True):
        means = Mean()(layer).scores.sort(descending=True).values.tolist()
        shares = [100 * (rank + 0.5) / len(means) for rank in range(len(means))]
        axis.plot(shares, means, **style, markevery=max(1, len(means) // 8))
    axis.set_title("E[θ] of each layer's structures, in order")
    axis.set_xlabel("share of the layer's structures (%)")
    axis.set_ylabel("E[θ]")
    axis.grid(alpha=0.3)


def _draw_scores(axis: Axes, noisy: TrainingState, config: TrainConfig) -> None:
    chosen_by = config.build_criterion()
    decides = isinstance(chosen_by, BMRSOdds | BMRSNormal | BMRSUniform)
    criterion = chosen_by if isinstance(chosen_by, BMRSOdds | BMRSNormal | BMRSUniform) else BMRSOdds()
    border = 0.0 if isinstance(criterion, BMRSOdds) else -criterion.tolerance
    sign = "≤" if isinstance(criterion, BMRSOdds) else "≥"
    layers = noise_layers(noisy.model)
    places: dict[bool, tuple[list[float], list[float]]] = {False: ([], []), True: ([], [])}
    for position, layer in enumerate(layers.values()):
        scores, kept = criterion(layer).scores.tolist(), layer.mask.tolist()
        for number, (score, is_kept) in enumerate(zip(scores, kept, strict=True)):
            places[is_kept][0].append(position - 0.3 + 0.6 * (number + 0.5) / len(scores))
            places[is_kept][1].append(score)
    for is_kept, label, marker, colour in ((False, "pruned", "x", _VERMILION), (True, "kept", "o", _BLUE)):
        x, y = places[is_kept]
        axis.plot(
            x,
            y,
            linestyle="",
            marker=marker,
            markersize=4.5,
            markerfacecolor="none",
            color=colour,
            label=f"{label} ({len(x)})",
        )
    if decides:
        axis.axhline(border, color="black", linewidth=1)
    scale = _fit_height(axis, [*places[False][1], *places[True][1]], border if decides else None)
    some = range(0, len(layers), math.ceil(len(layers) / _MOST_NAMES))
    names = [name.removesuffix(".noise").replace("_", "\n") for name in layers]
    long = max(map(len, names)) > _LONG_NAME
    turned: dict[str, Any] = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axis.set_xticks(some, [names[index] for index in some], fontsize=8, **turned)
    rule = f"pruned where {sign} {border + 0:.3g}" if decides else f"pruned by {config.criterion}"
    axis.set_title(f"{criterion.score_name} of each structure; {rule}")
    axis.set_ylabel(f"{criterion.score_name} (nats{scale})")
    axis.grid(alpha=0.3, axis="y")


def layer_styles(number: int) -> list[dict[str, Any]]:
    """Return a colour, a marker and a dash for each of a number of lines, told apart in grey too."""
    return [
        {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": _DASHES[index % len(_DASHES)],
            "markerfacecolor": "none",
            "markersize": 6 + 1.5 * (index % 4),  # lines on each other still show
        }
        for index in range(number)
    ]


def limit_accuracy(axis: Axes, percentages: Iterable[float], name: str) -> tuple[float, float]:
    """Have an axis span at least `_LEAST_RANGE` points around its values, and say which."""
    values = list(percentages)
    middle = (min(values) + max(values)) / 2
    centred = min(max(0, 5 * round((middle - _LEAST_RANGE / 2) / 5)), 100 - _LEAST_RANGE)
    low = min(centred, 5 * math.floor(min(values) / 5))
    high = max(centred + _LEAST_RANGE, 5 * math.ceil(max(values) / 5))
    margin = 0.02 * (high - low)
    axis.set_ylim(low - margin, high + margin)
    axis.set_ylabel(f"{name} (%), from {low} to {high}")
    return low, high


def _apart(values: Sequence[float], low: float, high: float) -> list[float]:
    """Return heights for labels of values, as close to them as labels that do not touch can be."""
    gap = 0.08 * (high - low)
    order = sorted(range(len(values)), key=lambda index: values[index])
    heights = [0.0] * len(values)
    below = low - gap / 2
    for index in order:
        below = heights[index] = max(values[index], below + gap)
    above = high + gap / 2
    for index in reversed(order):
        above = heights[index] = min(heights[index], above - gap)
    return heights


def _fit_height(axis: Axes, scores: Sequence[float], border: float | None) -> str:
    """Limit an axis to its scores, and to the border where that is near, and say what its scale is."""
    low, high = min(scores), max(scores)
    smallest, largest = sorted((abs(low), abs(high)))
    # A logarithmic axis of a single decade would have a single tick.
    one_decade = low * high > 0 and largest < 10 * smallest
    scale = ""
    if largest > 10 and not one_decade:
        axis.set_yscale("symlog", linthresh=1)
        scale = ", logarithmic beyond ±1"
    transform = axis.yaxis.get_transform()
    bottom, top = transform.transform([low, high])
    if border is not None:
        line = transform.transform([border])[0]
        near = (top - bottom) / 2
        if bottom - near <= line <= top + near:
            bottom, top = min(bottom, line), max(top, line)
    margin = 0.05 * (top - bottom) or 0.5
    axis.set_ylim(*transform.inverted().transform([bottom - margin, top + margin]))
    return scale


def _label_epochs(axis: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def _put_legend(axis: Axes, place: Axes) -> None:
    """Put an axis's legend of at most `_MOST_NAMES` names into another axis, which has nothing else."""
    handles, labels = axis.get_legend_handles_labels()
    if (more := len(labels) - _MOST_NAMES) > 0:
        labels[_MOST_NAMES - 1] += f", … {more} more"
    place.axis("off")
    legend = place.legend(
        handles[:_MOST_NAMES],
        labels[:_MOST_NAMES],
        loc="center",
        ncols=4 if len(labels) <= 4 else 3,
        fontsize=9,
        columnspacing=1.2,
        handletextpad=0.5,
        frameon=False,
    )
    legend.set_in_layout(False)  # a wide one would take the panels' room
