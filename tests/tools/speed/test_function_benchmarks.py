"""The function benchmarks: what they time, that wrong competitors are caught, and what a run records."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bmrs_kernels
from benchmarks import conftest, records
from benchmarks.processes import ROOT
from benchmarks.rivals import plain
from benchmarks.speed import competitors
from benchmarks.speed.activation_shapes import ActivationShape
from benchmarks.speed.competitors import Contest, competitors_of, project_backends
from benchmarks.speed.function_cases import DIRECTIONS, FunctionCase, cases
from benchmarks.speed.function_results import description, join_turns, rates_table, rows_of, turn_name

CPU = torch.device("cpu")
MAPS = ActivationShape((4, 6, 5, 5))
TOKENS = ActivationShape((3, 5, 8), dim=2)
STRUCTURES = ActivationShape((20,), dim=0)
TINY = [
    *(FunctionCase("multiply_noise", MAPS, granularity) for granularity in ("element", "sample", "batch")),
    FunctionCase("multiply_noise", TOKENS, "sample", "bfloat16"),
    FunctionCase("sample_noise", TOKENS),
    FunctionCase("philox_uniform", MAPS),
    *(FunctionCase(function, STRUCTURES) for function in ("kl_divergence", "delta_f_lognormal", "noise_snr")),
    *(FunctionCase(function, STRUCTURES) for function in ("delta_f_loguniform", "noise_mean")),
]


def test_every_public_function_is_timed_in_the_directions_that_it_has():
    timed = {case.function: case for case in cases(CPU, large=False, only_small=True)}
    assert set(timed) == set(bmrs_kernels.__all__)
    for case in TINY:
        out = Contest(case, CPU).call(competitors_of(case, CPU)[0], "forward")()
        assert (case.directions == DIRECTIONS) == out.requires_grad, case.name
    assert {case.function for case in TINY} == set(timed)


def test_shapes_by_device_and_option():
    on_cpu, small = cases(CPU, large=False), cases(CPU, large=False, only_small=True)
    with_large, on_gpu = cases(CPU, large=True), cases(torch.device("cuda"), large=True)
    for found in (on_cpu, small, with_large, on_gpu):
        assert len({case.name for case in found}) == len(found)
    assert max(case.elements for case in small) <= 120_000
    assert max(case.elements for case in on_cpu) <= 8_000_000
    assert max(case.tensor_bytes for case in with_large) >= 64 << 20
    assert [case for case in with_large if not case.large] == on_cpu
    assert not any(case.compiled for case in small)
    assert 1 <= sum(case.compiled for case in on_cpu) <= 4
    assert sum(case.compiled for case in on_gpu) > 4
    assert {case.dtype for case in on_gpu} == {"float32", "bfloat16"}
    shapes = {case.activation.shape for case in with_large}
    assert {(128, 50), (32, 6, 28, 28), (32, 2048, 7, 7), (32, 197, 768), (226,), (800,), (26_560,)} <= shapes
    # Of a matrix, element and sample are the same.
    assert not any(case.granularity == "sample" and len(case.activation.shape) == 2 for case in on_gpu)


def test_bytes_that_have_to_move():
    case = FunctionCase("multiply_noise", ActivationShape((2, 3)), "element", "bfloat16")
    assert [case.bytes_moved(direction) for direction in DIRECTIONS] == [24, 36, 60]
    assert FunctionCase("noise_snr", STRUCTURES).bytes_moved("forward") == 240
    copy = Contest(case, CPU).call("copy", "backward")
    assert copy().nbytes == 18


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_competitors_are_right_and_run(case):
    contest = Contest(case, CPU)
    for competitor in competitors_of(case, CPU):
        for direction in case.directions:
            contest.call(competitor, direction)()
        assert contest.peak_memory(competitor, "forward") is None


def test_project_backends_start_with_what_auto_takes():
    first, *_, last = (*project_backends(CPU), "torch")
    assert bmrs_kernels.kl_divergence(torch.zeros(1), torch.zeros(1), backend=first).isfinite().all()
    assert last == "torch"
    assert project_backends(torch.device("cuda"))[-1] == "torch"


@pytest.mark.parametrize("function", ["multiply_noise", "kl_divergence", "noise_mean", "delta_f_lognormal"])
def test_wrong_plain_formulas_are_caught(function, monkeypatch):
    right = getattr(plain, function)
    monkeypatch.setattr(plain, function, lambda *inputs, **options: 1.01 * right(*inputs, **options))
    case = next(case for case in TINY if case.function == function)
    contest = Contest(case, CPU)
    contest.call("torch", "forward")
    with pytest.raises(AssertionError, match=re.escape(f"{case.name}, plain, output: differs by")):
        contest.call("plain", "forward")


def test_wrong_gradients_are_caught(monkeypatch):
    right = plain.kl_divergence

    def without_gradient_of_mu(mu, log_sigma):
        return right(mu.detach(), log_sigma) + 0.0 * mu

    monkeypatch.setattr(plain, "kl_divergence", without_gradient_of_mu)
    with pytest.raises(AssertionError, match="gradient 1"):
        Contest(FunctionCase("kl_divergence", STRUCTURES), CPU).call("plain", "both")


def test_compiled_noise_is_checked_by_its_mean(monkeypatch):
    monkeypatch.setattr(competitors, "compiler", lambda: lambda function: function)
    case = FunctionCase("multiply_noise", ActivationShape((200, 50)), "element", compiled=True)
    assert "compiled" in competitors_of(case, CPU)
    Contest(case, CPU).call("compiled", "both")()
    monkeypatch.setattr(
        competitors, "compiler", lambda: lambda function: lambda *inputs: 2 * function(*inputs)
    )
    with pytest.raises(AssertionError, match="compiled: mean"):
        Contest(case, CPU).call("compiled", "forward")
    monkeypatch.setattr(
        competitors, "compiler", lambda: lambda function: lambda *inputs: function(*inputs) / 0.0
    )
    with pytest.raises(AssertionError, match="compiled: not finite"):
        Contest(case, CPU).call("compiled", "forward")


def test_memory_that_forward_keeps():
    contest = Contest(FunctionCase("multiply_noise", ActivationShape((64, 50)), "element"), CPU)
    project, eager = (contest.saved_for_backward(name) for name in ("torch", "plain"))
    small = 2 * 50 / (64 * 50)
    assert 1.0 <= project["inputs"] <= 1.0 + small
    assert project["others"] <= small
    assert eager["others"] > 1.0


def turn_of(contest, competitor, turn, seconds, **changes):
    """Return what pytest-benchmark keeps of a competitor's turn."""
    id_ = turn_name("group", competitor, turn)
    fields = {
        "group": "group",
        "params": {"case": contest.case, "direction": "both", "competitor": competitor, "turn": turn},
        "extra_info": description(contest, "both", competitor) if turn == 1 else {},
        "stats": SimpleNamespace(data=seconds),
        "has_error": False,
        "name": f"test_function[{id_}]",
        "fullname": f"folder/file.py::test_function[{id_}]",
        "param": id_,
    }
    return SimpleNamespace(**fields | changes)


