"""Which structures go, and how many of each layer, where a budget asks for more than evidence gives.

Evidence says what a structure is worth while all others are there. Of two that do the same each is worth little or
each is worth much, and where few may stay, the best ones by evidence can be the same thing twice. What goes is decided
here by what the layers behind can still make of those that are left, X_S, after a change of their weights: by how much
the least squares fit

    min ‖Y - X_S·B‖²

of what these layers compute now, Y = X·W, gets worse. Structures go one by one (a hundredth of the layer at a time in
large ones), that one first for which this rises least: with H = (XᵀX + ridge)⁻¹ over the columns that are left, and
H_bb and B_b the parts of one structure,

    tr(B_bᵀ · H_bb⁻¹ · B_b),

after which H and B follow by one step of elimination (Hassibi & Stork, "Second order derivatives for network pruning:
optimal brain surgeon", 1993, for a layer and whole structures).

How many go of each layer is what makes the sum of the rises over all layers least, each weighed by how much the
network's outputs depend on what is missed (`sensitivities`): as a share of the outputs' variance they can be compared.
Which ones go is then decided from the last layer to the first, so that what layers compute for structures that go does
not count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bmrs.budget.sensitivity import sensitivities
from bmrs.checks import one_line
from bmrs.compaction.cutting import channel_axis
from bmrs.compaction.least_squares import RIDGE
from bmrs.compaction.products import patches
from bmrs.graph.analysis import Analysis
from bmrs.graph.channels import STAYS
from bmrs.graph.inputs import Inputs, in_batches
from bmrs.graph.masked_graph import MaskedGraph, Unit
from bmrs.graph.operators import CONVOLUTIONS
from bmrs.graph.rules import Call
from bmrs.graph.stock_layers import WEIGHT_LAYERS, WeightLayer

_BATCH = 100
_BATCH_WITH_GRADIENTS = 10
"""As all that layers compute is kept then."""

_SHARE_WITH_GRADIENTS = 0.25
"""Of the examples: sums of squares need no more, and several backward passes take longer than all the rest."""

_MOST_COLUMNS = 8192
"""Inputs of a layer, kernel positions counted, beyond which covariances take too much: evidence says what goes."""

_MOST_ROWS = 20_000
"""Positions of feature maps of a batch beyond which a random choice is taken."""

_MOST_VALUES = 50_000_000
"""Of what positions read, that are laid out at a time; a single example may have more."""

_STEPS = 100

_CUT_AT = 0.75
"""Share of a layer's inputs below which the matrices are cut down to those that are left."""


@dataclass(frozen=True)
class _Reader:
    """A layer that reads structures.

    Attributes:
        layer: of the network without noise.
        columns: for each input of its matrix the channel that it belongs to, by its representative; `STAYS` for none.
        rows: the same of its outputs.
        weight: of shape (inputs, outputs), float64.
        gram: covariance of the inputs over examples.
        sensitivity: of the network's outputs to its outputs, as `sensitivities` has it; None if it is not known.
    """

    layer: WeightLayer
    columns: Tensor
    rows: Tensor
    weight: Tensor
    gram: Tensor
    sensitivity: Tensor | None = None


class JointChoice:
    """What the layers of a network read, for examples.

    Args:
        graph: the network; its masks are changed.
        base: its analysis; what its masks prune is not there to stand in for anything.
        examples: arguments of its forward pass, some thousand examples.

    Raises:
        ValueError: the network does not run on them, or a layer reads NaN or infinite values then.
    """

    def __init__(self, graph: MaskedGraph, base: Analysis, examples: Inputs) -> None:
        self._graph, self._base, self._examples = graph, base, examples
        self._readers = _readers(graph, base, base.findings.ties.roots(), examples)
        self._gone = {
            root
            for reader in self._readers
            for channels in (reader.columns, reader.rows)
            for root in channels[~base.stays(channels)].unique().tolist()
        }

    def rises(self, groups: Sequence[Sequence[Unit]]) -> list[NDArray[np.float64]] | None:
        """Return for each group what is lost with each unit that goes, one after the other, while other groups stay.

        Args:
            groups: units of which equally much leaves.

        Returns:
            Shares of the variance of the network's outputs, at least 0 and rising; None if groups cannot be compared,
            as there is one that the layers which are known here do not read alike, or the outputs have no gradients.
        """
        if any(_reading(self._readers, units) is None for units in groups if units):
            return None
        _keep_everything(self._graph)  # masks may have been set since
        layers = [reader.layer for reader in self._readers]
        batches = list(in_batches(self._examples, _BATCH_WITH_GRADIENTS))
        some = batches[: math.ceil(_SHARE_WITH_GRADIENTS * len(batches))]
        found = sensitivities(self._graph.masked, layers, some)
        if found is None:
            return None
        readers = [replace(reader, sensitivity=found[reader.layer]) for reader in self._readers]
        rises = []
        for units in groups:
            reading = _reading(readers, units)
            found_rises = (
                np.empty(0) if reading is None else _going(reading, units, len(units), self._gone).rises
            )
            # What one layer gives up never gets cheaper, even where a greedy order and rounding would have it so.
            rises.append(np.maximum.accumulate(found_rises))
        return rises

    def order(
        self, groups: Sequence[Sequence[Unit]], numbers: Sequence[int] | NDArray[np.int64]
    ) -> list[NDArray[np.int64] | None]:
        """Return for each group the places of its units, those that go first; None where evidence has to say it.

        Args:
            groups: units of which equally much leaves, the one least worth keeping first.
            numbers: how many go of each.
        """
        gone = set(self._gone)
        orders: list[NDArray[np.int64] | None] = [None] * len(groups)
        place = {call["name"]: i for i, call in enumerate(self._base.noise_calls())}
        last_first = sorted(
            range(len(groups)),
            key=lambda g: max(place[s.layer] for s in groups[g][0].structures),
            reverse=True,
        )
        for g in last_first:
            units, number = groups[g], int(numbers[g])
            reading = _reading(self._readers, units) if 0 < number < len(units) else None
            if reading is None:
                places = list(range(number))
            else:
                places = _going(reading, units, number, gone).places
                orders[g] = np.array([*places, *sorted(set(range(len(units))) - set(places))])
            gone |= {root for place in places for root in units[place].roots}
        return orders


