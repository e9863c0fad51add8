"""The paper's experiment: what is run and in which order, that it can be stopped and goes on, and its table."""

from __future__ import annotations

import functools
import json
import math
import operator
import pickle
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.experiments import paper, paper_table, published
from benchmarks.experiments.paper import Conditions, PaperRun
from benchmarks.tables import readme
from bmrs.data import EMBEDDED, TensorSplit
from bmrs.training import ConfigError, NonFiniteError, RunError, algorithm1
from bmrs.training.run import load

FEW = ("--data", EMBEDDED, "--networks", "mlp", "--seeds", "1", "--device", "cpu")
QUICK = (*FEW, "--criteria", "bmrs-n", "mean", "--epochs", "1", "--fine-tune-epochs", "1")
CONDITIONS = Conditions(None, "cpu", cuda_graph=False)
HERE, ELSEWHERE = {"CPU": "A", "threads": 1, "torch": "2"}, {"CPU": "B", "threads": 1, "torch": "2"}
DENSE, NOISY = PaperRun(0, EMBEDDED, "mlp"), PaperRun(0, EMBEDDED, "mlp", "element", "snr")


@pytest.fixture
def few_images(monkeypatch):
    """Leaves so few images that an epoch takes no time."""

    def load_few(config, device):
        data = load(config, device)
        parts = {name: getattr(data, name) for name in ("train", "validation", "test")}
        few = {name: TensorSplit(split.images[:64], split.labels[:64]) for name, split in parts.items()}
        return replace(data, **few)

    monkeypatch.setattr(paper, "load", load_few)
    paper.load_once.cache_clear()
    yield
    paper.load_once.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def rows_in(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text("utf-8").splitlines()]


def row_of(run, **values):
    """Return the row of a finished run, made up."""
    row = {
        **run._asdict(),
        "settings": paper.config_of(run, CONDITIONS).settings._asdict(),
        "failure": None,
        "test_accuracy": 0.5,
        "compression_percent": None if run.criterion is None else 50.0,
        "cuda_graph": False,
        "jobs": 1,
        "seconds": 1.0,
        "environment": HERE,
    }
    return {**row, **values}


