"""What `add_noise` did, noted in every noise layer that it added, so that what a conversion undoes can be noticed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bmrs.noise.layer import NoiseLayer

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


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
    names = tuple(map(_without_wrappers, layers))
    for name, layer in layers.items():
        layer.added = Added(_without_wrappers(name), names, _normalisation_behind(model, name))


def lost_noise(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return names of noise layers that are gone, and of normalisations that were folded into layers with noise."""
    # With duplicates: what a larger model also calls otherwise still goes by the name that was noted.
    modules = {
        _without_wrappers(name): module for name, module in model.named_modules(remove_duplicate=False)
    }
    names: defaultdict[NoiseLayer, list[str]] = defaultdict(list)
    for name, module in modules.items():
        if isinstance(module, NoiseLayer) and module.added is not None:
            names[module].append(name)
    missed: dict[tuple[str, tuple[str, ...], str], None] = {}
    renamed: defaultdict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    folded: dict[str, None] = {}

    found: dict[tuple[int, str, str], list[tuple[str, tuple[str, ...], str]]] = {}

    def missing(
        all_names: tuple[str, ...], prefix: str, inner: str
    ) -> list[tuple[str, tuple[str, ...], str]]:
        # By identity, since all layers of a model have one such tuple, which may be long.
        if (key := (id(all_names), prefix, inner)) not in found:
            expected = ((prefix + name[len(inner) :], name) for name in all_names if name.startswith(inner))
            found[key] = [
                (now, all_names, name)
                for now, name in expected
                if not isinstance(modules.get(now), NoiseLayer)
            ]
        return found[key]

    for layer, its_names in names.items():
        added: Added = layer.added
        # Names may have got a prefix since, or lost one.
        shifts = [shift for name in its_names if (shift := _shift(name, added.name))]
        if not shifts:
            renamed[added.all_names, added.name] += its_names
            continue
        # Of several names, that of the whole: the layer may also stand alone somewhere.
        prefix, inner = min(shifts, key=lambda shift: len(missing(added.all_names, *shift)))
        missed |= dict.fromkeys(missing(added.all_names, prefix, inner))
        if added.normalisation is not None and added.normalisation.startswith(inner):
            behind = prefix + added.normalisation[len(inner) :]
            # Fused layers are called otherwise, and another one may stand there.
            if "norm" not in type(modules.get(behind)).__name__.lower():
                folded[behind] = None
    # A layer that was put into another module in its place, as adapters do, has a longer name and is there.
    gone = dict.fromkeys(
        now
        for now, all_names, other in missed
        if not any(_has_parts(name, now) for name in renamed[all_names, other])
    )
    return list(gone), list(folded)


def _without_wrappers(name: str) -> str:
    """Return a name without the parts that torch.compile, activation checkpointing and FSDP put into it."""
    if not any(part in name for part in _WRAPPED):  # as a rule
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def _has_parts(name: str, of: str) -> bool:
    """Return whether a name has all parts of another, in order."""
    parts = iter(name.split("."))
    return all(part in parts for part in of.split("."))


def _shift(now: str, then: str) -> tuple[str, str] | None:
    """Return what stands in front of a name now, and what stood there when it was noted; None if it was renamed."""
    if now == then:
        return "", ""
    if now.endswith("." + then):
        return now[: len(now) - len(then)], ""
    if then.endswith("." + now):
        return "", then[: len(then) - len(now)]
    return None


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
            return _without_wrappers(f"{parent}.{key}" if parent else key)
        if isinstance(module, _ConvNd | _ConvTransposeNd | nn.Linear):
            return None
    return None
