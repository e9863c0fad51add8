import contextlib
import io
import json
import re
import shutil
import sys

import pytest
import torch
from checkpoint_files import rewrite_checkpoint
from idx_files import write_idx_folder
from rich.console import Console
from safetensors.torch import load_file, save_file

import bmrs
from bmrs.cli import main
from bmrs.training.progress import TrainingProgress

BEST_KEPT = "the best one of a layer was kept only because a layer cannot be empty. To prune less, take"
FILES = {
    ".lock",
    "environment.json",
    "checkpoint.safetensors",
    "compacted.safetensors",
    "config.json",
    "dense.checkpoint.safetensors",
    "dense.metrics.jsonl",
    "dense.safetensors",
    "metrics.jsonl",
    "picture.png",
    "summary.json",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("data") / "images", train=60, test=64)


@pytest.fixture(scope="module")
def options(images):
    data = f"--data mnist --data-dir {images} --device cpu"
    network = "--model mlp --num-blocks 1 --hidden 6 --batch-size 16"
    schedule = "--recipe paper --epochs 2 --fine-tune-epochs 1 --criterion l2 --ratio 0.34"
    return ["train", *data.split(), *network.split(), *schedule.split()]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A finished run and what it printed; tests leave it as it is."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main([*options, "--output", str(run)]) == 0
    return run, text.getvalue()


@pytest.fixture
def run_copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture
def no_picture(monkeypatch):
    """Saves the time of drawing."""
    monkeypatch.setattr("bmrs.training.run.draw", lambda *arguments: None)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_time(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def rewrite_config(run, **options):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **options}))


