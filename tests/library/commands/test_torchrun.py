"""`bmrs train` as several processes of torchrun."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from idx_files import write_idx_folder
from safetensors.torch import load_file
from several_processes import run_together
from torch import nn

import bmrs
from bmrs import processes
from bmrs.cli import main
from bmrs.training import RunError, TrainConfig, algorithm1, devices, recipe, run
from bmrs.training.fit import fit, fitting_state
from bmrs.training.progress import TrainingProgress
from bmrs.training.run_folder import RunFolder

pytestmark = pytest.mark.slow
# 48 training images: batches of 13, 13, 13 and 9, of which no part is as large as another.
NETWORK = "--device cpu --model mlp --num-blocks 1 --hidden 6 --batch-size 13"
PAPER = "--recipe paper --epochs 2 --fine-tune-epochs 1 --criterion l2 --ratio 0.34"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    images = write_idx_folder(tmp_path_factory.mktemp("data") / "images", train=60, test=64)
    return ["train", "--data", "mnist", "--data-dir", str(images), *NETWORK.split()]


def torchrun(*arguments):
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run(
        [*program, "-m", "bmrs", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def own_lines(text):
    return [line for line in text.splitlines() if line.startswith("bmrs: ")]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_time(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def assert_same(first, second, name):
    expected, found = (load_file(run / f"{name}.safetensors") for run in (first, second))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


class Quiet:
    def step(self, **values):
        pass

    def epoch(self, row):
        pass


def test_two_processes_train_what_one_does(options, tmp_path):
    schedule = ["--epochs", "2", "--noise-epochs", "1", "--fine-tune-epochs", "1"]
    done = torchrun(*options, *schedule, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert not own_lines(done.stderr)
    assert done.stdout.count("noise: epoch 1/1") == done.stdout.count("run folder: ") == 1
    assert done.stdout.count("test accuracy") == 1
    folder, config = RunFolder.open(tmp_path / "run")
    summary = json.loads(folder.summary.read_text())
    assert set(summary["networks"]) == {"dense", "compacted", "scratch", "random"}
    assert bmrs.load(folder.network("compacted"))(torch.zeros(1, 1, 32, 32)).shape == (1, 10)

    cpu = torch.device("cpu")
    data = run.load(config, cpu)
    rest = {"save": lambda state: None, "progress": Quiet()}
    states = {}
    for name, epochs in (("trained", 2), ("dense", 4)):
        states[name] = fitting_state(recipe.untrained(config, data, cpu), config, cpu)
        fit(states[name], data, config, epochs=epochs, phase=name, **rest)
        together = rows(folder.metrics(name))
        for key in ("loss", "train_accuracy", "validation_accuracy"):
            expected = [row[key] for row in states[name].history]
            assert [row[key] for row in together] == pytest.approx(expected, rel=1e-5)
    # Without noise the steps are the same, to rounding.
    torch.testing.assert_close(
        load_file(folder.dense), dict(states["dense"].model.state_dict()), rtol=1e-4, atol=1e-6
    )
    alone = recipe.noisy_state(states["trained"].model, config, data, cpu)
    recipe.learn_noise(alone, data, config, **rest)
    expected, found = alone.history[0], rows(folder.metrics("noisy"))[0]
    # The KL counts once. The draws of noise differ, and with them the likelihood a little.
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-2)
    assert found["nll"] != expected["nll"]


def test_a_bad_option_gives_one_line_and_the_exit_code(options):
    done = torchrun(*options, "--epochs", "0")
    assert own_lines(done.stderr) == [
        "bmrs: error: --epochs must be a number of at least 1, got 0; only --weights need no training"
    ]
    # torchrun ends with 1 whatever happened, and shows the code in its own report.
    assert done.returncode == 1
    assert re.findall(r"exitcode +: (\S+)", done.stderr) == ["2", "2"]
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert not done.stdout


# The rest without torchrun's own start, which takes seconds: processes as it makes them, that meet where it says


@pytest.fixture
def together(tmp_path):
    """Runs a command in two processes; returns exit codes, stdout and what both wrote to stderr."""

    def run(arguments, prepare=None):
        run_together(command, arguments, prepare, tmp_path, world=2)
        results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
        codes, outs, errs = zip(*results, strict=True)
        assert not outs[1]
        return codes, outs[0], "".join(errs)

    return run


def command(rank, arguments, prepare, folder):
    if prepare is not None:
        prepare(rank)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = exit.code
        except ZeroDivisionError as error:
            code = repr(error)
    (folder / f"{rank}.json").write_text(json.dumps([code, out.getvalue(), err.getvalue()]))


def without_measuring(rank):
    """Leave out what takes long and is no matter of several processes."""
    algorithm1.compression = lambda *arguments: 0.0
    run._result = lambda *arguments: None


def interrupt_the_second(rank):
    without_measuring(rank)
    step = TrainingProgress.step

    def interrupted_step(self, **values):
        if rank == 1 and values["epoch"] == 2:
            raise KeyboardInterrupt
        step(self, **values)

    TrainingProgress.step = interrupted_step


def nan_on_the_second(rank):
    forward = nn.Linear.forward
    if rank == 1:
        nn.Linear.forward = lambda self, x: forward(self, x) * float("nan")


def other_weights_on_the_second(rank):
    step = torch.optim.Adam.step

    def other_step(self):
        step(self)
        self.param_groups[0]["params"][0].data[0] += 1e-6 * rank

    torch.optim.Adam.step = other_step


def without_gpus(rank):
    torch.cuda.device_count = lambda: 0


def fault_on_the_second(rank):
    def fail(self, **values):
        raise ZeroDivisionError("a fault of the program")

    if rank == 1:
        TrainingProgress.step = fail


def test_an_interrupted_run_resumes_to_the_same_end(options, together, tmp_path, monkeypatch):
    straight, broken, alone = (tmp_path / name for name in ("straight", "broken", "alone"))
    options = [*options, *PAPER.split(), "--output"]
    assert together([*options, str(straight)], without_measuring)[0] == (0, 0)
    codes, _, err = together([*options, str(broken)], interrupt_the_second)
    assert codes == (130, 130)
    assert err == f"bmrs: interrupted; continue with: bmrs train --resume {broken}\n"

    shutil.copytree(broken, alone)
    assert together(["train", "--resume", str(broken)], without_measuring)[0] == (0, 0)
    for name in ("checkpoint", "dense.checkpoint", "compacted"):
        assert_same(straight, broken, name)
    for name in ("metrics.jsonl", "dense.metrics.jsonl"):
        assert without_time(rows(broken / name)) == without_time(rows(straight / name))

    # Another number of processes goes on from the same state, but draws other noise.
    before = rows(alone / "metrics.jsonl")
    assert len(before) == 1
    monkeypatch.setattr(algorithm1, "compression", lambda *arguments: 0.0)
    monkeypatch.setattr(run, "_result", lambda *arguments: None)
    assert main(["train", "--resume", str(alone)]) == 0
    after = rows(alone / "metrics.jsonl")
    assert len(after) == 3
    assert after[:1] == before
    dense = [rows(folder / "dense.metrics.jsonl")[-1]["loss"] for folder in (straight, alone)]
    assert dense[0] == pytest.approx(dense[1], rel=1e-5)


@pytest.mark.parametrize(
    ("prepare", "extra", "code", "line"),
    [
        (
            nan_on_the_second,
            [],
            1,
            r"NaN or infinity at epoch 1, step 1: first seen in the output of layer .*",
        ),
        (
            other_weights_on_the_second,
            [],
            2,
            r"after epoch 1 of .* the 2 processes hold different parameters .*",
        ),
        (
            None,
            ["--cuda-graph", "true"],
            2,
            r"--cuda-graph true goes with one process only, not with the 2 .*",
        ),
        (without_gpus, ["--device", "cuda"], 2, r"--device cuda needs a GPU for each process, .* has 0 .*"),
        (
            None,
            ["--device", "cuda:1"],
            2,
            r"--device cuda:1 does not go with the 2 processes of this run: .*",
        ),
    ],
)
def test_what_fails_on_a_process_ends_all_with_one_line(
    options, together, tmp_path, prepare, extra, code, line
):
    output = ["--output", str(tmp_path / "run")]
    codes, _, err = together([*options, *extra, *output], prepare)
    assert codes == (code, code)
    assert re.fullmatch(f"bmrs: error: {line}\n", err)
    if (tmp_path / "run").exists():
        assert not rows(tmp_path / "run/trained.metrics.jsonl")


def test_a_fault_of_the_program_is_raised_on_one_process(options, together, tmp_path):
    output = ["--output", str(tmp_path / "run")]
    codes, _, err = together([*options, *output], fault_on_the_second)
    assert codes == (1, "ZeroDivisionError('a fault of the program')")
    assert not err


def test_what_the_first_process_alone_does_ends_the_others_if_it_fails(together, tmp_path):
    codes, _, err = together(["evaluate", str(tmp_path / "nothing")])
    assert codes == (2, 2)
    assert err == f"bmrs: error: {tmp_path / 'nothing'} is no run folder: config.json is missing\n"


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    taken = []
    monkeypatch.setattr(processes, "count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices._device_of_process("cuda", TrainConfig()) == "cuda:1"
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RunError, match="this machine has 2 and a process number 2"):
        devices._device_of_process("cuda", TrainConfig())