class _Going(NamedTuple):
    """Units of a group in the order in which they go.

    Attributes:
        places: theirs in the group.
        rises: by how much each makes the fits worse, as shares of the variance; of several that go at once the mean.
    """

    places: list[int]
    rises: NDArray[np.float64]


def _reading(readers: Sequence[_Reader], units: Sequence[Unit]) -> list[tuple[_Reader, Tensor, int]] | None:
    """Return the layers that read units, and for each of its inputs the place of its unit, -1 for none.

    The last entries say how many inputs a unit has. None if layers that are known here do not read all units alike.
    """
    of_root = {root: place for place, unit in enumerate(units) for root in unit.roots}
    found = []
    for reader in readers:
        places = torch.tensor([of_root.get(root, -1) for root in reader.columns.tolist()])
        if (places < 0).all():
            continue
        counts = places[places >= 0].bincount(minlength=len(units))
        if (counts != counts[0]).any():
            return None
        found.append((reader, places, int(counts[0])))
    return found or None


def _going(
    reading: Sequence[tuple[_Reader, Tensor, int]], units: Sequence[Unit], number: int, gone: set[int]
) -> _Going:
    """Return the units that go, by what `_reading` has found."""
    eliminations = [_Elimination(reader, places, gone, each) for reader, places, each in reading]
    going = _Going([], np.zeros(number))
    at_once = max(1, len(units) // _STEPS)
    while (done := len(going.places)) < number:
        rise = torch.stack([each.rises() for each in eliminations]).sum(dim=0)
        chosen = rise.argsort(stable=True)[: min(at_once, number - done)]
        together = sum(each.eliminate(chosen) for each in eliminations)
        going.rises[done : done + len(chosen)] = together / len(chosen)
        going.places.extend(chosen.tolist())
    return going


class _Elimination:
    """The least squares fit of what a layer computes, from the inputs that are left.

    Args:
        reader: the layer.
        places: for each of its inputs the unit that it belongs to, -1 for none.
        gone: channels that are not there any more.
        each: inputs of a unit.
    """

    def __init__(self, reader: _Reader, places: Tensor, gone: set[int], each: int) -> None:
        there = torch.tensor([root not in gone for root in reader.columns.tolist()])
        wanted = torch.tensor([root not in gone for root in reader.rows.tolist()])
        wanted |= ~wanted.any()  # what nobody wants cannot tell
        weight = reader.weight[:, wanted]
        gram = reader.gram[there][:, there]
        ridge = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
        system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self._inverse = torch.linalg.inv(system)
        # What has gone already is made up for first.
        missing = reader.gram[there][:, ~there] @ weight[~there]
        self._fit = weight[there] + self._inverse @ missing
        if reader.sensitivity is None:
            variance = float((weight * (reader.gram @ weight)).sum())
            self._scale = 1 / variance if variance > 0 else 0.0
        else:
            self._fit, self._scale = self._fit @ _root(reader.sensitivity[wanted][:, wanted]), 1.0
        own = places[there]
        self._inputs = own.argsort(stable=True)[(own < 0).sum() :].view(-1, each)
        self._left = torch.ones(len(self._inputs), dtype=torch.bool)
        self._rows_left = torch.ones(len(own), dtype=torch.bool)

    def rises(self) -> Tensor:
        """Return by how much each unit's absence makes the fit worse; infinity for those that are absent already.

        Over the variance of what is fitted, or of the network's outputs where it is known how they depend on that.
        """
        rows = self._inputs[self._left]
        own = self._inverse[rows[:, :, None], rows[:, None, :]]
        fit = self._fit[rows]
        rises = torch.full((len(self._left),), torch.inf, dtype=fit.dtype)
        rises[self._left] = (fit * torch.linalg.solve(own, fit)).sum(dim=(1, 2)).cpu() * self._scale
        return rises

    def eliminate(self, units: Tensor) -> float:
        """Fit without some units, and return by how much that is worse, likewise.

        What the matrices say of them then is rounding, and never read.
        """
        rows = self._inputs[units].flatten()
        across, outputs = self._inverse[:, rows], self._fit.shape[1]
        step = torch.linalg.solve(self._inverse[rows][:, rows], torch.cat([self._fit[rows], across.T], dim=1))
        rise = float((self._fit[rows] * step[:, :outputs]).sum()) * self._scale
        self._fit.addmm_(across, step[:, :outputs], alpha=-1)
        self._inverse.addmm_(across, step[:, outputs:], alpha=-1)
        self._left[units] = self._rows_left[rows] = False
        if self._rows_left.sum() < _CUT_AT * len(self._rows_left):
            self._cut()
        return max(rise, 0.0)

    def _cut(self) -> None:
        """Let go of the rows and columns of what is absent."""
        left = self._rows_left
        self._inverse, self._fit = self._inverse[left][:, left], self._fit[left]
        self._inputs = left.cumsum(dim=0)[self._inputs] - 1
        self._rows_left = left[left]


def _root(matrix: Tensor) -> Tensor:
    """Return R with R·Rᵀ = a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0.0).sqrt()


@torch.no_grad()
def _readers(graph: MaskedGraph, base: Analysis, roots: Tensor, examples: Inputs) -> list[_Reader]:
    """Run the whole network on examples, and return what linear and convolution layers read."""
    found: dict[WeightLayer, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for call in base.calls.values():
        layer = _layer_of(graph, call)
        read = None if layer is None else call["input"].channels_along(channel_axis(call))
        if layer is not None and read is not None:
            made = call["weight"].channels_along(0)
            made = torch.full((len(layer.weight),), STAYS) if made is None else made
            found[layer].append((roots[read], roots[made]))
    scaled = {root for unit in graph.units(base) for root in unit.roots}
    sums = {
        layer: _Covariance()
        for layer, calls in found.items()
        # One that is called several times reads other things each time.
        if len(calls) == 1 and not scaled.isdisjoint(calls[0][0].tolist())
    }
    _keep_everything(graph)
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs, its=its: its.add(layer, args[0] if args else kwargs["input"]),
            with_kwargs=True,
        )
        for layer, its in sums.items()
    ]
    try:
        for args, kwargs in in_batches(examples, _BATCH):
            graph.masked(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"the model does not run on examples: {one_line(error)}; nothing was pruned"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    readers = []
    for layer, its in sums.items():
        if not its.count:  # its weight is used, and it is not called
            continue
        gram = its.matrix()
        if not bool(gram.isfinite().all()):
            name = next(name for name, part in graph.masked.named_modules() if part is layer)
            raise ValueError(f"layer {name!r} reads NaN or infinite values on examples; nothing was pruned")
        ((read, made),) = found[layer]
        weight = layer.weight.detach().double().flatten(1).T
        readers.append(_Reader(layer, read.repeat_interleave(len(weight) // len(read)), made, weight, gram))
    return readers


def _keep_everything(graph: MaskedGraph) -> None:
    graph.set_masks({name: torch.ones(n, dtype=torch.bool) for name, n in graph.structures.items()})


def _layer_of(graph: MaskedGraph, call: Call) -> WeightLayer | None:
    """Return the linear or convolution layer that an operation is, if it is one whose inputs are told apart here."""
    if call.operator not in ("linear", *CONVOLUTIONS) or call["weight"].parameter is None:
        return None
    layer = graph.masked.get_submodule(call["weight"].parameter.rpartition(".")[0])
    if not isinstance(layer, WEIGHT_LAYERS) or getattr(layer, "groups", 1) != 1:
        return None
    return layer if layer.weight[0].numel() <= _MOST_COLUMNS else None


class _Covariance:
    """Of the inputs of a layer, over examples and positions; float64."""

    def __init__(self) -> None:
        self.count, self._sum, self._products = 0, torch.zeros(()), torch.zeros(())
        self._generator = torch.Generator().manual_seed(0)

    def add(self, layer: WeightLayer, x: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            self._add(x.flatten(0, -2), _MOST_ROWS)
            return
        x = x if x.dim() == layer.weight.dim() else x[None]
        values = x[0, 0].numel() * layer.weight[0].numel()
        for part in x.split(max(1, _MOST_VALUES // values)):
            self._add(patches(layer, part).flatten(0, -2), -(-_MOST_ROWS * len(part) // len(x)))

    def _add(self, features: Tensor, most: int) -> None:
        if len(features) > most:
            chosen = torch.randperm(len(features), generator=self._generator)[:most]
            features = features[chosen.to(features.device)]
        features = features.double()
        self.count += len(features)
        self._sum = self._sum.to(features.device) + features.sum(dim=0)
        self._products = self._products.to(features.device) + features.T @ features

    def matrix(self) -> Tensor:
        mean = self._sum / self.count
        return self._products / self.count - mean.outer(mean)
