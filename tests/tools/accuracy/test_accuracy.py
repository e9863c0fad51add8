"""The accuracy gate: every quantity and gradient within the contract, and no worse than the committed report."""

from __future__ import annotations

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from judged_points import BY_NAME, DELTA_F, KL, SNR, few
from kernel_device import DEVICE, RUNS_KERNELS

import bmrs_kernels
from benchmarks.__main__ import main
from benchmarks.accuracy import attack, command, narrow, points, report, table
from benchmarks.accuracy.contract import ALLOWED_LOSS, BOUNDS
from benchmarks.accuracy.errors import Setting, errors, failures, input_rounding, measure
from benchmarks.accuracy.quantities import QUANTITIES
from benchmarks.accuracy.table import Judged, Values

FLOAT32 = Setting("torch", torch.float32)


def assert_meets_the_contract(setting):
    measured = [one for quantity in QUANTITIES for one in measure(quantity, table.judged(quantity), setting)]
    objections = failures(measured) + report.regressions(measured, setting)
    objections += filter(None, (one.failure() for one in narrow.measure_narrow(setting)))
    assert not objections, "\n".join(objections)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_backends_of_a_cpu_meet_the_contract(backend, dtype):
    assert_meets_the_contract(Setting(backend, dtype))


class TestKernels:
    pytestmark = RUNS_KERNELS

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_kernels_meet_the_contract(self, dtype):
        assert_meets_the_contract(Setting("triton", dtype, DEVICE))


def with_result(quantity, change):
    """Return a quantity whose project function has its outputs changed."""

    def project(backend):
        evaluate = quantity.project(backend)
        return lambda *inputs: [change(output.clone()) for output in evaluate(*inputs)]

    return quantity._replace(project=project)


def spoil(place, value):
    def change(output):
        output[place] = value
        return output

    return change


def test_errors_are_scaled_and_infinite_where_nothing_was_computed():
    true = Values(np.array([0.5, 100.0, 1e-3, 1.0]), np.array([0.0, 0.0, 0.0, 1e-17], np.float32))
    got = np.array([0.6, 101.0, math.nan, 1.0])
    assert errors(got, true, 1.0).tolist() == pytest.approx([0.1, 0.01, math.inf, 1e-17])
    assert errors(got, true, 0.0).tolist() == pytest.approx([0.2, 0.01, math.inf, 1e-17])
    assert errors(np.array([-math.inf]), Values(np.zeros(1), np.zeros(1, np.float32)), 1.0) == math.inf


def test_one_result_that_is_not_finite_fails_with_its_point():
    judged = few(KL)
    value, *gradients = measure(with_result(KL, spoil(17, math.nan)), judged, FLOAT32)
    assert value.project.non_finite == 1
    assert value.project.largest == math.inf
    for one in (value, *gradients):
        assert str(judged.points[17].tolist()) in one.failure()
        assert "got nan" in one.failure()


def test_one_error_beyond_the_bound_fails_with_its_point():
    judged = few(KL)
    place = int(np.argmax(judged.values.rounded[:, 0]))
    wrong = float(np.float32(judged.values.rounded[place, 0] * (1 + 3e-6)))
    value = measure(with_result(KL, spoil(place, wrong)), judged, FLOAT32)[0]
    assert f"{judged.points[place].tolist()}: got {wrong}" in value.failure()
    assert re.search(r"error (2\.9|3\.?)\d*e-06 with a bound of 1\.2e-07", value.failure())
    assert measure(KL, judged, FLOAT32)[0].failure() is None


def test_the_attack_passes_by_what_the_inputs_do_not_determine(monkeypatch):
    index = DELTA_F.outputs.index("d/dlog σ")
    centre = [15.823951721191406, -13.93261432647705]
    setting = Setting("torch", torch.float64)
    where = np.array([centre], np.float32)
    judged = Judged(where, np.zeros(1, np.uint8), table.compute(DELTA_F, where))
    one = measure(DELTA_F, judged, setting)[index]
    assert len(one.project.undetermined) == 1
    one = one._replace(project=one.project._replace(worst=one.project.undetermined))
    (found,) = attack.attack([one], setting, 3.0)
    assert not found.breaks_the_contract
    assert found.tried > 0


@pytest.mark.parametrize("wrong_value", ["other side", math.nan])
@pytest.mark.parametrize("quantity", [DELTA_F, SNR], ids=lambda quantity: quantity.name)
def test_wrong_decisions_are_counted(quantity, wrong_value):
    judged = few(quantity)
    true = judged.values.rounded[:, 0]
    margin = quantity.decision.margin(true)
    place = int(np.argmin(np.where(np.abs(margin) > 1e-5, np.abs(margin), np.inf)))
    wrong = 2 * quantity.decision.border - true[place] if wrong_value == "other side" else wrong_value
    measured = measure(with_result(quantity, spoil(place, wrong)), judged, FLOAT32)[0]
    assert measured.project.wrong_decisions == 1
    assert f"1 wrong decisions; at {judged.points[place].tolist()}" in measured.failure()
    assert measure(quantity, judged, FLOAT32)[0].project.wrong_decisions == 0


