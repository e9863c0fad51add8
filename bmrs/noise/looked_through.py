"""Models whose noise was looked through, and that are still as they were then.

Names, checks and hooks of a large model take a millisecond or two to look through, in every step of a training; to see
that nothing has changed takes a quarter of that.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from bmrs.noise.hooks import hooks_of_noise
from bmrs.noise.layer import NoiseLayer

Module = weakref.ref[nn.Module]


class _Tree(NamedTuple):
    """The modules below one, each as often as it stands there, level by level."""

    modules: list[nn.Module]
    names: list[str]  # in their parents
    numbers: list[int]  # of each one's children

    @classmethod
    def of(cls, model: nn.Module) -> _Tree:
        modules, names, numbers = [model], [""], []
        for module in modules:  # which grows on the way
            children = module._modules
            before = len(modules)
            if children:
                present = [(name, child) for name, child in children.items() if child is not None]
                names += [name for name, _ in present]
                modules += [child for _, child in present]
            numbers.append(len(modules) - before)
        return cls(modules, names, numbers)


class _LookedThrough(NamedTuple):
    modules: list[Module]
    kinds: list[type[nn.Module]]  # parametrization changes a module's class
    names: list[str]
    numbers: list[int]
    hooks: list[tuple[Module, str, Any]]  # that have to be there: module, attribute, function
    layers: dict[str, weakref.ref[NoiseLayer]]
    noted: list[Any]  # where `add_noise` put them

    def is_still_right(self, tree: _Tree) -> bool:
        if (tree.names, tree.numbers) != (self.names, self.numbers) or len(tree.modules) != len(self.modules):
            return False
        same = (seen() is module for seen, module in zip(self.modules, tree.modules, strict=True))
        if not all(same) or list(map(type, tree.modules)) != self.kinds:
            return False
        return all(function in getattr(module(), holder).values() for module, holder, function in self.hooks)

    def noise_layers(self) -> Iterator[tuple[str, NoiseLayer]]:
        for (name, reference), noted in zip(self.layers.items(), self.noted, strict=True):
            layer = reference()
            if layer is not None and layer.added is noted:
                yield name, layer


_LOOKED_THROUGH = WeakIdKeyDictionary()


def remember(model: nn.Module, layers: Mapping[str, NoiseLayer]) -> None:
    """Note a model as it is, after its noise layers, by name, were looked through and nothing was wrong with them."""
    tree = _Tree.of(model)
    _LOOKED_THROUGH[model] = _LookedThrough(
        list(map(weakref.ref, tree.modules)),
        list(map(type, tree.modules)),
        tree.names,
        tree.numbers,
        [(weakref.ref(module), *hook) for module in tree.modules for hook in hooks_of_noise(module)],
        {name: weakref.ref(layer) for name, layer in layers.items()},
        [layer.added for layer in layers.values()],
    )


def remembered_layers(model: nn.Module) -> dict[str, NoiseLayer] | None:
    """Return the noise layers of a model by name if it is as it was when it was remembered, None otherwise."""
    known: _LookedThrough | None = _LOOKED_THROUGH.get(model)
    if known is None or not known.is_still_right(_Tree.of(model)):
        return None
    layers = dict(known.noise_layers())
    return layers if len(layers) == len(known.layers) else None
