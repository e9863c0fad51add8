"""The README's tables of speed, made from made-up records."""

from __future__ import annotations

import pytest
from speed_rows import ABOUT, GPU, all_rows, function_rows, pruning_rows, step_rows

from benchmarks import records
from benchmarks.__main__ import main
from benchmarks.speed.step import AUTHORS_LAYERS, RECOMPUTED
from benchmarks.tables import plots, readme

SUITES = ("functions", "step", "pruning", "scaling")


@pytest.fixture
def results(tmp_path):
    for suite, rows in all_rows().items():
        records.save(suite, rows, ABOUT, tmp_path)
    return tmp_path


def cells(text: str) -> list[list[str]]:
    """Return the cells of all table rows, headings included."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("suite", SUITES)
def test_a_table_begins_with_what_ran_where(suite, results):
    lines = readme.BLOCKS[suite](results).splitlines()
    assert lines[0] == "Some(R) CPU, 2 threads; torch 2.13.0, triton 3.9.0, numba: none; 2026-01-02:"
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert len(widths) > 2
    if suite != "pruning":  # two tables
        assert len(set(widths)) == 1


@pytest.mark.parametrize("suite", SUITES)
def test_without_results_there_is_no_table(suite, tmp_path):
    assert readme.BLOCKS[suite](tmp_path) == ""


def test_machines_follow_each_other(results):
    records.save("step", step_rows(), GPU, results)
    text = readme.BLOCKS["step"](results)
    assert text.index("Some(R) CPU") < text.index("Some GPU; torch")
    assert "Some GPU" not in readme.BLOCKS["scaling"](results)


def test_functions_show_telling_rows_with_ratios_and_memory(results):
    _, _, *lines = cells(readme.BLOCKS["functions"](results))
    names = [(line[0], line[1]) for line in lines]
    assert names == [
        ("`multiply_noise`, element", "64×18×28×28"),
        ("`multiply_noise`, element", "128×100"),
        ("`multiply_noise`, sample", "64×18×28×28"),
        ("`kl_divergence`", "26,560"),
        ("`noise_snr`", "26,560"),
    ]
    assert lines[0][2:] == ["2 (numba)", "12", "6", "", "0.33 (0.3–0.4)", "25%", "0.01", "4.25"]
    assert lines[3][7] == ""  # what a copy of the structures takes tells nothing


def test_a_machine_without_a_faster_backend_shows_its_torch_path_once(tmp_path):
    rows = [row for row in function_rows() if row["competitor"] in ("torch", "plain", "copy")]
    records.save("functions", rows, ABOUT, tmp_path)
    _, _, *lines = cells(readme.BLOCKS["functions"](tmp_path))
    assert lines[0][2:5] == ["12 (torch)", "", "6"]
    assert lines[0][6] == "2 (1.8–2.4)"


def test_steps_show_losses_and_stand_ins(results):
    _, _, *lines = cells(readme.BLOCKS["step"](results))
    ratios = ["1.5 (1.4–1.8)", "2.5 (2.2–3)"]
    assert lines == [
        ["LeNet-5", "eager", "element", "4", *ratios, "4.9"],
        ["small ResNet-50 (stand-in)", "eager", "element", "4", *ratios, "6.9 (the whole network)"],
    ]


def test_the_authors_layers_have_a_column_once_they_are_measured(tmp_path):
    rows = step_rows()
    rows.append(rows[1] | {"way": AUTHORS_LAYERS, "ratio": {"value": 1.75, "low": 1.5, "high": 2.0}})
    records.save("step", rows, GPU, tmp_path)
    header, _, first, second = cells(readme.BLOCKS["step"](tmp_path))
    assert header[4:7] == ["with noise: project", "`bmrs.compat`", "plain formulas"]
    assert first[4:7] == ["1.5 (1.4–1.8)", "1.8 (1.5–2)", "2.5 (2.2–3)"]
    assert second[5] == ""


def test_memory_has_columns_once_it_is_measured(tmp_path):
    rows = step_rows()
    rows.append(rows[1] | {"way": RECOMPUTED, "peak_memory": 1.004})
    rows[1]["peak_memory"] = 1.41
    records.save("step", rows, GPU, tmp_path)
    header, _, first, second = cells(readme.BLOCKS["step"](tmp_path))
    assert header[4:9] == [
        *("with noise: project", "with `recompute`", "plain formulas", "peak memory", "with `recompute`"),
    ]
    assert first[7:9] == ["1.41", "1.00"]
    assert second[7:9] == ["", ""]


def test_other_granularities_in_one_mode_only(tmp_path):
    rows = step_rows()[:3]
    for mode in ("eager", "cuda graph"):
        rows.append(rows[1] | {"granularity": "batch", "mode": mode})
    records.save("step", rows, GPU, tmp_path)
    _, _, *lines = cells(readme.BLOCKS["step"](tmp_path))
    assert [line[1:3] for line in lines] == [["eager", "element"], ["eager", "batch"]]


def test_pruning(results):
    text = readme.BLOCKS["pruning"](results)
    assert "| decision by BMRSNormal() | MLP | 3.5 |" in text
    assert "| compaction | MLP | 7.5 |" in text
    assert "| MLP | 8 | 1 | 2 | 0.25 | 4 (3.6–4.8) |" in text


def test_pruning_without_latencies(tmp_path):
    records.save("pruning", pruning_rows()[:1], ABOUT, tmp_path)
    lines = readme.BLOCKS["pruning"](tmp_path).splitlines()
    assert sum(line.startswith("| ---") for line in lines) == 1


def test_scaling_names_defects(results):
    text = readme.BLOCKS["scaling"](results)
    assert "| kl_divergence (torch) | 100 to 10,000 structures | 1 to 20 | 0.97 |" in text
    assert "| 1.30, too steep |" in text


def test_plots_are_shown_where_there_are_rows_for_them(results):
    for suite, kind in (("functions", "throughput"), ("step", "overhead"), ("scaling", "scaling")):
        path = f"](benchmarks/results/{records.machine_of(ABOUT)}-{kind}.png)"
        assert path in readme.BLOCKS[suite](results)
    assert "![" not in readme.BLOCKS["pruning"](results)


def test_the_command_writes_and_checks_tables_and_plots(results, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    text = results / "README.md"
    text.write_text("<!-- results: scaling -->\n<!-- end -->\n", "utf-8")
    monkeypatch.setattr(readme, "README", text)
    monkeypatch.setattr(readme, "RESULTS", results)
    assert main(["readme", "--check"]) == 1
    assert "README.md" in capsys.readouterr().err
    assert main(["readme"]) == 0
    assert main(["readme", "--check"]) == 0
    plot = next(results.glob("*-overhead.png"))
    plot.unlink()
    assert main(["readme", "--check"]) == 1
    assert plot.name in capsys.readouterr().err
    assert plots.write(results) == [plot]
