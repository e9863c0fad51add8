"""What the examples on pretrained networks printed: from their ``results.json``, as the guide shows them."""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.markdown import table


def _tables(name: str, results: Path) -> str:
    found = [json.loads(path.read_text("utf-8")) for path in (results / "examples").glob(f"{name}-*.json")]
    temperatures = sorted({data["temperature"] for data in found})
    return "\n\n".join(
        _table(
            sorted(
                (data for data in found if data["temperature"] == temperature), key=lambda data: data["seed"]
            )
        )
        for temperature in temperatures
    )


def _table(seeds: list[dict[str, Any]]) -> str:
    data = seeds[0]
    columns = (
        *("network", "parameters", "MFLOPs"),
        *("test accuracy, %, pruned", "refitted", "fine-tuned", "time of a batch"),
    )
    numbers = ", ".join(str(each["seed"]) for each in seeds)
    several = f"s {numbers}, means and each one" if len(seeds) > 1 else f" {numbers}"
    about = (
        f"Temperature {data['temperature']:g}, seed{several}; {data['training']:,} examples for training, "
        f"{data['test']:,} for the test, on which a standard error is {_standard_error(data):.1f} points; "
        f"torch {data['torch']}, threads: {data['threads']}, "
        f"{max(each['cpu_seconds'] for each in seeds) / 60:.0f} minutes of CPU time at most:"
    )
    lines = list(zip(*(each["rows"] for each in seeds), strict=True))
    return f"{about}\n\n{table(columns, [_line(rows, lines[0]) for rows in lines])}"


def _line(rows: tuple[dict[str, Any], ...], dense: tuple[dict[str, Any], ...]) -> tuple[str, ...]:
    def mean(key: str, of: tuple[dict[str, Any], ...] = rows) -> float:
        return statistics.mean(row[key] for row in of)

    def percent(key: str) -> str:
        each = ", ".join(f"{100 * row[key]:.1f}" for row in rows)
        return f"{100 * mean(key):.1f} ({each})" if len(rows) > 1 else each

    def percent_if_there(key: str) -> str:
        return percent(key) if all(row.get(key) is not None for row in rows) else ""

    return (
        rows[0]["network"],
        f"{mean('parameters'):,.0f} ({mean('parameters') / mean('parameters', dense):.0%})",
        f"{mean('flops') / 1e6:,.0f} ({mean('flops') / mean('flops', dense):.0%})",
        percent("pruned"),
        percent_if_there("refitted"),
        percent("fine_tuned"),
        f"{mean('time'):.2f}",
    )


def _standard_error(data: dict[str, Any]) -> float:
    accuracy = data["rows"][0]["pruned"]
    return 100 * float(accuracy * (1 - accuracy) / data["test"]) ** 0.5


minilm = partial(_tables, "minilm")
efficientnet_lite0 = partial(_tables, "efficientnet_lite0")
