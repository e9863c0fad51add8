"""The README's tables of speed, for every machine with committed results: the most telling rows, losses too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.markdown import table
from benchmarks.speed.activation_shapes import LARGE
from benchmarks.speed.function_cases import LENET5_MAPS, OF_STRUCTURES, STRUCTURES, TINY_LINEAR, VIT_TOKENS
from benchmarks.speed.step import AUTHORS_LAYERS, RECOMPUTED
from benchmarks.tables import plots

Row = Mapping[str, Any]

# The first that a machine has is what backend="auto" takes there.
OURS = ("auto", "triton", "numba", "torch")
TELLING_SHAPES = {
    "multiply_noise": tuple(each.shape for each in (TINY_LINEAR, LENET5_MAPS, VIT_TOKENS, LARGE)),
    **dict.fromkeys(("sample_noise", "philox_uniform"), (LENET5_MAPS.shape,)),
    **dict.fromkeys(OF_STRUCTURES, ((STRUCTURES["ResNet-50"],),)),
}

# Of those ways of a training step that have been measured.
STEP_COLUMNS = {
    "project": "with noise: project",
    RECOMPUTED: "with `recompute`",
    AUTHORS_LAYERS: "`bmrs.compat`",
    "plain": "plain formulas",
}
MEMORY_COLUMNS = {"project": "peak memory", RECOMPUTED: "with `recompute`"}


def functions(results: Path) -> str:
    """Return times of the functions against the plain formulas and a copy."""
    return _by_machine("functions", results, _functions_table)


def step(results: Path) -> str:
    """Return times of training steps over those of the same network without noise."""
    return _by_machine("step", results, _step_table)


def pruning(results: Path) -> str:
    """Return times of pruning decisions, compaction and inference."""
    return _by_machine("pruning", results, _pruning_tables)


def scaling(results: Path) -> str:
    """Return how times grow with sizes."""
    return _by_machine("scaling", results, _scaling_table)


def _by_machine(suite: str, results: Path, make: Callable[[Sequence[Row]], str]) -> str:
    parts = []
    for machine, rows in records.load(suite, results).items():
        parts += [_head(rows[0]["environment"]), make(rows)]
        parts += [
            f"![{plot.title}](benchmarks/results/{plot.file_name(machine)})"
            for plot in plots.PLOTS
            if plot.suite == suite and plot.rows(rows)
        ]
    return "\n\n".join(parts)


def _head(about: Mapping[str, Any]) -> str:
    machine = about["GPU"] if "GPU" in about else f"{about['CPU']}, {about['threads']} threads"
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "numba"))
    return f"{machine}; {versions.replace(' none', ': none')}; {about['date'][:10]}:"


def _functions_table(rows: Sequence[Row]) -> str:
    lines = []
    for key, by_competitor in _contests(rows).items():
        function, shape, granularity, dtype, _ = key
        ours = next(by_competitor[name] for name in OURS if name in by_competitor)
        share = ours["share_of_copy"] if function == "multiply_noise" else None
        lines.append(
            (
                f"`{function}`" + (f", {granularity}" if granularity else ""),
                "×".join(f"{size:,}" for size in shape) + ("" if dtype == "float32" else f", {dtype}"),
                f"{_milliseconds(ours)} ({ours['competitor']})",
                *(
                    "" if by_competitor.get(name) is ours else _milliseconds(by_competitor.get(name))
                    for name in ("torch", "plain", "compiled")
                ),
                _spread(ours["ratio_to_plain"]),
                f"{_rounded(100 * share['value'], 2)}%" if share else "",
                _saved(ours),
                _saved(by_competitor.get("plain")),
            )
        )
    columns = (
        *("function, granularity", "shape", "project, ms", "its torch path", "plain", "compiled plain"),
        *("project's time over plain's", "rate over a copy's", "kept for backward", "by plain"),
    )
    return (
        f"{table(columns, lines)}\n\nForward and backward together, where a function has a backward. Kept for "
        "backward: in units of x, without x, μ and log σ themselves."
    )


def _contests(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Return the telling rows by what is competed in and by competitor."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    rows = list(rows)
    with_backward = {row["function"] for row in rows if row["direction"] == "both"}
    for row in rows:
        whole = row["direction"] == ("both" if row["function"] in with_backward else "forward")
        if whole and tuple(row["shape"]) in TELLING_SHAPES[row["function"]]:
            key = (row["function"], tuple(row["shape"]), row["granularity"], row["dtype"], row["direction"])
            found.setdefault(key, {})[row["competitor"]] = row
    return found


def _step_table(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    base: dict[tuple[str, ...], Row] = {}
    for row in rows:
        setting = (row["network"], row["mode"], row["dtype"])
        if row["way"] == "no noise":
            base[setting] = row
        elif row["granularity"] == "element" or row["mode"] == "eager":
            groups.setdefault((*setting, row["granularity"]), {})[row["way"]] = row
    shown = [way for way in STEP_COLUMNS if any(way in ways for ways in groups.values())]
    of_memory = [way for way in MEMORY_COLUMNS if any(_memory(ways.get(way)) for ways in groups.values())]
    lines = []
    for (network, mode, dtype, granularity), ways in groups.items():
        (any_way, *_) = ways.values()
        without = base.get((network, mode, dtype))
        paper = any_way["paper_ratio"]
        of_paper = "" if paper is None or granularity != "element" else f"{paper:g}"
        lines.append(
            (
                network
                + (" (stand-in)" if any_way["stand_in"] else "")
                # Older rows do not say it.
                + (", channels_last" if any_way.get("channels_last") else ""),
                mode + ("" if dtype == "float32" else f", {dtype}"),
                granularity,
                _milliseconds(without),
                *(_spread(ways[way]["ratio"]) if way in ways else "" for way in shown),
                *(_memory(ways.get(way)) for way in of_memory),
                of_paper + (" (the whole network)" if of_paper and any_way["stand_in"] else ""),
            )
        )
    columns = (
        *("network", "mode", "granularity", "without noise, ms"),
        *(STEP_COLUMNS[way] for way in shown),
        *(MEMORY_COLUMNS[way] for way in of_memory),
        "the paper's code (a GPU)",
    )
    return table(columns, lines)


def _memory(row: Row | None) -> str:
    """Return the peak memory of a step over that without noise; "" where it was not measured."""
    ratio = None if row is None else row.get("peak_memory")
    return "" if ratio is None else f"{ratio:.2f}"


def _pruning_tables(rows: Sequence[Row]) -> str:
    actions = [
        ("decision by " + row["criterion"] if row["kind"] == "decision" else row["kind"], row)
        for row in rows
        if row["kind"] != "latency"
    ]
    latencies: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "latency":
            latencies.setdefault((row["network"], row["batch"]), {})[row["model"]] = row
    first = table(
        ("", "network", "ms"), [(name, row["network"], _milliseconds(row)) for name, row in actions]
    )
    second = table(
        ("inference of", "batch", "dense, ms", "masked", "compacted", "speedup of compacted over dense"),
        [
            (
                *(network, batch),
                *(_milliseconds(models.get(name)) for name in ("dense", "masked", "compacted")),
                _spread(models["compacted"]["speedup"]) if "compacted" in models else "",
            )
            for (network, batch), models in latencies.items()
        ],
    )
    return "\n\n".join(part for part, found in ((first, bool(actions)), (second, bool(latencies))) if found)


def _scaling_table(rows: Sequence[Row]) -> str:
    lines = [
        (
            f"{row['name']} ({row['backend']})",
            f"{row['sizes'][0]:,} to {row['sizes'][-1]:,} {row['unit']}",
            " to ".join(_rounded(row["milliseconds"][end]["median"], 3) for end in (0, -1)),
            f"{row['slope']:.2f}{', too steep' if row['defect'] else ''}",
        )
        for row in rows
    ]
    return table(("what", "sizes", "ms", "slope"), lines)


def _milliseconds(row: Row | None) -> str:
    return _rounded(row["milliseconds"]["median"], 3) if row else ""


def _spread(found: Mapping[str, float] | None) -> str:
    if not found:
        return ""
    value, low, high = (_rounded(found[key], 2) for key in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def _saved(row: Row | None) -> str:
    kept = row and row["saved_for_backward"]
    return f"{round(kept['others'], 2):g}" if kept else ""


def _rounded(value: float, digits: int) -> str:
    """Return so many significant digits, without an exponent for large numbers."""
    return f"{float(f'{value:.{digits}g}'):,.15g}"
