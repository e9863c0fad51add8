"""Calls for a whole model: a fixed number, however many layers it has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bmrs


class Calls(TorchDispatchMode):
    """Counts the package's operators by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "bmrs_kernels":
            self.names.append(function._schema.name.removeprefix("bmrs_kernels::"))
        return function(*args, **(kwargs or {}))


def model_of(depth):
    layers = [(nn.Linear(8 + i, 9 + i), nn.ReLU(), bmrs.NoiseLayer(9 + i)) for i in range(depth)]
    return nn.Sequential(*(module for layer in layers for module in layer))


@pytest.mark.parametrize("depth", [1, 3, 53])
def test_kl_divergence(depth):
    model = model_of(depth)
    with Calls() as calls:
        bmrs.kl_divergence(model, weight="mean").backward()
    assert sorted(calls.names) == ["kl_divergence", "multiply_derivatives"]


@pytest.mark.parametrize(
    ("criterion", "operator"),
    [
        (bmrs.BMRSNormal(), "delta_f_lognormal"),
        (bmrs.BMRSUniform(), "delta_f_loguniform"),
        (bmrs.SNR(), "noise_snr"),
        (bmrs.Mean(), "noise_mean"),
    ],
)
@pytest.mark.parametrize("depth", [1, 53])
def test_prune(depth, criterion, operator):
    with torch.no_grad(), Calls() as calls:
        bmrs.prune(model_of(depth), criterion)
    assert calls.names == [operator]


def test_pruning_waits_for_the_device_as_often_for_many_layers_as_for_one(monkeypatch):
    transfers = []
    cpu = torch.Tensor.cpu

    def counted(tensor):
        transfers.append(tensor)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    numbers = []
    for depth in (1, 53):
        model = model_of(depth)
        transfers.clear()
        bmrs.prune(model, bmrs.BMRSNormal())
        numbers.append(len(transfers))
    assert numbers[0] == numbers[1] <= 4
