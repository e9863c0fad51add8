"""Fine-tuning in recipe "bmrs": the network and the weights that it starts from, and what it ends as.

While it goes on, noise can go on learning: what decided about the structures was a posterior of few images, at a high
temperature; what is left is trained by the evidence bound itself, at temperature 1, which keeps small networks from
learning their images by heart, and learns a scale for each structure beside.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bmrs.compaction.compact import compact
from bmrs.data import Dataset
from bmrs.data.dataset import IMAGE_SIZE
from bmrs.noise.lookup import noise_layers
from bmrs.training.config import TrainConfig

EXAMPLES = 2000
"""Training images of 32 × 32 pixels that the compacted network is refitted on; of larger ones there are fewer."""

FEW_EXAMPLES = 8
"""Training images that compaction is tried on."""


_RIDGE_OF_START = 0.3


def start_of_fine_tuning(
    noisy: nn.Module,
    trained: nn.Module,
    pruned: nn.Module,
    config: TrainConfig,
    data: Dataset,
    *,
    temperature: float,
) -> tuple[nn.Module, str]:
    """Return the compacted network that fine-tuning starts from, and what is to be said about it.

    Args:
        noisy: the pruned network with its noise.
        trained: the network before there was noise.
        pruned: the compacted network as it is.
        config: the options.
        data: the images.
        temperature: at which the noise has learned.
    """
    network, note = _start_without_noise(noisy, trained, pruned, config, data)
    if not config.settings.fine_tune_noise:
        return network, note
    with_noise = _with_noise(network, noisy, temperature, data)
    if with_noise is None:
        return (
            network,
            note or "noise cannot stay in the smaller network, so that fine-tuning goes on without",
        )
    return with_noise, note


def end_of_fine_tuning(model: nn.Module, data: Dataset) -> nn.Module:
    """Return a fine-tuned network without the noise that it may have."""
    return compact(model, data.train.examples(FEW_EXAMPLES)) if noise_layers(model) else model


def refitting_examples(data: Dataset) -> Tensor:
    """Return the training images that the compacted network is refitted on."""
    size = math.prod(data.train.image_shape) / IMAGE_SIZE**2
    return data.train.examples(max(2 * FEW_EXAMPLES, int(EXAMPLES / size)))


def _start_without_noise(
    noisy: nn.Module, trained: nn.Module, pruned: nn.Module, config: TrainConfig, data: Dataset
) -> tuple[nn.Module, str]:
    refits = config.settings.fine_tune_from == "refitted"
    if refits and not isinstance(pruned, GraphModule):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told already, of the network that is not fine-tuned
            # Weights that were there count for more than where nothing is trained afterwards.
            examples = refitting_examples(data)
            return compact(noisy, examples, refit_to=trained, refit_ridge=_RIDGE_OF_START), ""
    note = "a graph of operators cannot be refitted, so that fine-tuning starts from what pruning leaves"
    few = data.train.examples(FEW_EXAMPLES)
    return compact(noisy, few, expected_noise=bool(config.weight_lr)), note if refits else ""


def _with_noise(network: nn.Module, noisy: nn.Module, temperature: float, data: Dataset) -> nn.Module | None:
    """Return a compacted network with the noise of the structures that stay, None if it cannot have that.

    The noise starts around θ = 1, which the weights are for, and as narrow as posteriors at temperature 1 are, whose
    precision grows with the images that count.
    """
    try:
        result = compact(noisy, data.train.examples(FEW_EXAMPLES), keep_noise=True)
    except ValueError:
        return None
    weights, own = network.state_dict(), result.state_dict()
    if any(name not in own or own[name].shape != value.shape for name, value in weights.items()):
        return None  # biases stand in for constants, which noise would multiply
    result.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for layer in noise_layers(result).values():
            layer.log_sigma.sub_(0.5 * math.log(temperature))
            # The mean of a log-normal variable is then 1.
            layer.mu.copy_((-0.5 * (2 * layer.log_sigma).exp()).clamp(min=layer.lower / 4))
    return result
