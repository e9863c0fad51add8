"""A captured model whose masks can be changed and asked about, over and over, and what leaves it together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bmrs.graph.analysis import Analysis, analyse
from bmrs.graph.capture import Captured, capture, mark
from bmrs.graph.channels import STAYS, EqualNumbers, Whole
from bmrs.graph.copies import evaluation_copy
from bmrs.graph.inputs import Inputs, as_inputs, several_examples
from bmrs.graph.ties import needed_layers, same_channels
from bmrs.noise.hooks import check_noise_acts
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


class Structure(NamedTuple):
    """A structure of a noise layer: the layer's qualified name and the structure's number."""

    layer: str
    number: int


@dataclass(frozen=True)
class Unit:
    """Structures that leave a network together, if they are all pruned.

    Attributes:
        structures: those to prune.
        roots: channels that leave with them.
    """

    structures: tuple[Structure, ...]
    roots: frozenset[int]


class MaskedGraph:
    """A captured model and masks of its noise layers, which start with everything kept.

    Args:
        model: as for `bmrs.compact`; it is left as it is.
        inputs: its arguments.
        purpose: who asks, for errors.
        approximate: names of what compaction may approximate.

    Attributes:
        masked: the model with marked noise layers.
        captured: its graph.
        example: the arguments that it was captured with.
        structures: number of structures of each noise layer, by name.
        tied: qualified names of the noise layers that have to prune a channel together, two or more in each group and
            in the order of their use; all of a group have equally many structures. An addition z = x₁ + x₂ has a
            constant channel only if x₁ and x₂ have, and all blocks of a stage with identity shortcuts add to the same
            channels; a product is constant where one factor is.
        level: names of the noise layers that have to prune equally many, as those of the layers and directions of a
            recurrent layer; two or more in each group.
        equal_parts: whether as much stays of every part of what the model's code divides into equal ones, so that this
            code can be kept; may be set.

    Raises:
        TypeError, ValueError: as `bmrs.compact`.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, purpose: str, *, approximate: frozenset[str] = frozenset()
    ) -> None:
        copy = evaluation_copy(model)
        self.masked: nn.Module = nn.Sequential(copy).eval() if isinstance(copy, NoiseLayer) else copy
        check_noise_acts(self.masked)
        layers = noise_layers(self.masked)
        self.structures = {name: layer.num_structures for name, layer in layers.items()}
        self.equal_parts = True
        # Those of the graph, which is asked again when they have changed.
        self._factors = {name: torch.ones_like(layer.spread(layer.mu)) for name, layer in layers.items()}
        self._kept = {name: factors.clone() for name, factors in self._factors.items()}
        mark(self.masked, self._factors)
        self.captured: Captured = capture(
            self.masked, inputs, purpose, dynamic="first", approximate=approximate
        )
        self.example = several_examples(inputs)
        analysis = analyse(self.captured)
        self.level = _level(analysis)
        groups = same_channels(analysis)
        needed = needed_layers(self.captured, self._factors, groups)
        self._needed = dict(zip(map(frozenset, groups), needed, strict=True))
        order = list(layers)
        self.tied = sorted((n for n in needed if n and len(n) > 1), key=lambda group: order.index(group[0]))

    def set_masks(self, kept: Mapping[str, Tensor]) -> None:
        """Keep these structures; bool of shape (structures,) for each noise layer."""
        for name, mask in kept.items():
            factors = self._kept[name]
            factors.copy_(mask.repeat_interleave(len(factors) // len(mask)))
            self._factors[name].copy_(factors)

    def without(self, structures: Iterable[Structure] = ()) -> Analysis:
        """Return what leaves if these structures are pruned as well."""
        changed = defaultdict(list)
        for layer, number in structures:
            changed[layer].append(number)
        for layer, numbers in changed.items():
            self._factors[layer].view(self.structures[layer], -1)[numbers] = 0.0
        analysis = analyse(self.captured, equal_parts=self.equal_parts)
        for layer in changed:
            self._factors[layer].copy_(self._kept[layer])
        return analysis

    def units(self, analysis: Analysis) -> list[Unit]:
        """Return all that could leave together and has not left, in the order of the noise layers.

        Structures belong together where their noise layers scale one channel, or one structure several channels, and
        where a normalisation has statistics of all of them. Of the layers that scale a channel as few have to prune it
        as can let it leave.
        """
        roots = analysis.findings.ties.roots()
        parent: dict[Structure, Structure] = {}

        def root_of(structure: Structure) -> Structure:
            while parent[structure] != structure:
                parent[structure] = parent[parent[structure]]
                structure = parent[structure]
            return structure

        first: dict[int, Structure] = {}
        channels_of: dict[Structure, list[int]] = defaultdict(list)
        held: set[Structure] = set()
        for call in analysis.noise_calls():
            name = call["name"]
            channels = call["x"].channels_along(call["dim"])
            if channels is None:
                continue
            its_roots = roots[channels]
            stay = analysis.stays(channels).view(self.structures[name], -1).any(dim=1).tolist()
            for number, own in enumerate(its_roots.view(self.structures[name], -1).tolist()):
                structure = Structure(name, number)
                parent.setdefault(structure, structure)
                if not stay[number] or STAYS in own:
                    held.add(structure)
                for root in own:
                    channels_of[structure].append(root)
                    other = first.setdefault(root, structure)
                    parent[root_of(structure)] = root_of(other)
        for constraint in analysis.findings.constraints:
            if isinstance(constraint, Whole):
                for together in _in_rows(constraint, roots):
                    known = [first[root] for root in together if root in first]
                    for structure in known[1:]:
                        parent[root_of(structure)] = root_of(known[0])
        members: dict[Structure, list[Structure]] = defaultdict(list)
        for structure in parent:
            members[root_of(structure)].append(structure)
        units = []
        for structures in members.values():
            if held.isdisjoint(structures):
                needed = self._needed.get(frozenset(s.layer for s in structures))
                chosen = tuple(s for s in structures if needed is None or s.layer in needed)
                units.append(Unit(chosen, frozenset(r for s in structures for r in channels_of[s])))
        return units


def graph_for_pruning(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    approximate: frozenset[str] = frozenset(),
) -> MaskedGraph:
    """Return the graph in which `bmrs.prune` finds what it prunes together.

    Args:
        model: a model that `bmrs.compact` takes, in any mode; it is left as it is.
        example_inputs: as for `bmrs.compact`.
        approximate: names of what compaction may approximate.

    Raises:
        TypeError, ValueError: as `bmrs.compact`.
    """
    with torch.inference_mode(False), torch.no_grad():
        inputs = as_inputs(example_inputs, model)
        return MaskedGraph(model, inputs, "prune with example_inputs", approximate=approximate)


def _level(analysis: Analysis) -> list[list[str]]:
    roots = analysis.findings.ties.roots()
    names = defaultdict(list)
    for call in analysis.noise_calls():
        channels = call["x"].channels_along(call["dim"])
        for root in () if channels is None else roots[channels[channels != STAYS]].tolist():
            names[root].append(call["name"])
    groups = []
    for constraint in analysis.findings.constraints:
        if isinstance(constraint, EqualNumbers):
            rows = constraint.channels[constraint.channels != STAYS]
            groups.append(list(dict.fromkeys(name for root in roots[rows].tolist() for name in names[root])))
    return [group for group in groups if len(group) > 1]


def _in_rows(constraint: Whole, roots: Tensor) -> list[list[int]]:
    """Return the channels that stay or leave as a whole, in groups."""
    channels = constraint.channels
    axes = list(constraint.axes)
    grouped = channels.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes)).flatten(0, -2)
    found: list[list[int]] = roots[grouped].tolist()
    return found


