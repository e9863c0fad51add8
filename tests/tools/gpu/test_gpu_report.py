"""The report of the GPU check: what it records, and which targets are met."""

from __future__ import annotations

import json

import pytest
from gpu_rows import times, timing_row

from benchmarks.gpu import report as gpu_report
from benchmarks.speed.stopwatch import ratio


def target(rows: list[dict], words: str) -> dict:
    (found,) = (each for each in gpu_report.targets(rows) if words in each["target"])
    return found


def test_targets_name_what_missed_them():
    rows = [timing_row(0.95), timing_row(0.85, activation="other"), timing_row(0.5, granularity="element")]
    found = target(rows, "sample noise in float32, forward")
    assert found["met"] is False
    assert found["measured"] == 2
    assert found["missed"] == ["other float32 sample forward"]
    assert found["worst"] == pytest.approx(0.85)
    assert target(rows, "element noise in float32, forward")["met"] is False
    assert target(rows, "sample noise in bfloat16, forward")["met"] is None
    assert target(rows, "compiled")["met"] is None


def test_targets_are_met_at_their_limits():
    rows = [timing_row(0.9), timing_row(0.6, granularity="element"), timing_row(0.9, eager=5.0)]
    for words in ("sample noise in float32, forward", "element noise in float32, forward", "5 times faster"):
        assert target(rows, words)["met"] is True
    assert target([timing_row(0.9, eager=4.9)], "5 times faster")["met"] is False


def test_targets_against_a_copy_leave_out_what_a_cache_holds():
    small = timing_row(0.1, x_bytes=(64 << 20) - 1, eager=1.0)
    assert target([small], "sample noise in float32, forward")["met"] is None
    assert target([small], "5 times faster")["met"] is False


def test_stages_are_recorded_and_guarded(tmp_path):
    report = gpu_report.Report(tmp_path / "new" / "folder", {"GPU": "a | b"})

    def broken() -> dict:
        raise ArithmeticError("no such number")

    report.stage("good", lambda: {"summary": "all well", "failures": [], "number": 3})
    report.stage("broken", broken)
    report.stage("wrong", lambda: {"summary": "2 of 3", "failures": ["one differs"]})
    report.stage("absent", lambda: {"summary": "skipped: no tool", "failures": [], "skipped": True})
    assert report.failed == ["broken", "wrong"]
    report.data["timing"] = [timing_row(0.95, eager=7.0), timing_row(0.5, direction="both")]
    report.data["timing"][1]["peak_memory"] = {"triton": 2.0, "eager": 3.5}
    report.data["tiny"] = {"triton": 0.1}
    report.data["structures"] = [
        {
            "name": "KL",
            "structures": 26_560,
            "times": {"triton": times(1.0), "torch": times(3.0)},
            "wall_ms": {"triton": 1.0, "torch": 4.0},
            "speedup": ratio(times(3.0), times(1.0)),
        }
    ]
    report.write()
    stored = json.loads((report.folder / "gpu_check.json").read_text("utf-8"))
    assert [stage["status"] for stage in stored["stages"].values()] == [
        "passed",
        "failed",
        "failed",
        "skipped",
    ]
    assert stored["stages"]["good"]["number"] == 3
    assert "no such number" in stored["stages"]["broken"]["failures"][0]
    text = (report.folder / "gpu_check.md").read_text("utf-8")
    for part in (
        "| GPU | a \\| b |",
        "| good | passed |",
        "- broken: ArithmeticError: no such number",
        "95 % (95–95)",
        "7.0 × (7.0–7.0)",
        "2.00 / 3.50 / –",
        "26,560",
        "| triton | 0.1000 |",
        "not measured",
    ):
        assert part in text
    widths = {}
    for line in text.splitlines():
        if line.startswith("|"):
            columns = line.replace("\\|", "").count("|")
            assert widths.setdefault("now", columns) == columns
        else:
            widths.clear()
    assert sorted(path.name for path in report.folder.iterdir()) == ["gpu_check.json", "gpu_check.md"]
