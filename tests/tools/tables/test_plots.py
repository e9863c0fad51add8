"""The plots: that they are drawn from results, and that a stale one is noticed without being drawn."""

from __future__ import annotations

import pytest
from speed_rows import ABOUT, GPU, all_rows, function_rows, step_rows

from benchmarks import records
from benchmarks.tables import plots

MACHINE = records.machine_of(ABOUT)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("results")
    for suite, rows in all_rows().items():
        records.save(suite, rows, ABOUT, folder)
    (folder / "other.png").write_bytes(b"not a plot of these")
    plots.write(folder)
    return folder


def test_one_file_a_machine_and_kind(results):
    names = {path.name for path in results.glob("*.png")}
    assert names == {f"{MACHINE}-{kind}.png" for kind in ("overhead", "throughput", "scaling")} | {
        "other.png"
    }
    assert plots.stale_files(results) == []


def test_fresh_plots_are_left_alone(results):
    before = {path: path.stat().st_mtime_ns for path in results.glob("*.png")}
    assert plots.write(results) == []
    assert {path: path.stat().st_mtime_ns for path in results.glob("*.png")} == before


def test_stale_missing_and_surplus_plots_are_found_and_mended(results):
    rows = step_rows()
    rows[1]["ratio"]["value"] += 0.01
    records.save("step", rows, ABOUT, results)
    (results / f"{MACHINE}-scaling.png").unlink()
    surplus = results / "gone-overhead.png"
    surplus.write_bytes((results / f"{MACHINE}-overhead.png").read_bytes())
    found = [surplus, results / f"{MACHINE}-overhead.png", results / f"{MACHINE}-scaling.png"]
    assert plots.stale_files(results) == found
    assert plots.write(results) == found
    assert plots.stale_files(results) == []
    assert not surplus.exists()


def test_rows_that_a_plot_does_not_show_do_not_make_it_stale(results):
    rows = function_rows()
    shown = [row for row in rows if row["direction"] == "both" and row["function"] == "multiply_noise"]
    assert len(shown) < len(rows)
    records.save("functions", shown, ABOUT, results)
    assert plots.stale_files(results) == []
    records.save("functions", rows[:0], ABOUT, results)
    assert [path.name for path in plots.stale_files(results)] == [f"{MACHINE}-throughput.png"]
    records.save("functions", rows, ABOUT, results)


def test_digest_changes_with_any_value():
    first, second = step_rows(), step_rows()
    assert plots.digest(first) == plots.digest(second)
    second[0]["milliseconds"]["p80"] += 1e-9
    assert plots.digest(first) != plots.digest(second)


def test_every_plot_shows_all_its_values():
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = {}
    for plot in plots.PLOTS:
        drawn[plot.name] = figure_module.Figure()
        rows = plot.rows(all_rows()[plot.suite])
        assert rows
        plot.draw(drawn[plot.name], rows)
    heights = sorted(bar.get_height() for bar in drawn["overhead"].axes[0].patches)
    assert heights == sorted(row["ratio"]["value"] for row in step_rows() if row["way"] != "no noise")
    panels = drawn["throughput"].axes
    assert [panel.get_title() for panel in panels] == ["element", "sample"]
    assert [line.get_label() for line in panels[0].lines] == ["numba", "torch", "plain", "copy"]
    assert list(panels[0].lines[0].get_xdata()) == sorted(panels[0].lines[0].get_xdata())
    labels = [text.get_text() for text in drawn["scaling"].axes[0].get_legend().get_texts()]
    assert labels == ["kl_divergence (torch): 0.97"]


def test_results_of_nothing_need_no_plot(tmp_path):
    records.save("step", [step_rows()[0]], GPU, tmp_path)  # without noise
    assert plots.wanted(tmp_path) == {}
    assert plots.write(tmp_path) == []
