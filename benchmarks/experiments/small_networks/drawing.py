"""Test accuracy of a trained network with E[θ] in place of its noise, and with θ drawn as in training.

Behind max pooling the two differ: the largest of values that were each multiplied by a draw of its own is larger than
E[θ] times the largest value, and the layers behind have learned what to make of the former.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from benchmarks.experiments.small_networks.trunk import Row, Trunk
from bmrs.data import Dataset
from bmrs.data.split import Split
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers
from bmrs.training.evaluation import accuracy

DRAWS = 20
_BATCH = 1000


def drawn(trunk: Trunk, data: Dataset) -> Row:
    """Return test accuracies of a finished network in percent, by what stands for θ."""
    model = trunk.load(data)
    layers = noise_layers(model)
    maps = _over_feature_maps(model, layers, data.test.examples(1))
    few = {"mean": accuracy(model, data.test)}
    for name, which, draws in (
        ("one_draw", layers, 1),
        ("draws", layers, DRAWS),
        ("draws_over_feature_maps", maps, DRAWS),
        ("draws_elsewhere", set(layers) - maps, DRAWS),
    ):
        few[name] = accuracy_of_draws(model, data.test, which, draws, trunk.subject.seed)
    rounded = {name: round(100 * value, 2) for name, value in few.items()}
    return {**trunk.subject._asdict(), "settings": trunk.config.settings._asdict(), "accuracy": rounded}


@torch.no_grad()
def accuracy_of_draws(
    model: nn.Module, split: Split, drawn_layers: Collection[str], draws: int, seed: int
) -> float:
    """Return the share of images classified rightly by the mean of their classes' probabilities.

    Args:
        model: a network with noise; all but these layers is in evaluation mode.
        split: the images.
        drawn_layers: names of the noise layers that draw θ.
        draws: how many.
        seed: of the draws.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    for name, layer in noise_layers(model).items():
        layer.train(name in drawn_layers)
        layer.generator = generator
    right = 0
    for batch in split.in_order(_BATCH):
        mean = torch.stack([model(batch.images).softmax(dim=1) for _ in range(draws)]).mean(dim=0)
        right += int((mean.argmax(dim=1) == batch.labels).sum())
    model.eval()
    return right / len(split)


def _over_feature_maps(model: nn.Module, layers: dict[str, NoiseLayer], example: Tensor) -> set[str]:
    found: set[str] = set()
    handles = [
        layer.register_forward_hook(
            lambda module, args, output, name=name: found.add(name) if output.dim() > 2 else None
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return found
