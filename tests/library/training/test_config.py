import dataclasses
import json
import math

import pytest

import bmrs
from bmrs.training import ConfigError, RunError, TrainConfig
from bmrs.training.run_folder import RunFolder, write_json_lines


@pytest.mark.parametrize(
    ("model", "data", "batch_size", "lr", "num_blocks", "hidden"),
    [
        ("lenet5", "mnist", 128, 1.4e-3, None, None),
        ("lenet5", "fashion-mnist", 32, 1.4e-3, None, None),
        ("lenet5", "cifar10", 64, 1e-3, None, None),
        ("mlp", "mnist", 128, 8.5e-4, 7, 100),
        ("mlp", "fashion-mnist", 128, 1.5e-3, 1, 150),
        ("mlp", "cifar10", 32, 6.8e-4, 5, 150),
    ],
)
def test_defaults_are_the_papers(model, data, batch_size, lr, num_blocks, hidden):
    settings = TrainConfig(recipe="paper", model=model, data=data, data_dir="somewhere").settings
    assert settings[:8] == (
        50,
        10,
        batch_size,
        lr,
        lr,
        "element",
        num_blocks,
        hidden,
    )  # one learning rate for all


@pytest.mark.parametrize("recipe", ["bmrs", "paper"])
def test_each_recipe_fills_in_its_own_options_and_no_others(recipe):
    config = TrainConfig(recipe=recipe).resolved()
    own = {
        "bmrs": ("noise_epochs", "temperature", "distillation"),
        "paper": ("kl_weight", "mode", "prune_every", "fine_tune_noise"),
    }
    for name in own[recipe]:
        assert getattr(config, name) is not None, name
    for name in own["paper" if recipe == "bmrs" else "bmrs"]:
        assert getattr(config, name) is None, name
    assert config.criterion == {"bmrs": "bmrs-odds", "paper": "bmrs-normal"}[recipe]
    assert TrainConfig(**config.to_dict()) == config


