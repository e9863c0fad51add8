"""The energy of a run, with a stand-in for codecarbon; with codecarbon itself where that is installed."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from bmrs.cli import main
from bmrs.training import energy, evaluate, train

RAPL = "RAPL, which counts the whole processor"


class Tracker:
    """What codecarbon's tracker is used for: each task takes 10 J of the processor, 5 of a GPU and 2 of memory."""

    mode, kinds = "intel_rapl", ("RAM", "CPU")

    def __init__(self, *, output_methods, allow_multiple_runs, **options):
        assert output_methods == []
        assert allow_multiple_runs
        self._hardware = [
            type(kind, (), {"_mode": self.mode if kind == "CPU" else None})() for kind in self.kinds
        ]
        self._active = False

    def start_task(self):
        assert not self._active
        self._active = True

    def stop_task(self):
        assert self._active
        self._active = False
        return SimpleNamespace(cpu_energy=10 / 3.6e6, gpu_energy=5 / 3.6e6, ram_energy=2 / 3.6e6)


class Broken(Tracker):
    def start_task(self):
        raise OSError("no meters\nhere")


@pytest.fixture
def tracker(monkeypatch):
    def use(tracker):
        monkeypatch.setitem(sys.modules, "codecarbon", SimpleNamespace(OfflineEmissionsTracker=tracker))

    use(Tracker)
    monkeypatch.setattr("bmrs.training.run.draw", lambda *arguments: None)
    monkeypatch.setattr("bmrs.training.summarise.latency", lambda models, images: [1e-3] * len(models))
    real = energy.joules_of_inference
    monkeypatch.setattr("bmrs.training.summarise.joules_of_inference", lambda *given: real(*given, seconds=0))
    return use


def run(config, folder):
    stream = io.StringIO()
    train(config, output=folder, console=Console(file=stream, width=120))
    return stream.getvalue(), json.loads((folder / "summary.json").read_text())


def test_a_run_tells_the_energy_of_training_and_inference(tracker, tiny_config, tmp_path):
    text, summary = run(tiny_config(energy=True), tmp_path / "run")
    # Three epochs each; the batch has 64 images.
    assert summary["joules_by_training"] == pytest.approx({"noisy": 30, "dense": 30})
    for network in summary["networks"].values():
        assert network["training_joules"] == pytest.approx(30)
        assert network["joules"] == pytest.approx(10 * 1000 / 64)
    assert summary["energy_by"] == {"training": RAPL, "inference": RAPL}
    assert "J for 1,000 images" in text
    assert "0.03" in next(line for line in text.splitlines() if "kJ of training" in line)
    assert f"Energy of inference: {RAPL}." in text
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["joules"] == pytest.approx(10)
    assert row["energy_by"] == RAPL


def test_evaluate_measures_the_energy_of_a_run_that_did_not(tracker, tiny_config, tmp_path):
    folder = tmp_path / "run"
    text, summary = run(tiny_config(), folder)
    assert "J " not in text
    assert "Energy" not in text
    assert summary["energy_by"] == {}
    evaluate(folder, console=Console(quiet=True))
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert main(["evaluate", str(folder), "--energy"]) == 0
    after = json.loads((folder / "summary.json").read_text())
    assert after["networks"]["compacted"]["joules"] == pytest.approx(10 * 1000 / 64)
    assert after["networks"]["compacted"]["training_joules"] is None
    assert after["energy_by"] == {"inference": RAPL}


def test_a_machine_without_any_meter_trains_and_says_so(tracker, tiny_config, tmp_path):
    tracker(Broken)
    text, summary = run(tiny_config(energy=True, epochs=1, fine_tune_epochs=0), tmp_path / "run")
    note = "not measured: codecarbon gave OSError: no meters here"
    assert summary["energy_by"] == {"training": note, "inference": note}
    assert summary["joules_by_training"] == {}
    assert "J for" not in text
    assert f"Energy of training: {note}." in text


@pytest.mark.parametrize("command", ["train --energy true", "evaluate RUN --energy"])
def test_without_codecarbon_it_ends_before_there_is_a_folder(
    command, monkeypatch, tiny_config, tracker, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = command.split()
    if "RUN" in arguments:
        run(tiny_config(epochs=1, fine_tune_epochs=0), tmp_path / "RUN")
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    assert main(arguments) == 2
    line = "bmrs: error: energy is measured with codecarbon, which is missing: pip install codecarbon\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("mode", "kinds", "device", "words"),
    [
        ("intel_rapl", ("RAM", "CPU"), "cpu", RAPL),
        (
            "cpu_load",
            ("CPU",),
            "cpu",
            "estimated from the processor's nominal power and the load of this process",
        ),
        ("constant", ("CPU",), "cpu", "estimated from the processor's nominal power alone"),
        (None, ("AppleSiliconChip",), "cpu", "powermetrics, which counts the whole processor"),
        ("of tomorrow", ("CPU",), "cpu", "in a way that codecarbon does not tell"),
        ("intel_rapl", ("CPU",), "cuda", f"GPU: not measured; processor: {RAPL}"),
        (
            "intel_rapl",
            ("CPU", "GPU"),
            "cuda",
            f"GPU: the driver's counter (NVML or AMD SMI); processor: {RAPL}",
        ),
    ],
)
def test_an_estimate_is_called_one(tracker, mode, kinds, device, words):
    tracker(type("Other", (Tracker,), {"mode": mode, "kinds": kinds}))
    meter = energy.EnergyMeter(torch.device(device))
    assert meter.method == words
    meter.start()
    assert meter.stop() == pytest.approx(15 if device == "cuda" else 10)


def test_codecarbon_itself_tells_energy_and_leaves_nothing_behind(tmp_path, monkeypatch, capfd):
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    meter = energy.EnergyMeter(torch.device("cpu"))
    assert meter.method in energy._WAYS.values()
    model, images = nn.Linear(500, 500), torch.randn(64, 500)
    joules = energy.joules_of_inference({"linear": model}, images, meter, seconds=1.0)
    assert 0 < joules["linear"] < 1000
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
