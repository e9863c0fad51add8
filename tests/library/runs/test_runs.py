"""What can be done with finished runs: export, compare, curve. All tests share one tiny run."""

import contextlib
import io
import json
import re
import shutil
import sys

import pytest
import torch
from idx_files import write_idx_folder
from torch import nn

import bmrs
from bmrs.cli import main
from bmrs.compaction.sizes import CompactedSizes
from bmrs.noise.lookup import noise_layers
from bmrs.runs.curve import orders_of
from bmrs.runs.curve_picture import figure_of
from bmrs.runs.points import Point, knee_of
from bmrs.training.evaluation import compression


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """A finished run; tests leave it as it is, but for what `curve` writes."""
    folder = tmp_path_factory.mktemp("finished")
    images = write_idx_folder(folder / "images", train=60, test=64)
    data = f"--data mnist --data-dir {images} --device cpu"
    network = "--model mlp --num-blocks 1 --hidden 6 --batch-size 48"
    schedule = "--epochs 1 --noise-epochs 1 --fine-tune-epochs 1 --criterion l2 --ratio 0.34 --temperature 1"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("bmrs.training.run.draw", lambda *arguments: None)  # saves the time of drawing
        patch.setattr(
            "bmrs.training.summarise.latency", lambda models, images: [1e-3 * len(images)] * len(models)
        )
        options = f"train {data} {network} {schedule} --output {folder / 'run'}"
        assert main(options.split()) == 0
    return folder / "run"


@pytest.fixture
def of_seeds(seed, tmp_path):
    """A folder of two seeds, of which the second one was better by a point."""
    run = tmp_path / "run"
    config = json.loads((seed / "config.json").read_text())
    for number in (0, 1):
        shutil.copytree(seed, run / f"seed-{number}")
        summary = json.loads((seed / "summary.json").read_text())
        for network in summary["networks"].values():
            network["accuracy"] = network["accuracy"] + number / 100
        (run / f"seed-{number}" / "summary.json").write_text(json.dumps(summary))
    (run / "config.json").write_text(json.dumps({**config, "seeds": 2}))
    return run


@pytest.fixture
def quick(monkeypatch):
    """Measures latency no longer than it takes to see that it is measured."""
    from bmrs.runs import exported_run
    from bmrs.training.evaluation import latency

    monkeypatch.setattr(
        exported_run, "latency", lambda *arguments: latency(*arguments, rounds=2, min_seconds=1e-4)
    )


def said(capsys):
    """Output and the one line of errors, with single spaces."""
    captured = capsys.readouterr()
    return " ".join(captured.out.split()), " ".join(captured.err.split())


