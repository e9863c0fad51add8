"""The noise layers of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from bmrs.noise.layer import NoiseLayer


def noise_layers(model: nn.Module) -> dict[str, NoiseLayer]:
    """All noise layers of a model by qualified name, in module order; a shared layer appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NoiseLayer)}


def required_noise_layers(model: nn.Module) -> dict[str, NoiseLayer]:
    """Like `noise_layers`, but a model without any is a ValueError."""
    layers = noise_layers(model)
    if not layers:
        raise ValueError(
            f"the model ({type(model).__name__}) has no noise layer: add bmrs.NoiseLayer modules "
            "or call bmrs.add_noise"
        )
    return layers


def layers_of_one_kind(layers: Iterable[NoiseLayer]) -> list[list[NoiseLayer]]:
    """Group layers whose posteriors can be concatenated: equal bounds, dtype, device and backend."""
    groups: dict[tuple[Any, ...], list[NoiseLayer]] = {}
    for layer in layers:
        key = (layer.lower, layer.upper, layer.mu.dtype, layer.mu.device, layer.backend)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())
