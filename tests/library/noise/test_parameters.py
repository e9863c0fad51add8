"""Parameter groups keep weight decay off the noise."""

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
