"""The networks of the literature: their sizes are counted as it counts, and what is compacted is what is counted."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

import bmrs
from benchmarks.experiments.yardstick import networks, table
from benchmarks.experiments.yardstick.networks import Name, Takes
from benchmarks.records import RESULTS
from bmrs.compaction.costs import flops, num_parameters

NETWORKS = get_args(Name)


@pytest.mark.parametrize(
    ("name", "widths", "parameters"),
    [
        ("lenet5-caffe", (20, 50, 800, 500), 431_080),
        ("lenet5-caffe", (3, 18, 284, 283), 84_941),
        ("lenet5-caffe", (8, 15, 163, 81), 17_327),
        ("lenet5-caffe", (8, 13, 88, 13), 4_118),
        ("lenet5-caffe", (5, 10, 76, 16), 2_792),
        ("lenet5-caffe", (7, 13, 208, 16), 5_984),
        ("lenet-300-100", (245, 160, 55), 48_775),
        ("lenet-300-100", (97, 71, 33), 9_674),
    ],
)
def test_parameters_are_counted_as_published(name, widths, parameters):
    assert networks.takes(name, widths).parameters == parameters


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_takes_what_is_counted_and_does_what_the_masked_one_does(name):
    torch.manual_seed(0)
    dense = networks.build(name)
    assert networks.takes(name, networks.architecture(dense)) == Takes(
        num_parameters(dense), flops(dense, torch.zeros(1, 1, 28, 28))
    )
    noisy = networks.with_noise(dense).eval()
    for layer in noisy:
        if isinstance(layer, bmrs.NoiseLayer):
            layer.set_kept(torch.rand(layer.num_structures) < 0.3)
    images = torch.randn(4, 1, 28, 28)
    small = bmrs.compact(noisy, images)
    small = networks.without_unread_features(small)
    torch.testing.assert_close(small(images), noisy(images), atol=1e-5, rtol=1e-4)
    widths = networks.architecture(small)
    kept = [int(layer.mask.sum()) for layer in noisy if isinstance(layer, bmrs.NoiseLayer)]
    if name == "lenet-300-100":
        assert list(widths) == kept
    else:
        assert (*widths[:2], widths[3]) == (*kept[:2], kept[3])
        assert widths[2] <= kept[2]
    assert networks.takes(name, widths).parameters == num_parameters(small)


@pytest.mark.parametrize("name", NETWORKS)
def test_prices_are_factors_of_mean_1_and_filters_are_dearest(name):
    dense = networks.build(name)
    noisy = networks.with_noise(dense)
    prices = networks.prices(name, dense, noisy, exponent=0.5)
    layers = {key: layer for key, layer in noisy.named_modules() if isinstance(layer, bmrs.NoiseLayer)}
    structures = [layer.num_structures for layer in layers.values()]
    assert sum(
        price * count for price, count in zip(prices.values(), structures, strict=True)
    ) == pytest.approx(sum(structures))
    if name == "lenet5-caffe":
        assert min(list(prices.values())[:2]) > max(list(prices.values())[2:])
    assert set(networks.prices(name, dense, noisy, exponent=0).values()) == {1.0}


def test_the_front_is_of_those_that_none_beats():
    better = table.Entry("a", "", (), Takes(10, 10), 1.0, ours=True)
    worse = table.Entry("b", "", (), Takes(10, 20), 1.0, ours=False)
    other = table.Entry("c", "", (), Takes(5, 30), 2.0, ours=False)
    every = [better, worse, other]
    assert [table.is_on_front(entry, every) for entry in every] == [True, False, True]


def test_committed_networks_take_what_their_rows_say():
    rows = table.load(RESULTS)
    assert rows
    for row in rows:
        if not row["emptied"]:
            assert tuple(networks.takes(row["network"], row["widths"])) == (row["parameters"], row["flops"])
    assert "**this recipe**" in table.readme(RESULTS)


def test_a_feature_that_is_read_keeps_its_place():
    picked = networks.Picked(torch.tensor([0, 3]))
    assert picked(torch.arange(8.0).reshape(2, 4)).tolist() == [[0, 3], [4, 7]]
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        network[1].weight[:, 1:3] = 0
    assert networks.architecture(networks.without_unread_features(network)) == (2,)
