"""Networks that are not a plain chain: unused, tied and frozen weights, buffers of integers, odd training modes."""

import copy

import pytest
import torch
from safetensors.torch import save as serialize
from torch import fx, nn

import bmrs
from bmrs.data import Dataset, TensorSplit
from bmrs.noise.layer import NoiseLayer
from bmrs.training import RunError, TrainConfig, networks, phases, recipe, run, summarise
from bmrs.training.checkpoint import load_checkpoint, on_their_own, save_checkpoint
from bmrs.training.fit import fit, fitting_state
from bmrs.training.images import load_images

CPU = torch.device("cpu")


class Silent:
    def step(self, **values):
        pass

    def epoch(self, row):
        pass


class Odd(nn.Module):
    """Has weights that are never used, weights that stand in two places, frozen ones, and indices as a buffer."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.register_buffer("order", torch.arange(2**24 + 1, 2**24 + 17).flip(0))
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.second(self.first(self.frozen(x.flatten(1))).relu()))


class WithNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.other = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        x = x.flatten(1)
        return (self.head(x), self.other(x)) if self.training else self.head(x)


class Residual(nn.Module):
    """What its two branches add up to leaves only where both prune it."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(16, 12), nn.Linear(16, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.last((self.left(x) + self.right(x)).relu())


class OwnPrecision(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1).float())


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(5)

    def split(number):
        return TensorSplit(torch.randn(number, 1, 4, 4, generator=generator), torch.arange(number) % 3)

    return Dataset("blobs", 3, split(13), split(6), split(6))


def options(**given):
    return TrainConfig(**{"batch_size": 6, "lr": 0.05, "device": "cpu", **given}).resolved()


def trained(data, config, epochs=2, save=lambda state: None):
    torch.manual_seed(0)
    state = fitting_state(Odd(), config, CPU)
    fit(state, data, config, epochs=epochs, phase="test", save=save, progress=Silent())
    return state


@pytest.mark.parametrize(
    "given",
    [{"optimizer": "adam"}, {"optimizer": "sgd", "weight_decay": 0.1}, {"average": 0.9}],
    ids=str,
)
def test_odd_networks_go_on_from_a_checkpoint_to_bitwise_the_same_end(data, tmp_path, given):
    config, path = options(**given), tmp_path / "checkpoint.safetensors"

    def keep_the_first(state):
        if len(state.history) == 1:
            save_checkpoint(path, state, config)

    straight = trained(data, config, save=keep_the_first)
    torch.manual_seed(1)
    resumed = fitting_state(Odd(), config, CPU)
    load_checkpoint(path, resumed, config)
    fit(resumed, data, config, epochs=2, phase="test", save=lambda state: None, progress=Silent())
    for expected, found in zip(
        straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found)
    save_checkpoint(path, resumed, config)  # what was read is written again
    load_checkpoint(path, fitting_state(Odd(), config, CPU), config)


def test_frozen_weights_stay_and_indices_are_not_averaged(data):
    torch.manual_seed(0)
    start = Odd()
    end = trained(data, options(average=0.9)).model
    assert torch.equal(end.frozen.weight, start.frozen.weight)
    assert not end.frozen.weight.requires_grad
    assert not torch.equal(end.last.weight, start.last.weight)
    assert torch.equal(end.order, start.order)
    assert all(parameter.requires_grad for parameter in recipe.untrained_copy(end, options()).parameters())


def test_tied_weights_can_be_written_to_a_file():
    tensors = Odd().state_dict()
    apart = on_their_own(tensors)
    assert serialize(apart)
    assert all(torch.equal(tensors[name], apart[name]) for name in tensors)