@pytest.fixture(scope="module")
def turns():
    """Return a function that makes the turns of three competitors, which alternate."""
    contest = Contest(TINY[0], CPU)

    def make():
        return [
            turn_of(contest, competitor, turn, [milliseconds / 1e3] * 3)
            for turn, times in enumerate([(1.0, 2.0, 0.5), (2.0, 2.0, 0.5), (3.0, 12.0, 0.5)], start=1)
            for competitor, milliseconds in zip(("torch", "plain", "copy"), times, strict=True)
        ]

    return make


def test_turns_of_a_competitor_become_one_benchmark(turns):
    benchmarks = turns()
    join_turns(benchmarks)
    assert [each.name for each in benchmarks] == [
        f"test_function[group-{competitor}]" for competitor in ("torch", "plain", "copy")
    ]
    first = benchmarks[0]
    assert first.fullname == "folder/file.py::test_function[group-torch]"
    assert first.param == "group-torch"
    assert first.params == {"case": TINY[0].name, "direction": "both", "competitor": "torch"}
    assert first.stats.data == pytest.approx([0.001] * 3 + [0.002] * 3 + [0.003] * 3)
    assert first.extra_info["turns"] == pytest.approx([1.0, 2.0, 3.0])


def test_failed_turns_and_other_benchmarks_are_left_as_they_are(turns):
    *_, failed, other = benchmarks = turns()[:5]
    failed.has_error, other.params = True, None
    join_turns(benchmarks)
    assert [each.name for each in benchmarks[3:]] == [
        "test_function[group-torch-turn-2]",
        "test_function[group-plain-turn-2]",
    ]
    assert len(benchmarks[0].extra_info["turns"]) == 1


