"""What the examples on pretrained networks printed: from their ``results.json``, as the guide shows them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.markdown import table


def _tables(name: str, results: Path) -> str:
    found = sorted((results / "examples").glob(f"{name}*.json"))
    return "\n\n".join(_table(json.loads(path.read_text("utf-8"))) for path in found)


def _table(data: dict[str, Any]) -> str:
    dense = data["rows"][0]
    columns = ("network", "parameters", "MFLOPs", "test accuracy, %, pruned", "fine-tuned", "time of a batch")
    about = (
        f"Temperature {data['temperature']:g}, seed {data['seed']}; {data['training']:,} examples for training, "
        f"{data['test']:,} for the test, on which a standard error is {_standard_error(data):.1f} points; "
        f"torch {data['torch']}, threads: {data['threads']}, {data['cpu_seconds'] / 60:.0f} minutes of CPU time:"
    )
    return f"{about}\n\n{table(columns, [_line(row, dense) for row in data['rows']])}"


def _line(row: dict[str, Any], dense: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["network"],
        f"{row['parameters']:,} ({row['parameters'] / dense['parameters']:.0%})",
        f"{row['flops'] / 1e6:,.0f} ({row['flops'] / dense['flops']:.0%})",
        f"{row['pruned'] * 100:.1f}",
        "not measured" if row["fine_tuned"] is None else f"{row['fine_tuned'] * 100:.1f}",
        f"{row['time']:.2f}",
    )


def _standard_error(data: dict[str, Any]) -> float:
    accuracy = data["rows"][0]["pruned"]
    return 100 * float(accuracy * (1 - accuracy) / data["test"]) ** 0.5


minilm = partial(_tables, "minilm")
efficientnet_lite0 = partial(_tables, "efficientnet_lite0")
