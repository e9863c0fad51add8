"""A model whose noise was looked through once: what changes afterwards is noticed all the same."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import bmrs
from bmrs.noise import lookup
from bmrs.noise.lookup import noise_layers, required_noise_layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.spare = nn.Sequential()

    def forward(self, x):
        return self.spare(self.second(self.first(x)))


@pytest.fixture
def model():
    model = bmrs.add_noise(nn.Sequential(Block(), nn.Linear(4, 2)), where=["0.first.0", "0.second.0"])
    # Once more, so that what follows meets what is remembered.
    assert list(required_noise_layers(model)) == list(required_noise_layers(model)) == NAMES
    return model


NAMES = ["0.first.0.noise", "0.second.0.noise"]


@pytest.fixture
def looked(monkeypatch):
    """Models that were looked through in full."""
    seen = []
    original = lookup.check_noise_acts
    monkeypatch.setattr(lookup, "check_noise_acts", lambda model: seen.append(model) or original(model))
    return seen


def replace_layer(model):
    model[0].first[0] = nn.Linear(4, 4)


def clear_hooks(model):
    model[0].first[0]._forward_hooks.clear()


def fold_normalisation(model):
    model[0].second[1] = nn.Identity()


def keep_what_compat_left(model):
    layer = nn.Linear(4, 4)
    layer.__class__ = type("Waiting", (nn.Linear,), {"needs_upgrade": True})
    model[0].spare.append(layer)


def move_to_another_parent(model):
    layer = model[0].second[0]
    del model[0].second[0]
    model[0].spare.append(layer)


def rename(model):
    model[0].third = model[0].second
    del model[0].second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_to_another_parent, "the noise '0.second.0.noise' is gone"),
        (rename, "the noise '0.second.0.noise' is gone"),
        (replace_layer, "the noise '0.first.0.noise' is gone"),
        (clear_hooks, "the noise of '0.first.0' does not act any more"),
        (fold_normalisation, "the batch normalisation '0.second.1' is gone"),
        (keep_what_compat_left, "the noise of '0.spare.0' is that of bmrs.compat"),
    ],
)
def test_what_goes_wrong_later_is_noticed(model, change, message):
    change(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            bmrs.kl_divergence(model, weight="mean")


def test_nothing_is_looked_through_twice(model, looked):
    for _ in range(3):
        bmrs.kl_divergence(model, weight="mean").backward()
        model(torch.randn(3, 4)).sum().backward()
    model.eval()
    bmrs.prune(model, bmrs.BMRSNormal())
    bmrs.kl_divergence(model, weight=1.0)
    assert looked == []


def append_noise(model):
    model.append(bmrs.NoiseLayer(2))


def share(model):
    model[0].again = model[0].first


def parametrize(model):
    parametrizations.weight_norm(model[0].first[0])


def forget(model):
    replace_layer(model)
    bmrs.restore_noise(model)


def put_into_another(model):
    inner = model[0]
    model[0] = nn.Sequential(inner)


@pytest.mark.parametrize("change", [append_noise, share, parametrize, forget, put_into_another])
def test_what_changes_rightly_is_looked_through_anew(model, change, looked):
    change(model)
    found = required_noise_layers(model)
    assert looked == [model]
    assert found == noise_layers(model)
    assert required_noise_layers(model) == found
    assert looked == [model]


def test_other_models_are_looked_through_themselves(model, looked):
    twin = copy.deepcopy(model)
    clear_hooks(twin)
    with pytest.raises(ValueError, match="does not act any more"):
        required_noise_layers(twin)
    assert list(required_noise_layers(model)) == NAMES
    assert looked == [twin]
    # A part of it goes by other names.
    assert list(required_noise_layers(model[0])) == ["first.0.noise", "second.0.noise"]


def test_which_child_is_none_counts():
    model = nn.Module()
    for name, child in (("a", None), ("b", nn.Linear(2, 2)), ("c", nn.Linear(2, 2))):
        model.register_module(name, child)
    bmrs.add_noise(model, where=["b", "c"])
    assert list(required_noise_layers(model)) == ["b.noise", "c.noise"]
    model._modules["a"], model._modules["b"] = model._modules["b"], None
    with pytest.raises(ValueError, match=r"the noise 'b\.noise' is gone"):
        required_noise_layers(model)


def test_what_is_remembered_keeps_no_model():
    alone = bmrs.add_noise(nn.Sequential(nn.Linear(3, 3)), where="0")
    required_noise_layers(alone)
    gone = weakref.ref(alone), weakref.ref(alone[0].noise)
    del alone
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_wrapped_models_are_known_by_what_is_inside(model, looked):
    compiled = torch.compile(model, backend="eager")
    assert list(required_noise_layers(compiled)) == NAMES
    assert looked == []


def test_the_mean_is_over_layers_whatever_their_sizes():
    sizes = (3, 5, 3, 2, 5)
    model = nn.Sequential(*(bmrs.NoiseLayer(size) for size in sizes)).double()
    for number, layer in enumerate(model):
        nn.init.constant_(layer.mu, -1.0 - number)
    one_by_one = [bmrs.kl_divergence(layer, weight="mean") for layer in model]
    torch.testing.assert_close(bmrs.kl_divergence(model, weight="mean"), sum(one_by_one) / len(sizes))
    weights = {str(number): float(number) for number in range(len(sizes))}
    sums = [bmrs.kl_divergence(layer, weight=float(number)) for number, layer in enumerate(model)]
    torch.testing.assert_close(bmrs.kl_divergence(model, weight=weights), sum(sums))
