"""The scaling benchmark: its slopes, its exit code and what it records."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import records
from benchmarks.__main__ import main
from benchmarks.speed import scaling

CPU = torch.device("cpu")


def test_slope_is_that_of_the_upper_half():
    sizes = (1, 10, 100, 1000, 10_000)
    assert scaling.slope_of(sizes, [50.0, 7.0, 3.0 * 100**1.5, 3.0 * 1000**1.5, 3e6]) == pytest.approx(1.5)
    assert scaling.slope_of(sizes, [float(size) for size in sizes]) == pytest.approx(1.0)
    assert scaling.slope_of(sizes, [5.0] * 5) == pytest.approx(0.0)


def sweep(exponent: float) -> scaling.Sweep:
    """Return a sweep over sizes whose time is a power of the size."""

    def prepare(size: int):
        milliseconds = size**exponent / 10

        def wait():
            end = time.perf_counter() + milliseconds / 1e3
            while time.perf_counter() < end:
                pass

        return wait

    return scaling.Sweep(f"power {exponent}", "waits", "auto", (4, 8, 16), prepare)


@pytest.mark.parametrize(("exponent", "exit_code"), [(0.7, 0), (2.0, 1)])
def test_a_steep_slope_is_a_defect(exponent, exit_code, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(scaling, "sweeps", lambda *_, **__: [sweep(exponent)])
    assert main(["scaling", "--device", "cpu", "--rounds", "3", "--record", str(tmp_path)]) == exit_code
    printed = capsys.readouterr().out
    assert ("DEFECT" in printed) == bool(exit_code)
    assert f"{exit_code} of 1 slopes above 1.1" in printed
    ((row,),) = records.load("scaling", tmp_path).values()
    assert row["slope"] == pytest.approx(exponent, abs=0.3)
    assert row["defect"] is bool(exit_code)
    assert row["fitted_from"] == 8


def test_everything_is_swept(tmp_path, capsys):
    code = main(
        [
            *("scaling", "--device", "cpu", "--structures", "1e3", "--elements", "1e5", "--layers", "5"),
            *("--rounds", "1", "--record", str(tmp_path)),
        ]
    )
    printed = capsys.readouterr().out
    ((*rows,),) = records.load("scaling", tmp_path).values()
    assert code == any(row["defect"] for row in rows)
    assert {row["name"] for row in rows} == {
        *("kl_divergence", "delta_f_lognormal", "noise_mean"),
        *("multiply_noise, element", "multiply_noise, sample"),
        *("bmrs.kl_divergence(model)", "bmrs.prune(model)", "training step of a model"),
    }
    for row in rows:
        assert len(row["sizes"]) == len(row["milliseconds"]) == len(row["shortest"]) >= 3
        assert row["sizes"] == sorted(row["sizes"])
        assert f"| {row['name']} |" in printed


def test_default_sizes():
    found = scaling.sweeps(CPU, structures=10**6, elements=10**7, layers=500)
    ranges = {each.unit: (each.sizes[0], each.sizes[-1]) for each in found}
    assert ranges == {"structures": (10**2, 10**6), "elements": (10**4, 10**7), "noise layers": (1, 500)}


def test_the_torch_path_ends_before_it_fills_a_gpu():
    found = scaling.sweeps(CPU, structures=10**3, elements=10**9, layers=5)
    largest = {each.sizes[-1] for each in found if each.unit == "elements" and each.backend == "torch"}
    assert largest == {10**8}


@pytest.mark.parametrize(
    "options", [("--structures", "500"), ("--elements", "2e4"), ("--layers", "2")], ids=lambda each: each[0]
)
def test_too_few_sizes_for_a_slope(options, capsys):
    with pytest.raises(SystemExit):
        main(["scaling", *options])
    assert f"{options[0]} must be at least" in capsys.readouterr().err