def cells(markdown):
    """Return the lines of a table as dicts."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


# What is run


def test_seeds_are_outermost_and_each_has_a_run_without_noise():
    runs = paper.all_runs(2, ["mnist"], ["mlp", "lenet5"], ["element", "sample"], ["snr", "mean"])
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8
    for seed in range(2):
        assert [run[2:] for run in runs if run.seed == seed] == [
            ("mlp", None, None),
            ("mlp", "element", "snr"),
            ("mlp", "element", "mean"),
            ("lenet5", None, None),
            ("lenet5", "element", "snr"),
            ("lenet5", "element", "mean"),
            ("lenet5", "sample", "snr"),
            ("lenet5", "sample", "mean"),
        ]


def test_runs_have_the_papers_settings(tmp_path):
    conditions = Conditions(tmp_path, "cpu", cuda_graph=True)
    config = paper.config_of(PaperRun(3, "fashion-mnist", "lenet5", "sample", "bmrs-u-4"), conditions)
    assert (config.epochs, config.fine_tune_epochs, config.batch_size, config.lr) == (50, 10, 32, 1.4e-3)
    assert (config.kl_weight, config.mode, config.prune_every, config.fine_tune_noise) == (
        *("mean", "continuous", 1),
        True,
    )
    assert (config.criterion, config.p1, config.granularity, config.seed) == ("bmrs-uniform", 4, "sample", 3)
    assert (config.data_dir, config.cuda_graph) == (str(tmp_path / "fashion-mnist"), True)


@pytest.mark.parametrize(
    ("criterion", "kind", "options"),
    [
        ("bmrs-n", "BMRSNormal", {"tolerance": 0.5 * math.log(2 * math.pi)}),
        ("bmrs-u-8", "BMRSUniform", {"p1": 8}),
        ("bmrs-u-4", "BMRSUniform", {"p1": 4}),
        ("snr", "SNR", {"threshold": 1}),
        ("mean", "Mean", {"threshold": 0.1}),
    ],
)
def test_criteria_are_the_papers(criterion, kind, options):
    built = paper.config_of(NOISY._replace(criterion=criterion), CONDITIONS).build_criterion()
    assert type(built).__name__ == kind
    assert {name: getattr(built, name) for name in options} == options


def test_a_run_trains_prunes_and_measures_as_bmrs_train_does(few_images):
    run = NOISY._replace(criterion="mean")
    conditions = replace(CONDITIONS, epochs=2, fine_tune_epochs=1)
    row = paper.train_run(run, conditions)

    config = paper.config_of(run, conditions)
    data = paper.load(config, torch.device("cpu"))
    state = algorithm1.new_state(config, data, noise=True, device=torch.device("cpu"))
    algorithm1.train(state, data, config, save=lambda state: None, progress=paper.Deadline(math.inf))
    assert row["epochs"]["loss"] == [round(each["loss"], 5) for each in state.history]
    assert row["kept"] == state.history[-1]["kept"]
    assert row["compression_percent"] == state.history[-1]["compression_percent"]
    with torch.inference_mode():
        logits = state.model.eval()(data.test.images)
    assert row["test_accuracy"] == (logits.argmax(1) == data.test.labels).double().mean().item()


# The command


def test_command_keeps_every_run_and_starts_none_again(few_images, tmp_path, capsys, monkeypatch):
    assert main(["paper", *QUICK, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "[3/3]" in printed.err
    assert "left" not in printed.out
    rows = rows_in(tmp_path)
    assert [row["criterion"] for row in rows] == [None, "bmrs-n", "mean"]
    dense, noisy = rows[:2]
    assert dense["kept"] is None
    assert dense["compression_percent"] is None
    assert set(dense["epochs"]) == {"loss", "kl", "validation_accuracy"}
    assert noisy["kept"] == {"hidden0_tanh": 150, "hidden1_tanh": 150}
    assert [len(values) for values in noisy["epochs"].values()] == [2] * 4
    for row in rows:
        assert 0 <= row["test_accuracy"] <= 1
        assert row["seconds"] > 0
        assert row["environment"]["commit"]
        assert (row["cuda_graph"], row["jobs"], row["failure"]) == (False, 1, None)
    table = (tmp_path / "paper.md").read_text("utf-8")
    assert table in printed.out
    assert [line["criterion"] for line in cells(table)] == ["none, without noise", "BMRS_N", "E[θ]"]

    # One more criterion: the others are not run again.
    more = [*QUICK, "--criteria", "bmrs-n", "snr", "mean", "--output", str(tmp_path)]
    assert main(["paper", *more]) == 0
    assert [row["criterion"] for row in rows_in(tmp_path)] == [None, "bmrs-n", "mean", "snr"]
    assert "[1/1]" in capsys.readouterr().err
    # Other epochs are other runs.
    assert main(["paper", *QUICK, "--fine-tune-epochs", "2", "--output", str(tmp_path)]) == 0
    assert len(rows_in(tmp_path)) == 7
    assert [line["epochs"] for line in cells((tmp_path / "paper.md").read_text("utf-8"))] == [
        *["1 + 1"] * 4,
        *["1 + 2"] * 3,
    ]


def test_no_minutes_leave_only_the_table(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text(json.dumps(row_of(NOISY)) + "\n", "utf-8")
    assert main(["paper", *FEW, "--minutes", "0", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "5 of 6 runs are left; the same command goes on with them." in printed
    assert [line["criterion"] for line in cells(printed)] == ["SNR"]
    assert len(rows_in(tmp_path)) == 1


def test_an_interrupted_command_has_its_finished_runs(few_images, tmp_path, monkeypatch):
    train = paper.train_run

    def interrupted(run, conditions):
        if run.criterion == "mean":
            raise KeyboardInterrupt
        return train(run, conditions)

    monkeypatch.setattr(paper, "train_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["paper", *QUICK, "--output", str(tmp_path)])
    assert [row["criterion"] for row in rows_in(tmp_path)] == [None, "bmrs-n"]


def test_a_run_with_a_nan_is_kept_and_reported(few_images, tmp_path, capsys, monkeypatch):
    train = algorithm1.train

    def broken(state, data, config, **options):
        if config.criterion == "mean":
            raise NonFiniteError("NaN or infinity at epoch 1")
        train(state, data, config, **options)

    monkeypatch.setattr(algorithm1, "train", broken)
    assert main(["paper", *QUICK, "--output", str(tmp_path)]) == 1
    assert rows_in(tmp_path)[-1]["failure"] == "NaN or infinity at epoch 1"
    table = capsys.readouterr().out
    assert [line["seeds"] for line in cells(table)] == ["1", "1", "0"]
    assert f"- {EMBEDDED}, mlp, element, mean, seed 0: NaN or infinity at epoch 1" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "mnist"), "--data mnist needs --data-dir"),
        (("--data", "mnist", "--data-dir", "nowhere"), "nowhere/mnist: no such folder"),
    ],
)
def test_missing_data_are_named(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["paper", *FEW, *options, "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("paper: ")
    assert message in error


def test_a_device_that_cannot_be_used_is_named(tmp_path, capsys, monkeypatch):
    def no_device(config):
        raise RunError(f"--device {config.device} cannot be used")

    monkeypatch.setattr(paper, "device_of", no_device)
    assert main(["paper", *FEW, "--device", "cuda", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "paper: --device cuda cannot be used\n"


def test_a_broken_file_of_runs_is_named(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text(json.dumps(row_of(DENSE)) + '\n{"seed": 0, "da', "utf-8")
    assert main(["paper", *FEW, "--output", str(tmp_path)]) == 2
    assert "runs.jsonl, line 2: not the JSON of a run; remove the line" in capsys.readouterr().err
    with pytest.raises(RunError, match="line 2"):
        paper_table.load(tmp_path / "runs.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--criteria", "l2"), "invalid choice: 'l2'"), (("--seeds", "0"), "must be at least 1, got 0")],
)
def test_bad_options_are_named(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["paper", *options, "--output", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_data_set_without_a_folder_is_a_config_error():
    with pytest.raises(ConfigError, match="needs --data-dir"):
        paper.config_of(PaperRun(0, "mnist", "mlp"), CONDITIONS)


# Time


def started(runs, rows=(), *, deadline, seconds=10.0, jobs=1, monkeypatch, clock):
    """Return which runs are started if each takes so long."""
    found = []

    def train_run(run, conditions):
        found.append(run)
        clock[0] += seconds
        return {key: value for key, value in row_of(run, seconds=seconds).items() if key != "environment"}

    monkeypatch.setattr(paper, "train_run", train_run)
    conditions = replace(CONDITIONS, deadline=deadline)
    list(paper.train_missing(runs, rows, conditions, HERE, jobs))
    return found


def test_no_run_is_started_that_would_not_fit(monkeypatch, clock):
    runs = [NOISY._replace(seed=seed) for seed in range(5)]
    run_until = functools.partial(started, runs, monkeypatch=monkeypatch, clock=clock)
    # How long one takes is known after the first: the third would end at 1030.
    assert run_until(deadline=1025.0) == runs[:2]
    clock[0] = 1000.0
    assert run_until(deadline=math.inf) == runs


def test_finished_runs_of_this_machine_tell_how_long_one_takes(monkeypatch, clock):
    other_kind = DENSE
    run_until = functools.partial(started, deadline=1025.0, monkeypatch=monkeypatch, clock=clock)
    assert run_until([NOISY, other_kind], [row_of(NOISY, seconds=30.0)]) == [other_kind]
    clock[0] = 1000.0
    assert run_until([NOISY], [row_of(NOISY, seconds=30.0, environment=ELSEWHERE)]) == [NOISY]
    clock[0] = 1000.0
    assert run_until([NOISY], [row_of(NOISY, seconds=30.0, cuda_graph=True)]) == [NOISY]
    clock[0] = 1000.0
    assert run_until([NOISY], [row_of(NOISY, seconds=30.0, jobs=4)]) == [NOISY]


def test_a_run_past_the_deadline_is_given_up(few_images, clock):
    conditions = replace(CONDITIONS, epochs=1, fine_tune_epochs=1, deadline=1001.0)
    assert paper.train_run(DENSE, conditions) is not None
    clock[0] = 1002.0
    assert paper.train_run(DENSE, conditions) is None


def test_processes_ask_for_the_next_run_when_one_is_done():
    asked = []

    def runs():
        for number in range(5):
            asked.append(number)
            yield number

        yield "text"

    results = paper.in_processes(operator.neg, runs(), 2)
    first = next(results)
    assert len(asked) == 2  # the next one is asked for only when results of the first ones are taken
    found = [first]
    with pytest.raises(TypeError, match="bad operand type"):
        found.extend(results)
    assert asked == [0, 1, 2, 3, 4]
    assert set(found) <= {-4, -3, -2, -1, 0}
    assert len(found) >= 4  # but perhaps for one that ended together with the error
    # What a process gets can be sent to it.
    task = functools.partial(paper.train_run, conditions=CONDITIONS)
    assert pickle.loads(pickle.dumps(task)).keywords == {"conditions": CONDITIONS}


# The table


def test_table_has_means_and_standard_deviations_over_the_seeds():
    rows = [
        *(row_of(DENSE._replace(seed=seed), test_accuracy=0.9 + 0.01 * seed) for seed in range(3)),
        *(
            row_of(
                NOISY._replace(seed=seed),
                test_accuracy=0.8 + 0.02 * seed,
                compression_percent=40.0 + 10 * seed,
                seconds=1.0 + seed,
            )
            for seed in range(3)
        ),
        row_of(NOISY._replace(seed=3), failure="NaN", test_accuracy=None, seconds=5.0),
        row_of(PaperRun(0, "fashion-mnist-subset", "lenet5", "sample", "mean"), cuda_graph=True, jobs=4),
        row_of(PaperRun(0, "fashion-mnist-subset", "lenet5", "element", "snr")),
    ]
    dense, first, second, third = cells(paper_table.as_markdown(rows))
    assert (dense["criterion"], dense["test accuracy, %"]) == ("none, without noise", "91.00 ± 1.00")
    assert dense["compression, %"] == dense["granularity"] == ""
    assert first == {
        "data": "Fashion-MNIST subset",
        "network": "MLP",
        "granularity": "element = sample",
        "criterion": "SNR",
        "epochs": "11 + 12",
        "seeds": "3",
        "compression, %": "50.00 ± 10.00",
        "test accuracy, %": "82.00 ± 2.00",
        "compression as the authors count, %": "",
        "the paper's compression, %": "",
        "its accuracy, %": "",
        "each seed": "80.00 82.00 84.00",
        "seconds a run": "2.8",
        "steps": "eager",
    }
    assert (second["granularity"], second["criterion"]) == ("element", "SNR")
    assert (third["granularity"], third["criterion"]) == ("sample", "E[θ]")
    assert third["compression, %"] == "50.00"
    assert third["steps"] == "CUDA graph, 4 runs at a time"


def test_the_papers_own_results_stand_beside_runs_with_its_settings():
    settings = {**row_of(NOISY)["settings"], "epochs": 50, "fine_tune_epochs": 10}
    kept = {"first": 75, "second": 150}
    ours = row_of(NOISY, data="mnist", criterion="bmrs-n", settings=settings, kept=kept)
    rows = [
        ours,
        {**ours, "settings": {**settings, "epochs": 5}},
        {**ours, "granularity": None, "criterion": None},
    ]
    found = cells(paper_table.as_markdown(rows))
    assert [line["compression as the authors count, %"] for line in found] == ["", "", "49.41"]
    assert [(line["the paper's compression, %"], line["its accuracy, %"]) for line in found] == [
        ("", ""),
        ("", "97.43 ± 0.14"),
        ("48.86 ± 1.32", "96.95 ± 0.19"),
    ]


@pytest.mark.parametrize(
    ("network", "data", "kept", "percent"),
    [
        ("mlp", "fashion-mnist", (150, 150), 0.0),
        ("mlp", "fashion-mnist", (0, 0), 99.83),  # 310 biases stay, as the paper has it
        ("lenet5", "mnist", (6, 16, 120, 84), 0.0),
        ("lenet5", "cifar10", (6, 16, 120, 84), 0.0),
        ("lenet5", "mnist", (6, 8, 120, 84), 100 * (8 * (6 * 25 + 2)) / (61_706 + 2 * 226)),
    ],
)
def test_the_authors_count_takes_no_biases_off_and_no_columns_behind_a_flattening(
    network, data, kept, percent
):
    settings = {"hidden": 150, "num_blocks": 1}
    counted = published.compression_as_counted(network, data, settings, kept)
    assert counted == pytest.approx(percent, abs=0.005)


def test_pruning_by_l2_norms_is_taken_from_judged_networks(tmp_path):
    (tmp_path / "paper").mkdir()
    judged = {
        **row_of(NOISY, data="mnist"),
        "criteria": {"l2": {"stop": [600, 42.8, 8.92], "widths": [150, 10]}},
    }
    judged["settings"] = {**judged["settings"], "epochs": 50, "fine_tune_epochs": 10}
    (tmp_path / "paper" / "runs.jsonl").write_text(json.dumps(row_of(NOISY)) + "\n", "utf-8")
    (tmp_path / "paper" / "judged.jsonl").write_text(json.dumps(judged) + "\n", "utf-8")
    line = cells(paper_table.readme(tmp_path))[0]
    assert (line["criterion"], line["compression, %"], line["test accuracy, %"]) == ("L2", "42.80", "8.92")
    assert (line["the paper's compression, %"], line["its accuracy, %"]) == ("43.11 ± 2.06", "10.39 ± 0.32")
    assert line["seconds a run"] == ""


def test_readme_has_the_table_of_committed_runs_and_nothing_without(tmp_path):
    block = "<!-- results: paper -->\nold\n<!-- end -->"
    assert readme.with_results(block, tmp_path) == "<!-- results: paper -->\n\n\n\n<!-- end -->"
    (tmp_path / "paper").mkdir()
    rows = [row_of(NOISY), row_of(DENSE, environment={"GPU": "G", "torch": "3"})]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "paper" / "runs.jsonl").write_text(text, "utf-8")
    written = readme.with_results(block, tmp_path)
    assert "\nA, G; torch 2, 3:\n" in written
    assert "| 50.00 |" in written
    assert "old" not in written


def test_a_row_from_before_a_setting_existed_is_a_finished_run():
    row = row_of(NOISY)
    older = {**row, "settings": {key: row["settings"][key] for key in list(row["settings"])[:-1]}}
    identity = json.dumps([*NOISY, row["settings"]])
    assert paper.left_of([identity], [older]) == []
    assert paper.left_of([identity], [{**older, "seed": 9}]) == [identity]
