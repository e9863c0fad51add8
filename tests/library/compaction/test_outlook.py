import copy

import pytest
import torch
from residual_cases import BasicBlock
from torch import nn

import bmrs

IMAGES = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain():
    """What compaction does with convolutions in groups, a padded constant, group norm and an output; and the model."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)),
        nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.GroupNorm(4, 8), nn.Flatten()),
        nn.Sequential(nn.Linear(8 * 16, 5), nn.Tanh(), bmrs.NoiseLayer(5), nn.Tanh(), nn.Linear(5, 3)),
    )
    with torch.no_grad():
        model[0][1].bias.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    bmrs.add_noise(model, where=lambda name, _: name in ("0.0", "0.2", "1.1", "2.4"))
    before = copy.deepcopy(model.state_dict())
    outlook = bmrs.noise_outlook(model, IMAGES)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return {layer.name: layer for layer in outlook.layers}, outlook, model


def test_each_layer_says_how_many_structures_can_leave_and_why_others_cannot(plain):
    layers, outlook, _ = plain
    assert {name: (layer.structures, layer.removable) for name, layer in layers.items()} == {
        "0.0.noise": (4, 2),
        "0.2.noise": (4, 4),
        "1.1.noise": (8, 7),
        "2.2": (5, 5),
        "2.4.noise": (3, 0),
    }
    reason = "a constant other than 0 is left of it, beside the zeros of the padding at conv2d in layer '0.2'"
    assert layers["0.0.noise"].held_because == {reason: 2}
    assert "groups stay of equal size" in layers["0.2.noise"].not_singly
    assert "statistics" in layers["1.1.noise"].not_singly
    assert list(layers["2.4.noise"].held_because) == ["it is an output of the model at the model's output"]
    assert outlook.held == ("2.4.noise",)
    assert {name for name, layer in layers.items() if layer.factor_because} == {"2.2"}


def test_the_text_and_the_dict_have_it_all(plain):
    layers, outlook, _ = plain
    lines = str(outlook).splitlines()
    assert lines[1].split() == ["0.0.noise", "4", "2"]
    assert "2.4.noise: nothing can leave: it is an output of the model at the model's output" in lines
    factor = layers["2.2"].factor_because
    assert f"2.2: one multiplication by its factors will remain: {factor}" in lines
    assert outlook.to_dict()["held"] == ["2.4.noise"]
    assert [layer["name"] for layer in outlook.to_dict()["layers"]] == list(layers)


def test_it_is_what_compaction_then_does(plain):
    layers, _, model = plain
    pruned = copy.deepcopy(model)
    for layer in pruned.modules():
        if isinstance(layer, bmrs.NoiseLayer):
            layer.set_kept(torch.arange(layer.num_structures) == 0)
    for done in bmrs.compact_report(bmrs.compact(pruned, IMAGES)).layers:
        expected = layers[done.name]
        assert done.kept_because == expected.held_because
        assert done.removed == max(0, expected.removable - 1)
        assert done.folded == (not expected.factor_because)


def test_layers_that_are_added_name_each_other():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6))
    model = nn.Sequential(stem, BasicBlock(6, 6), nn.Conv2d(6, 2, 1))
    bmrs.add_noise(model, where=nn.BatchNorm2d)
    outlook = bmrs.noise_outlook(model, IMAGES)
    assert {layer.name: layer.together_with for layer in outlook.layers} == {
        "0.1.noise": ("1.bn2.noise",),
        "1.bn1.noise": (),
        "1.bn2.noise": ("0.1.noise",),
    }
    assert "0.1.noise: only what 1.bn2.noise prune too" in str(outlook)


def test_expectations_that_differ_later_cannot_share_a_weight():
    """Before training all layers have the same E[θ], so that one shared weight could take it up."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, bmrs.NoiseLayer(4), nn.Tanh(), shared, bmrs.NoiseLayer(4), nn.Tanh())
    model.append(nn.Linear(4, 2))
    outlook = bmrs.noise_outlook(model, torch.randn(2, 4))
    assert all("also used without this noise" in layer.factor_because for layer in outlook.layers)


def test_what_compaction_refuses_is_refused_with_the_place():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    model = bmrs.add_noise(Branches(), where="layer")
    with pytest.raises(
        ValueError, match=r"failed on Branches at line \d+ of .*test_outlook.py \(return self"
    ):
        bmrs.noise_outlook(model, torch.ones(2, 2))
    with pytest.raises(ValueError, match="no noise layer"):
        bmrs.noise_outlook(nn.Linear(2, 2), torch.ones(2, 2))
