"""The command that compacts the zoo: its rows and its table."""

import json
import re

import pytest

from benchmarks.__main__ import main as benchmarks
from benchmarks.experiments import compaction


def test_rows_and_table(tmp_path, capsys):
    assert benchmarks(["compaction", "conv1d", "highway", "--output", str(tmp_path), "--rounds", "1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert [row["network"] for row in rows] == ["conv1d", "highway"]
    for row in rows:
        assert row["form"] == "module"
        assert 0 < row["removed"] == row["pruned"] < row["structures"]
        assert row["parameters_after"] < row["parameters_before"]
        assert row["error"] < 1e-6
    assert rows[0]["torch_pruning_parameters"] < rows[0]["parameters_before"]
    table = (tmp_path / "table.md").read_text("utf-8")
    assert f"{rows[0]['parameters_before']:,} → {rows[0]['parameters_after']:,}" in table
    assert "| highway |" in capsys.readouterr().out


def test_refusals_are_rows_too():
    row = {"network": "x", "noise": "channels", "form": "refused", "because": "it does not run"}
    assert "refused: it does not run" in compaction.as_table([row])


def test_unknown_network(capsys):
    with pytest.raises(SystemExit):
        benchmarks(["compaction", "nonsense"])
    assert re.search(r"networks must be of resnet18, .*, got nonsense", capsys.readouterr().err)


def test_committed_table_is_that_of_the_committed_rows():
    committed = compaction.RESULTS / "compaction"
    lines = (committed / "rows.jsonl").read_text("utf-8").splitlines()
    table = (committed / "table.md").read_text("utf-8")
    assert compaction.as_table([json.loads(line) for line in lines]) in table
