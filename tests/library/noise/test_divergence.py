import warnings

import pytest
import torch
from torch import nn

import bmrs
import bmrs.noise.divergence
import bmrs_kernels
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


def posterior(layer: NoiseLayer) -> torch.Tensor:
    return bmrs_kernels.kl_divergence(layer.mu, layer.log_sigma, lower=layer.lower, upper=layer.upper)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(NoiseLayer(3), nn.Sequential(NoiseLayer(5), nn.ReLU()), NoiseLayer(4, lower=-10.0))
    with torch.no_grad():
        for layer in noise_layers(model).values():
            layer.mu.uniform_(-9.0, 0.0)
            layer.log_sigma.uniform_(-4.0, 1.0)
    return model


class TestWeights:
    def test_elbo_is_the_sum_over_the_dataset_size(self, model):
        total = sum(posterior(layer).sum() for layer in noise_layers(model).values())
        found = bmrs.kl_divergence(model, weight="elbo", dataset_size=200)
        torch.testing.assert_close(found, total / 200)
        assert found.shape == ()

    def test_mean_is_over_structures_then_layers(self, model):
        means = [posterior(layer).mean() for layer in noise_layers(model).values()]
        torch.testing.assert_close(bmrs.kl_divergence(model, weight="mean"), sum(means) / 3)

    @pytest.mark.parametrize("weight", [0, 0.25, 2])
    def test_number_multiplies_the_sum(self, model, weight):
        total = sum(posterior(layer).sum() for layer in noise_layers(model).values())
        torch.testing.assert_close(bmrs.kl_divergence(model, weight=weight), weight * total)

    def test_pruned_structures_pay_nothing_and_get_no_gradient(self, model):
        layers = list(noise_layers(model).values())
        layers[1].mask[:3] = False
        means = [posterior(layer)[layer.mask].sum() / layer.num_structures for layer in layers]
        found = bmrs.kl_divergence(model, weight="mean")
        torch.testing.assert_close(found, sum(means) / 3)
        found.backward()
        assert torch.equal(layers[1].log_sigma.grad != 0, layers[1].mask)
        assert not layers[1].mu.grad[~layers[1].mask].any()
        assert (layers[0].log_sigma.grad != 0).all()
        total = sum(posterior(layer)[layer.mask].sum() for layer in layers)
        torch.testing.assert_close(bmrs.kl_divergence(model, weight="elbo", dataset_size=1), total)

    @pytest.mark.parametrize("weight", ["elbo", "mean", 0.3])
    def test_pruning_changes_nothing_for_the_structures_that_are_left(self, model, weight):
        def gradient():
            divergence = bmrs.kl_divergence(model, weight=weight, dataset_size=10)
            return torch.autograd.grad(divergence, model[0].log_sigma)[0]

        before = gradient()
        model[0].mask[0] = False
        torch.testing.assert_close(gradient()[1:], before[1:])

    def test_gradient_is_that_of_the_plain_sum(self, model):
        layers = noise_layers(model).values()
        bmrs.kl_divergence(model, weight=0.5).backward()
        for layer in layers:
            expected = torch.autograd.grad(0.5 * posterior(layer).sum(), (layer.mu, layer.log_sigma))
            torch.testing.assert_close((layer.mu.grad, layer.log_sigma.grad), expected)

    def test_shared_layer_counts_once(self):
        layer = NoiseLayer(3)
        shared = bmrs.kl_divergence(nn.Sequential(layer, nn.Sequential(layer)), weight=1)
        torch.testing.assert_close(shared, bmrs.kl_divergence(nn.Sequential(layer), weight=1))

    def test_layers_of_different_dtype_add_up(self):
        model = nn.Sequential(NoiseLayer(3), NoiseLayer(3, dtype=torch.float64))
        found = bmrs.kl_divergence(model, weight=1)
        torch.testing.assert_close(found, 2 * bmrs.kl_divergence(model[0], weight=1))


def test_noise_that_is_switched_off_in_training_is_named_once():
    """As by a loop that freezes batch norms, whose noise is a part of them."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(4, 4), nn.Linear(4, 2))
    bmrs.add_noise(model, where=["1", "2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bmrs.kl_divergence(model, weight="mean")
        bmrs.kl_divergence(model.eval(), weight="mean")
    model.train()[1].eval()
    with pytest.warns(
        UserWarning, match=r"its noise layers '1\.noise' are in evaluation mode, .*freeze batch norms"
    ):
        bmrs.kl_divergence(model, weight="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bmrs.kl_divergence(model, weight="mean")
    model[2].eval()
    with pytest.warns(UserWarning, match=r"its noise layers '2\.noise' are"):
        bmrs.kl_divergence(model, weight="mean")


class Branches(nn.Module):
    """A layer that is called, one whose weight alone is read, and one that is called in some steps."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.rare = (nn.Linear(4, 4) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        x = nn.functional.linear(self.called(x), self.read.weight)
        self.calls += 1
        return self.rare(x) if self.calls % 10 == 0 else x


