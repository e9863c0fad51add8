"""The paper's figures with right numbers, from the committed rows of judged networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import bmrs_kernels
from benchmarks.experiments import paper_table
from benchmarks.experiments.small_networks import scores
from benchmarks.experiments.small_networks.table import (
    CRITERIA,
    JUDGED,
    Group,
    curve_of,
    judged,
    knee,
    structures_of,
)
from benchmarks.picture_files import DIGEST, DPI, digest, digest_in
from bmrs.noise.layer import INITIAL_LOG_SIGMA, INITIAL_MU
from bmrs_kernels.constants import LN2, REDUCED_LOWER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Any
Groups = dict[Group, list[Row]]

_COLOURS = {
    "bmrs-n": "#0072B2",
    "bmrs-n-authors": "#0072B2",
    "bmrs-u-8": "#E69F00",
    "bmrs-u-4": "#D55E00",
    "snr": "#009E73",
    "mean": "#CC79A7",
    "odds": "#000000",
    "l2": "#56B4E9",
    "gradient": "#882255",
    "random": "#999999",
}
_MARKERS = dict(zip(_COLOURS, "ooDsv^Px*.", strict=True))


def stale_files(results: Path) -> list[Path]:
    """Return the pictures that are missing or show other rows than there are."""
    rows = paper_table.load(results / "paper" / JUDGED)
    paths = [results / "paper" / f"{name}.png" for name in PICTURES] if rows else []
    return [path for path in paths if not (path.exists() and digest_in(path) == digest(rows))]


def write(results: Path) -> None:
    """Draw the pictures that show other rows than there are."""
    rows = paper_table.load(results / "paper" / JUDGED)
    for path in stale_files(results):
        figure = PICTURES[path.stem](judged(results))
        figure.savefig(path, dpi=DPI, metadata={DIGEST: digest(rows)})


def _axes(groups: Groups, *, rows: int = 1, height: float = 3.6, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(groups), height * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, len(groups), squeeze=False, **options)
    for axis, group in zip(axes[0], groups, strict=True):
        axis.set_title(str(group), fontsize=10)
    return figure, axes


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    columns = max(2, int(figure.get_figwidth() / 2.4))
    figure.legend(list(unique.values()), list(unique), loc="outside lower center", ncols=columns, fontsize=8)


def _noise(groups: Groups) -> Figure:
    """E[θ] at the start, after training, and with the prior reduced."""
    figure, (line,) = _axes(groups)
    start = float(bmrs_kernels.noise_mean(torch.tensor([INITIAL_MU]), torch.tensor([INITIAL_LOG_SIGMA])))
    bins = torch.linspace(-5, 0, 51).tolist()
    for axis, rows in zip(line, groups.values(), strict=True):
        each = structures_of(rows[0])
        priors = {
            "trained, original prior": bmrs_kernels.noise_mean(each.mu, each.log_sigma),
            "reduced prior, p1 = 4": _reduced_mean(each, 4),
            "reduced prior, p1 = 8": _reduced_mean(each, 8),
        }
        for (name, values), colour in zip(priors.items(), ("#0072B2", "#D55E00", "#E69F00"), strict=True):
            axis.hist(values.log10().tolist(), bins=bins, alpha=0.6, color=colour, label=name)
        axis.axvline(
            torch.tensor(start).log10().item(), color="black", linestyle="--", label="before training"
        )
        axis.set_xlabel("log₁₀ E[θ], seed 0")
        axis.set_yscale("log")
    line[0].set_ylabel("structures")
    _legend(figure, line[0])
    return figure


def _reduced_mean(each: Any, p1: int) -> torch.Tensor:
    """E[θ] where the prior is log-uniform on what p1 bits round to 0: the posterior, cut to that interval."""
    return bmrs_kernels.noise_mean(each.mu, each.log_sigma, lower=REDUCED_LOWER, upper=-p1 * LN2)


def _curves(groups: Groups, criteria: Sequence[str], *, stops: Sequence[str]) -> Figure:
    """Accuracy against compression, and where the criteria stop; below, how often they stop where."""
    figure, (line, density) = _axes(groups, rows=2, height=3.0, sharex=True, height_ratios=(3, 1))
    for axis, below, rows in zip(line, density, groups.values(), strict=True):
        for criterion in criteria:
            colour = _COLOURS[criterion]
            for row in rows:
                points = curve_of(row, criterion)
                axis.plot(
                    [point[1] for point in points],
                    [point[2] for point in points],
                    color=colour,
                    alpha=0.7 if row is rows[0] else 0.25,
                    linewidth=1.2,
                    label=CRITERIA[criterion].removesuffix(" *"),
                )
        for row in rows:
            at = knee(curve_of(row, "bmrs-n-authors"))
            axis.axvline(at, color="#0072B2", linestyle=":", linewidth=0.8, label="knee of BMRS_N's order")
            below.axvline(at, color="#0072B2", linestyle=":", linewidth=0.8)
        for place, criterion in enumerate(stops):
            ends = [row["criteria"][criterion]["stop"] for row in rows]
            style = {"color": _COLOURS[criterion], "marker": _MARKERS[criterion], "linestyle": "none"}
            hollow = "white" if criterion == "bmrs-n" else _COLOURS[criterion]
            axis.plot(
                [end[1] for end in ends],
                [end[2] for end in ends],
                markerfacecolor=hollow,
                label=f"{CRITERIA[criterion]}: stop",
                **style,
            )
            below.plot([end[1] for end in ends], [place] * len(ends), markerfacecolor=hollow, **style)
        below.set_yticks(range(len(stops)), [CRITERIA[each] for each in stops], fontsize=6)
        below.set_ylim(len(stops), -1)
        below.set_xlabel("compression (%)")
        axis.grid(alpha=0.3)
        below.grid(alpha=0.3)
    line[0].set_ylabel("test accuracy (%)")
    _legend(figure, line[0])
    return figure


def _figure_2(groups: Groups) -> Figure:
    criteria = ("bmrs-n-authors", "bmrs-u-8", "bmrs-u-4", "snr", "mean", "l2")
    return _curves(groups, criteria, stops=[*scores.RULES])


def _figure_5(groups: Groups) -> Figure:
    return _curves(
        groups, ("bmrs-n-authors", "gradient", "l2", "random"), stops=("bmrs-n-authors", *scores.RANKINGS)
    )


def _agreement(groups: Groups) -> Figure:
    """Rank correlations between criteria, and with what masking costs."""
    names = {
        key: name.removesuffix(" *")
        for key, name in CRITERIA.items()
        if key not in ("bmrs-n", "random", "odds")
    }
    names["bmrs-n-authors"] = "BMRS_N"
    labels = [*names.values(), "rise of the loss"]
    figure, (line,) = _axes(groups, height=4.0)
    for axis, rows in zip(line, groups.values(), strict=True):
        matrices = []
        for row in rows:
            each = structures_of(row)
            columns = [*(each.worth(name) for name in names), each.loss]
            matrices.append([[scores.spearman(one, other) for other in columns] for one in columns])
        mean = torch.tensor(matrices).mean(dim=0)
        axis.imshow(mean.numpy(), vmin=-1, vmax=1, cmap="RdBu")
        for i in range(len(labels)):
            for j in range(len(labels)):
                colour = "white" if abs(mean[i, j]) > 0.7 else "black"
                axis.text(j, i, f"{mean[i, j]:.2f}", ha="center", va="center", fontsize=6, color=colour)
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        axis.set_yticks(range(len(labels)), labels if axis is line[0] else [""] * len(labels), fontsize=7)
    return figure


def _bits(groups: Groups) -> Figure:
    """Compression and accuracy of BMRS_U where it stops, against p1."""
    figure, (above, below) = _axes(groups, rows=2, height=2.4, sharex=True)
    for top, bottom, rows in zip(above, below, groups.values(), strict=True):
        for row in rows:
            p1 = [point[0] for point in row["p1"]]
            style = {"color": "#D55E00", "marker": ".", "alpha": 0.9 if row is rows[0] else 0.35}
            top.plot(p1, [point[2] for point in row["p1"]], **style)
            bottom.plot(p1, [point[3] for point in row["p1"]], **style)
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
        bottom.set_xlabel("p1 (bits)")
        bottom.set_xticks(range(0, 21, 4))
    above[0].set_ylabel("compression (%)")
    below[0].set_ylabel("test accuracy (%)")
    return figure


def _knowledge(groups: Groups) -> Figure:
    """What masking a structure alone costs, and a growing group, against what the scores say."""
    figure, (alone, together) = _axes(groups, rows=2)
    for single, group, rows in zip(alone, together, groups.values(), strict=True):
        each = structures_of(rows[0])
        estimates = {
            "−ΔF of BMRS_N": (each.worth("bmrs-n"), "#0072B2"),
            "½ SNR²": (0.5 * each.worth("snr") ** 2, "#009E73"),
        }
        for name, (said, colour) in estimates.items():
            single.plot(each.tempered, said, ".", markersize=3, color=colour, alpha=0.6, label=name)
        most = float(each.tempered.max())
        single.plot([0.01, most], [0.01, most], color="black", linewidth=0.8, label="as measured")
        single.set_xscale("symlog", linthresh=0.1)
        single.set_yscale("symlog", linthresh=0.1)
        single.set_xlabel("likelihood lost, masked alone (nats)")
        for criterion in ("bmrs-n-authors", "bmrs-u-4", "snr", "mean", "l2", "gradient"):
            points = curve_of(rows[0], criterion)
            rises = [max(point[4] - rows[0]["full"][4], 1e-5) for point in points]
            group.plot(
                [point[0] for point in points],
                rises,
                color=_COLOURS[criterion],
                label=CRITERIA[criterion].removesuffix(" *").removesuffix(", without the 2π"),
            )
            stop = rows[0]["criteria"][criterion]["stop"]
            group.plot(
                stop[0],
                max(stop[4] - rows[0]["full"][4], 1e-5),
                _MARKERS[criterion],
                color=_COLOURS[criterion],
            )
        group.set_yscale("log")
        group.set_xlabel("structures masked together, in the criterion's order")
        single.grid(alpha=0.3)
        group.grid(alpha=0.3)
    alone[0].set_ylabel("said by the score (nats)")
    together[0].set_ylabel("rise of the training loss (nats)")
    alone[-1].legend(fontsize=7)
    _legend(figure, together[0])
    return figure


PICTURES: dict[str, Callable[[Groups], Figure]] = {
    "noise": _noise,
    "curves": _figure_2,
    "agreement": _agreement,
    "bits": _bits,
    "rankings": _figure_5,
    "knowledge": _knowledge,
}
