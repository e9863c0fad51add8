"""The command line where terminals, folders, signals and other processes are not what one would wish."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import get_args

import pytest
import torch
import yaml
from idx_files import write_idx_folder
from rich.console import Console

import bmrs.__main__
from bmrs.cli import main
from bmrs.terminal import any_encoding
from bmrs.training import RunError, TrainConfig
from bmrs.training.progress import TrainingProgress
from bmrs.training.run_folder import RunFolder
from bmrs.training.settings import PAPER_SETTINGS, RecipeName, default_settings

OPTIONS = "--data mnist --device cpu --model mlp --num-blocks 1 --hidden 6 --batch-size 16 --recipe paper"
SHORT = "--epochs 1 --fine-tune-epochs 0 --criterion l2 --ratio 0.34"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("data") / "images", train=60, test=64)


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr("bmrs.training.run.draw", lambda *arguments: None)


def printed(*arguments, code=0):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(text):
        assert main(list(arguments)) == code
    return text.getvalue()


# Letters


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_letters_that_an_encoding_lacks_are_spelled_out(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with any_encoding():
        print("θ ≤ 2.00× ± 0.1 字 \udcff")
        stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    wanted = {"ascii": "theta <= 2.00x +- 0.1 ? ?\n", "utf-8": "θ ≤ 2.00× ± 0.1 字 ?\n"}
    assert text == wanted.get(encoding, "theta <= 2.00× ± 0.1 ? ?\n")
    assert stream.errors == "strict"


@pytest.mark.slow
def test_help_in_ascii():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
    command = [sys.executable, "-m", "bmrs", "train", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=100, check=True)
    assert b"E[theta]" in done.stdout
    assert done.stderr == b""


# Width


def shown(width, **options):
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, **options)
    with TrainingProgress(console, "fine-tuning", epochs=3, done=0) as progress:
        progress.step(epoch=2, step=7, steps=150, loss=0.123, kl=4.567)
        progress.epoch(
            {"epoch": 2, "phase": "noise", "loss": 0.1, "kl": 0.2, "validation_accuracy": 0.8, "seconds": 1.0}
        )
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())


@pytest.mark.parametrize("width", [40, 60, 80, 99, 118, 200])
def test_the_epoch_and_the_time_left_are_shown_at_any_width(width, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    lines = [line for line in re.split(r"[\r\n]+", shown(width)) if line.strip()]
    assert all(len(line) <= width for line in lines)
    assert re.search(r"fine-tuning .*\d/3 +-?\d?:", lines[-1])
    assert ("loss 0.123" in lines[-1]) == (width >= 60)


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "fine-tuning: epoch 2/3 (noise) loss 0.100" in shown(80)


def test_what_takes_long_before_the_first_step_is_said():
    text = io.StringIO()
    options = {"epochs": 3, "before_the_first_step": "compiling [for a while]"}
    with TrainingProgress(Console(file=text), "noise", done=0, **options):
        pass
    assert text.getvalue().rstrip() == "noise: compiling [for a while]"


# Help and options


def test_help_has_groups_examples_and_plain_words():
    text = printed("train", "--help")
    for group in (
        "images",
        "network",
        "training",
        "what goes",
        "recipe paper",
        "seeds and device",
        "examples",
    ):
        assert f"\n{group}:" in text
    assert "(type:" not in text
    assert "null" not in text
    assert "the paper's" not in re.sub(r"the\s+paper's\s+own\s+code", "", text)
    assert "--criterion {bmrs-odds,bmrs-normal," in text


def test_help_states_the_defaults_that_are_used():
    texts = {name: field.metadata["help"] for name, field in TrainConfig.__dataclass_fields__.items()}
    for recipe in get_args(RecipeName):
        for model, data in PAPER_SETTINGS:
            settings = default_settings(recipe, model, data)
            for name, value in settings._asdict().items():
                default = texts[name].partition("default: ")[2]
                if value is None or ("see --print-config" in default and recipe == "paper"):
                    continue
                if name == "noise_lr" and value == settings.lr:
                    assert "the same as --lr" in default
                    continue
                numbers = [float(number) for number in re.findall(r"\d(?:[\d.]*\d)?(?:e-\d)?", default)]
                assert value in numbers or str(value) in default, (name, value)


def test_print_config_gives_what_config_takes(tmp_path, images):
    text = printed("train", *OPTIONS.split(), "--data-dir", str(images), "--print-config")
    options = yaml.safe_load(text)
    assert options["epochs"] == 50  # filled in
    assert options["criterion"] == "bmrs-normal"
    (tmp_path / "options.yaml").write_text(text)
    assert printed("train", "--config", str(tmp_path / "options.yaml"), "--print-config") == text
    assert yaml.safe_load(printed("train", "--temperature", "3", "--print-config"))["temperature"] == 3


# Folders


@pytest.mark.usefixtures("no_picture")
def test_data_are_found_from_any_folder_and_where_they_moved(images, tmp_path, monkeypatch):
    monkeypatch.chdir(images.parent)
    run = tmp_path / "run [bold] [x]"
    text = printed("train", *OPTIONS.split(), *SHORT.split(), "--data-dir", images.name, "--output", str(run))
    assert f"run folder: {run}" in text
    assert json.loads((run / "config.json").read_text())["data_dir"] == str(images)
    monkeypatch.chdir(tmp_path)
    printed("train", "--resume", str(run))
    moved = images.rename(images.parent / "moved")
    try:
        assert str(images) in printed("train", "--resume", str(run), code=2)
        printed("train", "--resume", str(run), "--data-dir", str(moved))
    finally:
        moved.rename(images)


def test_the_hint_to_resume_can_be_pasted(images, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "step", interrupted)
    run = tmp_path / "my run"
    arguments = [*OPTIONS.split(), *SHORT.split(), "--data-dir", str(images), "--output", str(run)]
    assert f"bmrs train --resume '{run}'" in printed("train", *arguments, code=130)


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.occupied():
        message = rf"is in use by process {os.getpid()} on .*: wait until it has ended"
        with pytest.raises(RunError, match=message), RunFolder(tmp_path).occupied():
            pass
        (tmp_path / ".process.json").write_text("nonsense")
        with pytest.raises(RunError, match="is in use by another process"), RunFolder(tmp_path).occupied():
            pass
    with RunFolder(tmp_path).occupied():
        pass


@pytest.mark.usefixtures("no_picture")
def test_another_number_of_threads_is_said_on_resuming(images, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", *OPTIONS.split(), *SHORT.split(), "--data-dir", str(images), "--output", str(run)]
    assert "note:" not in printed(*arguments)
    assert "note:" not in printed("train", "--resume", str(run))
    noted = json.loads((run / "environment.json").read_text())
    assert noted["threads"] == torch.get_num_threads()
    (run / "environment.json").write_text(json.dumps({**noted, "threads": 77}))
    text = printed("train", "--resume", str(run))
    assert (
        f"note: the run began with threads 77, now {torch.get_num_threads()}: it goes on, but need not end"
        in text
    )
    assert "(OMP_NUM_THREADS=77 sets threads)" in text


# Signals


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_sigterm_ends_like_ctrl_c(images, tmp_path):
    run = tmp_path / "run"
    arguments = f"{OPTIONS} --epochs 5000 --fine-tune-epochs 0 --data-dir {images} --output {run}".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "bmrs", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 100
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == f"bmrs: interrupted; continue with: bmrs train --resume {run}\n"


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/file"), "No space left on device: 'a/file'"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe: 'standard output'"),
    ],
)
def test_a_run_that_cannot_write_says_how_it_goes_on(images, tmp_path, monkeypatch, fault, message):
    """A full disk, and an output that nobody reads any more."""

    def fail(*arguments, **options):
        raise fault

    run = tmp_path / "my run"
    with monkeypatch.context() as patch:
        if isinstance(fault, BrokenPipeError):
            patch.setattr(TrainingProgress, "epoch", lambda self, row: self._console.on_broken_pipe())
        else:
            patch.setattr("bmrs.training.phases.write_json_lines", fail)
        text = printed(
            "train", *OPTIONS.split(), *SHORT.split(), "--data-dir", str(images), "--output", str(run), code=2
        )
    assert text.splitlines()[-1].endswith(
        f"{message}; that mended, continue with: bmrs train --resume '{run}'"
    )
    printed("train", "--resume", str(run))


def test_data_that_have_moved_are_asked_for(images, tmp_path):
    run = tmp_path / "run"
    RunFolder.create(
        TrainConfig(data="mnist", data_dir=str(images / "elsewhere"), model="mlp", device="cpu"), run
    )
    text = printed("train", "--resume", str(run), code=2)
    assert f"bmrs train --resume {run}, where --data-dir tells where data are now" in text


@pytest.mark.parametrize("error", [RecursionError("too deep"), ImportError("half imported")])
def test_what_libraries_make_of_ctrl_c_is_an_interruption(monkeypatch, capsys, error):
    def interrupted(*arguments, **options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error from None

    monkeypatch.setattr("bmrs.training.train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "bmrs: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_that_are_ignored_stay_so(monkeypatch, capsys):
    """As Ctrl-C is by what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr("bmrs.training.train", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        assert main(["train"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("reason", [0, "bye"])
def test_code_that_ends_the_program_does_not_do_so_in_silence(monkeypatch, capsys, reason):
    def ended(*arguments, **options):
        sys.exit(reason)

    monkeypatch.setattr("bmrs.training.train", ended)
    assert main(["train"]) == 2
    said = f"bmrs: error: code of a network or of data has ended the program: SystemExit({reason!r})\n"
    assert capsys.readouterr().err == said


def test_a_second_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("bmrs.cli.main", interrupted)
    assert bmrs.__main__.main() == 130
    assert capsys.readouterr().err == "bmrs: interrupted\n"


def test_ctrl_c_while_importing(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "bmrs.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "bmrs.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert bmrs.__main__.main() == 130
    assert capsys.readouterr().err == "bmrs: interrupted\n"