class TestExport:
    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize("name", ["onnx", "pt2", "torchscript"])
    def test_a_run_in_each_format(self, seed, name, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        file = tmp_path / "small"
        assert main(["export", str(seed), "--format", name, "--output", str(file)]) == 0
        out, _ = said(capsys)
        for part in (
            "dense, torch",
            "compacted, torch",
            f"dense, {name}",
            f"compacted, {name}",
            "one CPU thread",
        ):
            assert part in out
        assert "takes any number of examples" in out
        network, images = bmrs.load(seed / "compacted.safetensors"), torch.randn(5, 1, 32, 32)
        with torch.no_grad():
            expected = network(images)
        if name == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(file)
            (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            found = torch.from_numpy(found)
        elif name == "pt2":
            found = torch.export.load(str(file)).module()(images)
        else:
            with pytest.warns(DeprecationWarning, match="jit"):
                found = torch.jit.load(file)(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.usefixtures("quick")
    def test_a_file_is_replaced_only_if_asked_to(self, seed, tmp_path, capsys):
        file = tmp_path / "small.pt2"
        file.write_text("mine")
        arguments = ["export", str(seed), "--format", "pt2", "--output", str(file)]
        assert main(arguments) == 2
        assert "exists: give another --output, or --overwrite to replace it" in said(capsys)[1]
        assert file.read_text() == "mine"
        assert main([*arguments, "--network", "dense", "--overwrite"]) == 0
        assert torch.export.load(str(file)).module()(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
        assert [path.name for path in tmp_path.iterdir()] == [file.name]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--format", "tflite"], "--format must be one of onnx, pt2, torchscript, got 'tflite'"),
            (["--network", "best"], "--network best: .* has no best.safetensors, expected dense, compacted"),
            (["--network", "../x"], "--network must be the name of a network such as compacted"),
            (["--output", "missing/file"], "missing: no such folder, for the file file"),
        ],
    )
    def test_bad_options(self, seed, arguments, message, capsys):
        assert main(["export", str(seed), *arguments]) == 2
        assert re.search(message, said(capsys)[1])

    def test_runs_that_cannot_be_exported(self, of_seeds, seed, tmp_path, capsys, monkeypatch):
        assert main(["export", str(of_seeds)]) == 2
        assert f"has 2 seeds: give the folder of one, such as {of_seeds / 'seed-0'}" in said(capsys)[1]
        unfinished = shutil.copytree(seed, tmp_path / "unfinished")
        (unfinished / "summary.json").unlink()
        for command in ("export", "curve", "compare"):
            assert main([command, str(unfinished)]) == 2
            assert (
                "lacks summary.json: not a finished run; continue it with bmrs train --resume"
                in said(capsys)[1]
            )
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        assert main(["export", str(seed), "--output", str(tmp_path / "x.onnx")]) == 2
        assert "the format onnx needs onnxscript: pip install onnxscript" in said(capsys)[1]


class TestCompare:
    def test_a_run_of_seeds_beside_one_of_one(self, of_seeds, seed, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "160")
        picture = tmp_path / "all.png"
        assert main(["compare", str(of_seeds), str(seed), "--output", str(picture)]) == 0
        out = capsys.readouterr().out
        networks = json.loads((seed / "summary.json").read_text())["networks"]
        for name in ("dense", "compacted"):
            accuracy = 100 * networks[name]["accuracy"]
            of_seeds_line, of_one = [line for line in out.splitlines() if f" {name} " in line]
            assert f"{accuracy + 0.5:.2f} ± 0.71" in of_seeds_line
            assert f" {accuracy:.2f} " in of_one
            assert f" {networks[name]['parameters']:,} " in of_one
        # By more of their paths, as both are called run.
        assert f"{of_seeds.parent.name}/run (2 seeds)" in out
        assert f"{seed.parent.name}/run " in out
        for part in (
            "2 runs on mnist",
            "NLL, nats",
            "ECE, %",
            "64.000",
            "Means ± standard deviations",
            "machine",
        ):
            assert part in out
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_different_data_get_tables_of_their_own_and_old_summaries_their_gaps(
        self, seed, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        other = shutil.copytree(seed, tmp_path / "other")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "data": "cifar10"}))
        summary = json.loads((other / "summary.json").read_text())
        for network in summary["networks"].values():
            del network["nll"]
        (other / "summary.json").write_text(json.dumps({**summary, "device": "cuda:0"}))
        monkeypatch.chdir(tmp_path)
        assert main(["compare", str(seed), str(other)]) == 0
        out, _ = said(capsys)
        for part in (
            *("1 run on mnist", "1 run on cifar10", "–", "The runs are of different data (mnist, cifar10)"),
            *(
                "different devices: cpu, cuda:0",
                "no picture, as matplotlib is missing: pip install matplotlib",
            ),
        ):
            assert part in out
        assert not (tmp_path / "comparison.png").exists()

    @pytest.mark.parametrize("change", ["[]", "{", '{"networks": {"dense": {}}}', '{"networks": {}}'])
    def test_broken_summaries(self, seed, change, tmp_path, capsys):
        broken = shutil.copytree(seed, tmp_path / "run")
        (broken / "summary.json").write_text(change)
        assert main(["compare", str(broken), "--output", str(tmp_path / "x.png")]) == 2
        error = said(capsys)[1]
        assert "summary.json" in error
        assert "broken" in error or "lacks the networks compacted, dense" in error

    def test_what_is_given_twice_or_exists(self, seed, tmp_path, capsys):
        assert (
            main(["compare", str(seed), str(seed / ".." / seed.name), "--output", str(tmp_path / "x")]) == 2
        )
        assert "is given twice: give every run once" in said(capsys)[1]
        assert main(["compare", str(seed), "--output", str(seed / "summary.json")]) == 2
        assert "exists: give another --output, or --overwrite" in said(capsys)[1]


