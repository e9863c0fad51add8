"""What `add_noise` did, noted in every noise layer that it added, so that what a conversion undoes can be noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bmrs.noise.layer import NoiseLayer


@dataclass(frozen=True)
class Added:
    """Where a noise layer was put, by names inside the model that `add_noise` was given.

    Attributes:
        name: its own.
        all_names: those of all noise layers that the model had then.
        normalisation: that of the batch normalisation behind its convolution or linear layer, which fusing would fold
            into that.
    """

    name: str
    all_names: tuple[str, ...]
    normalisation: str | None


def note_what_was_added(model: nn.Module) -> None:
    """Note in every noise layer of a model where it is and which others there are."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NoiseLayer)}
    names = tuple(layers)
    for name, layer in layers.items():
        layer.added = Added(name, names, _normalisation_behind(model, name))


def lost_noise(modules: Mapping[str, nn.Module]) -> tuple[list[str], list[str]]:
    """Return names of noise layers that are gone, and of normalisations that were folded into layers with noise.

    Args:
        modules: all modules of a model by qualified name.
    """
    gone: dict[str, None] = {}
    folded: dict[str, None] = {}
    checked = set()
    for name, layer in modules.items():
        added = layer.added if isinstance(layer, NoiseLayer) else None
        if added is None:
            continue
        # Names may have got a prefix since, or lost one.
        prefix, inner = ("", "") if name == added.name else _shift(name, added.name)
        if prefix is None:
            continue
        if (key := (id(added.all_names), prefix, inner)) not in checked:
            checked.add(key)
            expected = (prefix + other[len(inner) :] for other in added.all_names if other.startswith(inner))
            gone |= dict.fromkeys(
                other for other in expected if not isinstance(modules.get(other), NoiseLayer)
            )
        if added.normalisation is not None and added.normalisation.startswith(inner):
            behind = prefix + added.normalisation[len(inner) :]
            # Fused layers are called otherwise, and another one may stand there.
            if "norm" not in type(modules.get(behind)).__name__.lower():
                folded[behind] = None
    return list(gone), list(folded)


def _shift(now: str, then: str) -> tuple[str | None, str]:
    """Return what stands in front of a name now, and what stood there when it was noted; None if it was renamed."""
    if now.endswith("." + then):
        return now[: len(now) - len(then)], ""
    if then.endswith("." + now):
        return "", then[: len(then) - len(now)]
    return None, ""


def _normalisation_behind(model: nn.Module, name: str) -> str | None:
    """Return the name of a batch normalisation that comes next, beside it, after a layer with noise."""
    host = name.rpartition(".")[0]
    parent, _, own = host.rpartition(".")
    if not host or not isinstance(model.get_submodule(host), _ConvNd | _ConvTransposeNd | nn.Linear):
        return None
    siblings = list(model.get_submodule(parent)._modules.items())
    following = siblings[[key for key, _ in siblings].index(own) + 1 :]
    for key, module in following:
        if isinstance(module, _BatchNorm):
            return f"{parent}.{key}" if parent else key
        if isinstance(module, _ConvNd | _ConvTransposeNd | nn.Linear):
            return None
    return None
