"""Which noise layers additions tie to the same channels."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from bmrs.compaction.folding import channel_axes, is_depthwise
from bmrs.compaction.stock_layers import MIXING_ACTIVATIONS, WEIGHT_LAYERS, Addition
from bmrs.compaction.tracing import Step, single_input, trace
from bmrs.noise_layer import NoiseLayer


def tied_noise_layers(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> list[list[str]]:
    """The noise layers that have to prune a channel together if `bmrs.compact` is to remove it.

    An addition z = x₁ + x₂ has a constant channel only if x₁ and x₂ have. In either operand the last noise layer before
    the addition can make the channel constant, with only operations that keep channels apart between the two; where
    these include another addition, its operands' last noise layers can do so together. All of them are tied,
    and so are those of additions that share one, as all blocks of a stage with identity shortcuts do. Where an operand
    has no such noise layer the channel can never go, and nothing is tied.

    Args:
        model: a model that `bmrs.compact` takes, in any mode; it is left as it is.
        example_inputs: as for `bmrs.compact`.

    Returns:
        Qualified names of tied layers, two or more in each group and in the order of their use; all of a group have
        equally many structures.

    Raises:
        TypeError, ValueError: as `bmrs.compact`.
    """
    steps = trace(copy.deepcopy(model).eval(), single_input(example_inputs))
    channel_axes(steps)
    names: dict[nn.Module, str] = {}
    # The noise layers that can silence a step's result, None among them if some part of it has none.
    silencers: dict[Step | None, frozenset[nn.Module | None]] = {None: frozenset([None])}
    groups: list[frozenset[nn.Module | None]] = []
    for step in steps:
        module = step.module
        if isinstance(module, NoiseLayer):
            names.setdefault(module, step.name)
            silencers[step] = frozenset([module])
        elif isinstance(module, Addition):
            silencers[step] = frozenset().union(*(silencers[source] for source in step.inputs))
            groups = _merged(groups, silencers[step])
        elif _keeps_channels(module):
            silencers[step] = silencers[step.inputs[0]]
        else:
            silencers[step] = frozenset([None])
    found = [
        [name for module, name in names.items() if module in group] for group in groups if None not in group
    ]
    order = {name: place for place, name in enumerate(names.values())}
    return sorted((group for group in found if len(group) > 1), key=lambda group: order[group[0]])


def _keeps_channels(module: nn.Module) -> bool:
    """True if each channel of a module's output depends on that of its input alone, in equal number."""
    mixes = isinstance(module, (*WEIGHT_LAYERS, *MIXING_ACTIVATIONS)) and not is_depthwise(module)
    return not mixes and not isinstance(module, nn.Flatten)


def _merged(
    groups: list[frozenset[nn.Module | None]], new: frozenset[nn.Module | None]
) -> list[frozenset[nn.Module | None]]:
    """Disjoint groups, after a new one has joined those that it shares a member with."""
    joined = new.union(*(group for group in groups if group & new))
    return [joined, *(group for group in groups if not group & new)]