def leaves(analysis: Analysis, units: Iterable[Unit], structures: Mapping[str, int]) -> list[bool]:
    """Return for each unit whether its structures leave."""
    gone = {}
    for call in analysis.noise_calls():
        channels = call["x"].channels_along(call["dim"])
        if channels is not None:
            stay = analysis.stays(channels).view(structures[call["name"]], -1)
            gone[call["name"]] = (~stay.any(dim=1)).tolist()
    return [all(gone[s.layer][s.number] for s in unit.structures) for unit in units]


def bundles(analysis: Analysis, units: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
    """Join units that can only leave with as many of other groups, of a grouped convolution or of queries.

    Args:
        analysis: of the network with all of them.
        units: the one most worth pruning first.

    Returns:
        Units that leave by themselves, and joint ones, of one unit of each group; both in the same order.
    """
    of_root = {root: place for place, unit in enumerate(units) for root in unit.roots}
    roots = analysis.findings.ties.roots()
    free = set(range(len(units)))
    joined: dict[tuple[int, ...], None] = {}
    for constraint in analysis.findings.constraints:
        if not isinstance(constraint, EqualNumbers) or len(constraint.channels) < 2:
            continue
        channels = constraint.channels.flatten(1)
        own = roots[channels].tolist()
        rows = [sorted({of_root[root] for root in row if root in of_root}) for row in own]
        free -= {place for row in rows for place in row}
        for joint in zip(*rows, strict=False):
            joined[tuple(sorted(set(joint)))] = None
    taken: set[int] = set()
    result = []
    for places in joined:
        if taken.isdisjoint(places):
            taken.update(places)
            its_units = [units[place] for place in places]
            structures = tuple(s for unit in its_units for s in unit.structures)
            result.append(Unit(structures, frozenset[int]().union(*(unit.roots for unit in its_units))))
    return [units[place] for place in sorted(free)], result