class TestCurve:
    def test_curves_of_a_run(self, seed, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        before = {path.name: path.read_bytes() for path in seed.iterdir()}
        assert main(["curve", str(seed), "--points", "4"]) == 0
        out, _ = said(capsys)
        for part in (
            "7 criteria, 4 networks each, 12 validation images",
            "knee at",
            "no weight trained on the way",
        ):
            assert part in out
        after = {path.name: path.read_bytes() for path in seed.iterdir()}
        assert after.pop("curve.png").startswith(b"\x89PNG")
        rows = [json.loads(line) for line in after.pop("curve.jsonl").decode().splitlines()]
        assert after == before
        curves = {}
        for row in rows:
            curves.setdefault(row["criterion"], []).append(row)
        assert set(curves) == {"BMRS odds", "ΔF_N", "ΔF_N + 0.919", "ΔF_U", "SNR", "E[θ]", "L2"}
        for criterion, curve in curves.items():
            # From all structures to one a layer, as a layer cannot be emptied.
            assert [curve[0]["removed"], curve[-1]["removed"], curve[0]["structures"]] == [0, 10, 12]
            assert curve[0]["compression_percent"] == 0
            assert curve[-1]["parameters"] == 1024 + 1 + 1 + 1 + 10 + 10
            compressions = [row["compression_percent"] for row in curve]
            assert compressions == sorted(compressions)
            # The noise has hardly moved: no criterion asks for a structure, and L2 has no rule of its own.
            assert [row["removed"] for row in curve if row["stop"]] == ([] if criterion == "L2" else [0])

    def test_a_rule_stops_where_it_has_what_it_asks_for(self):
        model = bmrs.models.MLP(in_features=4, num_blocks=1, hidden=4, num_classes=2)
        with torch.no_grad():
            model.hidden0_tanh.mu.copy_(torch.tensor([-1.0, -19.0, -9.0, 0.0]))
            model.hidden1_tanh.mu.copy_(torch.tensor([-12.0, -13.0, -14.0, -15.0]))
        orders = orders_of(model)
        order, stop = orders["E[θ]"]
        places = [(layer is model.hidden1_tanh, structure) for layer, structure in order]
        # The best one of each layer is not in it, the fourth and the first.
        assert places == [(False, 1), (True, 3), (True, 2), (True, 1), (False, 2), (False, 0)]
        assert stop == 5
        order, stop = orders["L2"]
        norms = [
            (model.hidden1 if layer is model.hidden1_tanh else model.hidden0).weight[structure].norm()
            for layer, structure in order
        ]
        assert norms == sorted(norms)
        assert stop is None

    def test_several_seeds_show_where_rules_stop(self):
        points = [
            Point(seed, name, count, 3, 20.0 * count + seed, 10, 0.9 - 0.2 * count, count == 1, count == 2)
            for seed in range(3)
            for name in ("SNR", "L2")
            for count in range(4)
            if (name, count) != ("L2", 1)
        ]
        figure = figure_of(points, "title")
        curves, stops = figure.axes
        assert [text.get_text() for text in curves.get_legend().get_texts()] == [
            *("SNR", "L2", "(any shape) where a rule stops", "knee: farthest above the chord")
        ]
        density, ticks = stops.lines  # of SNR alone
        area = float(torch.trapezoid(torch.tensor(density.get_ydata()), torch.tensor(density.get_xdata())))
        assert area == pytest.approx(1, abs=0.01)
        assert list(ticks.get_xdata()) == [20.0, 21.0, 22.0]
        assert len(figure_of(points[:7], "title").axes) == 1

    def test_options(self, seed, capsys):
        for option, least in (("points", 2), ("images", 1)):
            assert main(["curve", str(seed), f"--{option}", "0"]) == 2
            assert f"--{option} must be a number of at least {least}, got 0" in said(capsys)[1]


def test_sizes_are_those_of_compacted_networks():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Flatten(),
    )
    model = bmrs.add_noise(model, where="[03]")
    model[1].bias.data.normal_()
    sizes, x = CompactedSizes(model, torch.ones(1, 1, 8, 8)), torch.ones(1, 1, 8, 8)
    total = sum(p.numel() for p in model.parameters())
    for pruned in ([], [0], [1, 3]):
        model[0].noise.set_kept(~torch.isin(torch.arange(4), torch.tensor(pruned)))
        expected = sum(p.numel() for p in bmrs.compact(model, x).parameters())
        assert sizes.parameters() == expected
        kept = sum(int(layer.mask.sum()) for layer in noise_layers(model).values())
        assert compression(model, x) == pytest.approx(100 * (1 - (expected + 2 * kept) / total))


@pytest.mark.parametrize(
    ("x", "y", "knee"),
    [
        ([0, 10, 20, 30, 40], [0.9, 0.9, 0.88, 0.4, 0.1], 2),
        ([0, 50, 100], [0.9, 0.5, 0.1], None),  # straight
        ([0, 50, 100], [0.9, 0.2, 0.1], None),  # below its chord
        ([0, 50, 100], [0.5, 0.5, 0.5], None),
        ([0, 1], [1.0, 0.0], None),
    ],
)
def test_knees(x, y, knee):
    assert knee_of(x, y) == knee
