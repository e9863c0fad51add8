"""Networks with noise as a program for the authors' layers writes them, on `bmrs.compat`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmrs import NoiseLayer
from bmrs.compat import LogUniformApproximateDiracBMRPruningLayer
from bmrs.noise.activations import ACTIVATION_LAYERS


def use_authors_layers(model: nn.Module, example: Tensor) -> nn.Module:
    """Replace every noise layer below a model by one of `bmrs.compat` with the same values, in place.

    Activations that a noise layer fuses become layers of their own in front, as the authors' layers have none.

    Args:
        model: a model whose noise layers draw at every element.
        example: an input of it, from which the layers get their sizes.
    """
    shapes: dict[nn.Module, torch.Size] = {}
    layers = [module for module in model.modules() if isinstance(module, NoiseLayer)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: shapes.update({layer: inputs[0].shape}))
        for layer in layers
    ]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NoiseLayer):
                setattr(parent, name, _authors_layer(child, shapes[child]))
    return model


def _authors_layer(layer: NoiseLayer, shape: torch.Size) -> nn.Module:
    new = LogUniformApproximateDiracBMRPruningLayer(
        list(shape[1:]), layer.lower, layer.upper, axis=layer.dim % len(shape) - 1
    )
    with torch.no_grad():
        new.mu.copy_(layer.mu.view_as(new.mu))
        new.logsigma.copy_(layer.log_sigma.view_as(new.mu))
    return new if layer.activation is None else nn.Sequential(ACTIVATION_LAYERS[layer.activation](), new)
