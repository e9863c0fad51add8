import copy
import importlib
import warnings

import pytest
import torch
from residual_cases import SmallResNet
from torch import nn

import bmrs
from bmrs.compaction import products
from bmrs.compaction.products import windows
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
    found = bmrs.compact(model, inputs, refit_to=mlp, refit_ridge=1e-3)
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


@pytest.mark.parametrize("number", [80, 3000])
def test_examples_left_out_tell_how_much_present_weights_count(number):
    """With few examples more than with many; no fixed ridge is better by much with either."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(8, 60), nn.Tanh(), nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 5)
    ).double()
    with torch.no_grad():
        dense[0].weight.mul_(4), dense[2].weight.mul_(4)  # Nothing linear tells of one unit by others.
    model = masked_copy(dense, 0.3, where=["0", "2"])
    inputs, others = torch.randn(number + 2000, 8, generator=generator(), dtype=torch.float64).split(
        [number, 2000]
    )
    chosen = error(bmrs.compact(model, inputs, refit_to=dense), dense, others)
    fixed = {
        ridge: error(bmrs.compact(model, inputs, refit_to=dense, refit_ridge=ridge), dense, others)
        for ridge in (1e-3, 1e-2, 0.1, 1.0)
    }
    assert chosen < 1.15 * min(fixed.values())
    assert chosen < 0.8 * (fixed[1e-3] if number == 80 else fixed[1.0])
    assert chosen < 0.8 * error(bmrs.compact(model, inputs), dense, others)


@pytest.mark.parametrize("number", [19, 20])
def test_with_few_examples_or_such_that_depend_on_each_other_none_is_left_out(mlp, number):
    class Centred(nn.Sequential):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    inputs = torch.randn(number, 6, generator=generator(), dtype=torch.float64)
    for dense in (mlp, Centred(*mlp)):
        model = masked_copy(dense, 0.5, where=["0", "2"])
        chosen, fixed = (
            bmrs.compact(model, inputs, refit_to=dense, **options) for options in ({}, {"refit_ridge": 1e-3})
        )
        alike = torch.equal(chosen[2].weight, fixed[2].weight)
        assert alike == (number < 20 or dense is not mlp)


@pytest.mark.parametrize("times", [2, 50])
def test_examples_left_out_are_whole_ones_wherever_they_lie(times):
    """Times come first within, and resemble each other: left out in part, they would tell nothing."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(6, 60), nn.Tanh(), nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 4)
            )

        def forward(self, x):
            return self.layers(x.transpose(0, 1)).mean(0)

    torch.manual_seed(0)
    dense = Recurrent().double()
    with torch.no_grad():
        dense.layers[0].weight.mul_(4)
    model = masked_copy(dense, 0.3, where=["layers.0", "layers.2"])
    examples = torch.randn(2040, 1, 6, generator=generator(), dtype=torch.float64)
    drift = 0.05 * torch.randn(2040, times, 6, generator=generator(1), dtype=torch.float64).cumsum(1)
    inputs, others = (examples + drift).split([40, 2000])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too few examples, where a ridge is given
        chosen, *fixed = (
            error(bmrs.compact(model, inputs, refit_to=dense, refit_ridge=ridge), dense, others)
            for ridge in (None, 1e-2, 0.1, 1.0)
        )
    assert chosen < error(bmrs.compact(model, inputs), dense, others)
    if times > 2:
        assert chosen < 1.3 * min(fixed)


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

    def watching(x, kernel, **options):
        found = windows(x, kernel, **options)
        seen.append(found.shape[1:3])
        return found

    monkeypatch.setattr(products, "windows", watching)
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


class Summed(nn.Module):
    """Takes two inputs, and a number that is no tensor."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return self.layers(x + factor * y)


def test_inputs_by_name_and_several_of_them(mlp):
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(250, 6, generator=generator(), dtype=torch.float64)
    expected = bmrs.compact(model, inputs, refit_to=mlp)
    found = bmrs.compact(model, {"input": inputs}, refit_to=mlp)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))
    dense = Summed(mlp)
    model = masked_copy(dense, 0.5, where="layers.0")
    half = inputs / 2
    for several in ((half, half), {"x": half, "y": half}, (half, inputs, 0.5)):
        found = bmrs.compact(model, several, refit_to=dense)
        for new, old in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)


class Reader(nn.Module):
    """A small transformer that reads tokens, some of which are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 24, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.classifier = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=~mask)
        return self.classifier(x[:, 0])


