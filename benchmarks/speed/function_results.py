"""What pytest-benchmark measured of the functions: its turns put together, and the rows that are kept.

Every competitor of a case has several turns, each a test of its own, so that the turns of different competitors can
alternate. Put together, they are one benchmark, which pytest-benchmark shows, saves and compares.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.markdown import table
from benchmarks.speed.competitors import Contest
from benchmarks.speed.stopwatch import quantiles

FIRST_TURN = "-turn-1"


def turn_name(group: str, competitor: str, turn: int) -> str:
    """Return the name of a competitor's turn; turns count from 1."""
    return f"{group} {competitor} turn {turn}".replace(" ", "-")


def description(contest: Contest, direction: str, competitor: str) -> dict[str, Any]:
    """Return what a row says of a competitor beside its times; its memory is measured for this."""
    case = contest.case
    keeps = direction == "both" and competitor != "copy"
    return {
        "function": case.function,
        "shape": list(case.activation.shape),
        "dim": case.activation.dim,
        "large": case.large,
        "dtype": case.dtype,
        "granularity": case.granularity,
        "direction": direction,
        "competitor": competitor,
        "bytes_moved": case.bytes_moved(direction),
        "peak_memory": contest.peak_memory(competitor, direction),
        "saved_for_backward": contest.saved_for_backward(competitor) if keeps else None,
    }


def join_turns(benchmarks: list[Any]) -> None:
    """Put the turns of each competitor together, in place.

    Args:
        benchmarks: pytest-benchmark's own, as its session keeps them; those that failed stay as they are.
    """
    joined: dict[tuple[str, str], Any] = {}
    for turn in list(benchmarks):
        if turn.has_error or not turn.stats.data or "turn" not in (turn.params or {}):
            continue
        first = joined.setdefault((turn.group, turn.params["competitor"]), turn)
        first.extra_info.setdefault("turns", []).append(1e3 * statistics.median(turn.stats.data))
        if first is not turn:
            first.stats.data.extend(turn.stats.data)
            benchmarks.remove(turn)
    for whole in joined.values():
        case, direction, competitor = (whole.params[name] for name in ("case", "direction", "competitor"))
        whole.params = {"case": case.name, "direction": direction, "competitor": competitor}
        for name in ("name", "fullname", "param"):
            setattr(whole, name, getattr(whole, name).replace(FIRST_TURN, ""))


def rows_of(benchmarks: Iterable[Any]) -> list[dict[str, Any]]:
    """Return a row for each case, direction and competitor; ratios are between the medians of a turn."""
    contests: dict[str, dict[str, Any]] = {}
    for benchmark in benchmarks:
        if "turns" in benchmark.extra_info:
            contests.setdefault(benchmark.group, {})[benchmark.extra_info["competitor"]] = benchmark
    rows = []
    for by_competitor in contests.values():
        turns = {name: each.extra_info["turns"] for name, each in by_competitor.items()}
        for name, benchmark in by_competitor.items():
            about = benchmark.extra_info
            milliseconds = quantiles([1e3 * seconds for seconds in benchmark.stats.data])
            rows.append(
                {
                    **about,
                    "milliseconds": milliseconds,
                    "gb_per_s": about["bytes_moved"] / milliseconds["median"] / 1e6,
                    "share_of_copy": _over(turns.get("copy"), turns[name]),
                    "ratio_to_plain": _over(turns[name], turns.get("plain")),
                }
            )
    return rows


def rates_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return for a terminal what pytest-benchmark's own tables, of times, do not say."""
    columns = ("function", "shape", "granularity", "dtype", "direction", "competitor")
    lines = [
        (
            *(row["function"], "x".join(map(str, row["shape"])), row["granularity"] or "", row["dtype"]),
            *(row["direction"], row["competitor"], f"{row['gb_per_s']:.2f}"),
            *(f"{row[key]['value']:.2f}" if row[key] else "" for key in ("share_of_copy", "ratio_to_plain")),
        )
        for row in rows
    ]
    return table((*columns, "GB/s", "of copy's rate", "of plain's time"), lines)


def _over(first: Sequence[float] | None, second: Sequence[float] | None) -> dict[str, float] | None:
    """Return the ratio of two competitors' medians in a turn: its median, lowest and highest over the turns."""
    if first is None or second is None:
        return None
    by_turn = [a / b for a, b in zip(first, second, strict=True)]
    return {"value": statistics.median(by_turn), "low": min(by_turn), "high": max(by_turn)}
