"""A pruned chain of layers as the narrow network that it is, many times faster to evaluate than with masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import bmrs
import bmrs_kernels
from bmrs.noise.activations import ACTIVATION_LAYERS


@torch.no_grad()
def narrowed(model: nn.Sequential, kept: Sequence[Tensor]) -> nn.Sequential:
    """Return what `bmrs.compact` would, for one of the paper's small networks, without capturing it.

    Args:
        model: linear and convolution layers, each but the last one followed by a noise layer with its activation.
        kept: bool of each noise layer.
    """
    masks = iter(kept)
    noise = [layer for layer in model if isinstance(layer, bmrs.NoiseLayer)]
    means = iter(
        bmrs_kernels.noise_mean(each.mu, each.log_sigma, lower=each.lower, upper=each.upper) for each in noise
    )
    factor: Tensor | None = None  # of each structure of the layer before, 0 for those that are gone
    mask = torch.ones(0, dtype=torch.bool)
    layers: list[nn.Module] = []
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight
            if factor is not None:
                # One structure can be several successive inputs of a linear layer behind a flattening.
                each = weight.reshape(len(weight), len(factor), -1, *weight.shape[2:])
                each = each * factor.view(-1, *[1] * (each.dim() - 2))
                weight = each[:, mask].reshape(len(weight), -1, *weight.shape[2:])
            mask = next(masks, torch.ones(len(weight), dtype=torch.bool))
            assert layer.bias is not None, "the paper's layers have biases"
            layers.append(_with(layer, weight[mask], layer.bias[mask]))
        elif isinstance(layer, bmrs.NoiseLayer):
            assert layer.activation is not None, "the paper's networks have theirs in the noise layer"
            factor = next(means)
            layers.append(ACTIVATION_LAYERS[layer.activation]())
        else:
            layers.append(layer)
    return nn.Sequential(*layers).eval()


def _with(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> nn.Module:
    outputs, inputs = weight.shape[:2]
    narrow: nn.Module
    if isinstance(layer, nn.Linear):
        narrow = nn.Linear(inputs, outputs)
    else:
        narrow = nn.Conv2d(inputs, outputs, layer.kernel_size)  # type: ignore[arg-type]
    narrow.load_state_dict({"weight": weight, "bias": bias})
    return narrow
