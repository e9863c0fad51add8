"""Committed measurements: JSON lines, one file for each kind of machine, one line for each thing measured.

A line carries its suite, the machine, the versions, the commit and the date, so that it can be read alone. A suite that
is measured again replaces its own lines and no others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT

RESULTS = ROOT / "benchmarks" / "results"

Record = dict[str, Any]


def machine_of(about: Mapping[str, Any]) -> str:
    """Return the name of the kind of machine that ``environment.environment`` describes."""
    name = about["GPU"] if "GPU" in about else f"{about['CPU']} {about['threads']} threads"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def save(
    suite: str, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any], folder: Path = RESULTS
) -> Path:
    """Put a suite's rows in place of its earlier ones in the machine's file, and return the file.

    Args:
        suite: "functions", "step", "pruning" or "scaling".
        rows: what was measured; plain values that JSON can hold.
        about: what ``environment.environment`` returned.
        folder: where the files are; made if it does not exist.
    """
    machine = machine_of(about)
    path = folder / f"{machine}.jsonl"
    kept = [row for row in _lines(path) if row["suite"] != suite] if path.exists() else []
    head = {"suite": suite, "machine": machine, "environment": dict(about)}
    lines = [*kept, *(head | dict(row) for row in rows)]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def load(suite: str, folder: Path = RESULTS) -> dict[str, list[Record]]:
    """Return a suite's rows by machine, in alphabetical order; machines without any are left out."""
    found = {
        path.stem: [row for row in _lines(path) if row["suite"] == suite]
        for path in sorted(folder.glob("*.jsonl"))
    }
    return {machine: rows for machine, rows in found.items() if rows}


def _lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