def test_the_plain_formulas_fail_where_the_project_does_not():
    measured = measure(KL, few(KL, 1000), FLOAT32)[0]
    assert measured.project.non_finite_share == 0.0
    assert 0.3 < measured.plain.non_finite_share < 0.7


def test_a_point_whose_inputs_do_not_determine_the_value_is_listed_and_not_counted():
    point = [15.823951721191406, -13.93261432647705]
    index = DELTA_F.outputs.index("d/dlog σ")
    condition = input_rounding(DELTA_F, index, point, torch.float64)
    assert condition > 1e-9
    where = np.array([point], np.float32)
    judged = Judged(where, np.zeros(1, np.uint8), table.compute(DELTA_F, where))
    true = float(judged.values.rounded[0, index])
    for factor, excused in ((0.5, True), (2.0, False)):
        got = true * (1 + factor * condition)
        measured = measure(with_result(DELTA_F, spoil(0, got)), judged, Setting("torch", torch.float64))[
            index
        ]
        assert (measured.failure() is None) == excused
        assert len(measured.project.undetermined) == excused
        assert (measured.project.largest == 0.0) == excused


def test_float32_results_are_never_excused():
    point = [15.823951721191406, -13.93261432647705]
    where = np.array([point], np.float32)
    judged = Judged(where, np.zeros(1, np.uint8), table.compute(DELTA_F, where))
    index = DELTA_F.outputs.index("d/dlog σ")
    assert input_rounding(DELTA_F, index, point, torch.float32) > 0.1
    got = float(judged.values.rounded[0, index]) * 1.01
    assert measure(with_result(DELTA_F, spoil(0, got)), judged, FLOAT32)[index].failure() is not None


def test_input_rounding_is_the_derivative_times_half_a_unit():
    # E[θ] is eᵘ well inside the interval, so that rounding μ = -8 to float32 changes it by 8 · 2⁻²⁴.
    rounding = input_rounding(BY_NAME["noise_mean"], 0, (-8.0, -12.0), torch.float32)
    assert rounding == pytest.approx(8 * 2.0**-24, rel=1e-5)
    # θ is nearly y-independent at the lower end, and as much so at the upper: y is moved alike near 0 and near 1.
    sample = BY_NAME["sample_noise"]
    low, high = (input_rounding(sample, 0, (-10.0, 0.0, y), torch.float64) for y in (2.0**-24, 1 - 2.0**-24))
    assert low == pytest.approx(high, rel=1e-3)


@pytest.mark.parametrize("result", ["value", "d/dx", "d/dμ", "d/dlog σ"])
def test_a_wrong_result_of_a_narrow_activation_is_found(result, monkeypatch):
    """An output that is one unit in the last place off, or a gradient that was summed in 16 bits."""
    exact = bmrs_kernels.multiply_noise

    def spoiled(x, mu, log_sigma, **options):
        index = narrow_results.index(result)
        if index == 0:
            out = exact(x, mu, log_sigma, **options)
            return out + (out * 2 * torch.finfo(x.dtype).eps).detach()
        (x, mu, log_sigma)[index - 1].register_hook(lambda grad: (grad * 1.01).to(torch.bfloat16).to(grad))
        return exact(x, mu, log_sigma, **options)

    narrow_results = ["value", "d/dx", "d/dμ", "d/dlog σ"]
    monkeypatch.setattr(bmrs_kernels, "multiply_noise", spoiled)
    found = [one for one in narrow.measure_narrow(FLOAT32) if one.failure()]
    assert {one.result for one in found} == {result}
    assert {one.dtype for one in found} == {"bfloat16", "float16"}
    assert re.fullmatch(
        rf"multiply_noise of a bfloat16 activation, {result}: error \S+ \D+ with a bound of \S+",
        found[0].failure(),
    )


def test_narrow_activations_belong_to_float32_parameters():
    assert narrow.measure_narrow(Setting("torch", torch.float64)) == []


