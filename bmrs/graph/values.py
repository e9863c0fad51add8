"""What is known of the values of a network: which channels lie along them, and where they are constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bmrs.graph.channels import (
    STAYS,
    AtLeastOne,
    Constraint,
    EqualNumbers,
    Joint,
    Product,
    Read,
    SameEntries,
    Stay,
    Ties,
    Whole,
    compressed,
    varying_axes,
    without_repetition,
)

IT_IS_READ = "it is read"
"""Why a channel stays of which nothing more is known."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a network, of which only the shape is computed.

    Attributes:
        shape: its shape.
        layers: tensors of channels, each of this shape and with stride 0 along the dimensions that it does not vary
            along; no two vary along the same dimension. An element leaves where one of its channels does.
        constant: float64 of this shape, the element's value where it is the same for all inputs of the network, and
            NaN elsewhere; None stands for NaN everywhere.
        tensor: the tensor itself where it does not depend on the input, such as a parameter; ``constant`` is then None.
        parameter: qualified name, where it is a parameter or buffer itself.
    """

    shape: torch.Size
    layers: tuple[Tensor, ...] = ()
    constant: Tensor | None = None
    tensor: Tensor | None = None
    parameter: str | None = None

    def known(self) -> Tensor | None:
        """Return ``constant``, also of a value that does not depend on the input; None if nothing is known."""
        if self.tensor is None:
            return self.constant
        if self.tensor.is_complex() or self.tensor.shape != self.shape:
            return None
        return compressed(self.tensor.detach().cpu().double())

    def layer_along(self, axis: int) -> Tensor | None:
        """Return the channels that vary along a dimension, None if none do."""
        axis %= len(self.shape)
        return next((layer for layer in self.layers if axis in varying_axes(layer)), None)

    def channels_along(self, axis: int) -> Tensor | None:
        """Return channels of shape (size of the dimension,), None unless they vary along this dimension alone."""
        axis %= len(self.shape)
        layer = self.layer_along(axis)
        if layer is None or varying_axes(layer) != (axis,):
            return None
        for d in range(layer.dim() - 1, -1, -1):
            if d != axis:
                layer = layer.select(d, 0)
        return layer


@dataclass
class Findings:
    """What the rules find out about a whole network.

    Attributes:
        ties: its channels.
        constraints: what holds for them, in an order of computation.
        notes: for each constraint, why it is there, as a part of a sentence; and the operation, as text.
        place: the operation that is looked at.
        constants: by the operation, channels that are constant there and why that does not let them leave, as a part
            of a sentence.
        counted: channels that were constant in front of a normalisation of groups and are not behind it, with a note of
            that.
        repetitions: channels along dimensions that were expanded behind groups: of the repetitions of each group.
        follow_constants: whether what linear layers and convolutions make of nothing but constants is one.
    """

    ties: Ties = field(default_factory=Ties)
    constraints: list[Constraint] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    place: str = ""
    constants: dict[str, list[tuple[Tensor, str]]] = field(default_factory=dict)
    counted: dict[int, str] = field(default_factory=dict)
    repetitions: set[int] = field(default_factory=set)
    follow_constants: bool = True

    def add(self, constraint: Constraint, note: str) -> None:
        """Note a constraint of the present operation."""
        self.constraints.append(constraint)
        self.notes.append((note, self.place))
        if self.counted and isinstance(constraint, Read) and note == IT_IS_READ:
            read = [channel for channel in constraint.channels.flatten().tolist() if channel in self.counted]
            for reason in dict.fromkeys(self.counted[channel] for channel in read):
                of_it = [channel for channel in read if self.counted[channel] == reason]
                self.say_of_constants(torch.tensor(of_it), f"{reason}, and it is read")

    def say_of_counted(self, channels: Tensor, note: str) -> None:
        """Note why channels that were constant are not behind the present operation, for where they are read."""
        self.counted |= dict.fromkeys(channels.tolist(), f"{note} ({self.place})")

    def say_of_constants(self, channels: Tensor, note: str) -> None:
        """Note why channels are read, if they are, by the present operation although they are constant."""
        self.constants.setdefault(self.place, []).append((channels, note))

    def stay(self, channels: Tensor, note: str) -> None:
        """Keep channels for good."""
        (channels,) = without_repetition(channels)
        channels = channels[channels != STAYS].unique()
        if channels.numel():
            self.add(Stay(channels), note)

    def stay_all(self, value: Value, note: str) -> None:
        """Keep all channels of a value for good."""
        for layer in value.layers:
            self.stay(layer, note)

    def new_layer(self, shape: Sequence[int], axis: int) -> Tensor:
        """Make new channels along a dimension of a value."""
        size, view = shape[axis], [1] * len(shape)
        view[axis] = size
        channels = self.ties.new(size)
        self.add(AtLeastOne(channels), "no layer is left empty")
        return channels.view(view).expand(tuple(shape))

    def at_least_one(self, layer: Tensor) -> None:
        """Keep something of a part of a tensor."""
        (channels,) = without_repetition(layer)
        self.add(AtLeastOne(channels), "no part is left empty")

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie channels that meet."""
        staying = self.ties.tie(a, b)
        if staying.numel():
            self.add(Stay(staying), "it meets what cannot leave")

    def product(self, layer: Tensor) -> None:
        """Keep what stays of a value a product, where channels vary along more than one of its dimensions."""
        if len(varying_axes(layer)) > 1:
            (channels,) = without_repetition(layer)
            self.add(Product(channels), "sizes stay equal along every dimension")

    def whole(self, layer: Tensor, axes: Sequence[int], note: str) -> None:
        """Keep all or nothing along dimensions."""
        axes = tuple(set(axes) & set(varying_axes(layer)))
        if axes:
            (channels,) = without_repetition(layer)
            self.add(Whole(channels, axes), note)

    def same_entries(self, a: Tensor, b: Tensor, axes: Sequence[int]) -> None:
        """Keep the same entries of two tensors of channels along shared dimensions."""
        a, b = without_repetition(a)[0], without_repetition(b)[0]
        self.add(SameEntries(a, b, tuple(axes)), "sizes have to agree")

    def entries(self, layer: Tensor, axes: Sequence[int]) -> Tensor:
        """Make new channels for a layer's entries along some of its dimensions, which stay where any of them does."""
        for d in range(layer.dim()):
            if d not in axes:
                layer = layer.narrow(d, 0, 1) if layer.stride(d) == 0 else layer
        shape = [layer.shape[d] if d in axes else 1 for d in range(layer.dim())]
        channels = self.ties.new(*shape)
        self.same_entries(layer, channels, axes)
        return channels

    def joint(self, layers: Sequence[Tensor]) -> Tensor:
        """Make new channels for elements that carry a channel of each of several layers."""
        parts = without_repetition(*layers)
        carried, numbers = torch.stack([part.flatten() for part in parts]).unique(dim=1, return_inverse=True)
        channels = self.ties.new(carried.shape[1])
        self.add(Joint(channels, tuple(carried)), "sizes have to agree")
        layer = channels[numbers].view(parts[0].shape).expand(layers[0].shape)
        self.product(layer)
        self.at_least_one(layer)
        return layer

    def repetitions_in(self, value: object) -> Tensor | None:
        """Return that layer of a value which has the repetitions of groups by themselves, None if there is none."""
        layers = value.layers if isinstance(value, Value) else ()
        return next((x for x in layers if x.numel() and int(x[(0,) * x.dim()]) in self.repetitions), None)

    def repeated(self, groups: Tensor, axis: int, repeats: int, places: Tensor | None = None) -> Tensor:
        """Make new channels for repetitions of groups, of which equally many of each group stay.

        What is repeated is the same for all of a group, as keys and values are for its queries: it does not matter
        which of them stay, if each group has as many.

        Args:
            groups: channels; along ``axis`` those of each group, if they vary.
            axis: a dimension of ``groups``.
            repeats: repetitions of each group.
            places: see `EqualNumbers`.

        Returns:
            Channels of the shape of ``groups``, ``repeats`` times as many along ``axis``.
        """
        behind = axis + 1
        (small,) = without_repetition(groups)
        shape = [*small.shape[:axis], groups.shape[axis], repeats, *small.shape[behind:]]
        channels = self.ties.new(*shape)
        shared = [d if d <= axis else d + 1 for d in varying_axes(groups)]
        self.same_entries(channels, small.unsqueeze(behind), shared)
        rows = channels.movedim([axis, behind], [0, 1]).flatten(2)
        self.add(EqualNumbers(rows, places=places), "as many queries stay in every group")
        full = [*groups.shape[:axis], groups.shape[axis] * repeats, *groups.shape[behind:]]
        layer = channels.flatten(axis, behind).expand(full)
        self.product(layer)
        return layer


