"""The committed measurements: which rows stay when others are measured again."""

from __future__ import annotations

import pytest
from speed_rows import ABOUT, GPU

from benchmarks import records


def row(case, milliseconds, competitor="project"):
    return {"shape": [case, 3], "dim": 1, "competitor": competitor, "milliseconds": milliseconds}


def times(folder, suite="functions"):
    (rows,) = records.load(suite, folder).values()
    return [(each["shape"][0], each["competitor"], each["milliseconds"]) for each in rows]


@pytest.mark.parametrize(
    ("setting", "kept"),
    [((), []), (("shape", "dim"), [(1, "project", 1.0)]), (("dim",), [])],
    ids=["all", "shape and dim", "dim"],
)
def test_rows_stay_unless_their_setting_was_measured_again(setting, kept, tmp_path):
    records.save("functions", [row(1, 1.0), row(2, 2.0), row(2, 3.0, "plain")], ABOUT, tmp_path)
    records.save("other", [row(2, 9.0)], ABOUT, tmp_path)
    records.save("functions", [row(2, 4.0)], ABOUT, tmp_path, setting=setting)
    assert times(tmp_path) == [*kept, (2, "project", 4.0)]
    assert times(tmp_path, "other") == [(2, "project", 9.0)]


def test_nothing_measured_replaces_nothing_of_other_settings(tmp_path):
    records.save("functions", [row(1, 1.0)], ABOUT, tmp_path)
    records.save("functions", [], ABOUT, tmp_path, setting=("shape",))
    assert times(tmp_path) == [(1, "project", 1.0)]


def test_machines_have_files_of_their_own(tmp_path):
    for about in (ABOUT, GPU):
        path = records.save("functions", [row(1, 1.0)], about, tmp_path)
        assert path == tmp_path / f"{records.machine_of(about)}.jsonl"
    assert set(records.load("functions", tmp_path)) == {records.machine_of(each) for each in (ABOUT, GPU)}
    assert records.machine_of({"GPU": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
