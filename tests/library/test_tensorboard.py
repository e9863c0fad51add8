"""What is written for TensorBoard, read back from its files."""

import math

import pytest
import torch
from torch import nn

import bmrs
import bmrs_kernels
from bmrs.tensorboard import write_noise

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags["scalars"]}
    return scalars, {
        tag: {e.step: e.histogram_value for e in events.Histograms(tag)} for tag in tags["histograms"]
    }


def model():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), bmrs.NoiseLayer(6), nn.Linear(6, 4), nn.Linear(4, 2))
    bmrs.add_noise(network, where="3", lower=-10.0)
    for layer in (network[2], network[3].noise):
        nn.init.normal_(layer.mu, -3.0, 2.0)
    network[2].set_kept(torch.tensor([True, True, False, True, False, True]))
    return network


def test_histograms_and_numbers_are_those_of_the_structures_that_are_kept(tmp_path):
    network = model()
    with SummaryWriter(tmp_path) as writer:
        write_noise(writer, network, step=3)
        network[3].noise.set_kept(torch.zeros(4, dtype=torch.bool))
        write_noise(writer, network, step=5, kl=0.25)
    scalars, histograms = read(tmp_path)
    assert scalars["bmrs/kept"] == {3: 8, 5: 4}
    assert scalars["bmrs/kept/2"] == {3: 4, 5: 4}
    assert scalars["bmrs/kept/3.noise"] == {3: 4, 5: 0}
    assert scalars["bmrs/compression"] == {3: pytest.approx(20.0), 5: pytest.approx(60.0)}
    expected = bmrs.kl_divergence(model(), weight=1.0).item()
    assert scalars["bmrs/kl"] == {3: pytest.approx(expected), 5: 0.25}

    assert {tag: list(steps) for tag, steps in histograms.items()} == {
        "bmrs/expected_noise/2": [3, 5],
        "bmrs/delta_f/2": [3, 5],
        "bmrs/expected_noise/3.noise": [3],  # nothing was kept at 5
        "bmrs/delta_f/3.noise": [3],
    }
    layer = network[2]
    for tag, function in {
        "expected_noise": bmrs_kernels.noise_mean,
        "delta_f": bmrs_kernels.delta_f_lognormal,
    }.items():
        values = function(layer.mu, layer.log_sigma)[layer.kept]
        found = histograms[f"bmrs/{tag}/2"][3]
        assert found.num == 4
        assert [found.min, found.max, found.sum] == pytest.approx(
            [values.min().item(), values.max().item(), values.sum().item()], rel=1e-6
        )
    # The bounds of the layer count: E[θ] is above exp(lower).
    assert histograms["bmrs/expected_noise/3.noise"][3].min > math.exp(-10)


def test_processes_without_a_writer_take_part():
    write_noise(None, model(), step=0)


def test_a_model_without_noise_is_named():
    with pytest.raises(ValueError, match="has no noise layer"):
        write_noise(None, nn.Linear(2, 2), step=0)