def combine(
    findings: Findings, shape: Sequence[int], operands: Sequence[tuple[Sequence[int], Sequence[Tensor]]]
) -> tuple[Tensor, ...]:
    """Return the layers of a value whose elements are made from those of others at the same place.

    Channels that lie along the same dimensions are tied. Where those of one operand lie along some of the dimensions of
    another's, their entries along these leave together. An operand without channels along a dimension cannot lose a
    part of it; all of it stays then.

    Args:
        findings: where ties and constraints go.
        shape: shape of the result.
        operands: shape and layers of each; they broadcast.
    """
    shape = tuple(shape)
    expanded = [
        (_full_axes(its_shape, shape), [layer.expand(shape) for layer in layers])
        for its_shape, layers in operands
    ]
    groups = _overlapping([layer for _, layers in expanded for layer in layers if varying_axes(layer)])
    results = []
    for group in groups:
        representative = max(group, key=lambda layer: len(varying_axes(layer)))
        axes = set(varying_axes(representative))
        if any(not axes.issuperset(varying_axes(layer)) for layer in group):
            for layer in group:
                findings.stay(layer, "channels along different dimensions meet")
            continue
        for full, layers in expanded:
            covered: set[int] = set()
            for layer in layers:
                its_axes = set(varying_axes(layer))
                if not its_axes & axes:
                    continue
                covered |= its_axes
                if layer is representative:
                    continue
                if its_axes == axes:
                    findings.tie(layer, representative)
                else:
                    findings.same_entries(representative, layer, tuple(its_axes))
            missing = (axes - covered) & full
            if missing == axes:
                findings.stay(representative, "it meets a tensor that cannot be cut")
            elif missing:
                findings.whole(representative, tuple(missing), "it meets a tensor that cannot be cut")
        results.append(representative)
    for layer in results:
        findings.product(layer)
    return tuple(results)


def joined(findings: Findings, layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return layers of one value, those with dimensions in common as one, as where dimensions were flattened."""
    return tuple(
        group[0] if len(group) == 1 else findings.joint(group) for group in _overlapping(list(layers))
    )


def _full_axes(its_shape: Sequence[int], shape: tuple[int, ...]) -> set[int]:
    """Return the dimensions of a result along which an operand is not broadcast."""
    offset = len(shape) - len(its_shape)
    return {d + offset for d, size in enumerate(its_shape) if size != 1}


def _overlapping(layers: list[Tensor]) -> list[list[Tensor]]:
    """Return layers in groups, so that those of different groups have no dimension in common."""
    groups: list[tuple[set[int], list[Tensor]]] = []
    for layer in layers:
        axes, members = set(varying_axes(layer)), [layer]
        rest = []
        for its_axes, its_members in groups:
            if axes & its_axes:
                axes, members = axes | its_axes, its_members + members
            else:
                rest.append((its_axes, its_members))
        groups = [*rest, (axes, members)]
    return [members for _, members in groups]