def test_given_options_win_over_defaults():
    config = TrainConfig(model="mlp", lr=0.5, hidden=3).resolved()
    assert (config.lr, config.hidden) == (0.5, 3)
    assert config.batch_size == TrainConfig(model="mlp").settings.batch_size
    assert config.resolved() == config
    assert TrainConfig().resolved().num_blocks is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs must be a number of at least 1, got 0"),
        ({"recipe": "paper", "prune_every": 0}, "--prune-every must be a number of at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be a number of at least 1, got -1"),
        ({"model": "mlp", "hidden": 0}, "--hidden must be a number of at least 1, got 0"),
        ({"model": "mlp", "num_blocks": -1}, "--num-blocks must be a number of at least 0, got -1"),
        ({"fine_tune_epochs": -1}, "--fine-tune-epochs must be a number of at least 0, got -1"),
        ({"seed": -1}, "--seed must be a number of at least 0, got -1"),
        ({"lr": 0.0}, "--lr must be a number greater than 0, got 0.0"),
        ({"noise_lr": -1.0}, "--noise-lr must be a number greater than 0, got -1.0"),
        ({"lr": float("inf")}, "--lr must be a number greater than 0, got inf"),
        ({"recipe": "paper", "kl_weight": -0.5}, "--kl-weight must be a number of at least 0, got -0.5"),
        (
            {"recipe": "paper", "kl_weight": float("nan")},
            "--kl-weight must be a number of at least 0, got nan",
        ),
        ({"recipe": "paper", "kl_weight": "max"}, "--kl-weight must be elbo, mean or a number, got 'max'"),
        ({"lr": "fast"}, "--lr must be a number, got 'fast'"),
        ({"seed": 1.5}, "--seed must be a whole number, got 1.5"),
        ({"epochs": True}, "--epochs must be a whole number, got True"),
        ({"data_dir": 3}, "--data-dir must be a text, got 3"),
        ({"model": "vgg"}, "--model must be mlp, lenet5, lenet5_caffe, "),
        (
            {"data": "imagenet"},
            "--data must be one of fashion-mnist-subset, mnist, fashion-mnist, cifar10, cifar100, ",
        ),
        ({"recipe": "paper", "mode": "never"}, "--mode must be continuous or post-training, got 'never'"),
        ({"granularity": "row"}, "--granularity must be element, sample or batch, got 'row'"),
        ({"data": "mnist"}, "--data mnist needs --data-dir"),
        ({"data_dir": "x"}, "--data-dir x goes with --data mnist or"),
        ({"hidden": 5}, "--hidden 5 goes with --model mlp only"),
        ({"num_blocks": 5}, "--num-blocks 5 goes with --model mlp only"),
        ({"threshold": 1.0}, "--threshold 1.0 goes with --criterion snr or mean only"),
        ({"ratio": 0.5}, "--ratio 0.5 goes with --criterion l2 or gradient-norm only"),
        (
            {"criterion": "snr", "p1": 4.0},
            "--p1 4.0 goes with --criterion bmrs-odds or bmrs-uniform only",
        ),
        (
            {"criterion": "bmrs-odds", "p1": 0.0},
            "--criterion bmrs-odds: p1 must be finite and greater than 0",
        ),
        (
            {"criterion": "bmrs-odds", "p1": 30.0},
            "--criterion bmrs-odds: p1=30.0 of BMRSOdds puts the border",
        ),
        (
            {"criterion": "gradient-norm", "ratio": 0.5},
            "--criterion gradient-norm goes with --recipe paper only",
        ),
        ({"temperature": 0.0}, "--temperature must be a number greater than 0, got 0.0"),
        ({"noise_epochs": 0}, "--noise-epochs must be a number of at least 1, got 0"),
        ({"distillation": 1.5}, "--distillation must be a number from 0 to 1, got 1.5"),
        ({"average": 1.5}, "--average must be a number from 0 to 1, got 1.5"),
        ({"momentum": 0.9}, "--momentum 0.9 goes with --optimizer sgd only"),
        ({"accumulate": 0}, "--accumulate must be a number of at least 1, got 0"),
        ({"weight_decay": -0.1}, "--weight-decay must be a number of at least 0, got -0.1"),
        (
            {"recipe": "paper", "epochs": 0, "weights": "w.pt"},
            "--epochs must be a number of at least 1, got 0",
        ),
        ({"skip_unreadable": True}, "--skip-unreadable true goes with --data folder:DIR only"),
        ({"new_classifier": True}, "--new-classifier true goes with --weights only"),
        (
            {"cuda_graph": True, "optimizer": "sgd"},
            "--cuda-graph true goes with --optimizer adam or adamw only",
        ),
        (
            {"fine_tune_from": "refitted", "weight_lr": 1e-3},
            "--fine-tune-from refitted goes with --weight-lr 0 only: weights are refitted to the trained network",
        ),
        (
            {"recipe": "paper", "fine_tune_from": "pruned"},
            "--fine-tune-from pruned goes with --recipe bmrs only",
        ),
        (
            {"target_flops": 0.5, "target_latency": 1.0},
            "--target-flops and --target-latency do not go together",
        ),
        ({"recipe": "paper", "target_flops": 0.5}, "--target-flops 0.5 goes with --recipe bmrs only"),
        ({"kl_warm_up": 3.0}, "--kl-warm-up 3.0 goes with --recipe paper only"),
        ({"seeds": 0}, "--seeds must be a number of at least 1, got 0"),
        ({"recipe": "chef"}, "--recipe must be bmrs or paper, got 'chef'"),
        ({"kl_weight": "elbo"}, "--kl-weight elbo goes with --recipe paper only"),
        ({"mode": "continuous"}, "--mode continuous goes with --recipe paper only"),
        ({"prune_every": 2}, "--prune-every 2 goes with --recipe paper only"),
        ({"fine_tune_noise": True}, "--fine-tune-noise True goes with --recipe paper only"),
        ({"recipe": "paper", "temperature": 3.0}, "--temperature 3.0 goes with --recipe bmrs only"),
        ({"recipe": "paper", "noise_epochs": 3}, "--noise-epochs 3 goes with --recipe bmrs only"),
        ({"recipe": "paper", "distillation": 0.5}, "--distillation 0.5 goes with --recipe bmrs only"),
        (
            {"criterion": "snr", "prior_mean": -10.0},
            "--prior-mean -10.0 goes with --criterion bmrs-normal only",
        ),
        (
            {"criterion": "snr", "tolerance": 1.0},
            "--tolerance 1.0 goes with --criterion bmrs-normal or bmrs-uniform",
        ),
        (
            {"criterion": "bmrs-normal", "tolerance": -1.0},
            "--criterion bmrs-normal: tolerance must be finite and at least 0",
        ),
        ({"criterion": "l2"}, "--criterion l2 needs --ratio"),
        (
            {"seed": 2**64},
            "--seed must be a number of at most 18446744073709551615, got 18446744073709551616",
        ),
        ({"seed": 2**64 - 1, "seeds": 2}, "--seed 18446744073709551615 with --seeds 2 goes beyond"),
        ({"epochs": 10**5000}, "--epochs must be a number of at most 1000000, got a value of type int"),
        ({"lr": 10**400}, "--lr must be a number, got 1000"),
        ({"model": "mlp", "num_blocks": 1001}, "--num-blocks must be a number of at most 1000, got 1001"),
        ({"data": "mnist", "data_dir": "a\0"}, "--data-dir must be text in UTF-8 without NUL characters"),
        ({"criterion": "l2", "ratio": 1.5}, "--criterion l2: ratio must be less than 1"),
        ({"criterion": "bmrs-uniform", "p1": -3.0}, "--criterion bmrs-uniform: the reduced interval"),
        (
            {"criterion": "bmrs-normal", "prior_mean": 3.0},
            "--criterion bmrs-normal: prior_mean must lie in the noise layer's interval",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "criterion"),
    [
        ({}, bmrs.BMRSOdds(p1=8)),
        ({"p1": 4.0}, bmrs.BMRSOdds(p1=4)),
        ({"recipe": "paper"}, bmrs.BMRSNormal(tolerance=0.5 * math.log(2 * math.pi))),
        ({"criterion": "bmrs-normal", "tolerance": 0.0}, bmrs.BMRSNormal()),
        (
            {"criterion": "bmrs-normal", "prior_mean": -5.0, "tolerance": 0.5},
            bmrs.BMRSNormal(prior_mean=-5.0, tolerance=0.5),
        ),
        ({"criterion": "bmrs-uniform"}, bmrs.BMRSUniform(p1=8)),
        ({"criterion": "bmrs-uniform", "p1": 4.0}, bmrs.BMRSUniform(p1=4)),
        ({"criterion": "snr"}, bmrs.SNR(threshold=1.0)),
        ({"criterion": "mean", "threshold": 0.2}, bmrs.Mean(threshold=0.2)),
        ({"criterion": "l2", "ratio": 0.2}, bmrs.L2(ratio=0.2)),
        ({"recipe": "paper", "criterion": "gradient-norm", "ratio": 0.2}, bmrs.GradientNorm(ratio=0.2)),
    ],
)
def test_options_choose_the_criterion(options, criterion):
    assert TrainConfig(**options).build_criterion() == criterion


