"""Around compaction: suggestions, round numbers, optimizers, folding, and what users do to their models."""

import copy
import functools
import pickle
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bmrs
from bmrs import NoiseLayer
from bmrs.noise.lookup import noise_layers
from tests.library.compaction_cases import num_values, prune_structures, randomise


class Residual(nn.Module):
    """A stem and two residual blocks, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.second = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x.mean((2, 3)))


class Written(nn.Module):
    """Its forward has a width written into it, so that it cannot run narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.b(self.dropout(F.relu(self.a(x)).view(-1, 12)))


class Storing(nn.Module):
    """Calls a function that it stores."""

    def __init__(self, stored, within) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.factor = 2.0
        self.stored = within(stored(self))

    def called(self, x):
        return self.b(x)

    def forward(self, x):
        stored = self.stored
        if not callable(stored):
            (stored,) = stored.values() if isinstance(stored, dict) else stored
        return self.c(F.relu(stored(F.relu(self.a(x)))))


IMAGES = torch.randn(2, 3, 5, 5)


def half(model: nn.Module) -> nn.Module:
    for layer in noise_layers(model).values():
        layer.mask[::2] = False
    return model.eval()


def noisy_residual() -> nn.Module:
    torch.manual_seed(0)
    return bmrs.add_noise(Residual(), where=lambda name, layer: isinstance(layer, nn.Conv2d))


