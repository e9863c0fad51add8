"""`bmrs train` with its own recipe, on small images of the embedded kind."""

import contextlib
import io
import json
import shutil

import pytest
import torch
from idx_files import write_idx_folder
from safetensors.torch import load_file

import bmrs
from bmrs.cli import main
from bmrs.training.progress import TrainingProgress

pytestmark = pytest.mark.slow  # whole runs

NETWORKS = ("compacted", "pruned", "refitted", "random", "scratch")
STAGES = ("trained.", "", "fine-tuned.", "dense.", "random.", "scratch.")
TITLES = ("training", "noise", "fine-tuning", "dense", "random structures", "from scratch")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    images = write_idx_folder(tmp_path_factory.mktemp("data") / "images", train=60, test=64)
    data = f"--data mnist --data-dir {images} --device cpu"
    network = "--model mlp --num-blocks 1 --hidden 6 --batch-size 16"
    # Noise that would take a single epoch of three steps to settle; a ratio makes the widths known.
    schedule = "--epochs 2 --noise-epochs 2 --fine-tune-epochs 1 --criterion l2 --ratio 0.34 --temperature 1"
    return ["train", *data.split(), *network.split(), *schedule.split()]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A finished run and what it printed; tests leave it as it is."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        assert main([*options, "--output", str(run)]) == 0
    return run, text.getvalue()


@pytest.fixture
def no_picture(monkeypatch):
    """Saves the time of drawing."""
    monkeypatch.setattr("bmrs.training.run.draw", lambda *arguments: None)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_time(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_a_run_leaves_its_files_and_a_table_of_what_one_would_do_instead(finished):
    run, text = finished
    assert {path.name for path in run.iterdir()} == {
        *(".lock", "environment.json", "config.json", "summary.json", "picture.png", "dense.safetensors"),
        *(f"{name}.safetensors" for name in NETWORKS),
        *(f"{stage}{name}" for stage in STAGES for name in ("checkpoint.safetensors", "metrics.jsonl")),
    }
    for title, epochs in zip(TITLES, (2, 2, 1, 5, 3, 5), strict=True):
        assert text.count(f"{title}: epoch") == epochs, title
    for part in (
        "from scratch",
        "random",
        "structures of",
        "hidden0_tanh",
        "Posteriors at temperature 1: rules",
    ):
        assert part in text
    assert "cut off before they settled (--noise-epochs)" in text
    assert "without training a weight after pruning: trained" in text

    summary = json.loads((run / "summary.json").read_text())
    assert summary["kept"] == {"hidden0_tanh": [4, 6], "hidden1_tanh": [4, 6]}
    assert summary["reload_error"] < 1e-4
    assert list(summary["networks"]) == ["dense", "compacted", "scratch", "random"]
    sizes = {name: network["parameters"] for name, network in summary["networks"].items()}
    assert sizes["dense"] == 1024 * 6 + 6 + 6 * 6 + 6 + 6 * 10 + 10
    assert sizes["compacted"] == sizes["scratch"] == sizes["random"] == 1024 * 4 + 4 + 4 * 4 + 4 + 4 * 10 + 10
    assert set(summary["on_the_way"]) == {"trained", "pruned", "refitted"}
    assert not summary["settled"]
    weights = {name: load_file(run / f"{name}.safetensors") for name in NETWORKS}
    for first, second in (("compacted", "pruned"), ("pruned", "refitted"), ("scratch", "random")):
        assert weights[first].keys() == weights[second].keys()
        assert not all(torch.equal(weights[second][key], tensor) for key, tensor in weights[first].items())
    assert rows(run / "metrics.jsonl")[-1]["pruning"]["after"] == 8


def test_phases_start_from_what_the_one_before_left(finished):
    run, _ = finished
    trained = load_file(run / "trained.checkpoint.safetensors")
    noisy = load_file(run / "checkpoint.safetensors")
    for name, tensor in trained.items():
        if name.startswith("model."):
            assert torch.equal(noisy[name], tensor), name  # frozen while the noise learns
    assert (noisy["model.hidden0_tanh.mu"] != 0).any()
    assert int(noisy["model.hidden0_tanh.mask"].sum()) == 4
    history = rows(run / "metrics.jsonl")
    assert [row["steps"] for row in history] == [3, 6]
    assert all(row["temperature"] == 1 and not row["settled"] for row in history)


@pytest.mark.parametrize(
    ("title", "epoch"), [("training", 2), ("noise", 2), ("fine-tuning", 1), ("random structures", 2)]
)
@pytest.mark.usefixtures("no_picture")
def test_an_interrupted_run_resumes_to_bitwise_the_same_end(
    finished, options, tmp_path, monkeypatch, title, epoch
):
    straight, broken = finished[0], tmp_path / "broken"
    step = TrainingProgress.step

    def interrupted_step(self, **values):
        if self.title == title and values["epoch"] == epoch:
            raise KeyboardInterrupt
        step(self, **values)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "step", interrupted_step)
        assert main([*options, "--output", str(broken)]) == 130
    torch.rand(3)  # the state of this process must not matter
    assert main(["train", "--resume", str(broken)]) == 0
    for name in (*NETWORKS, "dense", "checkpoint", "fine-tuned.checkpoint"):
        expected, found = (load_file(run / f"{name}.safetensors") for run in (straight, broken))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name
    for stage in STAGES:
        expected, found = (without_time(rows(run / f"{stage}metrics.jsonl")) for run in (straight, broken))
        assert found == expected, stage