def error_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_leaves_its_files_and_a_table(finished):
    run, text = finished
    assert {path.name for path in run.iterdir()} == FILES
    for part in ("test accuracy", "parameters", "FLOPs per image", "bytes on disk", "ms for 64 images"):
        assert part in text
    assert "Compression as the paper counts it" in text
    assert text.count("with noise: epoch") == 3  # no live bar where there is no terminal
    assert text.count("dense: epoch") == 3

    summary = json.loads((run / "summary.json").read_text())
    assert summary["kept"] == {"hidden0_tanh": [3, 6], "hidden1_tanh": [3, 6]}
    assert summary["reload_error"] < 1e-4
    networks = summary["networks"]
    dense, compacted = networks["dense"], networks["compacted"]
    assert dense["parameters"] == 1024 * 6 + 6 + 6 * 6 + 6 + 6 * 10 + 10
    assert compacted["parameters"] == 1024 * 3 + 3 + 3 * 3 + 3 + 3 * 10 + 10
    assert compacted["flops"] == 2 * (1024 * 3 + 3 * 3 + 3 * 10)
    assert compacted["file_size"] == (run / "compacted.safetensors").stat().st_size < dense["file_size"]
    assert compacted["accuracy"] == networks["masked"]["accuracy"]
    assert all(time > 0 for network in networks.values() for time in network["latency"])
    assert bmrs.load(run / "compacted.safetensors")(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    assert (run / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [row["epoch"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.usefixtures("no_picture")
def test_a_criterion_that_empties_a_network_is_told(options, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [*options[: options.index("--criterion")], "--criterion", "snr", "--threshold", "1e6"]
    assert main([*arguments, "--output", str(run)]) == 0
    said = f"snr asked for every structure of hidden0_tanh (6), hidden1_tanh (6); {BEST_KEPT}"
    assert f"Warning: {said}" in capsys.readouterr().out
    assert said in json.loads((run / "summary.json").read_text())["warnings"][0]
    assert main(["evaluate", str(run)]) == 0
    assert f"Warning: {said}" in capsys.readouterr().out


# Interruption


def interrupt_at(monkeypatch, *, title, epoch):
    """Make Ctrl-C arrive in the middle of an epoch."""
    step = TrainingProgress.step

    def interrupted_step(self, **values):
        if self.title == title and values["epoch"] == epoch:
            raise KeyboardInterrupt
        step(self, **values)

    monkeypatch.setattr(TrainingProgress, "step", interrupted_step)


@pytest.mark.slow
@pytest.mark.parametrize(("title", "epoch"), [("with noise", 1), ("with noise", 2), ("dense", 3)])
@pytest.mark.usefixtures("no_picture")
def test_an_interrupted_run_resumes_to_bitwise_the_same_end(
    finished, options, tmp_path, monkeypatch, capsys, title, epoch
):
    straight, broken = finished[0], tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt_at(patch, title=title, epoch=epoch)
        assert main([*options, "--output", str(broken)]) == 130
    assert error_line(capsys) == f"bmrs: interrupted; continue with: bmrs train --resume {broken}"
    metrics = "metrics.jsonl" if title == "with noise" else "dense.metrics.jsonl"
    assert len(rows(broken / metrics)) == epoch - 1

    torch.rand(3)  # the state of this process must not matter
    assert main(["train", "--resume", str(broken)]) == 0
    for name in ("checkpoint", "dense.checkpoint", "dense", "compacted"):
        expected, found = (load_file(run / f"{name}.safetensors") for run in (straight, broken))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name
    for name in ("metrics.jsonl", "dense.metrics.jsonl"):
        assert without_time(rows(broken / name)) == without_time(rows(straight / name))


@pytest.mark.usefixtures("no_picture")
def test_resuming_accepts_the_runs_own_options_only(options, run_copy, capsys):
    run = str(run_copy)
    assert main([*options, "--resume", run]) == 0
    capsys.readouterr()
    assert main([*options, "--lr", "0.5", "--resume", run]) == 2
    assert error_line(capsys) == "bmrs: error: --lr is 0.5, but the run to resume has 0.00085"
    assert main(["train", "--output", "elsewhere", "--resume", run]) == 2
    assert "--output does not go with --resume" in error_line(capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda run: rewrite_checkpoint(
                run / "checkpoint.safetensors",
                lambda s, t: t.update({"optimizer.0.exp_avg": t["optimizer.0.exp_avg"][:1, 0]}),
            ),
            r"optimizer.0.exp_avg is float32 of shape \(1,\), expected float32 of shape \(6, 1024\)",
        ),
        (
            lambda run: rewrite_config(run, seed=1),
            "of a run with --seed 0, and this run's config.json says 1",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train --resume", "evaluate"])
def test_a_run_that_was_tampered_with_is_left_alone(run_copy, change, message, command, capsys):
    change(run_copy)
    before = {path.name: path.read_bytes() for path in run_copy.iterdir()}
    assert main([*command.split(), str(run_copy)]) == 2
    assert re.search(message, error_line(capsys))
    assert {path.name: path.read_bytes() for path in run_copy.iterdir()} == before


# NaN


@pytest.mark.usefixtures("no_picture")
def test_a_non_finite_loss_stops_with_the_place_and_keeps_the_last_good_checkpoint(
    options, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, title="with noise", epoch=2)
        assert main([*options, "--output", str(run)]) == 130
    capsys.readouterr()
    good = (run / "checkpoint.safetensors").read_bytes()
    loss = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        "bmrs.training.algorithm1.cross_entropy",
        lambda config: lambda logits, batch: loss(logits, batch.labels) * torch.nan,
    )
    assert main(["train", "--resume", str(run)]) == 1
    place = r"(the output of layer|the gradient of|parameter) '\w+(\.\w+)?'"
    line = rf"bmrs: error: NaN or infinity at epoch 2, step \d: first seen in {place}\. The checkpoint of the last good"
    assert re.match(line, error_line(capsys))
    assert (run / "checkpoint.safetensors").read_bytes() == good
    assert [row["epoch"] for row in rows(run / "metrics.jsonl")] == [1]
    assert not (run / "compacted.safetensors").exists()


# Evaluation


def test_evaluation_measures_a_run_again(run_copy, tmp_path, images, capsys):
    before = {path.name: path.read_bytes() for path in run_copy.iterdir()}
    moved = shutil.copytree(images, tmp_path / "moved")
    assert main(["evaluate", str(run_copy), "--data-dir", str(moved), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "test accuracy" in text
    accuracy = json.loads(before["summary.json"])["networks"]["compacted"]["accuracy"]
    assert f"{100 * accuracy:.2f}" in text
    assert {path.name: path.read_bytes() for path in run_copy.iterdir()} == before


def test_evaluation_names_missing_files(run_copy, capsys):
    (run_copy / "compacted.safetensors").unlink()
    (run_copy / "dense.safetensors").unlink()
    assert main(["evaluate", str(run_copy)]) == 2
    assert "run lacks dense.safetensors, compacted.safetensors: not a finished run" in error_line(capsys)


def test_evaluation_is_not_misled_by_rough_float32_products(run_copy, monkeypatch):
    """A GPU may take TF32 for them, which keeps 10 bits of each factor."""
    exact = torch.nn.functional.linear

    def rough(input, weight, bias=None):
        out = exact(input, weight, bias)
        return out + 1e-3 * out.abs().max() * torch.randn_like(out) if out.dtype == torch.float32 else out

    monkeypatch.setattr(torch.nn.functional, "linear", rough)
    assert main(["evaluate", str(run_copy)]) == 0


def test_evaluation_notices_a_network_that_differs(run_copy, capsys):
    path = run_copy / "compacted.safetensors"
    model = bmrs.load(path)
    with torch.no_grad():
        model[-1].bias.add_(1)
    bmrs.save(path, model)
    assert main(["evaluate", str(run_copy)]) == 2
    assert "compacted.safetensors: its outputs differ from the masked network's by" in error_line(capsys)


def with_nan(weight):
    return torch.full_like(weight, torch.nan)


@pytest.mark.parametrize("name", ["dense", "compacted"])
def test_evaluation_names_a_network_with_nan(run_copy, name, capsys):
    path = run_copy / f"{name}.safetensors"
    if name == "dense":
        save_file({key: with_nan(tensor) for key, tensor in load_file(path).items()}, path)
    else:
        model = bmrs.load(path)
        torch.nn.init.constant_(model.hidden0.weight, torch.nan)
        bmrs.save(path, model)
    assert main(["evaluate", str(run_copy)]) == 2
    assert re.search(rf"{name}.safetensors is broken: hidden0.\w+ holds NaN or infinity", error_line(capsys))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            (torch.nn.Flatten(), torch.nn.Linear(3072, 10)),
            "it does not take the images of mnist, of shape (1, 32, 32)",
        ),
        ((torch.nn.Flatten(), torch.nn.Linear(1024, 3)), "have the shape (2, 3), expected (2, 10)"),
    ],
)
def test_evaluation_names_a_network_for_other_data(run_copy, layers, message, capsys):
    bmrs.save(run_copy / "compacted.safetensors", torch.nn.Sequential(*layers))
    assert main(["evaluate", str(run_copy)]) == 2
    line = error_line(capsys)
    assert "compacted.safetensors is broken or of another run" in line
    assert message in line


@pytest.mark.parametrize("name", ["dense.safetensors", "compacted.safetensors", "checkpoint.safetensors"])
@pytest.mark.parametrize("other", [True, False])
def test_evaluation_names_a_broken_file(run_copy, name, other, capsys):
    if other:
        save_file({"weight": torch.zeros(3)}, run_copy / name)
    else:
        (run_copy / name).write_bytes(b"nonsense")
    assert main(["evaluate", str(run_copy)]) == 2
    line = error_line(capsys)
    assert name in line
    assert "broken" in line


# Options


@pytest.mark.usefixtures("no_picture")
def test_options_come_from_a_file_and_flags_win(options, images, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"data: mnist\ndata_dir: {images}\nmodel: mlp\nhidden: 6\nnum_blocks: 0\nlr: 1e-3\nkl_weight: 0.5\n"
        "recipe: paper\nepochs: 5\nfine_tune_epochs: 0\ndevice: cpu\n"
    )
    run = tmp_path / "run"
    assert main(["train", "--config", str(settings), "--epochs", "1", "--output", str(run)]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["lr"], config["kl_weight"], config["epochs"], config["batch_size"]) == (1e-3, 0.5, 1, 128)
    # A run's own config repeats it.
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.json"), "--output", str(again)]) == 0
    assert (again / "config.json").read_text() == (run / "config.json").read_text()
    first, second = (load_file(path / "compacted.safetensors") for path in (run, again))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --lr x", "--lr must be a number, got 'x'"),
        ("train --lr -1", "--lr must be a number greater than 0, got -1.0"),
        ("train --seed 1.5", "--seed must be a whole number, got '1.5'"),
        ("train --model vgg", "or package.module:factory, got 'vgg'"),
        ("train --kl-weight max", "--kl-weight must be elbo, mean or a number, got 'max'"),
        ("train --data mnist", "--data mnist needs --data-dir, the folder with its official files"),
        (
            "train --data mnist --data-dir nowhere",
            "nowhere: no such folder; expected the official files of mnist",
        ),
        ("train --colour red", "unrecognized arguments: --colour red"),
        ("train --channels_last true", "--channels_last true; did you mean --channels-last?"),
        ("train --data /", "got '/'; for that folder give folder:/"),
        ("train --new-classifier", "--new-classifier must be true or false, got nothing"),
        ("train --config nowhere.yaml", "nowhere.yaml"),
        (
            "train --image-size 16 --recipe paper",
            "--model lenet5 does not take images of shape (1, 16, 16): ",
        ),
        ("train --image-size 16", "; it is meant for --image-size 32"),
        ("train --device nonsense", "--device nonsense cannot be used: "),
        ("train --device cuda:99", "--device cuda:99 cannot be used: "),
        ("train --resume nowhere", "nowhere is no run folder: config.json is missing"),
        ("evaluate nowhere", "nowhere is no run folder: config.json is missing"),
        ("evaluate", "RUN is missing: give the folder of a run"),
        ("compare", "RUN is missing: give the folder of a run"),
        ("curve run --points x", "--points must be a whole number, got 'x'"),
        ("curve run --points 1000000000", "--points must be a number of at most 10000, got 1000000000"),
        ("evaluate run --device ", "--device must not be empty"),
        ("train --output ", "--output must not be empty"),
        ("train --data mnist --data-dir ", "--data-dir must not be empty"),
        ("export ", "RUN must not be empty"),
        ("", "train,evaluate"),
        ("train --seed 18446744073709551616", "--seed must be a number of at most 18446744073709551615, got"),
        (f"train --seed {10**400}", "--seed must be a number of at most 18446744073709551615, got 1000"),
        (f"train --lr {10**400}", "--lr must be a number, got '1000"),
        (f"train --seed 1{'0' * 5000}", "--seed must be a whole number: Exceeds the limit"),
        ("train --batch-size 1e30", "--batch-size must be a whole number, got '1e30'"),
        ("train --recipe paper --tolerance -1e30", "tolerance must be finite and at least 0, got -1e+30"),
        ("train --recipe paper --tolerance=-1e30", "tolerance must be finite and at least 0, got -1e+30"),
        ("train --lr -.5e-1", "--lr must be a number greater than 0, got -0.05"),
        ("train --lr -.inf", "--lr must be a number greater than 0, got -inf"),
        (
            "train --model mlp --hidden 1000000000",
            "--hidden 1000000000 with --num-blocks 1 needs at least 16,",
        ),
        ("train --device meta", "--device meta cannot be used: "),
        ("train --device privateuseone", "--device privateuseone cannot be used: "),
        ("train --output \0", "--output must be text in UTF-8 without NUL characters, got '\\x00'"),
        ("evaluate \ud800", "RUN must be text in UTF-8 without NUL characters, got '\\ud800'"),
        (f"train --colour {'red' * 10**5}", "unrecognized arguments: --colour redred"),
        ("prune", "invalid choice: 'prune'"),
    ],
)
def test_a_bad_command_is_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split(" ") if arguments else []) == 2
    line = error_line(capsys)
    assert line.startswith("bmrs: error: ")
    assert message in line
    assert len(line) < 1100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 1e-3\n".encode("utf-16"), "must be text in UTF-8"),
        (bytes(range(256)), "must be text in UTF-8"),
        (b"\0", "is no YAML or JSON file"),
        (b"", "must hold options, as in 'lr: 1e-3', got ''"),
        (b"- 1", "must hold options"),
        (b"{", "is no YAML or JSON file"),
        (b"[" * 5 * 10**4, "must hold options"),
        (b"lr: " + b"[" * 5 * 10**4, "line 1: the value of 'lr' must be a plain number or text"),
        (b"lr: 1\n}", "is no YAML or JSON file"),
        (b'{"lr":' * 10**3 + b"1" + b"}" * 10**3, "line 1: the value of 'lr' must be a plain number or text"),
        (b"#" * 10**5, "is no file with options: it has more than 65536 bytes"),
        (b"seed: 1" + b"0" * 5000, "line 1: '10000"),
        (b"lr: 1e-3\nseed: 1\nlr: 1e-2", "line 3: 'lr' is given more than once"),
        (b'{"lr": 1e-3, "lr": 1e-2}', "line 1: 'lr' is given more than once"),
        (b"lr: !!int x", "line 1: the value of 'lr' must be a plain number or text"),
        (b"lr: &a 1\nnoise_lr: *a", "line 1: the value of 'lr' must be a plain number or text"),
        (b"lr: 1\n---\nlr: 2", "must hold one document of options, got several"),
        (b"lr: 1\n\ncolour: red", "line 3: there is no option 'colour'"),
        (b"config: settings.yaml", "line 1: there is no option 'config'"),
        (b"lr: fast", "--lr must be a number, got 'fast'"),
    ],
)
def test_a_bad_file_with_options_is_one_line(content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_bytes(content)
    assert main(["train", "--config", "settings.yaml"]) == 2
    assert message in error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


def test_running_out_of_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("bmrs.training.train", lambda *arguments, **options: torch.empty(10**13))
    assert main(["train"]) == 2
    assert error_line(capsys).startswith(
        "bmrs: error: out of memory; a smaller --batch-size or --hidden may fit"
    )


def test_other_errors_of_torch_are_not_hidden(monkeypatch):
    monkeypatch.setattr("bmrs.training.train", lambda *arguments, **options: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        main(["train"])


def test_a_used_output_folder_is_refused(options, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert main([*options, "--output", str(tmp_path / "used")]) == 2
    assert "is not empty: give another --output" in error_line(capsys)


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"]])
def test_help_is_there(command, capsys):
    assert main([*command, "--help"]) == 0
    assert "usage: bmrs" in capsys.readouterr().out


def test_interruption_before_the_run_starts(options, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bmrs.training.train", interrupt)
    assert main(options) == 130
    assert error_line(capsys) == "bmrs: interrupted"


def test_a_run_without_matplotlib_says_how_to_get_the_picture(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert (
        main([*options, "--epochs", "1", "--fine-tune-epochs", "0", "--output", str(tmp_path / "run")]) == 0
    )
    assert "no picture, as matplotlib is missing: pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "run" / "picture.png").exists()


# Progress


def test_a_terminal_gets_a_live_bar():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with TrainingProgress(console, "with noise", epochs=4, done=1) as progress:
        progress.step(epoch=2, step=5, steps=10, loss=1.25, kl=0.5)
        progress.epoch({"kept": {"a": 3, "b": 4}, "validation_accuracy": 0.5})
        progress.step(epoch=3, step=10, steps=10, loss=1.0, kl=0.25)
    text = stream.getvalue()
    assert "loss 1.000 KL 0.250 kept 3/4 accuracy 50.0%" in text
    assert "3/4" in text
