"""Optimizers, schedules, averages, precision and augmentation, as the options name them."""

import functools
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bmrs.data import Batch, Dataset, TensorSplit
from bmrs.noise.layer import NoiseLayer
from bmrs.training import RunError, TrainConfig, algorithm1
from bmrs.training.checkpoint import load_checkpoint, save_checkpoint
from bmrs.training.fit import fit, fitting_state
from bmrs.training.optimizers import new_optimizer, scheduled
from bmrs.training.recipe import from_scratch, noise_epochs
from bmrs.training.training_step import cross_entropy

CPU = torch.device("cpu")


class Silent:
    def step(self, **values):
        pass

    def epoch(self, row):
        pass


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(5)

    def split(number):
        labels = torch.arange(number) % 3
        images = torch.randn(number, 1, 8, 8, generator=generator) + labels[:, None, None, None]
        return TensorSplit(images, labels)

    return Dataset("blobs", 3, split(36), split(12), split(12))


def options(**given):
    return TrainConfig(**{"batch_size": 12, "lr": 0.05, "device": "cpu", **given}).resolved()


def network():
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, 3, 3), norm=nn.BatchNorm2d(3), flat=nn.Flatten(), fc=nn.Linear(108, 3))
    )


def without_norm():
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), hidden=nn.Linear(64, 5), fc=nn.Linear(5, 3)))


def trained(data, config, build=network, epochs=2, save=lambda state: None):
    torch.manual_seed(0)
    state = fitting_state(build(), config, CPU)
    fit(state, data, config, epochs=epochs, phase="test", save=save, progress=Silent())
    return state


