"""What the function benchmarks measured, by case, direction and competitor."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.speed.competitors import Contest
from benchmarks.speed.function_cases import FunctionCase
from benchmarks.speed.stopwatch import Round, summary
from benchmarks.tables.markdown import table


class Item(NamedTuple):
    """One competitor's turn."""

    case: FunctionCase
    direction: str
    turn: int
    competitor: str

    @property
    def group(self) -> str:
        """Name of what is competed in."""
        return f"{self.case.name} {self.direction}"

    @property
    def name(self) -> str:
        """Name of the turn."""
        return f"{self.group} turn {self.turn + 1} {self.competitor}".replace(" ", "-")


class Measurements:
    """Collects turns."""

    def __init__(self) -> None:
        self._rounds: dict[tuple[FunctionCase, str], dict[str, list[Round]]] = {}
        self._memory: dict[tuple[FunctionCase, str, str], dict[str, Any]] = {}

    def add(self, item: Item, milliseconds: list[float], contest: Contest) -> None:
        """Add a turn; memory is measured in a competitor's first one."""
        by_competitor = self._rounds.setdefault((item.case, item.direction), {})
        by_competitor.setdefault(item.competitor, []).append(Round(milliseconds, queued=True))
        key = (item.case, item.direction, item.competitor)
        if key not in self._memory:
            keeps = item.direction == "both" and item.competitor != "copy"
            self._memory[key] = {
                "peak_memory": contest.peak_memory(item.competitor, item.direction),
                "saved_for_backward": contest.saved_for_backward(item.competitor) if keeps else None,
            }

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each case, direction and competitor; ratios are between the medians of a turn."""
        found = []
        for (case, direction), by_competitor in self._rounds.items():
            times = {competitor: summary(rounds) for competitor, rounds in by_competitor.items()}
            for competitor, milliseconds in times.items():
                found.append(
                    {
                        "function": case.function,
                        "shape": list(case.activation.shape),
                        "dim": case.activation.dim,
                        "large": case.large,
                        "dtype": case.dtype,
                        "granularity": case.granularity,
                        "direction": direction,
                        "competitor": competitor,
                        "milliseconds": {key: milliseconds[key] for key in ("median", "p20", "p80")},
                        "turns": milliseconds["rounds"],
                        "bytes_moved": case.bytes_moved(direction),
                        "gb_per_s": case.bytes_moved(direction) / milliseconds["median"] / 1e6,
                        "share_of_copy": _over(times.get("copy"), milliseconds),
                        "ratio_to_plain": _over(milliseconds, times.get("plain")),
                        **self._memory[case, direction, competitor],
                    }
                )
        return found


def results_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return all rows for a terminal."""
    columns = ("function", "shape", "granularity", "dtype", "direction", "competitor", "ms", "p20", "p80")
    lines = [
        (
            *(row["function"], "x".join(map(str, row["shape"])), row["granularity"] or "", row["dtype"]),
            *(row["direction"], row["competitor"]),
            *(f"{row['milliseconds'][key]:.4f}" for key in ("median", "p20", "p80")),
            f"{row['gb_per_s']:.2f}",
            *(f"{row[key]['value']:.2f}" if row[key] else "" for key in ("share_of_copy", "ratio_to_plain")),
        )
        for row in rows
    ]
    return table((*columns, "GB/s", "of copy's rate", "of plain's time"), lines)


def _over(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Return the ratio of two competitors' medians in a turn: its median, lowest and highest over the turns."""
    if first is None or second is None:
        return None
    by_turn = [a / b for a, b in zip(first["rounds"], second["rounds"], strict=True)]
    return {"value": statistics.median(by_turn), "low": min(by_turn), "high": max(by_turn)}