class TestSuggest:
    def test_places_and_what_they_are_worth(self):
        torch.manual_seed(0)
        model = Residual()
        state = copy.deepcopy(model.state_dict())
        suggestions = bmrs.suggest(model, IMAGES)
        found = {place.layers: place for place in suggestions}
        assert set(found) == {("stem", "first.2", "second.2"), ("first.0",), ("second.0",)}
        assert found["stem", "first.2", "second.2"].together
        assert not found["first.0",].together
        # A hidden channel: its row and bias, and its column.
        assert found["second.0",].parameters == 8 + 1 + 8
        assert found["second.0",].flops == 2 * (8 + 8) * 25 * 2
        assert found["stem", "first.2", "second.2"].parameters == (27 + 1) + 2 * (12 + 16) + 2 + 4
        assert [p.structures * p.parameters for p in suggestions] == sorted(
            (p.structures * p.parameters for p in suggestions), reverse=True
        )
        assert "stem and first.2 and second.2" in str(suggestions)
        assert suggestions.to_dict()["places"][0]["structures"] == suggestions.places[0].structures
        assert not noise_layers(model)
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    def test_noise_that_is_there_already_is_no_place(self):
        model = bmrs.add_noise(Residual(), where=["first.0"])
        found = {place.layers for place in bmrs.suggest(model, IMAGES)}
        assert found == {("stem", "first.2", "second.2"), ("second.0",)}
        chain = nn.Sequential(
            nn.Linear(4, 6), NoiseLayer(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
        )
        # Behind a linear layer whose outputs have noise of their own there can be more.
        assert {place.layers for place in bmrs.suggest(chain, torch.randn(2, 4))} == {("0",), ("3",)}

    def test_pruning_there_removes_what_was_said(self):
        for place in bmrs.suggest(Residual(), IMAGES):
            model = bmrs.add_noise(Residual(), where=lambda name, _, names=place.layers: name in names).eval()
            for layer in noise_layers(model).values():
                layer.mask[1] = False
            report = bmrs.compact_report(bmrs.compact(model, IMAGES))
            assert report.parameters_before - report.parameters_after == place.parameters
            assert report.flops_before - report.flops_after == place.flops

    def test_nothing_to_suggest(self):
        assert len(bmrs.suggest(nn.Linear(3, 2), torch.randn(1, 3))) == 0


class TestRoundTo:
    def test_gives_back_those_with_most_evidence(self):
        model = nn.Sequential(nn.Linear(4, 12), NoiseLayer(12), nn.ReLU(), nn.Linear(12, 2)).double()
        with torch.no_grad():
            model[1].mu.copy_(torch.linspace(-3.0, 0.0, 12))
        model[1].mask[:7] = False
        x = torch.randn(3, 4, dtype=torch.float64)
        compacted = bmrs.compact(model, x, round_to=8)
        assert compacted[0].out_features == 8
        (layer,) = bmrs.compact_report(compacted).layers
        assert (layer.pruned, layer.given_back, layer.removed) == (4, 3, 4)
        assert "3 given back" in str(bmrs.compact_report(compacted))
        model.eval()
        assert not model[1].mask[4:7].any()
        model[1].set_kept(torch.arange(len(model[1].mask)) >= 4)
        torch.testing.assert_close(compacted(x), model(x), rtol=0, atol=1e-12)

    def test_tied_layers_give_back_together(self):
        model = half(noisy_residual())
        compacted = bmrs.compact(model, IMAGES, round_to=3)
        assert compacted.stem.out_channels == compacted.first[2].out_channels == 6
        assert compacted.first[0].out_channels == 6
        assert compacted.second[0].out_channels == 9

    def test_keeps_all_where_there_are_fewer(self):
        model = half(nn.Sequential(nn.Linear(4, 6), NoiseLayer(6), nn.ReLU(), nn.Linear(6, 2)))
        assert bmrs.compact(model, torch.randn(2, 4), round_to=8)[0].out_features == 6

    @pytest.mark.parametrize(("value", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
    def test_bad_values(self, value, error):
        with pytest.raises(error, match="round_to must be"):
            bmrs.compact(nn.Linear(2, 2), torch.randn(1, 2), round_to=value)


class Wrapping(torch.optim.Optimizer):
    """As accelerate has it."""

    def __init__(self, inner):
        self.inner, self.state, self.param_groups = inner, inner.state, inner.param_groups

    def zero_grad(self):
        self.inner.zero_grad()

    def step(self, closure):
        self.inner.step(closure)


class Summing(torch.optim.SGD):
    """As transformers' Adafactor has it."""

    def state_of(self, parameter):
        return {"sums": parameter.detach().sum(tuple(range(1, parameter.dim())))}

    def step(self, closure):
        super().step(closure)
        self.state |= {p: self.state_of(p) for group in self.param_groups for p in group["params"]}


class Listing(Summing):
    def state_of(self, parameter):
        return {"all": [parameter.detach()]}


class TestOptimizer:
    def test_moments_are_cut_like_the_parameters(self):
        model = noisy_residual()
        optimizer = torch.optim.Adam(
            [
                {"params": [p for n, p in model.named_parameters() if "noise" not in n], "lr": 1e-2},
                {"params": [p for n, p in model.named_parameters() if "noise" in n], "lr": 1e-1},
            ]
        )
        model(IMAGES).pow(2).mean().backward()
        optimizer.step()
        half(model)
        compacted = bmrs.compact(model, IMAGES, expected_noise=False)
        found = bmrs.compact_optimizer(optimizer, model, compacted)
        assert type(found) is torch.optim.Adam
        assert [group["lr"] for group in found.param_groups] == [1e-2, 1e-1]
        assert found.param_groups[1]["params"] == []
        weight = compacted.second[0].weight
        moments = optimizer.state[model.second[0].weight]["exp_avg"]
        assert torch.equal(found.state[weight]["exp_avg"], moments[1::2][:, 1::2])
        compacted.train()
        compacted(IMAGES).pow(2).mean().backward()
        before = weight.detach().clone()
        found.step()
        assert not torch.equal(weight, before)
        assert optimizer.state[model.second[0].weight]["exp_avg"].shape == (16, 8, 1, 1)

    def test_names_of_parameters_go_with_them(self):
        model = bmrs.add_noise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), where="0")
        x = torch.randn(5, 4)
        optimizer = torch.optim.Adam(model.named_parameters())
        model[0].noise.set_kept(torch.arange(6) < 3)
        compacted = bmrs.compact(model, x)
        group = bmrs.compact_optimizer(optimizer, model, compacted).param_groups[0]
        assert group["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        own = dict(compacted.named_parameters())
        assert all(own[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))

    @staticmethod
    def trained(optimizer_of, schedule=None):
        """A small masked model, its optimizer after two steps, and the compacted network."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), NoiseLayer(6), nn.ReLU(), nn.Linear(6, 2))
        optimizer = optimizer_of([p for n, p in model.named_parameters() if not n.startswith("1.")])
        scheduler = schedule and schedule(optimizer)
        x = torch.randn(5, 4)

        def loss():
            optimizer.zero_grad()
            value = model(x).pow(2).mean()
            value.backward()
            return value

        for _ in range(2):
            optimizer.step(loss)
            if scheduler:
                scheduler.step()
        half(model).eval()
        return model, optimizer, bmrs.compact(model, x), x

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
            lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
        ],
        ids=["StepLR", "OneCycleLR"],
    )
    def test_an_optimizer_with_a_scheduler_trains_the_new_network(self, schedule):
        model, optimizer, compacted, x = self.trained(functools.partial(torch.optim.AdamW, lr=1e-2), schedule)
        called = []
        optimizer.register_step_post_hook(lambda *_: called.append("old"))
        found = bmrs.compact_optimizer(optimizer, model, compacted)
        before = [[p.detach().clone() for p in each.parameters()] for each in (model, compacted)]
        compacted(x).pow(2).mean().backward()
        torch.optim.lr_scheduler.StepLR(found, 1)
        found.step()
        same = [
            [torch.equal(a, b) for a, b in zip(each.parameters(), old, strict=True)]
            for each, old in zip((model, compacted), before, strict=True)
        ]
        assert all(same[0])
        assert not any(same[1])
        assert called == []
        optimizer.step()
        assert called == ["old"]

    def test_what_an_optimizer_shares_it_goes_on_sharing(self):
        class Locked(torch.optim.SGD):
            def __init__(self, parameters, **options):
                super().__init__(parameters, **options)
                self.lock, self.names = threading.Lock(), ["a"]

        model, optimizer, compacted, _ = self.trained(functools.partial(Locked, lr=0.1))
        found = bmrs.compact_optimizer(optimizer, model, compacted)
        assert found.lock is optimizer.lock
        found.names.append("b")
        assert optimizer.names == ["a"]

    def test_factored_moments_are_cut(self):
        model, optimizer, compacted, x = self.trained(functools.partial(torch.optim.Adafactor, lr=1e-2))
        found = bmrs.compact_optimizer(optimizer, model, compacted)
        rows = optimizer.state[model[0].weight]["row_var"]
        assert rows.shape == (6, 1)
        assert torch.equal(found.state[compacted[0].weight]["row_var"], rows[1::2])
        compacted(x).pow(2).mean().backward()
        found.step()

    @pytest.mark.parametrize(
        ("optimizer_of", "message"),
        [
            (torch.optim.LBFGS, "state is by parameter, and LBFGS has more in '_params'"),
            (
                lambda p: Wrapping(torch.optim.SGD(p, lr=0.1)),
                "and Wrapping has more in 'inner': give it the opt",
            ),
            (
                lambda p: Summing(p, lr=0.1),
                r"Summing keeps 'sums' for '0.weight', of shape \(6,\) for a parameter",
            ),
            (
                lambda p: Listing(p, lr=0.1),
                "Listing keeps 'all' for '0.weight', a list with tensors for a parameter",
            ),
        ],
    )
    def test_refuses_state_that_it_cannot_cut(self, optimizer_of, message):
        model, optimizer, compacted, _ = self.trained(optimizer_of)
        with pytest.raises(ValueError, match=message):
            bmrs.compact_optimizer(optimizer, model, compacted)

    def test_refuses_what_does_not_belong_together(self):
        model = half(noisy_residual())
        compacted = bmrs.compact(model, IMAGES)
        with pytest.raises(TypeError, match=r"needs a network that bmrs\.compact returned, got Linear"):
            bmrs.compact_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, nn.Linear(2, 2))
        other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
        with pytest.raises(ValueError, match=r"a parameter of shape \(2, 2\) that is not one of the model"):
            bmrs.compact_optimizer(other, model, compacted)


class TestFold:
    def test_works_for_what_cannot_be_compacted(self):
        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear, self.noise = nn.Linear(4, 6), NoiseLayer(6, activation="relu")

            def forward(self, x):
                y = self.noise(self.linear(x))
                return y if y.sum() > 0 else -y

        model = randomise(Branches()).eval()
        x = torch.randn(3, 4)
        with pytest.raises(
            ValueError, match=r"failed on Branches at line \d+ of .*y\.sum\(\) > 0.*bmrs\.fold"
        ):
            bmrs.compact(model, x)
        folded = bmrs.fold(model)
        assert not noise_layers(folded)
        assert torch.equal(folded(x), model(x))
        assert type(folded) is Branches

    def test_report_of_another_model_is_refused(self):
        with pytest.raises(TypeError, match=r"needs a network that bmrs\.compact returned, got Linear"):
            bmrs.compact_report(bmrs.fold(nn.Linear(2, 2)))


class TestGraphs:
    """Networks whose own code cannot run narrower."""

    def test_becomes_a_graph_that_can_be_used_like_a_module(self, tmp_path):
        model = half(bmrs.add_noise(Written(), where="a"))
        x = torch.randn(4, 6)
        compacted = bmrs.compact(model, x)
        report = bmrs.compact_report(compacted)
        assert report.form == "graph"
        assert report.removed == 6
        assert "cannot be multiplied" in report.form_because
        for copied in (copy.deepcopy(compacted), pickle.loads(pickle.dumps(compacted))):
            torch.testing.assert_close(copied(x), model(x))
            torch.testing.assert_close(copied(x[:1]), model(x[:1]))
        assert bmrs.compact_report(copy.deepcopy(compacted)) == report
        compacted.train()
        assert not torch.equal(compacted(x), compacted(x)), "dropout is gone"
        bmrs.save(tmp_path / "m", compacted.eval())
        with pytest.raises(
            ValueError, match="a graph of operators, not layers of a class: load it without model="
        ):
            bmrs.load(tmp_path / "m", model=Written())

    def test_loaded_graph_refuses_what_it_was_not_captured_for(self, tmp_path):
        class Branching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

            def forward(self, x, twice):
                y = F.relu(self.a(x))
                return self.b(2 * y if twice else y)

        model = half(bmrs.add_noise(Branching(), where="a"))
        bmrs.save(tmp_path / "m", bmrs.compact(model, (torch.randn(4, 6), True)))
        loaded = bmrs.load(tmp_path / "m")
        x = torch.randn(7, 6)
        torch.testing.assert_close(loaded(x, True), model(x, True))
        with pytest.raises(
            ValueError,
            match="twice must be True, as in the example that the network was made with, got False",
        ):
            loaded(x, False)
        with pytest.raises(
            ValueError, match="size 1 of x must be 6, as in the example that the network was made with, got 5"
        ):
            loaded(torch.randn(7, 5), True)

    def test_graph_that_was_never_saved_refuses_what_it_was_not_captured_for(self):
        class Fixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

            def forward(self, x):
                return self.b(F.relu(self.a(x)).view(-1, 12))

        compacted = bmrs.compact(half(bmrs.add_noise(Fixed(), where="a")), torch.randn(4, 6))
        assert bmrs.compact_report(compacted).form == "graph"
        with pytest.raises(ValueError, match=r"size 1 of x must be 6, as in the example .* made with, got 5"):
            compacted(torch.randn(4, 5))


class TestModelsOfUsers:
    def test_weight_normalisation_of_both_kinds(self):
        for normalise in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = nn.Sequential(normalise(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 3))
            half(bmrs.add_noise(model, where=lambda name, _: name == "0"))
            x = torch.randn(4, 6)
            model.train()(x).sum().backward()
            model.eval()
            compacted = bmrs.compact(model, x)
            torch.testing.assert_close(compacted(x), model(x))
            assert compacted[0].weight.shape == (8, 6)
            # The original computes its weight as before.
            torch.testing.assert_close(model.train()(x).shape, torch.Size([4, 3]))

    def test_inference_mode(self):
        with torch.inference_mode():
            model = half(
                bmrs.add_noise(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), where="0")
            )
            compacted = bmrs.compact(model, torch.randn(4, 6))
        compacted(torch.randn(2, 6)).sum().backward()
        assert compacted[0].weight.grad.shape == (8, 6)

    def test_what_a_forward_keeps_stays_out(self):
        class Keeps(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

            def forward(self, x):
                self.shape = x.shape
                return self.b(F.relu(self.a(x)))

        model = half(bmrs.add_noise(Keeps(), where="a"))
        compacted = bmrs.compact(model, torch.randn(4, 6))
        assert compacted(torch.randn(5, 6)).shape == (5, 3)
        assert not hasattr(model, "shape")

    def test_forward_that_holds_the_original_is_refused(self):
        model = half(bmrs.add_noise(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), where="0"))
        old = model[2].forward
        model[2].forward = lambda x: 2 * old(x)
        with pytest.raises(ValueError, match=r"the forward of layer '2' \(Linear\) was replaced"):
            bmrs.compact(model, torch.randn(4, 6))

    @pytest.mark.parametrize(
        "stored",
        [
            lambda model: lambda x: model.b(x),
            lambda model: functools.partial(lambda x: model.b(x)),
            lambda model: lambda x, layer=model.b: layer(x),
            lambda model: functools.lru_cache(lambda x: model.b(x)),
            lambda model: types.MethodType(lambda self, x: model.b(x), model),
            lambda model: functools.wraps(model.called)(lambda x: model.called(x)),
        ],
        ids=["closure", "partial", "default", "cache", "method", "wrapper"],
    )
    @pytest.mark.parametrize(
        "within", [lambda f: f, lambda f: [f], lambda f: {"f": f}], ids=["", "list", "dict"]
    )
    def test_functions_that_call_noisy_layers_of_the_original_are_refused(self, stored, within):
        message = (
            r"the attribute 'stored' of layer '0' \(Storing\) calls layer '0.b' \(Linear\), and in a copy"
        )
        model = half(bmrs.add_noise(nn.Sequential(Storing(stored, within)), where=["*.a", "*.b"])).double()
        for training in (False, True):
            with pytest.raises(ValueError, match=message):
                bmrs.compact(model.train(training), torch.randn(4, 6, dtype=torch.float64))

    @pytest.mark.parametrize(
        "stored",
        [
            lambda model: model.called,
            lambda model: model.b.forward,
            lambda model: functools.partial(Storing.called, model),
            lambda model: functools.partial(lambda layer, x: layer(x), model.b),
            lambda model: types.MethodType(lambda self, x: self.b(x), model),
            lambda model: lambda x: x * model.factor,
        ],
    )
    def test_functions_that_are_copied_or_call_no_noise_are_right(self, stored):
        model = half(bmrs.add_noise(Storing(stored, lambda f: [f]), where=["a", "b"]))
        x = torch.randn(4, 6)
        compacted = bmrs.compact(model, x)
        assert compacted.a.out_features == 6
        torch.testing.assert_close(compacted(x), model(x))

    def test_the_same_random_numbers_in_evaluation_are_compared(self):
        """As of a variational autoencoder, which draws as many numbers as before."""

        class Autoencoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.mean, self.b = nn.Linear(6, 12), nn.Linear(12, 2), nn.Linear(2, 12)
                self.c = nn.Linear(12, 6)

            def forward(self, x):
                mean = self.mean(F.relu(self.a(x)))
                return self.c(F.relu(self.b(mean + torch.randn_like(mean))))

        model, x = half(bmrs.add_noise(Autoencoder(), where=["a", "b"])), torch.randn(4, 6)
        compacted = bmrs.compact(model, x)
        assert (compacted.a.out_features, compacted.b.out_features) == (6, 6)
        found = []
        for network in (model, compacted):
            torch.manual_seed(1)
            found.append(network(x))
        torch.testing.assert_close(*found)

    def test_random_evaluation_is_refused(self):
        class Random(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

            def forward(self, x):
                return self.b(F.dropout(F.relu(self.a(x)), 0.5))

        with pytest.raises(ValueError, match="gives other outputs every time in evaluation mode"):
            bmrs.compact(half(bmrs.add_noise(Random(), where="a")), torch.randn(4, 6))

    def test_heads_only_training_has_are_named(self):
        class Auxiliary(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.aux = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 2)

            def forward(self, x):
                y = F.relu(self.a(x))
                return (self.b(y), self.aux(y)) if self.training else self.b(y)

        with pytest.warns(
            UserWarning, match=r"in training mode .* RuntimeError: mat1 .* use aux\.weight, aux"
        ):
            compacted = bmrs.compact(half(bmrs.add_noise(Auxiliary(), where="a")), torch.randn(4, 6))
        report = bmrs.compact_report(compacted)
        assert report.unused == ("aux.weight", "aux.bias")
        assert f"in training mode it ends in an error: {report.fails_in_training}" in str(report)
        assert "not used in evaluation mode, left as they are: aux.weight, aux.bias" in str(report)

    def test_parts_that_only_training_uses_and_that_still_fit_are_no_matter(self):
        class Noisy(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)
                self.sigma = nn.Parameter(torch.rand(width))
                self.register_buffer("eps", torch.randn(width))

            def forward(self, x):
                y = torch.relu(self.a(x))
                return self.b(y + self.sigma * self.eps if self.training else y)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compacted = bmrs.compact(half(bmrs.add_noise(Noisy(1), where="a")), torch.randn(4, 6))
        assert bmrs.compact_report(compacted).fails_in_training == ""
        model, x = half(bmrs.add_noise(Noisy(12), where="a")), torch.randn(4, 6)
        with pytest.warns(UserWarning, match="Evaluation mode does not use sigma, eps, whose sizes stay"):
            bmrs.compact(model, x)

    def test_examples_of_other_dtypes_and_shapes_are_refused(self):
        model = half(bmrs.add_noise(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), where="0"))
        for example in (torch.randn(4, 6).double(), torch.randn(4, 7)):
            with pytest.raises(ValueError, match=r"does not run on example_inputs of \(4, [67]\) float"):
                bmrs.compact(model, example)

    def test_frozen_shared_and_channels_last_parameters_stay_so(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )
        model = model.to(memory_format=torch.channels_last)
        model[0].requires_grad_(False)
        model[4].bias = model[4].bias
        half(bmrs.add_noise(model, where=lambda name, _: name in ("0", "2")))
        compacted = bmrs.compact(model, IMAGES)
        assert not compacted[0].weight.requires_grad
        assert compacted[2].weight.requires_grad
        assert compacted[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert num_values(compacted) < num_values(model)

    def test_a_part_that_is_compiled_comes_out_plain(self):
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))
        half(bmrs.add_noise(model, where="0.0"))
        x = torch.randn(3, 4)
        expected = model.eval()(x)
        model[0] = torch.compile(model[0], backend="eager")
        compacted = bmrs.compact(model, x)
        assert isinstance(compacted[0], nn.Sequential)
        assert compacted[0][0].out_features == 4
        torch.testing.assert_close(compacted(x), expected)

    def test_noise_added_after_compilation_acts(self):
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        compiled = torch.compile(model, backend="eager")
        x = torch.randn(8, 6)
        compiled(x)
        bmrs.add_noise(compiled, where="*.0", initial_log_sigma=0.0)
        assert not torch.equal(compiled.train()(x), compiled(x))


class TestShuffles:
    """What takes channels in blocks loses blocks."""

    def test_channel_shuffle_loses_the_same_channels_of_every_group(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.ReLU(), nn.Conv2d(8, 4, 1)
        ).double()
        bmrs.add_noise(model, where="0")
        model[0].noise.mask[[0, 4, 1]] = False
        x = IMAGES.double()
        compacted = bmrs.compact(model.eval(), x)
        assert compacted[0].out_channels == 6
        torch.testing.assert_close(compacted(x), model(x), rtol=0, atol=1e-12)
        (reason,) = bmrs.compact_report(compacted).layers[0].kept_because
        assert reason.startswith("channel_shuffle takes blocks of channels at channel_shuffle in layer '1'")

    def test_pixel_shuffle_loses_whole_channels(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(2, 4, 1)).double()
        bmrs.add_noise(model, where="0")
        model[0].noise.mask[[0, 1, 2, 3, 5]] = False
        x = IMAGES.double()
        compacted = bmrs.compact(model.eval(), x)
        assert (compacted[0].out_channels, compacted[3].in_channels) == (4, 1)
        torch.testing.assert_close(compacted(x), model(x), rtol=0, atol=1e-12)


def test_where_all_heads_are_pruned_a_whole_one_stays():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x):
            q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = bmrs.add_noise(Attention(), where="o", structures="heads", num_heads=3).double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for kept in ([False, True, False], [False, False, False]):
        model.o.noise.mask.copy_(torch.tensor(kept))
        compacted = bmrs.compact(model, x)
        assert type(compacted) is Attention
        assert compacted.q.out_features == compacted.v.out_features == compacted.o.in_features == 4
        torch.testing.assert_close(compacted(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_batches_of_torchs_encoder_come_out_as_before():
    """Without gradients torch leaves padded places out, in the masked network as in the compacted one."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double()
    half(bmrs.add_noise(model, where="layers.*.linear1"))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    inputs = {"src": x, "src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}
    compacted = bmrs.compact(model, inputs)
    assert compacted.layers[1].linear1.out_features == 8
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(compacted(**inputs), model(**inputs), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:the saved network takes")  # of bags of one number
def test_operators_without_a_rule_are_saved(tmp_path):
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.cell = nn.EmbeddingBag(9, 4), nn.GRUCell(4, 6)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, ids, labels):
            y = self.b(F.relu(self.a(self.cell(self.bag(ids)))))
            return F.cross_entropy(y, labels), y

    model = half(bmrs.add_noise(Bag(), where="a"))
    inputs = (torch.randint(0, 9, (3, 5)), torch.tensor([0, 1, 2]))
    compacted = bmrs.compact(model, inputs)
    assert compacted.a.out_features == 4
    bmrs.save(tmp_path / "m", compacted)
    for found, expected in zip(bmrs.load(tmp_path / "m")(*inputs), compacted(*inputs), strict=True):
        assert torch.equal(found, expected)


class TestTorchScript:
    """torch.export cannot look into it, and it takes no hooks; a network may have parts of it all the same."""

    @staticmethod
    def partly():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            scripted = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 6, 3)))
        return nn.Sequential(nn.Conv2d(3, 8, 3), scripted).eval()

    def test_what_follows_the_network_names_the_part(self):
        model = bmrs.add_noise(self.partly(), where="0")
        x = torch.randn(2, 3, 8, 8)
        for follow in (bmrs.compact, bmrs.suggest):
            with pytest.raises(
                ValueError, match=r"cannot see into TorchScript: layer '1' is a Recursive\w+\. Give it"
            ):
                follow(model, x)

    def test_noise_goes_elsewhere_and_can_be_folded(self):
        model = self.partly()
        with pytest.raises(ValueError, match=r"layer '1\.1' .* is TorchScript, .* before torch\.jit\.script"):
            bmrs.add_noise(model, where="1.1", num_structures=6, dim=1)
        bmrs.add_noise(model, where="0")
        prune_structures(noise_layers(model)["0.noise"], [1, 5])
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(bmrs.fold(model)(x), model(x))

    def test_a_network_of_nothing_else_has_no_places(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
        with pytest.raises(ValueError, match=r"the model is a .*Module"):
            bmrs.suggest(traced, torch.randn(2, 3))

    def test_a_compacted_network_of_the_users_class_can_be_scripted(self):
        model = randomise(noisy_residual()).eval()
        model.first.compile(backend="eager")
        compacted = bmrs.compact(model, IMAGES)
        assert type(compacted) is Residual
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            scripted = torch.jit.script(compacted)
        torch.testing.assert_close(scripted(IMAGES), compacted(IMAGES))


def test_model_without_tensors_to_compare_is_refused():
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 12)

        def forward(self, x):
            self.a(x)
            return (3,)

    with pytest.raises(ValueError, match=r"\(Silent\) returns no tensor on example_inputs"):
        bmrs.compact(half(bmrs.add_noise(Silent(), where="a")), torch.randn(4, 6))
