"""From the authors' layers to those of the library."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from bmrs.checks import check_module
from bmrs.compat.layers import PER_ELEMENT, PruningLayer
from bmrs.noise.layer import NoiseLayer


def upgrade(model: nn.Module) -> nn.Module:
    """Replace every pruning layer of a model by a `bmrs.NoiseLayer` with the same posterior and mask, in place.

    Outputs in evaluation mode stay the same; `bmrs.prune`, `bmrs.compact` and all the rest then take the model. Build
    optimizers afterwards. A layer that is not enabled becomes ``nn.Identity``. One with a structure at every element of
    several dimensions becomes an ``nn.Sequential`` that flattens around the noise.

    Returns:
        The model; the new layer if the model was itself a pruning layer.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no pruning layer.
    """
    check_module(model)
    new: dict[PruningLayer, nn.Module] = {
        layer: _upgraded(layer) for layer in model.modules() if isinstance(layer, PruningLayer)
    }
    if not new:
        raise ValueError("the model has no pruning layer of bmrs.compat")
    for parent in list(model.modules()):
        # Not named_children, which leaves out a second name of a shared layer.
        for name, child in list(parent._modules.items()):
            if isinstance(child, PruningLayer):
                setattr(parent, name, new[child])
    return new[model] if isinstance(model, PruningLayer) else model


def _upgraded(layer: PruningLayer) -> nn.Module:
    if not layer.enabled:
        return nn.Identity().train(layer.training)
    noise = NoiseLayer(
        layer.mu.numel(),
        dim=1 if layer.axis == PER_ELEMENT else layer.axis + 1,
        granularity="element",
        lower=layer.a,
        upper=layer.b,
        device=layer.mu.device,
        dtype=layer.mu.dtype,
    )
    with torch.no_grad():
        noise.mu.copy_(layer.mu.flatten())
        noise.log_sigma.copy_(layer.logsigma.flatten())
        noise.set_kept(layer.kept.flatten())
    noise.mu.requires_grad_(layer.mu.requires_grad)
    noise.log_sigma.requires_grad_(layer.logsigma.requires_grad)
    result: nn.Module = noise
    if layer.axis == PER_ELEMENT and len(layer.d) > 1:
        parts = OrderedDict(flatten=nn.Flatten(), noise=noise, unflatten=nn.Unflatten(1, layer.d))
        result = nn.Sequential(parts)
    return result.train(layer.training)
