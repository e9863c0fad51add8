import copy
import importlib

import pytest
import torch
from residual_cases import SmallResNet
from torch import nn

import bmrs
from bmrs.compaction.refit import patches
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked_copy(dense: nn.Module, fraction: float, *, where: object, seed: int = 0) -> nn.Module:
    """The network with noise near θ = 1 behind chosen layers, a share of the structures pruned at random."""
    model = bmrs.add_noise(copy.deepcopy(dense), where=where, initial_mu=-0.01)
    for layer in noise_layers(model).values():
        layer.mask.copy_(torch.rand(layer.num_structures, generator=generator(seed)) > fraction)
        layer.mask[0] = True
    return model


def error(model: nn.Module, reference: nn.Module, inputs: torch.Tensor) -> float:
    """Mean square of the difference of the outputs, relative to that of the outputs around their mean."""
    with torch.no_grad():
        expected = reference.eval()(inputs)
        return float((model(inputs) - expected).pow(2).mean() / (expected - expected.mean(0)).pow(2).mean())


@pytest.fixture
def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)).double()


def test_what_stays_tells_of_what_left_if_it_can(mlp):
    """Every second unit is three times the one before it, so that nothing is lost without it."""
    with torch.no_grad():
        for tensor in (mlp[0].weight, mlp[0].bias):
            tensor[1::2] = 3 * tensor[::2]
    model = masked_copy(mlp, 0.0, where="0")
    model[0].noise.mask[1::2] = False
    inputs, others = torch.randn(2, 400, 6, generator=generator(), dtype=torch.float64)
    plain = bmrs.compact(model, inputs)
    refitted = bmrs.compact(model, inputs, refit_to=mlp)
    assert refitted[0].out_features == plain[0].out_features == 6
    assert error(plain, mlp, others) > 0.1
    assert error(refitted, mlp, others) < 1e-5


def test_weights_are_those_of_least_squares(mlp):
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(300, 6, generator=generator(), dtype=torch.float64)
    found = bmrs.compact(model, inputs, refit_to=mlp)
    with torch.no_grad():
        read = torch.relu(found[0](inputs))
        wanted = mlp[2](torch.relu(mlp[0](inputs)))
        rows = torch.cat([read, torch.ones(300, 1, dtype=torch.float64)], dim=1)
        exact = torch.linalg.lstsq(rows, wanted).solution
        residual = (rows @ exact - wanted).pow(2).mean()
        assert (found[2](read) - wanted).pow(2).mean() <= 1.001 * residual
    torch.testing.assert_close(found[2].bias, exact[-1], rtol=0.02, atol=0.02)


def test_the_more_the_ridge_counts_the_nearer_weights_stay(mlp):
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(300, 6, generator=generator(), dtype=torch.float64)
    plain = bmrs.compact(model, inputs)
    refitted = [bmrs.compact(model, inputs, refit_to=mlp, refit_ridge=ridge) for ridge in (1e-3, 0.3, 1e6)]
    moved = [(network[2].weight - plain[2].weight).norm().item() for network in refitted]
    assert moved == sorted(moved, reverse=True)
    assert moved[1] < 0.9 * moved[0]
    assert moved[2] < 1e-4 * moved[0]
    errors = [error(network, mlp, inputs) for network in refitted]
    assert errors == sorted(errors)
    with pytest.raises(ValueError, match="refit_ridge must be finite and greater than 0, got 0"):
        bmrs.compact(model, inputs, refit_to=mlp, refit_ridge=0.0)
    with pytest.raises(ValueError, match="refit_ridge goes with refit_to"):
        bmrs.compact(model, inputs, refit_ridge=0.3)


def test_nothing_pruned_and_no_noise_to_speak_of_changes_nothing(mlp):
    model = bmrs.add_noise(copy.deepcopy(mlp), where="0", initial_mu=0.0, initial_log_sigma=-20.0)
    inputs = torch.randn(100, 6, generator=generator(), dtype=torch.float64)
    found = bmrs.compact(model, inputs, refit_to=mlp)
    for new, old in zip(found.parameters(), mlp.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)


