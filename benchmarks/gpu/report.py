"""The record of a GPU check: written as JSON and Markdown after every stage."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from bmrs.files.atomic import write_atomically

MIB = 1 << 20
# The targets are for an H100 and for activations that do not fit into its cache.
TARGET_BYTES = 64 * MIB


class Report:
    """Results so far, and the folder in which they are kept."""

    def __init__(self, folder: Path, environment: dict[str, Any]) -> None:
        self.folder = folder
        self.started = time.monotonic()
        self.data: dict[str, Any] = {
            "environment": environment,
            "stages": {},
            "targets": [],
            "timing": [],
            "structures": [],
            "tiny": {},
        }
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def failed(self) -> list[str]:
        """Names of the stages that failed."""
        return [name for name, stage in self.data["stages"].items() if stage["status"] == "failed"]

    def stage(self, name: str, function: Callable[[], dict[str, Any]]) -> None:
        """Run a stage, which returns at least a summary and failures; record it whatever happens."""
        self.say(f"{name} ...")
        started = time.monotonic()
        try:
            found = dict(function())
            status = "failed" if found["failures"] else "skipped" if found.pop("skipped", False) else "passed"
        except Exception as error:
            found = {
                "summary": f"{type(error).__name__}: {error}",
                "failures": [traceback.format_exc()[-5000:]],
            }
            status = "failed"
        seconds = time.monotonic() - started
        with self._lock:
            self.data["stages"][name] = {"status": status, "seconds": round(seconds, 1), **found}
        self.write()
        self.say(f"{name}: {status} after {seconds:.1f} s: {found['summary']}")
        for failure in found["failures"][:5]:
            self.say(f"    {one_line(failure)}")

    def write(self) -> None:
        """Bring the files up to date, so that a run that is killed leaves its last complete state."""
        with self._lock:
            self.data["targets"] = targets(self.data["timing"])
            self.data["seconds"] = round(self.elapsed_s, 1)
            write_atomically(
                self.folder / "gpu_check.json", (json.dumps(self.data, indent=1) + "\n").encode()
            )
            write_atomically(self.folder / "gpu_check.md", markdown(self.data).encode())

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{self.elapsed_s:6.1f} s] {text}", flush=True)


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each target with its worst row: met is None where nothing was measured."""
    large = [row for row in rows if row["x_bytes"] >= TARGET_BYTES and row["direction"] != "both"]
    shared = [row for row in large if row["granularity"] in ("sample", "batch")]
    single = [row for row in large if row["granularity"] == "element" and row["dtype"] == "float32"]
    found = [
        _target(
            f"{granularity} noise in {dtype}, {direction}: at least 90 % of a copy's bytes per second",
            0.9,
            _shares(shared, granularity=granularity, dtype=dtype, direction=direction),
        )
        for granularity in ("sample", "batch")
        for dtype in ("float32", "bfloat16")
        for direction in ("forward", "backward")
    ]
    found += [
        _target(
            f"element noise in float32, {direction}: at least 60 % of a copy's bytes per second",
            0.6,
            _shares(single, direction=direction),
        )
        for direction in ("forward", "backward")
    ]
    for rival, limit, words in (
        ("compiled", 1.0, "faster than the compiled plain formula"),
        ("eager", 5.0, "at least 5 times faster than the torch reference"),
    ):
        measured = [(row["speedup"][rival]["value"], row) for row in rows if rival in row["speedup"]]
        found.append(_target(f"every case {words}", limit, measured))
    return found


def _shares(rows: Sequence[dict[str, Any]], **wanted: str) -> list[tuple[float, dict[str, Any]]]:
    return [
        (row["share_of_copy"]["value"], row)
        for row in rows
        if all(row[key] == value for key, value in wanted.items())
    ]


