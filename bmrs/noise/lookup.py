"""The noise layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.noise.hooks import check_noise_acts
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.looked_through import remember, remembered_layers
from bmrs.noise.tensor_parallel import check_no_noise_is_left_out
from bmrs.noise.wrappers import inside_wrappers, whole


def noise_layers(model: nn.Module) -> dict[str, NoiseLayer]:
    """Return all noise layers of a model by qualified name, in module order; a shared layer appears once.

    The names are those without wrappers such as DistributedDataParallel.
    """
    modules = inside_wrappers(model).named_modules()
    return {name: module for name, module in modules if isinstance(module, NoiseLayer)}


def required_noise_layers(model: nn.Module) -> dict[str, NoiseLayer]:
    """Return what `noise_layers` does, but raise ValueError if there is none, or one that does not act any more."""
    inner = inside_wrappers(model)
    # What torch.compile traces has to be plain code; it looks itself whether a model has changed.
    compiling = torch.compiler.is_compiling()
    layers = None if compiling else remembered_layers(inner)
    if layers is None:
        layers = noise_layers(inner)
        check_noise_acts(inner)
        if not compiling:
            remember(inner, layers)
    for name, layer in layers.items():
        # Without use_orig_params it is a view of memory that may be gone. Replicas of DataParallel look alike.
        is_view = "mu" in layer.__dict__ and "_former_parameters" not in layer.__dict__
        if layer.mu.shape != layer.mask.shape or is_view:
            raise ValueError(
                f"mu of noise layer {name!r} must be whole, and FullyShardedDataParallel has cut it: shard the model "
                "with torch.distributed.fsdp.fully_shard, or give FullyShardedDataParallel use_orig_params=True and "
                "call this within its summon_full_params"
            )
    check_no_noise_is_left_out(model, layers)
    if not layers:
        raise ValueError(
            f"the model ({type(model).__name__}) has no noise layer: add bmrs.NoiseLayer modules "
            "or call bmrs.add_noise"
        )
    return layers


def settled_noise_layers(model: nn.Module) -> dict[str, NoiseLayer]:
    """Return what `required_noise_layers` does, whose masks then say what is kept, also after averaging."""
    layers = required_noise_layers(model)
    for name, layer in layers.items():
        layer.settle(name)
    return layers


@dataclass(frozen=True)
class LayerGroup:
    """Noise layers with equal bounds, dtype, device and backend, whose structures can be handled in one call."""

    layers: tuple[NoiseLayer, ...]

    def joined(self, name: str) -> Tensor:
        """Return the tensors of a name of all layers, behind each other; of sharded ones the whole."""
        return torch.cat([whole(getattr(layer, name)) for layer in self.layers])

    def split(self, values: Tensor) -> Iterator[tuple[NoiseLayer, Tensor]]:
        """Return each layer with its part of what was computed from joined tensors."""
        sizes = [layer.num_structures for layer in self.layers]
        return zip(self.layers, values.split(sizes), strict=True)

    def computed(self, function: Callable[..., Tensor]) -> Tensor:
        """Return ``function(mu, log_sigma, lower=, upper=, backend=)`` of all structures."""
        first = self.layers[0]
        return function(
            self.joined("mu"),
            self.joined("log_sigma"),
            lower=first.lower,
            upper=first.upper,
            backend=first.backend,
        )


def layers_of_one_kind(layers: Iterable[NoiseLayer]) -> list[LayerGroup]:
    """Return layers in as few groups as can be."""
    groups: dict[tuple[Any, ...], list[NoiseLayer]] = {}
    for layer in layers:
        mu = layer.mu
        key = (layer.lower, layer.upper, mu.dtype, mu.device, layer.backend)
        groups.setdefault(key, []).append(layer)
    return [LayerGroup(tuple(group)) for group in groups.values()]