def test_with_too_few_examples_a_layer_keeps_its_weights_and_says_so(mlp):
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(15, 6, generator=generator(), dtype=torch.float64)
    with pytest.warns(
        UserWarning, match=r"layer '4' keeps its weights, as 15 examples .* to refit its 10 inputs"
    ):
        found = bmrs.compact(model, inputs, refit_to=mlp)
    plain = bmrs.compact(model, inputs)
    assert torch.equal(found[4].weight, plain[4].weight)
    assert not torch.equal(found[2].weight, plain[2].weight)


def test_pruned_structures_that_stay_stay_pruned(mlp):
    """The model's outputs cannot go, nor, with zero padding, a channel with a constant behind it."""
    model = masked_copy(mlp, 0.4, where=lambda name, _: name in ("0", "4"))
    model[4].noise.mask[1] = False
    inputs = torch.randn(100, 6, generator=generator(), dtype=torch.float64)
    found = bmrs.compact(model, inputs, refit_to=mlp)
    assert not found[4].weight[1].any()
    assert found[4].bias[1] == 0
    assert found[4].weight[0].any()

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1)).double()
    model = bmrs.add_noise(copy.deepcopy(dense), where="0", activation="relu")
    images = torch.randn(50, 1, 8, 8, generator=generator(), dtype=torch.float64)
    model[0].noise.mask[2] = False
    plain, found = bmrs.compact(model, images), bmrs.compact(model, images, refit_to=dense)
    for before, after in zip(plain, found, strict=True):
        if isinstance(before, nn.Conv2d):
            assert torch.equal(before.weight == 0, after.weight == 0)


def test_positions_of_feature_maps_are_chosen_at_random(monkeypatch):
    """Every 20th of 10 × 10 positions would be five of one column."""
    seen = []
    refit = importlib.import_module("bmrs.compaction.refit")  # the package has a function of this name
    patches = refit.patches

    def watching(layer, x):
        found = patches(layer, x)
        seen.append(found.shape[1:3])
        return found

    monkeypatch.setattr(refit, "patches", watching)
    monkeypatch.setattr(refit, "_MOST_EQUATIONS", 20)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Conv2d(4, 6, 5)).double()
    model = masked_copy(dense, 0.0, where="0")
    model[0].noise.mask[:2] = False
    images = torch.randn(300, 1, 18, 18, generator=generator(), dtype=torch.float64)
    images[..., 9:] *= 0.01  # what one column shows is not what the others do
    few = bmrs.compact(model, images, refit_to=dense)
    monkeypatch.setattr(refit, "_MOST_EQUATIONS", 10**6)
    all_of_them = bmrs.compact(model, images, refit_to=dense)
    assert set(seen) == {(10, 10)}
    assert error(few, dense, images) < 1.2 * error(all_of_them, dense, images)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_inputs_that_never_vary_leave_the_weights_as_they_are(mlp, value):
    """Units that are the same for all examples, dead ones among them, tell of nothing."""
    with torch.no_grad():
        mlp[0].weight.zero_()
        mlp[0].bias.fill_(value)
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(100, 6, generator=generator(), dtype=torch.float64)
    plain, refitted = bmrs.compact(model, inputs), bmrs.compact(model, inputs, refit_to=mlp)
    torch.testing.assert_close(refitted[2].weight, plain[2].weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(refitted(inputs), mlp(inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", dilation=2),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(4, 6, 2, stride=2, padding=1),
    ],
    ids=str,
)
def test_patches_are_what_a_convolution_reads(layer):
    x = torch.randn(2, 4, *[7] * (layer.weight.dim() - 2), generator=generator())
    found = patches(layer, x) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(found.movedim(-1, 1), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutions(groups, dtype):
    torch.manual_seed(1)
    dense = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    ).to(dtype)
    model = masked_copy(dense, 0.0, where="0")
    model[0].noise.mask[1::4] = False  # equally many in each group
    inputs, others = torch.randn(2, 200, 2, 8, 8, generator=generator(), dtype=dtype)
    plain, refitted = bmrs.compact(model, inputs), bmrs.compact(model, inputs, refit_to=dense)
    assert sum(p.numel() for p in refitted.parameters()) <= sum(p.numel() for p in dense.parameters())
    assert all(parameter.dtype == dtype for parameter in refitted.parameters())
    assert refitted[2].bias is None  # a layer does not grow
    assert error(refitted, dense, others) < 0.7 * error(plain, dense, others)


def test_residual_networks_and_what_is_left_alone():
    torch.manual_seed(0)
    dense = SmallResNet().double().train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    model = masked_copy(dense, 0.4, where="*.bn1")
    inputs, others = torch.randn(2, 100, 3, 12, 12, generator=generator(), dtype=torch.float64)
    plain, refitted = bmrs.compact(model, inputs), bmrs.compact(model, inputs, refit_to=dense)
    assert dense.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())
    assert error(refitted, dense.eval(), others) < 0.5 * error(plain, dense, others)


