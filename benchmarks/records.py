"""Committed measurements: JSON lines, one file for each kind of machine, one line for each thing measured.

A line carries its suite, the machine, the versions, the commit and the date, so that it can be read alone. A suite that
is measured again replaces its own lines and no others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
    suite: str,
    rows: Iterable[Mapping[str, Any]],
    about: Mapping[str, Any],
    folder: Path = RESULTS,
    *,
    setting: Sequence[str] = (),
) -> Path:
    """Put a suite's rows in place of its earlier ones in the machine's file, and return the file.

    Args:
        suite: "functions", "step", "pruning" or "scaling".
        rows: what was measured; plain values that JSON can hold.
        about: what ``environment.environment`` returned.
        folder: where the files are; made if it does not exist.
        setting: names of values. Earlier rows stay if no new one agrees with them in all of these, so that a suite
            can be measured by several commands, where one would take too long.
    """
    machine, rows = machine_of(about), list(rows)
    path = folder / f"{machine}.jsonl"

    def setting_of(row: Mapping[str, Any]) -> str:
        return json.dumps([row[name] for name in setting])

    measured = {setting_of(row) for row in rows}
    kept = [
        row
        for row in (_lines(path) if path.exists() else [])
        if row["suite"] != suite or (setting and setting_of(row) not in measured)
    ]
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