# Run folders


@pytest.mark.parametrize(("new_classifier", "epochs"), [(True, 80), (False, 0)])
def test_weights_are_trained_on_in_small_steps(new_classifier, epochs):
    given = {"model": "resnet18", "weights": "weights.pt", "new_classifier": new_classifier}
    assert TrainConfig(**given).settings.lr == TrainConfig(model="resnet18").settings.lr / 10
    assert TrainConfig(**given).settings.epochs == epochs


def test_new_runs_get_fresh_numbered_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [RunFolder.create(TrainConfig(), None) for _ in range(2)]
    assert [str(folder.path) for folder in folders] == [
        "runs/lenet5-fashion-mnist-subset-1",
        "runs/lenet5-fashion-mnist-subset-2",
    ]


def test_config_survives_the_folder(tmp_path):
    config = TrainConfig(model="mlp", temperature=0.5, criterion="snr", threshold=2.0).resolved()
    RunFolder.create(config, tmp_path / "run")
    assert RunFolder.open(tmp_path / "run") == (RunFolder(tmp_path / "run"), config)


def test_a_used_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        RunError, match=r"is not empty: give another --output, or continue its run with --resume"
    ):
        RunFolder.create(TrainConfig(), tmp_path)
    with pytest.raises(RunError, match="is not empty"):
        RunFolder.create(TrainConfig(), tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_used(tmp_path):
    assert RunFolder.create(TrainConfig(), tmp_path).config.is_file()


def test_opening_what_is_no_run_says_so(tmp_path):
    with pytest.raises(RunError, match=r"is no run folder: config\.json is missing"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        json.dumps({"lr": -1}),
        json.dumps({"colour": "red"}),
        json.dumps({"lr": "fast"}),
        "3",
        "[" * 10**4,
        '{"lr": 1, "lr": 2}',
        "1" + "0" * 5000,
        '{"data_dir": "\\ud800"}',
        "\ufeff\ufeff",
    ],
)
def test_a_broken_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"config.json is broken: ."):
        RunFolder.open(tmp_path)


def test_json_lines_are_one_object_a_line(tmp_path):
    rows = [{"epoch": 1, "name": "ΔF"}, {"epoch": 2}]
    write_json_lines(tmp_path / "rows", rows)
    lines = (tmp_path / "rows").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_every_option_has_a_help_text():
    assert all(option.metadata["help"] for option in dataclasses.fields(TrainConfig))


def test_runs_from_before_there_were_recipes_are_the_papers(tmp_path):
    config = TrainConfig(recipe="paper", model="mlp", kl_weight=0.5).resolved()
    folder = RunFolder.create(config, tmp_path / "run")
    new = ("recipe", "temperature", "noise_epochs", "price_exponent", "distillation", "seeds")
    old = {name: value for name, value in config.to_dict().items() if name not in new}
    folder.config.write_text(json.dumps(old))
    assert RunFolder.open(tmp_path / "run") == (folder, config)


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({"model": "mlp"}, "refitted"),
        ({"model": "mlp", "weight_lr": 1e-3}, "pruned"),
        ({"model": "lenet5"}, "pruned"),
        ({"model": "lenet5", "fine_tune_from": "refitted"}, "refitted"),
        ({"model": "mlp", "recipe": "paper"}, None),
    ],
)
def test_what_fine_tuning_starts_from(given, start):
    assert TrainConfig(**given).resolved().fine_tune_from == start
