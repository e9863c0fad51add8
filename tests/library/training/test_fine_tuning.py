"""Where fine-tuning starts, what of the noise goes on in it, and what it ends as."""

import copy
import math

import pytest
import torch
from torch import nn

import bmrs
from bmrs.data import Dataset, TensorSplit
from bmrs.noise.lookup import noise_layers
from bmrs.training import TrainConfig
from bmrs.training.fine_tuning import end_of_fine_tuning, start_of_fine_tuning
from bmrs.training.fit import fit, fitting_state

CPU = torch.device("cpu")
TEMPERATURE = 25.0
KEPT = torch.arange(8) < 5


class Silent:
    def step(self, **values):
        pass

    def epoch(self, row):
        pass


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(x.flatten(1)).relu())


class SizeInCode(Perceptron):
    """Becomes a graph where it gets smaller."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(x.flatten(1)).relu().view(x.shape[0], 8))


@pytest.fixture
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (64,), generator=generator)
    images = torch.randn(64, 1, 4, 4, generator=generator) + labels.view(-1, 1, 1, 1)
    split = TensorSplit(images, labels)
    return Dataset("test", 3, split, split, split)


def options(**given) -> TrainConfig:
    return TrainConfig(**{"model": "a:b", "batch_size": 16, "device": "cpu", **given}).resolved()


def pruned(trained: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    noisy = bmrs.add_noise(copy.deepcopy(trained), where="inner")
    with torch.no_grad():
        noisy.inner.noise.mu.uniform_(-1.0, 0.0)
        noisy.inner.noise.log_sigma.uniform_(-2.0, 0.5)
    noisy.inner.noise.set_kept(KEPT)
    return noisy


def started(trained: nn.Module, data: Dataset, config: TrainConfig) -> tuple[nn.Module, str]:
    noisy = pruned(trained)
    smaller = bmrs.compact(noisy, data.train.examples(2))
    return start_of_fine_tuning(noisy, trained, smaller, config, data, temperature=TEMPERATURE)


@pytest.mark.parametrize("start", ["refitted", "pruned"])
@pytest.mark.parametrize("kind", [Perceptron, SizeInCode])
def test_it_says_where_it_cannot_start_from_refitted_weights(data, kind, start):
    trained = kind()
    network, note = started(trained, data, options(fine_tune_from=start))
    assert ("cannot be refitted" in note) == (kind is SizeInCode and start == "refitted")
    as_it_was = torch.equal(network.get_parameter("last.weight"), trained.last.weight[:, :5])
    assert as_it_was == (kind is SizeInCode or start == "pruned")
    assert not noise_layers(network)
    assert end_of_fine_tuning(network, data) is network


@pytest.mark.parametrize("kind", [Perceptron, SizeInCode])
@pytest.mark.parametrize("start", ["refitted", "pruned"])
def test_noise_that_goes_on_starts_around_one_as_narrow_as_at_temperature_one(data, kind, start):
    trained = kind()
    network, _ = started(trained, data, options(fine_tune_from=start, fine_tune_noise=True))
    plain, _ = started(trained, data, options(fine_tune_from=start))
    [layer] = noise_layers(network).values()
    before = pruned(trained).inner.noise
    narrower = before.log_sigma[KEPT] - 0.5 * math.log(TEMPERATURE)
    torch.testing.assert_close(layer.log_sigma.detach(), narrower.detach())
    torch.testing.assert_close(layer.mu.detach(), -0.5 * (2 * narrower).exp().detach())
    assert layer.mu.requires_grad
    assert layer.log_sigma.requires_grad
    for name, weight in plain.named_parameters():
        assert torch.equal(network.get_parameter(name), weight)
    x = data.test.examples(4)
    assert torch.equal(network.eval()(x), network(x))
    assert not torch.equal(network.train()(x), network(x))


def test_noise_and_weights_learn_and_the_end_has_no_noise(data):
    config = options(fine_tune_noise=True, optimizer="adam", weight_decay=0.0, noise_lr=0.2, lr=1e-2)
    network, _ = started(Perceptron(), data, config)
    state = fitting_state(copy.deepcopy(network), config, CPU)
    rates = []

    def save(state):
        rates.append([group["lr"] for group in state.optimizer.param_groups])

    fit(state, data, config, epochs=4, phase="test", save=save, progress=Silent())
    for name, parameter in network.named_parameters():
        assert not torch.equal(parameter, state.model.get_parameter(name)), name
    assert all(row["kl"] > 0 for row in state.history)
    assert state.history[-1]["nll"] < state.history[0]["nll"]
    for of_weights, of_noise in rates:  # noise from its own rate, weights from twice theirs
        assert of_noise / 0.1 == pytest.approx(of_weights / 1e-2)
    assert rates[-1][1] < 0.01 * 0.2

    end = end_of_fine_tuning(state.model, data)
    assert not noise_layers(end)
    assert end.inner.out_features == 5
    x = data.test.examples(4)
    torch.testing.assert_close(end(x), state.model(x))


def test_the_kl_term_is_that_of_the_evidence_bound(data):
    config = options(fine_tune_noise=True, optimizer="adam", batch_size=64)
    network, _ = started(Perceptron(), data, config)
    kl = bmrs.kl_divergence(network.train(), weight="elbo", dataset_size=64).item()
    state = fitting_state(network, config, CPU)
    fit(state, data, config, epochs=1, phase="test", save=lambda state: None, progress=Silent())
    assert state.history[0]["kl"] == pytest.approx(kl)


def test_it_says_where_noise_cannot_stay(data):
    """What is pruned is a constant behind the batch norm, which a bias can take up, but no noise can multiply."""
    trained = Perceptron()
    trained.inner = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))
    noisy = bmrs.add_noise(copy.deepcopy(trained), where=["inner.0", "inner.1"])
    noisy.inner[0].noise.set_kept(KEPT)
    nn.init.ones_(noisy.inner[1].bias)
    smaller = bmrs.compact(noisy, data.train.examples(2))
    config = options(fine_tune_noise=True)
    network, note = start_of_fine_tuning(noisy, trained, smaller, config, data, temperature=TEMPERATURE)
    assert note == "noise cannot stay in the smaller network, so that fine-tuning goes on without"
    assert not noise_layers(network)
    assert network.inner[0].out_features == 5