def _target(name: str, limit: float, measured: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    missed = sorted((value, row_name(row)) for value, row in measured if value < limit)
    lowest = min(((value, row_name(row)) for value, row in measured), default=(None, None))
    return {
        "target": name,
        "limit": limit,
        "measured": len(measured),
        "met": None if not measured else not missed,
        "worst": lowest[0],
        "worst_case": lowest[1],
        "missed": [case for _, case in missed],
    }


def row_name(row: dict[str, Any]) -> str:
    """Return a row's name for people."""
    return f"{row['activation']} {row['dtype']} {row['granularity']} {row['direction']}"


def markdown(data: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    parts = ["# GPU check", table(("", ""), list(data["environment"].items()))]
    stages = [
        (name, stage["status"], f"{stage['seconds']:.1f}", one_line(stage["summary"]))
        for name, stage in data["stages"].items()
    ]
    parts += ["## Stages", table(("stage", "status", "s", "result"), stages)]
    failures = [
        f"- {name}: {one_line(failure)}"
        for name, stage in data["stages"].items()
        for failure in stage["failures"][:20]
    ]
    if failures:
        parts += ["## Failures", "\n".join(failures)]
    if data["timing"]:
        parts += ["## Targets", TARGETS_NOTE, targets_table(data["targets"])]
        parts += ["## multiply_noise", TIMING_NOTE, timing_table(data["timing"])]
    if data["structures"]:
        parts += ["## Functions of the structures", STRUCTURES_NOTE, structures_table(data["structures"])]
    if data["tiny"]:
        tiny = [(name, f"{milliseconds:.4f}") for name, milliseconds in data["tiny"].items()]
        parts += ["## A layer bound by its launches", TINY_NOTE, table(("implementation", "wall ms"), tiny)]
    return "\n\n".join(parts) + "\n"


TARGETS_NOTE = (
    "For an H100 and activations of 64 MiB or more where a copy is compared with; all cases elsewhere."
)
TIMING_NOTE = """\
Milliseconds are medians of event times with p20 and p80 over all calls; the competitors take turns, and ratios carry
the smallest and largest value of a round. Launches are queued beforehand, so the times are the GPU's own; † marks where
the queue did not hold them. *GB/s* counts what has to be moved at least (forward: x → out; backward: grad, x → grad_x);
*of copy* compares with a device copy of as many bytes. *eager* is `backend="torch"` on the GPU, whose launches are too
many to be queued; *compiled* is the plain formula of `benchmarks.rivals.plain` under `torch.compile`, which draws from
torch's generator and is inexact in the tails. *peak* is the memory that forward and backward allocate on top of their
inputs, in units of x: Triton / eager / compiled. Activations that fit into the L2 cache are measured with the cache
emptied."""
STRUCTURES_NOTE = "GPU milliseconds as above, and wall milliseconds per call with launches."
TINY_NOTE = "Forward and backward of (128, 100), element noise: wall time per step, launches included."


def targets_table(found: Sequence[dict[str, Any]]) -> str:
    """Return the table of targets."""
    rows = []
    for target in found:
        met = {True: "met", False: f"missed by {len(target['missed'])}", None: "not measured"}[target["met"]]
        worst = "" if target["worst"] is None else f"{target['worst']:.2f}"
        rows.append((target["target"], met, str(target["measured"]), worst, target["worst_case"] or ""))
    return table(("target", "", "cases", "lowest", "where"), rows)


def timing_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of timings."""
    lines = []
    for row in rows:
        times = row["times"]
        triton = times["triton"]
        hidden = "" if triton["queued"] else " †"
        peak = row.get("peak_memory", {})
        lines.append(
            (
                row["activation"],
                row["dtype"],
                row["granularity"],
                row["direction"],
                f"{triton['median']:.4f} ({triton['p20']:.4f}–{triton['p80']:.4f}){hidden}",
                f"{row['gb_per_s']:.0f}",
                spread(row["share_of_copy"], 100.0, " %"),
                spread(row["speedup"].get("eager"), 1.0, " ×"),
                spread(row["speedup"].get("compiled"), 1.0, " ×"),
                " / ".join(
                    f"{peak[name]:.2f}" if name in peak else "–" for name in ("triton", "eager", "compiled")
                )
                if peak
                else "",
            )
        )
    columns = ("x", "dtype", "noise", "", "Triton ms", "GB/s", "of copy", "vs eager", "vs compiled", "peak")
    return table(columns, lines)


def structures_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of per-structure functions."""
    lines = [
        (
            row["name"],
            f"{row['structures']:,}",
            *(f"{row['times'][name]['median']:.4f}" for name in ("triton", "torch")),
            spread(row["speedup"], 1.0, " ×"),
            *(f"{row['wall_ms'][name]:.3f}" for name in ("triton", "torch")),
        )
        for row in rows
    ]
    columns = ("", "structures", "Triton ms", "torch ms", "ratio", "Triton wall ms", "torch wall ms")
    return table(columns, lines)


def spread(ratio: dict[str, float] | None, factor: float, unit: str) -> str:
    """Return a ratio with its range."""
    if ratio is None:
        return ""
    value, low, high = (factor * ratio[key] for key in ("value", "low", "high"))
    digits = 0 if factor > 1 or value >= 20 else 2 if value < 3 else 1
    return f"{value:.{digits}f}{unit} ({low:.{digits}f}–{high:.{digits}f})"


def one_line(text: str) -> str:
    """Return the last line of a text, cut short: of a traceback, the error."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""
