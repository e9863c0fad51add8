"""The two networks of the literature: what this recipe comes to beside what was published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from benchmarks.experiments import paper_table
from benchmarks.experiments.yardstick.networks import PUBLISHED, Name, Takes, build, takes
from benchmarks.markdown import table
from benchmarks.picture_files import DIGEST, DPI, digest, digest_in

RUNS = "yardstick.jsonl"
NAMES: dict[Name, str] = {"lenet5-caffe": "LeNet-5 (Caffe)", "lenet-300-100": "LeNet-300-100"}

DEFAULTS: dict[str, Any] = {"fine_tune_lr": 1.5e-3, "moves": 0}
"""Settings of rows that were made before there was a choice."""

Row = Any


class Entry(NamedTuple):
    """A line of the table.

    Attributes:
        what: method.
        where: source, or how it was made.
        widths: as the literature writes them.
        takes: parameters and FLOPs.
        error: on the test images, in percent.
        ours: whether it is this project's.
    """

    what: str
    where: str
    widths: tuple[int, ...]
    takes: Takes
    error: float
    ours: bool


def load(results: Path) -> list[Row]:
    """Return the committed rows."""
    return paper_table.load(results / "yardstick" / RUNS)


def entries(name: Name, rows: Sequence[Row]) -> list[Entry]:
    """Return what was published of a network and what this recipe came to, the smallest first."""
    found = [
        Entry(
            each.method, _source(each.source), each.widths, takes(name, each.widths), each.error, ours=False
        )
        for each in PUBLISHED[name]
    ]
    for row in rows:
        if row["network"] == name and not row["emptied"]:
            weights = (
                f", weights at {row['weight_lr']:g}, noise at {row['noise_lr']:g}" if row["weight_lr"] else ""
            )
            teacher = f", teacher {row['distillation']:g}" if row["distillation"] else ""
            moved = f", moved by {row['moves']}" if row.get("moves") else ""
            epochs = f", {row['fine_tune_epochs']} epochs"
            way = f"T = {row['temperature']:g}{weights}{teacher}{moved}{epochs}, seed {row['seed']}"
            of = Takes(row["parameters"], row["flops"])
            found.append(Entry("**this recipe**", way, tuple(row["widths"]), of, row["error"], ours=True))
    return sorted(found, key=lambda entry: (entry.takes.parameters, entry.error))


def is_on_front(entry: Entry, others: Sequence[Entry]) -> bool:
    """Return whether no other is at least as good in error, parameters and FLOPs, and better in one of them."""
    mine = (entry.error, *entry.takes)
    return not any(
        all(theirs <= own for theirs, own in zip((other.error, *other.takes), mine, strict=True))
        and (other.error, *other.takes) != mine
        for other in others
    )


def readme(results: Path) -> str:
    """Return the table of both networks, with the picture."""
    rows = load(results)
    if not rows:
        return ""
    lines = []
    for name in get_args(Name):
        found = entries(name, rows)
        for entry in found:
            lines.append(
                (
                    NAMES[name],
                    entry.what,
                    entry.where,
                    "-".join(map(str, entry.widths)),
                    f"{entry.takes.parameters:,}",
                    f"{entry.takes.flops:,}",
                    f"{entry.error:g}",
                    "yes" if is_on_front(entry, found) else "",
                )
            )
    empty = [row for row in rows if row["emptied"]]
    left_out = "; ".join(f"{NAMES[row['network']]} at T = {row['temperature']:g}" for row in empty)
    dense = ", ".join(
        f"{NAMES[name]}: {sum(each.numel() for each in build(name).parameters()):,} parameters, error "
        + " ".join(sorted({f"{row['trained_error']:g} %" for row in rows if row["network"] == name}))
        for name in get_args(Name)
        if any(row["network"] == name for row in rows)
    )
    columns = (
        "network",
        "method",
        "source or setting",
        "kept",
        "parameters",
        "FLOPs",
        "test error, %",
        "on the front",
    )
    parts = [f"Before pruning: {dense}.", table(columns, lines)]
    if left_out:
        parts.append(f"Nothing was left of a layer, and no network delivered: {left_out}.")
    parts.append("![Test error against parameters and FLOPs](benchmarks/results/yardstick/front.png)")
    return "\n\n".join(parts)


def stale_files(results: Path) -> list[Path]:
    """Return the picture if it is missing or shows other results than there are."""
    rows, path = load(results), results / "yardstick" / "front.png"
    fresh = not rows or (path.exists() and digest_in(path) == digest(_shown(rows)))
    return [] if fresh else [path]


def write(results: Path) -> None:
    """Draw the picture if it shows other results than there are."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = load(results)
    for path in stale_files(results):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        for line, name in zip(figure.subplots(2, 2), get_args(Name), strict=True):
            found = entries(name, rows)
            for axis, cost in zip(line, Takes._fields, strict=True):
                for ours, style in ((False, "s"), (True, "o")):
                    own = [entry for entry in found if entry.ours == ours]
                    axis.plot(
                        [getattr(entry.takes, cost) for entry in own],
                        [entry.error for entry in own],
                        style,
                        color="#0072B2" if ours else "#999999",
                        label="this recipe" if ours else "published",
                    )
                for entry in found:
                    place = (getattr(entry.takes, cost), entry.error)
                    text = entry.where.partition(",")[0] if entry.ours else entry.what
                    axis.annotate(
                        text, place, fontsize=6, xytext=(2, 4), textcoords="offset points", rotation=50
                    )
                axis.set_xscale("log")
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.xaxis.set_major_formatter("{x:,.0f}")
                axis.xaxis.set_minor_formatter(NullFormatter())
                axis.set_xlabel({"parameters": "parameters", "flops": "FLOPs of an image"}[cost])
                axis.set_ylabel("test error (%)")
                axis.set_title(NAMES[name], fontsize=10)
                axis.grid(alpha=0.3)
        figure.axes[0].legend(fontsize=8)
        figure.savefig(path, dpi=DPI, metadata={DIGEST: digest(_shown(rows))})


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Return all that the picture shows: what was measured, and what was published."""
    return [
        *rows,
        *(result._asdict() | {"network": name} for name in PUBLISHED for result in PUBLISHED[name]),
    ]


def _source(source: str) -> str:
    return f"arXiv {source}" if source[0].isdigit() else source
