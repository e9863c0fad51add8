"""What a network takes as a function of how many structures are pruned.

A structure that leaves takes entries along dimensions of parameters and activations with it, and structures that take
equally many from the same dimensions are alike. What is left of a dimension is then its size less a sum over groups of
such structures, number pruned times entries each; a parameter's values and an operation's multiply-adds are products
of such sizes. All of it comes from the captured graph, so that nothing has to be compacted to know what compaction
would give.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bmrs.compaction.cutting import channel_axis, leaving_constants, names_gone, new_biases, selection, shifts
from bmrs.compaction.flop_count import forward_flops
from bmrs.compaction.operation_flops import Axis, products, value_of
from bmrs.graph.analysis import Analysis
from bmrs.graph.channels import STAYS, varying_axes
from bmrs.graph.emptied import emptied_layers
from bmrs.graph.inputs import Inputs
from bmrs.graph.masked_graph import MaskedGraph, Unit, bundles, leaves

Floats = NDArray[np.float64]
Terms = list[tuple[float, Sequence[Axis]]]


@dataclass(frozen=True)
class Cost:
    """What a network takes.

    Attributes:
        parameters: values of all parameters, noise left out.
        flops: floating-point operations for the example, two for each multiply-add.
    """

    parameters: int
    flops: int


class Sizes:
    """Sizes of dimensions as functions of how many structures of each group are pruned.

    Args:
        axes: the dimensions.
        base: their sizes before, of shape (axes,).
        entries: of shape (groups, axes), what one structure takes from each.
    """

    def __init__(self, axes: Sequence[Axis], base: Floats, entries: Floats) -> None:
        self.base, self.entries = base, entries
        self.place = {axis: i for i, axis in enumerate(axes)}

    def of(self, axis: Axis, pruned: Floats) -> Floats:
        """Return the size of a dimension, of shape (...), for numbers pruned of shape (..., groups)."""
        i = self.place[axis]
        return self.base[i] - pruned @ self.entries[:, i]


class Polynomial:
    """A sum of products of sizes.

    Args:
        sizes: of the dimensions.
        terms: of each product the factor and the dimensions.
    """

    def __init__(self, sizes: Sizes, terms: Sequence[tuple[float, Sequence[Axis]]]) -> None:
        moving = np.abs(sizes.entries).max(axis=0, initial=0.0) > 0
        joined: dict[tuple[bytes, ...], float] = defaultdict(float)
        columns: dict[bytes, tuple[float, Floats]] = {}
        for factor, axes in terms:
            keys = []
            for place in (sizes.place[axis] for axis in axes):
                if moving[place]:
                    base, entries = sizes.base[place], sizes.entries[:, place]
                    key = np.append(entries, base).tobytes()
                    columns[key] = (base, entries)
                    keys.append(key)
                else:
                    factor *= sizes.base[place]
            joined[tuple(sorted(keys))] += factor
        names = list(columns)
        self._base = np.array([*(columns[n][0] for n in names), 1.0])
        groups = len(sizes.entries)
        self._entries = np.stack([*(columns[n][1] for n in names), np.zeros(groups)], axis=1)
        degree = max(map(len, joined), default=0)
        self._factors = np.array(list(joined.values()))
        self._places = np.array(
            [[*map(names.index, keys), *[len(names)] * (degree - len(keys))] for keys in joined],
            dtype=np.int64,
        ).reshape(len(joined), degree)

    def __call__(self, pruned: Floats) -> Floats:
        """Return the values, of shape (...), for numbers pruned of shape (..., groups)."""
        sizes = self._base - pruned @ self._entries
        return np.asarray(sizes[..., self._places].prod(axis=-1) @ self._factors)


@dataclass(frozen=True, eq=False)
class CostModel:
    """Costs of a network as functions of how many structures of each group are pruned.

    Numbers pruned are arrays of shape (..., groups), from 0 to the numbers of `units`, and costs have shape (...).

    Attributes:
        units: of each group what can be pruned, least worth keeping first; equally many leave whichever is taken.
        dense: what the network takes with nothing pruned, whatever its masks.
        sizes: of all dimensions that matter.
        values: sizes of parameters.
        operations: FLOPs.
        biases: layers that get a bias once something of a group is pruned that is a constant behind its noise: its size
            and the groups.
        cost_of: what is left of the network by any analysis of it.
        base: the analysis that all of this was found with, by the masks.
    """

    units: tuple[tuple[Unit, ...], ...]
    dense: Cost
    sizes: Sizes
    values: Polynomial
    operations: Polynomial
    biases: tuple[tuple[Axis, tuple[int, ...]], ...]
    cost_of: Callable[[Analysis], Cost]
    base: Analysis

    def parameters(self, pruned: ArrayLike) -> Floats:
        """Return the values of all parameters."""
        pruned = np.asarray(pruned, dtype=np.float64)
        found = self.values(pruned)
        for axis, groups in self.biases:
            found = found + self.sizes.of(axis, pruned) * (pruned[..., list(groups)] > 0).any(axis=-1)
        return found

    def flops(self, pruned: ArrayLike) -> Floats:
        """Return the floating-point operations."""
        return self.operations(np.asarray(pruned, dtype=np.float64))

    def cost(self, pruned: ArrayLike) -> Cost:
        """Return both for one set of numbers."""
        return Cost(round(float(self.parameters(pruned))), round(float(self.flops(pruned))))


def make_cost_model(
    graph: MaskedGraph,
    inputs: Inputs,
    masks: Mapping[str, Tensor],
    worth: Callable[[Sequence[Unit]], Sequence[float]],
    *,
    bundled: bool = True,
    every_operation: bool = False,
) -> CostModel:
    """Find what can be pruned of a network beyond its masks, and what that saves.

    Of each layer the structure most worth keeping is not among it, as no layer can be emptied.

    Args:
        graph: the network.
        inputs: the example that FLOPs are counted for.
        masks: what is kept of each noise layer, by name.
        worth: of each of some units what keeping it is worth.
        bundled: whether structures that can leave only with others, of other groups of a convolution, are joined.
        every_operation: whether sizes are needed of the tensors of all operations, not only of those that have FLOPs.
    """
    graph.set_masks({name: torch.ones(n, dtype=torch.bool) for name, n in graph.structures.items()})
    finder = _Finder(graph, graph.without(), every_operation=every_operation)
    dense, constants = finder.dense_cost(inputs)
    graph.set_masks(masks)
    finder.base = base = graph.without()
    units = graph.units(base)
    worths = dict(zip(units, worth(units), strict=True))
    candidates = sorted(_without_the_best(units, worths), key=worths.__getitem__)
    alone, joined = bundles(base, candidates)
    if bundled:
        worths |= dict(zip(joined, worth(joined), strict=True))
        alone = sorted([*alone, *joined], key=worths.__getitem__)
    removable = finder.removable(alone)
    groups, entries, triggers = finder.groups(removable)
    sizes = Sizes(finder.axes, finder.sizes(base), entries)
    parameters, operations = finder.terms(base, constants)
    return CostModel(
        tuple(map(tuple, groups)),
        dense,
        sizes,
        Polynomial(sizes, parameters),
        Polynomial(sizes, operations),
        tuple((finder.rows(node), its_groups) for node, its_groups in triggers.items()),
        lambda analysis: finder.cost_of(analysis, constants),
        base,
    )


def _without_the_best(units: Sequence[Unit], worths: Mapping[Unit, float]) -> list[Unit]:
    """Return units without the one most worth keeping of each noise layer."""
    best: dict[str, Unit] = {}
    for unit in units:
        for structure in unit.structures:
            other = best.get(structure.layer)
            if other is None or worths[unit] > worths[other]:
                best[structure.layer] = unit
    protected = set(best.values())
    return [unit for unit in units if unit not in protected]


class _Finder:
    """Finds sizes of dimensions, and what units take from them, by asking what leaves with some of them."""

    def __init__(self, graph: MaskedGraph, dense: Analysis, *, every_operation: bool) -> None:
        self.graph, self.base = graph, dense
        trained = dict(graph.captured.model.named_parameters())
        self.parameters = {
            v.parameter: v for n, v in dense.parameters.items() if n in trained and v.parameter
        }
        self.products = [(node, axes) for node in dense.calls for axes in products(dense, node)]
        axes = [Axis(name, "", d) for name, v in self.parameters.items() for d in range(len(v.shape))]
        axes += [axis for _, product in self.products for axis in product]
        if every_operation:
            axes += _all_axes(dense)
        self.axes = list(dict.fromkeys(axes))
        self._analyses: dict[frozenset[Unit], Analysis] = {}

    def dense_cost(self, inputs: Inputs) -> tuple[Cost, tuple[float, float, float]]:
        """Return what the whole network takes; values outside the products, FLOPs outside, and a factor on FLOPs."""
        captured = self.graph.captured
        values = sum(parameter.numel() for parameter in captured.model.parameters())
        place = dict(zip(self.axes, self.sizes(self.base), strict=True))
        used = sum(v.shape.numel() for v in self.parameters.values())
        flops = forward_flops(self.graph.masked, inputs)
        same = self.graph.example is inputs
        of_graph = flops if same else forward_flops(self.graph.masked, self.graph.example)
        known = sum(2.0 * math.prod(place[axis] for axis in product) for _, product in self.products)
        return Cost(values, flops), (values - used, of_graph - known, flops / of_graph if of_graph else 1.0)

    def terms(self, analysis: Analysis, constants: tuple[float, float, float]) -> tuple[Terms, Terms]:
        """Return the products that parameters and FLOPs are sums of, with the new biases that an analysis needs."""
        other_values, other_flops, scale = constants
        emptied = emptied_layers(analysis)
        gone = names_gone(analysis, emptied)
        values: Terms = [
            (1.0, [Axis(name, "", d) for d in range(len(value.shape))])
            for name, value in self.parameters.items()
            if name not in gone
        ]
        values += [(1.0, [self.rows(node)]) for node in new_biases(analysis, shifts(analysis, emptied))]
        idle = {*emptied.constant, *emptied.unread}
        operations: Terms = [(2.0 * scale, product) for node, product in self.products if node not in idle]
        return [*values, (other_values, [])], [*operations, (other_flops * scale, [])]

    def cost_of(self, analysis: Analysis, constants: tuple[float, float, float]) -> Cost:
        """Return what is left."""
        place = dict(zip(self.axes, self.sizes(analysis), strict=True))
        values, operations = (
            round(sum(factor * math.prod(place[axis] for axis in axes) for factor, axes in terms))
            for terms in self.terms(analysis, constants)
        )
        return Cost(values, operations)

    def rows(self, node: object) -> Axis:
        """Return the dimension of an operation's weight that its results lie along."""
        call = self.base.calls[node]  # type: ignore[index]
        return Axis(call["weight"].parameter, "", 1 if "transpose" in call.operator else 0)

    def sizes(self, analysis: Analysis) -> Floats:
        """Return the sizes of all dimensions that are left."""
        shapes: dict[tuple[object, str], Sequence[int]] = {}
        for holder, argument, dim in self.axes:
            if (holder, argument) not in shapes:
                value = value_of(analysis, Axis(holder, argument, dim))
                if isinstance(holder, str):
                    chosen = selection(analysis, value)
                    shape = [len(chosen.axes.get(d, range(n))) for d, n in enumerate(value.shape)]
                    if chosen.columns is not None:
                        shape[1] = chosen.columns.shape[1]
                    shapes[holder, argument] = shape
                else:
                    shapes[holder, argument] = analysis.kept_shape(value)
        return np.array([shapes[a.holder, a.argument][a.dim] for a in self.axes], dtype=np.float64)

    def without(self, units: Sequence[Unit]) -> Analysis:
        """Return what leaves with some units."""
        key = frozenset(units)
        if key not in self._analyses:
            self._analyses[key] = self.graph.without(s for unit in units for s in unit.structures)
        return self._analyses[key]

    def removable(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units that leave where every second one is pruned, or fewer."""
        stays = set()
        for some in _trials(units):
            found = leaves(self.without(some), some, self.graph.structures)
            stays |= {unit for unit, gone in zip(some, found, strict=True) if not gone}
        return [unit for unit in units if unit not in stays]

    def groups(self, units: Sequence[Unit]) -> tuple[list[list[Unit]], Floats, dict[object, tuple[int, ...]]]:
        """Return units in groups that are alike, what one of each takes from the axes, and new biases' groups."""
        while True:
            owned, triggers = self._owned(units), self._triggers(units)
            alike: dict[object, list[Unit]] = defaultdict(list)
            for unit in units:
                layers = tuple(s.layer for s in unit.structures)
                alike[layers, tuple(owned[unit]), frozenset(triggers[unit])].append(unit)
            groups = list(alike.values())
            entries = np.zeros((len(groups), len(self.axes)))
            for g, group in enumerate(groups):
                for place, number in owned[group[0]]:
                    entries[g, place] = number
            wrong = self._wrong(groups, entries)
            if wrong.any():
                alone = [unit for group in groups for unit in self.removable(group)]
                if len(alone) < len(units):
                    # The others leave with structures of other layers only, as heads that share a bias of positions.
                    units = alone
                    continue
                for g, group in enumerate(groups):
                    some = group[::2]
                    entries[g] = (self.sizes(self.base) - self.sizes(self.without(some))) / len(some)
                wrong = self._wrong(groups, entries) | (entries % 1 != 0).any(axis=0)
            if not wrong.any():
                break
            # What leaves depends on more than numbers; what takes from these dimensions stays.
            rest = [u for g, group in enumerate(groups) if not entries[g, wrong].any() for u in group]
            units = rest if len(rest) < len(units) else []
        saving = [g for g in range(len(groups)) if entries[g].any()]
        places = {g: i for i, g in enumerate(saving)}
        biases: dict[object, set[int]] = defaultdict(set)
        for g in saving:
            for node in triggers[groups[g][0]]:
                biases[node].add(places[g])
        return (
            [groups[g] for g in saving],
            entries[saving],
            {node: tuple(sorted(its)) for node, its in biases.items()},
        )

    def _wrong(self, groups: Sequence[Sequence[Unit]], entries: Floats) -> NDArray[np.bool_]:
        """Return the dimensions whose sizes are not what numbers pruned of the groups say."""
        base = self.sizes(self.base)
        found = np.zeros(len(self.axes), dtype=bool)
        units = [unit for group in groups for unit in group]
        for some in _trials(units):
            taken = set(some)
            numbers = np.array([sum(u in taken for u in group) for group in groups], dtype=np.float64)
            found |= base - numbers @ entries != self.sizes(self.without(some))
        return found

    def _owned(self, units: Sequence[Unit]) -> dict[Unit, list[tuple[int, int]]]:
        """Return for each unit the axes along which its own channels lie, with how many."""
        roots = self.base.findings.ties.roots()
        of_root = self._units_of_roots(units, len(roots))
        owned: dict[Unit, list[tuple[int, int]]] = {unit: [] for unit in units}
        for place, axis in enumerate(self.axes):
            channels = value_of(self.base, axis).channels_along(axis.dim)
            if channels is None:
                continue
            its_units = of_root[roots[channels[channels != STAYS]]]
            present, counts = its_units[its_units >= 0].unique(return_counts=True)
            for unit, count in zip(present.tolist(), counts.tolist(), strict=True):
                owned[units[unit]].append((place, count))
        return owned

    def _triggers(self, units: Sequence[Unit]) -> dict[Unit, set[object]]:
        """Return for each unit the operations that get a bias with it, for what it leaves as a constant."""
        roots = self.base.findings.ties.roots()
        of_root = self._units_of_roots(units, len(roots))
        present = new_biases(self.base, shifts(self.base))
        found: dict[Unit, set[object]] = {unit: set() for unit in units}
        for some in _trials(units):
            analysis = self.without(some)
            for node, call in analysis.calls.items():
                affine = call.operator == "linear" or call.operator.startswith("conv")
                if not affine or call["bias"] is not None or node in present:
                    continue
                constants = leaving_constants(analysis, call)
                if constants is None or not constants.any():
                    continue
                channels = self.base.calls[node]["input"].channels_along(channel_axis(call))
                for unit in of_root[roots[channels[constants != 0]]].unique().tolist():
                    if unit >= 0:
                        found[units[unit]].add(node)
        return found

    def _units_of_roots(self, units: Sequence[Unit], number: int) -> Tensor:
        of_root = torch.full((number,), -1)
        for place, unit in enumerate(units):
            of_root[list(unit.roots)] = place
        return of_root


def _trials(units: Sequence[Unit]) -> list[Sequence[Unit]]:
    """Return parts of some units that together are all of them: two halves, and few."""
    return [some for some in (units[::2], units[1::2], units[::7]) if some]


def _all_axes(analysis: Analysis) -> list[Axis]:
    """Return the dimensions of all tensors that operations take and return, where channels lie along them."""
    found = []
    for node, call in analysis.calls.items():
        for name, argument in call.arguments.items():
            items = argument if isinstance(argument, list) else [argument]
            for place, value in enumerate(items):
                if getattr(value, "layers", ()):
                    label = f"{name}.{place}" if isinstance(argument, list) else name
                    found += [Axis(node, label, d) for layer in value.layers for d in varying_axes(layer)]
    return found
