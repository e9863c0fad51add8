"""What a cost model says a network of some widths takes is what compaction of one of those widths reports."""

import copy

import numpy as np
import pytest
import torch
from residual_cases import BasicBlock
from torch import nn
from torch.nn import functional as F

import bmrs
from bmrs.compaction.cost_model import make_cost_model
from bmrs.graph.masked_graph import MaskedGraph
from bmrs.noise.lookup import noise_layers


class Attention(nn.Module):
    """Attention of eight query heads, of which each two share keys and values, with its feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(12, 24), nn.Linear(12, 24, bias=False)
        self.out, self.norm = nn.Linear(24, 12), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, -1, 3).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, -1, 3).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        scores = torch.softmax(q @ k.transpose(2, 3) / 3**0.5, dim=-1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Joined(nn.Module):
    """Two branches side by side, and a bottleneck that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.joint, self.last = nn.Conv2d(9, 6, 1, bias=False), nn.Conv2d(6, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(torch.cat([self.first(x), self.second(x)], dim=1))
        return self.last(torch.relu(self.joint(x)))


def chain() -> nn.Module:
    """Convolutions without biases behind noise in front of batch norms: what leaves is a constant."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 16, 7, bias=False),
        nn.Tanh(),
        nn.Linear(7, 3),
    )


def separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 4, 1),
    )


class Recurrent(nn.Module):
    """A recurrent layer, whose input can lose channels."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.recurrent, self.out = (
            nn.Linear(12, 8),
            nn.GRU(8, 4, batch_first=True),
            nn.Linear(4, 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.recurrent(torch.relu(self.into(x)))[0])


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(12, 3, 1),
    )


def normalised() -> nn.Module:
    """Statistics of pairs of channels, which leave together."""
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 3, 1))


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), BasicBlock(6, 6), BasicBlock(6, 8, 2)
    )


IMAGE, SEQUENCE = (2, 8, 8), (5, 12)
CASES = {
    "chain": (chain, IMAGE, [{"where": lambda name, _: name in ("0", "3", "6")}], 3),
    "residual": (residual, IMAGE, [{"where": nn.BatchNorm2d}], 3),
    "depthwise": (separable, IMAGE, [{"where": nn.BatchNorm2d}], 1),
    "grouped": (grouped, IMAGE, [{"where": lambda name, _: name in ("0", "2")}], 2),
    "recurrent": (Recurrent, SEQUENCE, [{"where": "into"}], 1),
    "group norm": (normalised, IMAGE, [{"where": nn.GroupNorm}], 1),
    "concatenation": (Joined, IMAGE, [{"where": lambda name, _: name in ("first", "second", "joint")}], 3),
    "grouped query": (
        Attention,
        SEQUENCE,
        [{"where": "out", "structures": "heads", "num_heads": 8}, {"where": "up"}],
        2,
    ),
}


def without(model: nn.Module, units) -> nn.Module:
    pruned = copy.deepcopy(model)
    layers = noise_layers(pruned)
    for unit in units:
        for layer, structure in unit.structures:
            layers[layer].mask[structure] = False
    return pruned


@pytest.mark.parametrize("case", CASES)
def test_costs_are_those_of_compaction(case):
    build, shape, noise, at_least = CASES[case]
    torch.manual_seed(0)
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    for places in noise:
        bmrs.add_noise(model, **places)
    layers = noise_layers(model)
    first = next(iter(layers.values()))
    first.mask[1] = False  # something is pruned already
    x = torch.randn(1, *shape)
    inputs = ((x,), {})
    order = np.random.default_rng(0)
    with torch.no_grad():
        graph = MaskedGraph(model, inputs, "test")
        costs = make_cost_model(
            graph, inputs, {n: layer.mask for n, layer in layers.items()}, lambda us: order.random(len(us))
        )
    most = [len(units) for units in costs.units]
    assert len(most) >= at_least
    report = None
    for pruned in ([0] * len(most), [(n + 1) // 2 for n in most], most):
        units = [
            unit for its_units, number in zip(costs.units, pruned, strict=True) for unit in its_units[:number]
        ]
        report = bmrs.compact_report(bmrs.compact(without(model, units), x))
        found = costs.cost(pruned)
        assert (found.parameters, found.flops) == (report.parameters_after, report.flops_after)
        assert report.removed >= sum(len(unit.structures) for unit in units)
    assert (costs.dense.parameters, costs.dense.flops) == (report.parameters_before, report.flops_before)
    assert report.parameters_after < report.parameters_before