def test_a_transformer_that_takes_tokens():
    torch.manual_seed(0)
    dense = Reader().double()
    model = masked_copy(dense, 0.5, where="*.linear1")
    ids, others = torch.randint(20, (2, 400, 6), generator=generator())
    mask = torch.arange(6) < torch.randint(2, 7, (400, 1), generator=generator())
    plain = bmrs.compact(model, {"ids": ids, "mask": mask})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refitted = bmrs.compact(model, {"ids": ids, "mask": mask}, refit_to=dense)
    with torch.no_grad():
        expected = dense.eval()(others, mask)
        errors = [(network(others, mask) - expected).pow(2).mean() for network in (refitted, plain)]
    assert errors[0] < 0.5 * errors[1]
    # What attention makes of values is multiplied inside of a function of torch.
    before, after = (network.blocks[1].self_attn.out_proj.weight for network in (plain, refitted))
    assert not torch.equal(before, after)


def test_layers_that_read_one_tensor_are_refitted_in_one_pass(mlp):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 12)
            self.branches = nn.ModuleList(nn.Linear(12, 4) for _ in range(3))
            self.last = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.first(x))
            return self.last(self.branches[0](h) * self.branches[1](h) + self.branches[2](h))

    torch.manual_seed(0)
    dense = Branches().double()
    model = masked_copy(dense, 0.5, where="first")
    inputs = torch.randn(200, 6, generator=generator(), dtype=torch.float64)
    calls = []
    dense.first.register_forward_hook(lambda *_: calls.append("first"))
    dense.last.register_forward_hook(lambda *_: calls.append("last"))
    refitted = bmrs.compact(model, inputs, refit_to=dense)
    # All of it once, to see what there is; all three batches, one of them of what is left out at first, for what layers
    # are to return; and for the branches and for the last layer the first batch, to see what they read. It stops in the
    # middle of the last layer looked for.
    assert calls == ["first", "last", *3 * ["first"], *2 * ["first"]]
    plain = bmrs.compact(model, inputs)
    for before, after in zip(plain.branches, refitted.branches, strict=True):
        assert not torch.equal(before.weight, after.weight)


def test_the_full_network_runs_in_parts_where_memory_is_short(mlp, monkeypatch):
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(250, 6, generator=generator(), dtype=torch.float64)
    whole = bmrs.compact(model, inputs, refit_to=mlp)
    monkeypatch.setattr(importlib.import_module("bmrs.compaction.refit"), "_MOST_BYTES", 1)
    runs = []
    mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    in_parts = bmrs.compact(model, inputs, refit_to=mlp)
    assert len(runs) == 1 + 3 * (3 + 1)  # of three layers, each in a part of its own
    assert all(map(torch.equal, in_parts.parameters(), whole.parameters()))


def test_a_network_that_becomes_a_graph():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(3, 12), nn.Conv1d(12, 4, 1), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(torch.tanh(self.second(torch.tanh(self.first(x)).view(-1, 12, 1))).flatten(1))

    torch.manual_seed(0)
    dense = Fixed().double()
    model = masked_copy(dense, 0.5, where="first")
    inputs, others = torch.randn(2, 250, 3, generator=generator(), dtype=torch.float64)
    plain, refitted = bmrs.compact(model, inputs), bmrs.compact(model, inputs, refit_to=dense)
    assert bmrs.compact_report(refitted).form == "graph"
    assert error(refitted, dense, others) < 0.3 * error(plain, dense, others)


