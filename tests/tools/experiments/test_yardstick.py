"""The networks of the literature: their sizes are counted as it counts, and what is compacted is what is counted."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

import bmrs
from benchmarks.experiments.deadline import Deadline
from benchmarks.experiments.yardstick import command, networks, table
from benchmarks.experiments.yardstick.networks import Name, Takes
from benchmarks.records import RESULTS
from bmrs.compaction.costs import flops, num_parameters
from bmrs.data import Dataset, TensorSplit

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


def test_runs_are_told_apart_by_all_settings_and_older_rows_have_the_defaults():
    def runs(*options):
        arguments = ["--data-dir", "somewhere", "--output", "elsewhere", *options]
        return command.Runs("lenet5-caffe", 3, command._parsed(arguments), Deadline())

    settings = runs().settings(10.0, 5e-3, 1e-3, 0.5)
    older = {name: value for name, value in settings.items() if name not in table.DEFAULTS}
    assert command._key(older) == runs().key(10.0, 5e-3, 1e-3, 0.5)
    for options in (["--moves", "2"], ["--fine-tune-lr", "1"], ["--fine-tune-epochs", "1"]):
        assert runs(*options).key(10.0, 5e-3, 1e-3, 0.5) != command._key(older)


def test_moved_images_are_the_same_ones_elsewhere_with_a_black_margin():
    images = torch.full((64, 1, 5, 5), -0.4)
    images[:, :, 2, 2] = 2.0
    split = command._moved(TensorSplit(images, torch.arange(64)), 1, seed=0)
    (one, labels), (other, _) = (next(split.batches([torch.arange(64)])) for _ in range(2))
    assert torch.equal(labels, torch.arange(64))
    assert not torch.equal(one, other)
    for moved in (one, other):
        assert ((moved == 2.0).sum(dim=(1, 2, 3)) == 1).all()
        assert moved.min() == -0.4
        assert (moved[:, :, [0, 4]] < 0).all()
        assert (moved[:, :, 1:4, 1:4] > 0).any(dim=0).all()


@pytest.mark.slow
def test_a_run_is_the_recipe_by_library_calls(tmp_path):
    labels = torch.arange(512) % 10
    images = torch.randn(512, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images[torch.arange(512), 0, 2 * labels + 4] += 2  # a line for each class
    split = TensorSplit(images, labels)
    arguments = f"--data-dir {tmp_path} --output {tmp_path} --epochs 3 --fine-tune-epochs 3 --moves 1"
    options = command._parsed(arguments.split())
    runs = command.Runs("lenet-300-100", 0, options, Deadline())
    runs.data = Dataset("mnist", 10, split, split, split, image_size=28)
    row = runs.row(0.1, 0.5, 0.0, 0.5)
    assert tuple(networks.takes("lenet-300-100", row["widths"])) == (row["parameters"], row["flops"])
    assert row["moves"] == 1
    assert row["fine_tune_lr"] == 1.5e-3
    assert row["error"] < 50
    assert (tmp_path / "lenet-300-100-0-3.safetensors").exists()


def test_a_feature_that_is_read_keeps_its_place():
    picked = networks.Picked(torch.tensor([0, 3]))
    assert picked(torch.arange(8.0).reshape(2, 4)).tolist() == [[0, 3], [4, 7]]
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        network[1].weight[:, 1:3] = 0
    assert networks.architecture(networks.without_unread_features(network)) == (2,)