def test_rows_have_ratios_between_turns(turns):
    benchmarks = turns()
    join_turns(benchmarks)
    rows = rows_of(benchmarks)
    torch_row, plain_row, copy_row = rows
    assert torch_row["milliseconds"] == pytest.approx({"median": 2.0, "p20": 1.0, "p80": 3.0})
    assert torch_row["turns"] == pytest.approx([1.0, 2.0, 3.0])
    assert torch_row["ratio_to_plain"] == pytest.approx({"value": 0.5, "low": 0.25, "high": 1.0})
    assert torch_row["share_of_copy"] == pytest.approx({"value": 0.25, "low": 1 / 6, "high": 0.5})
    assert torch_row["bytes_moved"] == 5 * 4 * 600
    assert torch_row["gb_per_s"] == pytest.approx(12_000 / 2e-3 / 1e9)
    assert plain_row["saved_for_backward"]["others"] > 0
    assert copy_row["saved_for_backward"] is None
    assert len(rates_table(rows).splitlines()) == 2 + 3


def test_rows_have_what_committed_ones_have(turns):
    benchmarks = turns()
    join_turns(benchmarks)
    head = {"suite", "machine", "environment"}
    for rows in records.load("functions").values():
        assert rows_of(benchmarks)[0].keys() == rows[0].keys() - head


def benchmarked(*options: str) -> str:
    """Run the benchmarks of one small function and return what they print."""
    # Nothing of the run that this test is part of: workers of pytest-xdist time nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--verbose"),
            *("-p", "no:cacheprovider", "-k", "noise_snr-226", "--device", "cpu"),
            *("--turn-seconds", "0.01", *options),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_runs_are_recorded_saved_and_compared(tmp_path):
    storage, json_file, recorded = tmp_path / "storage", tmp_path / "all.json", tmp_path / "recorded"
    keep = ("--benchmark-storage", str(storage))
    # There is nothing to compare with, which is worth a warning and no more.
    printed = benchmarked(*keep, "--benchmark-save=before", "--benchmark-compare", "--record", str(recorded))
    order = re.findall(r"noise_snr-226-dim-0-forward-(\w+)-turn-(\d)\]", printed)
    names = competitors_of(FunctionCase("noise_snr", ActivationShape((226,), dim=0)), CPU)
    assert order == [(name, str(turn)) for turn in (1, 2, 3) for name in names]
    assert "| noise_snr | 226 |" in printed
    assert "left out: --large" in printed
    (path,) = recorded.iterdir()
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [row["competitor"] for row in rows] == list(names)
    for row in rows:
        assert row["suite"] == "functions"
        assert (row["function"], row["shape"], row["direction"]) == ("noise_snr", [226], "forward")
        assert len(row["turns"]) == 3
        assert row["share_of_copy"]["low"] <= row["share_of_copy"]["high"]
    (saved,) = storage.rglob("0001_before.json")
    for row, benchmark in zip(rows, json.loads(saved.read_text("utf-8"))["benchmarks"], strict=True):
        assert benchmark["name"] == f"test_function[noise_snr-226-dim-0-forward-{row['competitor']}]"
        assert benchmark["group"] == "noise_snr 226 dim 0 forward"
        # The rows are what pytest-benchmark measured.
        assert row["milliseconds"]["median"] == pytest.approx(1e3 * benchmark["stats"]["median"])

    printed = benchmarked(
        *keep, "--benchmark-autosave", "--benchmark-compare", "--benchmark-json", str(json_file)
    )
    for name in names:
        for run in ("NOW", "0001_before"):
            assert f"test_function[noise_snr-226-dim-0-forward-{name}] ({run})" in printed
    benchmarks = json.loads(json_file.read_text("utf-8"))["benchmarks"]
    assert [each["params"]["competitor"] for each in benchmarks] == list(names)
    assert all(len(each["stats"]["data"]) == each["stats"]["rounds"] >= 6 for each in benchmarks)

    compare = [sys.executable, "-m", "pytest_benchmark", "--storage", str(storage), "compare", "0001", "0002"]
    compared = subprocess.run(
        compare, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    for name in names:
        assert (
            len(re.findall(rf"test_function\[noise_snr-226-dim-0-forward-{name}\] \(000[12]_", compared)) == 2
        )


def test_a_run_without_times_cannot_be_recorded():
    config = SimpleNamespace(getoption=lambda name: True)
    with pytest.raises(pytest.UsageError, match="--benchmark-disable"):
        conftest.pytest_configure(config)