def differs(first, second):
    return max(
        (a.double() - b.double()).abs().max().item()
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("accumulate", [2, 5, 10**9])
def test_a_batch_in_parts_comes_to_the_same(data, accumulate):
    given = {"optimizer": "sgd", "momentum": 0.5}
    whole = trained(data, options(**given), without_norm)
    parts = trained(data, options(accumulate=accumulate, **given), without_norm)
    assert 0 < differs(whole.model, parts.model) < 1e-5
    assert parts.history[-1]["nll"] == pytest.approx(whole.history[-1]["nll"], rel=1e-5)
    assert parts.history[-1]["train_accuracy"] == whole.history[-1]["train_accuracy"]


def test_only_weights_decay():
    model = nn.Sequential(network(), NoiseLayer(3))
    config = options(optimizer="adamw", weight_decay=0.1, noise_lr=0.3)
    groups = new_optimizer(model, config, CPU).param_groups
    decayed = [parameter for group in groups if group["weight_decay"] for parameter in group["params"]]
    assert [parameter.ndim for parameter in decayed] == [4, 2]
    [noise] = [group for group in groups if group["lr"] == 0.3]
    assert len(noise["params"]) == 2
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, torch.optim.Adam),
        ({"optimizer": "adamw"}, torch.optim.AdamW),
        ({"optimizer": "sgd", "momentum": 0.0}, torch.optim.SGD),
        ({"model": "resnet20"}, torch.optim.SGD),
        ({"model": "vit-small"}, torch.optim.AdamW),
    ],
)
def test_each_network_has_its_usual_optimizer(given, kind):
    assert type(new_optimizer(network(), options(**given), CPU)) is kind


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "sgd", "weight_decay": 1e-3},
        {"average": 0.9},
        {"augmentation": "crop-flip", "accumulate": 3},
        {"precision": "bfloat16", "channels_last": True, "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_training_goes_on_from_a_checkpoint_to_bitwise_the_same_end(data, tmp_path, given):
    config, path = options(**given), tmp_path / "checkpoint.safetensors"

    def keep_the_first(state):
        if len(state.history) == 1:
            save_checkpoint(path, state, config)

    straight = trained(data, config, epochs=3, save=keep_the_first)
    torch.manual_seed(1)
    resumed = fitting_state(network(), config, CPU)
    load_checkpoint(path, resumed, config)
    assert len(resumed.history) == 1
    fit(resumed, data, config, epochs=3, phase="test", save=lambda state: None, progress=Silent())
    assert differs(straight.model, resumed.model) == 0
    assert differs(trained(data, options(), epochs=3).model, straight.model) > 0  # the options did something


def test_a_checkpoint_without_the_average_is_refused(data, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, trained(data, options()), options())
    with pytest.raises(RunError, match=r"--average 0\.0, and this run's config\.json says 0\.5"):
        load_checkpoint(path, fitting_state(network(), options(average=0.5), CPU), options(average=0.5))


def test_the_average_is_that_of_the_steps_and_is_what_stays(data):
    config = options(average=0.5)
    steps = []
    torch.manual_seed(0)
    state = fitting_state(without_norm(), config, CPU)
    update = state.average.update_parameters

    def noting(model):
        steps.append(model.fc.weight.detach().clone())
        update(model)

    state.average.update_parameters = noting
    fit(state, data, config, epochs=2, phase="test", save=lambda state: None, progress=Silent())
    expected = steps[0]
    for number, weight in enumerate(steps[1:], start=1):
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(state.model.fc.weight, expected)


def test_label_smoothing_is_that_of_torch():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    loss = cross_entropy(options(label_smoothing=0.2))(logits, Batch(torch.ones(4, 1, 1, 1), labels))
    assert loss == F.cross_entropy(logits, labels, label_smoothing=0.2)


def test_precision_and_layout_reach_the_layers(data):
    seen = []

    def build():
        model = network()
        model.conv.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
        return model

    trained(data, options(precision="bfloat16", channels_last=True, image_size=8), build, epochs=1)
    image, output = seen[0]
    assert output.dtype == torch.bfloat16
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_network_trains_as_it_does_otherwise(data, monkeypatch):
    # Without generating code, which takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert differs(trained(data, options(compile=True)).model, trained(data, options()).model) < 1e-6


@pytest.mark.parametrize(
    ("given", "progress", "expected"),
    [
        ({}, 0.025, 0.5 * (1 + 0.9969)),
        ({}, 0.5, 1.0),
        ({"schedule": "constant"}, 0.5, 1.0),
        ({"schedule": "constant"}, 0.025, 0.5),
        ({"warm_up": 0.0}, 0.0, 2.0),
    ],
)
def test_the_learning_rate_follows_its_schedule(given, progress, expected):
    assert scheduled(progress, options(**given)) == pytest.approx(expected, abs=1e-4)


def test_the_kl_term_warms_up(tiny_config, monkeypatch):
    data = Dataset("noise", 10, *(TensorSplit(torch.randn(48, 1, 8, 8), torch.arange(48) % 10),) * 3)

    def kl_terms(**given):
        config = tiny_config(lr=1e-6, epochs=3, fine_tune_epochs=0, noise_lr=1e-9, **given).resolved()
        state = algorithm1.new_state(config, data, noise=True, device=CPU)
        algorithm1.train(state, data, config, save=lambda state: None, progress=Silent())
        return [row["kl"] for row in state.history]

    full, warmed = kl_terms(), kl_terms(kl_warm_up=2.0)
    # Three steps an epoch, of which the first has a factor of 0.
    assert warmed[0] == pytest.approx(full[0] * (0 + 1 / 6 + 2 / 6) / 3, rel=1e-4)
    assert warmed[2] == pytest.approx(full[2], rel=1e-6)


def test_noise_has_the_epochs_that_it_takes_to_settle(data):
    few = options(model="resnet20", noise_lr=0.05)  # three steps an epoch
    assert noise_epochs(few, data) == 200
    assert noise_epochs(options(), data) == 4
    assert noise_epochs(options(model="resnet20", noise_epochs=3), data) == 3


def test_what_starts_from_no_weights_has_the_usual_learning_rate():
    pretrained = TrainConfig(model="resnet18", weights="weights.pt").resolved()
    assert from_scratch(pretrained).lr == pytest.approx(10 * pretrained.lr)
    chosen = TrainConfig(model="resnet18", weights="weights.pt", lr=0.3).resolved()
    assert from_scratch(chosen).lr == 0.3
    assert from_scratch(options()).lr == options().lr