@pytest.mark.usefixtures("no_picture")
def test_noise_that_settles_early_leaves_its_epochs_to_fine_tuning(options, tmp_path, monkeypatch):
    monkeypatch.setattr("bmrs.pruning.learner.LEAST_DISTANCE", 0.1)  # where nothing has moved yet
    run = tmp_path / "run"
    assert main([*options, "--noise-epochs", "5", "--output", str(run)]) == 0
    noise = rows(run / "metrics.jsonl")
    assert len(noise) == 1
    assert noise[0]["settled"]
    assert len(rows(run / "fine-tuned.metrics.jsonl")) == 1 + 4
    assert len(rows(run / "scratch.metrics.jsonl")) == len(rows(run / "dense.metrics.jsonl")) == 2 + 5 + 1


@pytest.mark.usefixtures("no_picture")
def test_a_collapse_is_never_delivered(options, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [*options[:-6], "--temperature", "1e9", "--noise-lr", "4", "--noise-epochs", "3"]
    assert main([*arguments, "--output", str(run)]) == 1
    line = capsys.readouterr().err
    assert "at temperature 2.5e+08 the posteriors leave nothing of hidden0_tanh, hidden1_tanh" in line
    assert "nothing was pruned. Start again with a --temperature well below that" in line
    assert [row["temperature"] for row in rows(run / "metrics.jsonl")] == [1e9, 5e8, 2.5e8]
    assert not (run / "compacted.safetensors").exists()


@pytest.mark.usefixtures("no_picture")
def test_a_criterion_that_all_but_empties_a_network_is_told(options, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [*options[: options.index("--ratio")], "--ratio", "0.9", "--noise-epochs", "1"]
    assert main([*arguments, "--output", str(run)]) == 0
    (said, *_) = json.loads((run / "summary.json").read_text())["warnings"]
    assert said.startswith(
        "One structure alone is left of hidden0_tanh (of 6), hidden1_tanh (of 6). To prune less"
    )
    assert f"Warning: {said}" in capsys.readouterr().out


@pytest.mark.usefixtures("no_picture")
def test_without_fine_tuning_the_refitted_network_is_the_result(options, tmp_path):
    run = tmp_path / "run"
    assert main([*options, "--fine-tune-epochs", "0", "--noise-epochs", "1", "--output", str(run)]) == 0
    compacted, refitted = (load_file(run / f"{name}.safetensors") for name in ("compacted", "refitted"))
    assert all(torch.equal(compacted[key], tensor) for key, tensor in refitted.items())
    assert rows(run / "fine-tuned.metrics.jsonl") == []


@pytest.mark.usefixtures("no_picture")
def test_weights_can_go_on_training_with_the_noise(options, tmp_path):
    run = tmp_path / "run"
    assert main([*options, "--weight-lr", "1e-3", "--output", str(run)]) == 0
    trained, noisy = (load_file(run / f"{stage}checkpoint.safetensors") for stage in ("trained.", ""))
    assert not torch.equal(noisy["model.hidden0.weight"], trained["model.hidden0.weight"])
    pruned, refitted = (load_file(run / f"{name}.safetensors") for name in ("pruned", "refitted"))
    assert all(torch.equal(refitted[key], tensor) for key, tensor in pruned.items())
    assert main(["evaluate", str(run)]) == 0


@pytest.mark.usefixtures("no_picture")
def test_several_seeds_have_a_folder_each_and_a_table_of_means(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("bmrs.training.run.draw", lambda *arguments: None)  # saves the time of drawing
    run = tmp_path / "run"
    assert main([*options, "--seed", "4", "--seeds", "2", "--distillation", "0.5", "--output", str(run)]) == 0
    text = capsys.readouterr().out
    assert "Means ± standard deviations of 2 seeds." in text
    assert "2 seeds" in text
    summaries = json.loads((run / "summary.json").read_text())["seeds"]
    accuracies = [summary["networks"]["compacted"]["accuracy"] for summary in summaries]
    for seed, accuracy in zip((4, 5), accuracies, strict=True):
        own = json.loads((run / f"seed-{seed}" / "summary.json").read_text())
        assert own["networks"]["compacted"]["accuracy"] == accuracy
        assert json.loads((run / f"seed-{seed}" / "config.json").read_text())["seed"] == seed
        assert bmrs.load(run / f"seed-{seed}" / "compacted.safetensors")(torch.zeros(1, 1, 32, 32)).shape == (
            1,
            10,
        )
    assert f"{50 * sum(accuracies):.2f} ± " in text

    assert main(["train", "--resume", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert f"{50 * sum(accuracies):.2f} ± " in capsys.readouterr().out
    (run / "seed-5" / "scratch.safetensors").unlink()
    assert main(["evaluate", str(run)]) == 2
    line = " ".join(capsys.readouterr().err.split())
    assert f"seed-5 lacks scratch.safetensors: not a finished run; continue it with --resume {run}" in line
    assert not line.endswith("seed-5")


def test_evaluation_notices_a_network_that_differs(finished, tmp_path, capsys):
    run = shutil.copytree(finished[0], tmp_path / "run")
    model = bmrs.load(run / "pruned.safetensors")
    with torch.no_grad():
        model[-1].bias.add_(1)
    bmrs.save(run / "pruned.safetensors", model)
    assert main(["evaluate", str(run)]) == 2
    assert "pruned.safetensors: its outputs differ from the masked network's by" in capsys.readouterr().err
