import copy
import math

import pytest
import torch
from residual_cases import BasicBlock
from torch import nn

import bmrs
from bmrs.noise.lookup import noise_layers

IMAGE = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def lenet() -> nn.Module:
    return bmrs.models.LeNet5()


def test_costs_are_what_the_layers_of_a_structure_take(lenet):
    before = copy.deepcopy(lenet.state_dict())
    costs = bmrs.structure_costs(lenet, IMAGE)
    assert list(costs) == list(noise_layers(lenet))
    assert costs["conv1_relu"] == bmrs.StructureCost(25 + 1 + 25 * 16, 2 * (25 * 784 + 25 * 16 * 100))
    assert costs["conv2_relu"] == bmrs.StructureCost(25 * 6 + 1 + 25 * 120, 2 * (25 * 6 * 100 + 25 * 120))
    assert costs["hidden1_relu"] == bmrs.StructureCost(400 + 1 + 84, 2 * (400 + 84))
    assert costs["hidden2_relu"] == bmrs.StructureCost(120 + 1 + 10, 2 * (120 + 10))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lenet.state_dict().items())
    assert lenet.training


def test_costs_follow_what_is_pruned_already(lenet):
    lenet.hidden1_relu.mask[20:] = False
    costs = bmrs.structure_costs(lenet, IMAGE)
    assert costs["hidden2_relu"].parameters == 20 + 1 + 10
    lenet.conv1_relu.mask[1:] = False
    assert bmrs.structure_costs(lenet, IMAGE)["conv1_relu"] == bmrs.StructureCost(0, 0)  # the last one stays


def test_tied_structures_share_what_they_save():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
    model = nn.Sequential(stem, BasicBlock(6, 6), nn.Conv2d(6, 2, 1))
    bmrs.add_noise(model, where=nn.BatchNorm2d)
    images = torch.randn(2, 3, 8, 8)
    costs = bmrs.structure_costs(model, images)
    assert all(cost.parameters > 0 and cost.flops > 0 for cost in costs.values())
    tied = ["0.1.noise", "1.bn2.noise"]
    assert len({costs[name] for name in tied}) == 1
    together = copy.deepcopy(model)
    for name in tied:
        noise_layers(together)[name].mask[-1] = False
    whole, less = (bmrs.compact_report(bmrs.compact(each, images)) for each in (model, together))
    assert less.removed == 2
    assert 2 * costs[tied[0]].parameters == pytest.approx(whole.parameters_after - less.parameters_after)
    assert 2 * 2 * costs[tied[0]].flops == pytest.approx(whole.flops_after - less.flops_after)


def test_inputs_of_all_kinds():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(2, 4), nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.out(self.first(x) * self.second(y))

    model = bmrs.add_noise(Added(), where="first")
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    saved = bmrs.StructureCost(2 + 3 + 2 + 1, 2 * (2 + 3 + 1))
    assert bmrs.structure_costs(model, (x, y)) == {"first.noise": saved}
    assert bmrs.structure_costs(model, {"y": y, "x": x}) == {"first.noise": saved}
    assert bmrs.structure_prices(model, {"y": y, "x": x}) == {"first.noise": 1.0}


def test_prices_are_powers_of_the_share_with_mean_one(lenet):
    layers = noise_layers(lenet)
    total = sum(layer.num_structures for layer in layers.values())
    costs = bmrs.structure_costs(lenet, IMAGE)
    shares = {n: (c.parameters / 61706 + c.flops / 833040) / 2 for n, c in costs.items()}
    for exponent in (0.0, 0.5, 1.0):
        prices = bmrs.structure_prices(lenet, IMAGE, exponent=exponent)
        spent = sum(prices[name] * layer.num_structures for name, layer in layers.items())
        assert spent == pytest.approx(total)
        if exponent == 0:
            assert set(prices.values()) == {1.0}
            continue
        ratio = (shares["conv1_relu"] / shares["hidden2_relu"]) ** exponent
        assert prices["conv1_relu"] / prices["hidden2_relu"] == pytest.approx(ratio)
        assert prices["conv1_relu"] > prices["conv2_relu"] > prices["hidden1_relu"] > prices["hidden2_relu"]


def test_structures_that_save_nothing_cost_next_to_nothing():
    model = nn.Sequential(nn.Linear(4, 6), bmrs.NoiseLayer(6), nn.Linear(6, 3), bmrs.NoiseLayer(3))
    prices = bmrs.structure_prices(model, torch.randn(2, 4))
    assert prices["3"] == 1e-3
    assert prices["1"] > 1
    alone = nn.Sequential(nn.Linear(4, 3), bmrs.NoiseLayer(3))
    assert bmrs.structure_prices(alone, torch.randn(2, 4)) == {"1": 1.0}


@pytest.mark.parametrize("exponent", [-1.0, math.inf, math.nan])
def test_a_bad_exponent_is_named(lenet, exponent):
    with pytest.raises(ValueError, match="exponent must be finite and at least 0"):
        bmrs.structure_prices(lenet, IMAGE, exponent=exponent)
