"""Parameter groups keep weight decay off the noise."""

import warnings

import pytest
import torch
from torch import nn

import bmrs


def noisy():
    return bmrs.add_noise(
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), where="0", initial_mu=-4.0
    )


def test_weight_decay_reaches_the_weights_and_not_the_noise():
    model = noisy()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(bmrs.parameter_groups(model, lr=0.01, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(50):
        optimizer.step()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (".noise." in name), name


def test_groups_hold_every_trained_parameter_once_at_its_rate():
    model = noisy()
    model[2].weight.requires_grad_(False)
    weights, noise = bmrs.parameter_groups(model, lr=0.1, weight_decay=0.01, noise_lr=0.5)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.01)
    assert (noise["lr"], noise["weight_decay"]) == (0.5, 0.0)
    assert {id(p) for p in noise["params"]} == {id(model[0].noise.mu), id(model[0].noise.log_sigma)}
    assert {id(p) for p in weights["params"]} == {id(model[0].weight), id(model[0].bias), id(model[2].bias)}
    assert bmrs.parameter_groups(model, lr=0.1)[1]["lr"] == 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0"),
        ({"lr": "1"}, TypeError, "lr must be a number"),
        ({"lr": 1.0, "weight_decay": -0.1}, ValueError, "weight_decay must be finite and at least 0"),
        ({"lr": 1.0, "noise_lr": float("nan")}, ValueError, "noise_lr must be finite and at least 0"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        bmrs.parameter_groups(noisy(), **options)


def test_a_model_without_noise_is_refused():
    with pytest.raises(ValueError, match="no noise layer"):
        bmrs.parameter_groups(nn.Linear(2, 2), lr=0.1)


class TestWarningOfWeightDecay:
    def model_and_optimizer(self, groups, **options):
        model = bmrs.add_noise(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), where="0")
        return model, torch.optim.AdamW(groups(model), lr=1e-3, **options)

    def step(self, model, optimizer):
        loss = model(torch.ones(2, 3)).square().mean() + bmrs.kl_divergence(model, weight=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def test_once_where_an_optimizer_applies_it_to_the_noise(self):
        model, optimizer = self.model_and_optimizer(lambda model: model.parameters(), weight_decay=0.1)
        self.step(model, optimizer)
        with pytest.warns(
            UserWarning, match=r"weight decay 0\.1 to the noise of '0\.noise'.*parameter_groups"
        ):
            self.step(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.step(model, optimizer)
            bmrs.prune(model, bmrs.SNR())

    @pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
    def test_in_a_loop_that_clears_gradients_before_the_loss(self, options):
        model, optimizer = self.model_and_optimizer(lambda m: m.parameters(), weight_decay=0.1, **options)

        def step():
            optimizer.zero_grad()
            (model(torch.ones(2, 3)).square().mean() + bmrs.kl_divergence(model, weight=1.0)).backward()
            optimizer.step()

        for _ in range(2):  # nothing has been trained yet
            bmrs.kl_divergence(model, weight=1.0)
        step()
        with pytest.warns(UserWarning, match=r"weight decay 0\.1 to the noise of '0\.noise'"):
            step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step()

    def test_before_pruning_where_gradients_are_cleared_in_each_step(self):
        model, optimizer = self.model_and_optimizer(lambda model: model.parameters(), weight_decay=0.1)
        self.step(model, optimizer)
        with pytest.warns(UserWarning, match=r"weight decay 0\.1"):
            bmrs.prune(model, bmrs.SNR())

    @pytest.mark.parametrize(
        ("groups", "decay"),
        [
            (lambda model: bmrs.parameter_groups(model, lr=1e-3, weight_decay=0.1), 0.1),
            (lambda model: model.parameters(), 0.0),
        ],
    )
    def test_not_where_none_reaches_the_noise(self, groups, decay):
        model, optimizer = self.model_and_optimizer(groups, weight_decay=decay)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                self.step(model, optimizer)
            bmrs.prune(model, bmrs.SNR())

    def test_where_it_reaches_one_of_several_layers(self):
        model = bmrs.add_noise(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), where=nn.Linear)
        groups = [{"params": model[0].parameters(), "weight_decay": 0.0}, {"params": model[1].parameters()}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
        self.step(model, optimizer)
        with pytest.warns(UserWarning, match=r"weight decay 0\.1 to the noise of '1\.noise'"):
            bmrs.prune(model, bmrs.SNR())

    def test_not_for_what_only_looks_like_a_group(self):
        model, optimizer = self.model_and_optimizer(lambda model: model.parameters(), weight_decay=0.0)
        mine = {"params": [model[0].noise.mu], "weight_decay": "0.1"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                self.step(model, optimizer)
        assert mine["params"]

    def test_noise_whose_tensors_are_computed_can_be_asked(self):
        model, _ = self.model_and_optimizer(lambda model: model.parameters())
        computed = {name: 1.0 * value for name, value in model.named_parameters()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.func.functional_call(
                Divergence(model), {f"model.{name}": v for name, v in computed.items()}, ()
            )


class Divergence(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return bmrs.kl_divergence(self.model, weight=1.0)


class Doubled(nn.Module):
    def forward(self, values):
        return 2.0 * values


def test_parametrized_noise_is_noise():
    model = bmrs.add_noise(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), where="0")
    nn.utils.parametrize.register_parametrization(model[0].noise, "mu", Doubled())
    _, noise = bmrs.parameter_groups(model, lr=1e-3, weight_decay=0.1)
    assert {id(parameter) for parameter in noise["params"]} == {id(p) for p in model[0].noise.parameters()}