def test_a_network_of_which_less_was_cut_than_could_be():
    """A sum that starts from zeros of a width in code, of a number of examples in code."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 12)
            self.layers = nn.ModuleList(nn.Linear(12, 6) for _ in range(2))
            self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.first(x))
            total = torch.zeros(len(x), 6, dtype=x.dtype)
            for layer in self.layers:
                total = total + torch.tanh(layer(x))
            return self.last(torch.tanh(self.second(total)))

    torch.manual_seed(0)
    dense = Summed().double()
    model = bmrs.add_noise(copy.deepcopy(dense), where=["first", "layers.*", "second"], initial_mu=-0.01)
    for layer in noise_layers(model).values():
        layer.set_kept(torch.arange(layer.num_structures) % 3 > 0)
    inputs, others = torch.randn(2, 200, 4, generator=generator(), dtype=torch.float64)
    plain, refitted = bmrs.compact(model, inputs), bmrs.compact(model, inputs, refit_to=dense)
    assert bmrs.compact_report(refitted).form == "module"
    assert (refitted.second.in_features, refitted.second.out_features) == (6, 8)
    assert error(refitted, dense, others) < 0.9 * error(plain, dense, others)


def test_weights_that_are_used_otherwise_too_stay():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 6)
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)
            self.decoder = nn.Linear(6, 20)
            self.decoder.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.second(torch.relu(self.first(self.table(ids)))))

    torch.manual_seed(0)
    dense = Tied().double()
    model = masked_copy(dense, 0.5, where="first")
    ids = torch.randint(20, (200, 5), generator=generator())
    plain, refitted = bmrs.compact(model, ids), bmrs.compact(model, ids, refit_to=dense)
    assert torch.equal(refitted.table.weight, plain.table.weight)
    assert refitted.decoder.weight is refitted.table.weight
    assert not torch.equal(refitted.second.weight, plain.second.weight)


@pytest.mark.parametrize("biases", ["two", "first", "second", "computed"])
def test_a_weight_of_two_layers_with_biases_of_their_own(biases):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 12, bias=biases != "second")
            self.third = nn.Linear(12, 12, bias=biases != "first")
            self.third.weight = self.second.weight
            self.last = nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.second(torch.tanh(self.first(x))))
            bias = 2 * self.third.bias if biases == "computed" else self.third.bias
            return self.last(torch.tanh(nn.functional.linear(x, self.third.weight, bias)))

    torch.manual_seed(0)
    dense = Tied().double()
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model = masked_copy(dense, 0.4, where="first")
    inputs, others = torch.randn(2, 400, 5, generator=generator(), dtype=torch.float64)
    plain, refitted = bmrs.compact(model, inputs), bmrs.compact(model, inputs, refit_to=dense)
    assert error(refitted, dense, others) < 0.8 * error(plain, dense, others)
    if biases == "two":
        assert torch.equal(refitted.second.bias, plain.second.bias)


def test_a_weight_of_the_name_that_attention_has_is_one_like_others():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.randn(6, 12) / 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.in_proj_weight)

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), Packed(), nn.Tanh(), nn.Linear(6, 2)).double()
    model = masked_copy(dense, 0.4, where="0")
    inputs = torch.randn(200, 4, generator=generator(), dtype=torch.float64)
    plain, refitted = bmrs.compact(model, inputs), bmrs.compact(model, inputs, refit_to=dense)
    assert not torch.equal(refitted[2].in_proj_weight, plain[2].in_proj_weight)


def test_scaled_products_stay_and_are_named():
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight, alpha=5)

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Scaled(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    model = masked_copy(dense, 0.4, where="0")
    inputs = torch.randn(200, 4, generator=generator(), dtype=torch.float64)
    with pytest.warns(UserWarning, match="^'2' keep their weights"):
        refitted = bmrs.compact(model, inputs, refit_to=dense)
    assert torch.equal(refitted[2].weight, bmrs.compact(model, inputs)[2].weight)


def test_a_model_that_catches_everything(mlp):
    class Catching(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return super().forward(x)
            except BaseException:
                raise RuntimeError("something went wrong") from None

    dense = Catching(*mlp)
    inputs = torch.randn(200, 6, generator=generator(), dtype=torch.float64)
    found = bmrs.compact(masked_copy(dense, 0.5, where="0"), inputs, refit_to=dense)
    expected = bmrs.compact(masked_copy(mlp, 0.5, where="0"), inputs, refit_to=mlp)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


def test_matrices_with_inputs_in_rows():
    """As transformers' Conv1D has them, which GPT-2 is made of."""

    class Rows(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
            self.bias = nn.Parameter(torch.randn(outputs))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight)

    torch.manual_seed(0)
    dense = nn.Sequential(Rows(4, 16), nn.ReLU(), Rows(16, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    model = bmrs.add_noise(copy.deepcopy(dense), where="0", num_structures=16, dim=-1, initial_mu=-0.01)
    model[0].noise.mask[::2] = False
    inputs, others = torch.randn(2, 300, 4, generator=generator(), dtype=torch.float64)
    plain, refitted = bmrs.compact(model, inputs), bmrs.compact(model, inputs, refit_to=dense)
    assert refitted[2].weight.shape == plain[2].weight.shape == (8, 5)
    assert error(refitted, dense, others) < 0.5 * error(plain, dense, others)


def test_examples_with_a_nan_are_refused_by_the_layer_that_meets_it(mlp):
    model = masked_copy(mlp, 0.5, where="0")
    inputs = torch.randn(100, 6, generator=generator(), dtype=torch.float64)
    inputs[50, 1] = torch.nan
    with pytest.raises(
        ValueError, match="layer '0' cannot be refitted: on example_inputs it reads or is to return NaN"
    ):
        bmrs.compact(model, inputs, refit_to=mlp)


def test_a_reference_that_uses_a_layer_another_number_of_times_is_refused(mlp):
    class Again(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self[4](torch.zeros(len(x), 10, dtype=x.dtype))

    inputs = torch.randn(100, 6, generator=generator(), dtype=torch.float64)
    for pruned, reference, ones, others in ((Again(*mlp), mlp, 1, 2), (mlp, Again(*mlp), 2, 1)):
        model = masked_copy(pruned, 0.5, where="0")
        with pytest.raises(
            ValueError,
            match=f"layer '4' of refit_to is used {ones} times in a forward pass, and {others} times",
        ):
            bmrs.compact(model, inputs, refit_to=reference)


def test_a_branch_that_is_gone_needs_no_refitting():
    torch.manual_seed(0)
    dense = SmallResNet().double().eval()
    model = masked_copy(dense, 0.3, where="*.bn1")
    emptied = next(iter(noise_layers(model).values()))
    emptied.set_kept(torch.zeros_like(emptied.mask))
    inputs, others = torch.randn(2, 100, 3, 12, 12, generator=generator(), dtype=torch.float64)
    plain, refitted = bmrs.compact(model, inputs), bmrs.compact(model, inputs, refit_to=dense)
    assert bmrs.compact_report(plain).emptied
    assert error(refitted, dense, others) < 0.7 * error(plain, dense, others)


def test_weights_under_a_parametrization_are_refitted_as_what_they_come_to(mlp):
    dense = copy.deepcopy(mlp)
    nn.utils.parametrizations.weight_norm(dense[2])
    model = masked_copy(dense, 0.5, where="0")
    inputs = torch.randn(100, 6, generator=generator(), dtype=torch.float64)
    found = bmrs.compact(model, inputs, refit_to=dense)
    assert isinstance(dense[2].parametrizations, nn.ModuleDict)
    expected = bmrs.compact(masked_copy(mlp, 0.5, where="0"), inputs, refit_to=mlp)
    torch.testing.assert_close(found[2].weight, expected[2].weight, rtol=1e-6, atol=1e-6)


class Doubled(nn.Linear):
    """Computes its weight in its code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


def test_computed_weights_stay_and_are_named():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), Doubled(12, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    model = masked_copy(dense, 0.5, where="0")
    inputs = torch.randn(100, 6, generator=generator(), dtype=torch.float64)
    with pytest.warns(
        UserWarning, match="^'2' keep their weights: refitting takes parameters that torch's linear"
    ):
        refitted = bmrs.compact(model, inputs, refit_to=dense)
    plain = bmrs.compact(model, inputs)
    assert torch.equal(refitted[2].weight, plain[2].weight)
    assert not torch.equal(refitted[4].weight, plain[4].weight)
