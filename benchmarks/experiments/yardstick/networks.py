"""The two networks, with noise and without, and what they take by the literature's count."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import bmrs

Name: TypeAlias = Literal["lenet5-caffe", "lenet-300-100"]


def build(name: Name) -> nn.Sequential:
    """Return the untrained network for images of shape (N, 1, 28, 28)."""
    if name == "lenet-300-100":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


class Picked(nn.Module):
    """Some features of a flat input: what is left of it when the layer behind reads no others.

    Args:
        indices: of the features, in rising order.
    """

    indices: Tensor

    def __init__(self, indices: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, of shape (N, len(indices))."""
        return x.index_select(1, self.indices)


def with_noise(network: nn.Sequential) -> nn.Sequential:
    """Return a copy with noise on every filter and neuron, and on every feature behind the flattening."""
    layers: list[nn.Module] = []
    width = 0
    for layer in copy.deepcopy(network):
        layers.append(layer)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            width = len(layer.weight)
        elif isinstance(layer, nn.ReLU):
            layers.append(bmrs.NoiseLayer(width, granularity="sample"))
        elif isinstance(layer, nn.Flatten):
            layers.append(bmrs.NoiseLayer(features_of(network), granularity="sample"))
    return nn.Sequential(*layers)


def features_of(network: nn.Sequential) -> int:
    """Return the number of features that the first linear layer reads."""
    return next(layer.in_features for layer in network if isinstance(layer, nn.Linear))


def without_unread_features(network: nn.Sequential) -> nn.Sequential:
    """Return a copy whose first linear layer reads only the features that have weights other than zero."""
    layers: list[nn.Module] = []
    first = True
    for layer in copy.deepcopy(network):
        if isinstance(layer, nn.Linear) and first:
            first = False
            read = layer.weight.detach().any(dim=0).nonzero().flatten()
            layers.append(Picked(read))
            smaller = nn.Linear(len(read), layer.out_features)
            smaller.load_state_dict({"weight": layer.weight.detach()[:, read], "bias": layer.bias.detach()})
            layers.append(smaller)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def architecture(network: nn.Sequential) -> tuple[int, ...]:
    """Return the widths as the literature writes them: filters, features read by the first linear layer, neurons."""
    widths = []
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            widths.append(layer.out_channels)
        elif isinstance(layer, nn.Linear):
            widths.append(layer.in_features)
    return tuple(widths)


class Takes(NamedTuple):
    """What a network takes: trainable values, and operations for one image, two for a multiply-add."""

    parameters: int
    flops: int


def takes(name: Name, widths: Sequence[int]) -> Takes:
    """Return what a network of these widths takes, written as `architecture` does.

    Args:
        name: the network that it was.
        widths: filters of both convolutions, features and hidden neurons; or features and neurons of both layers.
    """
    if name == "lenet-300-100":
        linear, parameters, flops = [*widths, 10], 0, 0
    else:
        first, second, *linear = [*widths, 10]
        parameters = first * (25 + 1) + second * (25 * first + 1)
        flops = 2 * 25 * (first * 24 * 24 + second * first * 8 * 8)
    for inputs, outputs in pairwise(linear):
        parameters += outputs * (inputs + 1)
        flops += 2 * outputs * inputs
    return Takes(parameters, flops)


class Published(NamedTuple):
    """A result of the literature.

    Attributes:
        method: its name.
        source: arXiv number or place.
        widths: as `architecture` writes them.
        error: on the test images, in percent.
    """

    method: str
    source: str
    widths: tuple[int, ...]
    error: float


PUBLISHED: dict[Name, tuple[Published, ...]] = {
    "lenet5-caffe": (
        Published("generalized dropout", "1611.06791", (7, 13, 208, 16), 1.1),
        Published("structured Bayesian pruning", "1705.07283", (3, 18, 284, 283), 0.9),
        Published("the same, in PyTorch", "github.com/gaosh", (8, 15, 163, 81), 1.17),
        Published("Bayesian compression, GNJ", "1705.08665", (8, 13, 88, 13), 1.0),
        Published("Bayesian compression, GHS", "1705.08665", (5, 10, 76, 16), 1.0),
        Published("L0", "1712.01312", (20, 25, 45, 462), 0.9),
        Published("L0, a weight for each layer", "1712.01312", (9, 18, 65, 25), 1.0),
    ),
    # As in Table 2 of arXiv 1911.11134.
    "lenet-300-100": (
        Published("structured Bayesian pruning", "1705.07283", (245, 160, 55), 1.6),
        Published("L0, a weight for each layer", "1712.01312", (266, 88, 33), 1.6),
        Published("variational information bottleneck", "1802.10399", (97, 71, 33), 1.6),
    ),
}


@torch.no_grad()
def prices(name: Name, network: nn.Sequential, noisy: nn.Sequential, *, exponent: float) -> dict[str, float]:
    """Return factors on the temperature, by noise layer: what one of its structures takes, to a power.

    As `bmrs.structure_prices`, but with the features that leave here and stay where `bmrs.compact` alone is asked.

    Args:
        name: the network's name.
        network: without noise.
        noisy: what `with_noise` made of it.
        exponent: 0 has all structures pay alike.
    """
    widths = list(architecture(network))
    full = takes(name, widths)
    layers = {key: layer for key, layer in noisy.named_modules() if isinstance(layer, bmrs.NoiseLayer)}
    share = {}
    for place, key in enumerate(layers):
        fewer = list(widths)
        fewer[place] -= 1
        if name == "lenet5-caffe" and place == 1:
            fewer[2] -= widths[2] // widths[1]  # a filter takes its features along
        less = takes(name, fewer)
        saved = [(before - after) / before for before, after in zip(full, less, strict=True)]
        share[key] = (sum(saved) / len(saved)) ** exponent
    structures = {key: layer.num_structures for key, layer in layers.items()}
    mean = sum(share[key] * structures[key] for key in layers) / sum(structures.values())
    return {key: value / mean for key, value in share.items()}