def train(model, *, steps, compiled=False):
    compute = torch.compile(model, backend="eager") if compiled else model
    for _ in range(steps):
        loss = compute(torch.randn(2, 4)).square().mean()
        (loss + bmrs.kl_divergence(model, weight="mean")).backward()
        with torch.no_grad():
            bmrs.kl_divergence(model, weight="mean")  # to be shown, not to learn from


def test_noise_that_multiplies_nothing_is_named_once(monkeypatch):
    monkeypatch.setattr(bmrs.noise.divergence, "_LOSSES_WITHOUT_DRAW", 20)
    model, unseen = (bmrs.add_noise(Branches(), where=nn.Linear) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, steps=19)
        train(unseen, steps=25, compiled=True)  # where nothing can be seen, nothing is said
    with pytest.warns(
        UserWarning, match=r"layers 'read\.noise' have multiplied nothing so far, in 20"
    ) as told:
        train(model, steps=30)
    assert len(told) == 1


def test_noise_that_runs_compiled_in_part_is_not_missed(monkeypatch):
    monkeypatch.setattr(bmrs.noise.divergence, "_LOSSES_WITHOUT_DRAW", 20)
    model = bmrs.add_noise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), where=nn.Linear)
    model[0].compile(backend="eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(model, steps=25)
    assert not [warning for warning in told if "multiplied nothing" in str(warning.message)]


def test_number_of_kernel_calls_does_not_grow_with_the_layers(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return original(*args, **options)

    original = bmrs_kernels.kl_divergence
    monkeypatch.setattr(bmrs_kernels, "kl_divergence", counted)
    model = nn.Sequential(*[NoiseLayer(3) for _ in range(30)], NoiseLayer(3, lower=-5.0))
    bmrs.kl_divergence(model, weight="mean")
    assert len(calls) == 2


def test_compiles_to_one_graph(model):
    compiled = torch.compile(
        lambda: bmrs.kl_divergence(model, weight="mean"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(), bmrs.kl_divergence(model, weight="mean"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "elbo"}, "dataset_size must be a positive int, got None"),
        ({"weight": "elbo", "dataset_size": 0}, "dataset_size must be a positive int, got 0"),
        ({"weight": "sum"}, "weight must be 'elbo', 'mean' or a finite number >= 0, got 'sum'"),
        ({"weight": -1.0}, "got -1.0"),
        ({"weight": float("nan")}, "got nan"),
        ({"weight": True}, "got True"),
    ],
)
def test_errors(model, options, message):
    with pytest.raises(ValueError, match=message):
        bmrs.kl_divergence(model, **options)


def test_model_without_noise_is_an_error():
    with pytest.raises(ValueError, match=r"the model \(Linear\) has no noise layer"):
        bmrs.kl_divergence(nn.Linear(2, 2), weight="mean")


def test_a_weight_for_each_layer():
    model = nn.Sequential(NoiseLayer(3), NoiseLayer(5, upper=1.0), NoiseLayer(2, dim=-1))
    model[2].mask[0] = False
    alone = [bmrs.kl_divergence(layer, weight=1.0) for layer in model]
    found = bmrs.kl_divergence(model, weight={"0": 0.5, "1": 2.0, "2": 3.0})
    torch.testing.assert_close(found, 0.5 * alone[0] + 2 * alone[1] + 3 * alone[2])
    with pytest.raises(
        ValueError, match=r"weight must name the model's noise layers \['0', '1', '2'\], got \['0', '3'\]"
    ):
        bmrs.kl_divergence(model, weight={"0": 1.0, "3": 1.0})
    with pytest.raises(ValueError, match="weight must map '1' to a number, got 'mean'"):
        bmrs.kl_divergence(model, weight={"0": 1.0, "1": "mean", "2": 1.0})
    with pytest.raises(ValueError, match="weight must be 'elbo', 'mean' or a finite number >= 0, got -1"):
        bmrs.kl_divergence(model, weight={"0": 1.0, "1": 1.0, "2": -1.0})


def test_replicas_of_data_parallel_have_whole_parameters():
    layer = NoiseLayer(3)
    replica = layer._replicate_for_data_parallel()  # as nn.parallel.replicate does on each GPU
    replica._former_parameters = dict(layer.named_parameters())
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 1.0)
    expected = bmrs.kl_divergence(layer, weight=1.0)
    torch.testing.assert_close(bmrs.kl_divergence(replica, weight=1.0), expected)