def test_a_change_for_the_worse_is_found(tmp_path, monkeypatch):
    measured = measure(KL, few(KL), FLOAT32)
    monkeypatch.setattr(report, "ACCURACY_RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError):
        report.regressions(measured, FLOAT32)
    (tmp_path / f"{FLOAT32}.json").write_text(report.as_json(measured, [], [], {}), "utf-8")
    assert report.regressions(measured, FLOAT32) == []
    worse = [
        one._replace(project=one.project._replace(largest=1.01 * ALLOWED_LOSS * one.project.largest))
        for one in measured
    ]
    found = report.regressions(worse, FLOAT32)
    assert len(found) == len(measured)
    assert "kl_divergence: value" in found[0]
    assert str(measured[0].project.worst[0].point) in found[0]
    many = measured[0]._replace(project=measured[0].project._replace(percentile_99=1e-6))
    assert "error of all but 1 %" in report.regressions([many], FLOAT32)[0]
    excused = measured[0]._replace(
        project=measured[0].project._replace(undetermined=measured[0].project.worst[:1])
    )
    assert "which the inputs do not determine" in report.regressions([excused], FLOAT32)[0]
    renamed = measured[0]._replace(quantity="entropy")
    assert report.regressions([renamed], FLOAT32) == ["entropy: value is not in the committed report"]


@pytest.mark.slow
def test_the_command_writes_its_report(tmp_path, capsys):
    assert main(["accuracy", "--points", "64", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "torch-float32.md").read_text("utf-8") in printed
    assert "## Objections\n\nNone." in printed
    data = json.loads((tmp_path / "torch-float32.json").read_text("utf-8"))
    assert data["environment"]["setting"] == "torch-float32"
    assert len(data["measured"]) == sum(len(quantity.outputs) for quantity in QUANTITIES)
    for record in data["measured"]:
        assert record["project"]["largest"] <= record["bound"] == BOUNDS[record["bound_name"]].float32
        assert record["project"]["worst"][0]["error"] == record["project"]["largest"]
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == len(QUANTITIES)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_the_command_fails_if_the_contract_is_missed(monkeypatch, capsys):
    broken = with_result(KL, spoil(0, math.inf))
    monkeypatch.setattr(command, "QUANTITIES", (broken,))
    assert main(["accuracy", "--points", "64"]) == 1
    assert "- kl_divergence: value: error inf" in capsys.readouterr().out


def test_the_command_says_why_a_backend_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(command.backend, "TRITON_IS_INSTALLED", False)
    assert main(["accuracy", "--backend", "triton", "--device", "cpu"]) == 2
    assert "Triton is not installed" in capsys.readouterr().err
    monkeypatch.setattr(command.backend, "TRITON_IS_INSTALLED", True)
    monkeypatch.setattr(command.backend, "INTERPRETING", False)
    assert main(["accuracy", "--backend", "triton", "--device", "cpu"]) == 2
    assert "only with TRITON_INTERPRET=1" in capsys.readouterr().err
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    assert main(["accuracy", "--backend", "triton"]) == 2
    assert "no GPU that torch can use was found; TRITON_INTERPRET=1" in capsys.readouterr().err
    assert main(["accuracy", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "accuracy: no GPU that torch can use was found\n"
    for options, message in (
        (["--points", "0"], "must be at least 1, got 0"),
        (["--keep"], "--keep needs --attack"),
    ):
        with pytest.raises(SystemExit):
            main(["accuracy", *options])
        assert message in capsys.readouterr().err


def test_a_report_with_objections_does_not_replace_the_committed_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "ACCURACY_RESULTS", tmp_path)
    monkeypatch.setattr(command, "ACCURACY_RESULTS", tmp_path)
    monkeypatch.setattr(command, "QUANTITIES", (KL,))
    options = ["accuracy", "--points", "64", "--no-maps", "--output", str(tmp_path)]
    assert main(options) == 0
    assert "no committed report of torch-float32" in capsys.readouterr().out
    before = (tmp_path / "torch-float32.json").read_text("utf-8")
    monkeypatch.setattr(command, "QUANTITIES", (with_result(KL, spoil(0, math.inf)),))
    assert main(options) == 1
    assert (tmp_path / "torch-float32.json").read_text("utf-8") == before


def test_without_matplotlib_there_are_no_maps(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(command, "QUANTITIES", (SNR,))
    assert main(["accuracy", "--points", "64", "--output", str(tmp_path)]) == 0
    assert "no heat maps, as matplotlib.figure is missing" in capsys.readouterr().err
    assert (tmp_path / "torch-float32.json").exists()


@pytest.mark.slow
def test_an_attack_finds_what_the_points_missed(tmp_path, monkeypatch):
    """An error that is planted away from the points, and grows towards its middle."""
    middle = torch.tensor([-5.25, 0.75])

    def planted(backend):
        evaluate = KL.project(backend)

        def spoiled(mu, log_sigma):
            value, *gradients = evaluate(mu, log_sigma)
            distance = torch.hypot(mu - middle[0], log_sigma - middle[1])
            return value + 1e-3 * torch.exp(-4 * distance), *gradients

        return spoiled

    broken = KL._replace(project=planted)
    monkeypatch.setattr(attack, "QUANTITIES", (broken,))
    judged = few(KL, 300)
    judged = judged.where(np.hypot(*(judged.points - middle.numpy()).T) > 3)
    measured = measure(broken, judged, FLOAT32)[:1]
    assert measured[0].failure() is None
    (found,) = attack.attack(measured, FLOAT32, 12.0, None)
    assert found.breaks_the_contract
    assert found.error > 1e-5
    assert math.dist(found.point, middle.tolist()) < 1.2
    monkeypatch.setattr(points, "FOUND_FILE", tmp_path / "found.json")
    assert attack.keep([found], measured) == 1
    assert attack.keep([found], measured) == 0
    assert points.found(KL).tolist() == [found.point]
    assert table.judged(KL).of_kind("found").points.tolist() == [found.point]
    assert points.found(SNR).shape == (0, 2)