def test_a_shared_layer_is_refitted_to_the_results_of_all_its_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 5)
            self.noise = NoiseLayer(5, initial_mu=-0.01)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.noise(torch.tanh(self.inner(x))))

    torch.manual_seed(0)
    model = Twice().double()
    model.noise.mask[2] = False
    dense = copy.deepcopy(model)
    dense.noise.set_kept(torch.ones_like(dense.noise.mask))
    inputs, others = torch.randn(2, 300, 5, generator=generator(), dtype=torch.float64)
    plain, refitted = bmrs.compact(model, inputs), bmrs.compact(model, inputs, refit_to=dense)
    assert error(refitted, dense, others) < 0.9 * error(plain, dense, others)


def test_noise_in_the_reference_does_not_count(mlp):
    """It may be the very model that was pruned: its layers' own outputs are what the trained network computed."""
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(50, 6, generator=generator(), dtype=torch.float64)
    first = bmrs.compact(model, inputs, refit_to=mlp)
    unmasked = copy.deepcopy(model)
    unmasked[0].noise.set_kept(torch.ones_like(unmasked[0].noise.mask))
    with torch.no_grad():
        unmasked[0].noise.log_sigma.fill_(-20.0)
        unmasked[0].noise.mu.fill_(0.0)
    second = bmrs.compact(model, inputs, refit_to=unmasked)
    torch.testing.assert_close(second[2].weight, first[2].weight, rtol=1e-6, atol=1e-6)


def test_another_dtype_is_refused(mlp):
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(50, 6, generator=generator(), dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"refit_to must be torch.float64 on cpu .* got torch.float32 on cpu"
    ):
        bmrs.compact(model, inputs, refit_to=copy.deepcopy(mlp).float())


def test_another_network_is_refused_by_name(mlp):
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(50, 6, generator=generator(), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"refit_to must be .* with a layer '0'.* got Linear"):
        bmrs.compact(model, inputs, refit_to=nn.Linear(6, 3).double())
    other = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    with pytest.raises(
        ValueError, match=r"layer '0' of refit_to must be a Linear with more than \d+ outputs, got"
    ):
        bmrs.compact(model, inputs, refit_to=other)
    with pytest.raises(ValueError, match="layer '2' of refit_to must be a Linear"):
        bmrs.compact(model, inputs, refit_to=nn.Sequential(mlp[0], mlp[1], nn.ReLU()))


def test_single_input_by_name(mlp):
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(50, 6, generator=generator(), dtype=torch.float64)
    expected = bmrs.compact(model, inputs, refit_to=mlp)
    found = bmrs.compact(model, {"input": inputs}, refit_to=mlp)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


def test_several_inputs_are_refused(mlp):
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.layers(x + y)

    model = masked_copy(Added(), 0.5, where="layers.0")
    inputs = torch.randn(2, 50, 6, generator=generator(), dtype=torch.float64)
    with pytest.raises(TypeError, match="refit_to needs a model of one input, got 2 in example_inputs"):
        bmrs.compact(model, tuple(inputs), refit_to=mlp)


def test_a_network_that_becomes_a_graph_is_refused():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).view(-1, 6))

    torch.manual_seed(0)
    dense = Fixed()
    model = masked_copy(dense, 0.5, where="first")
    inputs = torch.randn(50, 3, generator=generator())
    assert bmrs.compact_report(bmrs.compact(model, inputs)).form == "graph"
    with pytest.raises(
        ValueError, match="needs a network of the model's own classes, and this one became a graph"
    ):
        bmrs.compact(model, inputs, refit_to=dense)