@pytest.mark.parametrize(
    ("network", "given", "message"),
    [
        (
            WithNorm(),
            {},
            "part of a batch that has 1 image: Expected more than 1 value.*another --batch-size",
        ),
        (WithNorm(), {"batch_size": 5, "accumulate": 2}, "part of a batch that has 1 image"),
        (TwoHeads(), {}, "gives tuple in training mode, expected logits"),
        (Odd().requires_grad_(False), {}, "no parameters to train"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_before(data, network, given, message):
    with pytest.raises(RunError, match=message):
        networks.check_training(network, options(**given), data)


def test_trying_a_network_changes_nothing(data):
    network = WithNorm().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random = torch.get_rng_state()
    networks.check_training(network, options(batch_size=5), data)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not network.training
    assert torch.equal(random, torch.get_rng_state())


def test_networks_that_compute_in_float32_themselves_are_compared_too(data):
    network = OwnPrecision(16, 3)
    assert summarise._difference(network, network, data.test, "network") == 0
    with pytest.raises(RunError, match="differ from the masked network's"):
        summarise._difference(network, OwnPrecision(16, 3), data.test, "network")


def test_other_processes_prune_what_the_first_one_decided(data, monkeypatch):
    noisy = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), NoiseLayer(4), nn.Linear(4, 3))
    of_first = iter([{"text": "decided"}, {"2": torch.tensor([True, False, True, True])}])
    monkeypatch.setattr(recipe.processes, "of_first", lambda call: next(of_first))
    assert recipe.decide(noisy, options(target_latency=1.0), data) == {"text": "decided"}
    assert noisy[2].mask.tolist() == [True, False, True, True]


def test_a_split_that_scaled_would_fill_the_memory_is_scaled_a_batch_at_a_time(tiny_config):
    small, large = (load_images(tiny_config(image_size=size).resolved(), CPU) for size in (32, 5000))
    assert small.train.images.dtype == torch.float32
    for split in (large.train, large.validation, large.test):
        assert split.images.dtype == torch.uint8
        assert split.image_shape == (1, 5000, 5000)


def test_the_paper_s_recipe_starts_from_the_weights_that_it_is_given(tmp_path, tiny_config, monkeypatch):
    data = Dataset("noise", 10, *(TensorSplit(torch.randn(12, 1, 8, 8), torch.arange(12) % 10),) * 3)
    config = tiny_config(epochs=1, fine_tune_epochs=0)
    torch.manual_seed(3)
    given = networks.dense_network(config, data)
    torch.save(given.state_dict(), tmp_path / "given.pt")
    config = tiny_config(epochs=1, fine_tune_epochs=0, weights=str(tmp_path / "given.pt"))
    started = {}

    class StoppedError(Exception):
        pass

    def trainer(name, title, state, epochs, train):
        started[name] = state.model
        if len(started) == 2:
            raise StoppedError
        return state

    with pytest.raises(StoppedError):
        phases.by_algorithm1(trainer, config, data, CPU)
    for model in started.values():
        its = model.state_dict()
        assert all(torch.equal(its[name], tensor) for name, tensor in given.state_dict().items())


@pytest.mark.parametrize("start", ["refitted", "pruned"])
@pytest.mark.parametrize("width", [8, -1])
def test_fine_tuning_starts_from_refitted_weights_of_any_network(data, width, start):
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.inner(x.flatten(1)).view(x.shape[0], 8 if width == 8 else -1))

    trained = Viewed()
    noisy = bmrs.add_noise(copy.deepcopy(trained), where="inner")
    noisy.inner.noise.set_kept(torch.arange(8) < 5)
    config = TrainConfig(model="a:b", fine_tune_from=start)
    network = recipe.start_of_fine_tuning(noisy, trained, config, data)
    assert isinstance(network, fx.GraphModule) == (width == 8)
    as_it_was = torch.equal(network.get_parameter("last.weight"), trained.last.weight[:, :5])
    assert as_it_was == (start == "pruned")


def test_class_folders_may_have_been_moved(data, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    before = options(data="folder:/old")
    save_checkpoint(path, trained(data, before), before)
    after = run.moved(before, str(tmp_path))
    assert after.data == f"folder:{tmp_path}"
    load_checkpoint(path, fitting_state(Odd(), after, CPU), after)
    elsewhere = run.moved(options(data="mnist", data_dir="/old"), str(tmp_path))
    assert (elsewhere.data, elsewhere.data_dir) == ("mnist", str(tmp_path))


def test_what_is_tied_is_pruned_together_and_so_are_random_structures(data, monkeypatch):
    monkeypatch.setattr(networks, "network_from", lambda *spec, **given: Residual())
    config = options(model="own:net", noise_on="left, right")
    noisy = networks.noisy_network(config, data)
    with torch.no_grad():
        # Each alone would prune others, and nothing could leave.
        for position, layer in enumerate((noisy.left.noise, noisy.right.noise)):
            layer.mu.fill_(-15.0)
            layer.mu[6 * position : 6 * position + 8] = -0.1
            layer.log_sigma.fill_(0.0)
    recipe.decide(noisy, config, data)
    kept = int(noisy.left.noise.mask.sum())
    assert 0 < kept < 12
    assert torch.equal(noisy.left.noise.mask, noisy.right.noise.mask)
    drawn = recipe.random_structures(Residual(), noisy, config, data)
    assert drawn.last.in_features == kept
