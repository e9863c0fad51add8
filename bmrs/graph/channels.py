"""Channels: what can leave a network, what has to leave together, and what has to stay.

A channel is an integer. Tensors of channels are laid over the values of a network: an element that carries a channel
leaves with it. -1 is carried by what always stays. Channels that meet in one element of a computation leave together:
they are tied. Everything else that keeps a smaller network whole is a `Constraint`, which looks at the channels that
stay so far and names further ones that have to. Starting from the fewest, the outputs of the network, and asking until
nobody names any more gives the smallest set of channels that can stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

STAYS = -1
"""Carried by elements that never leave."""


class Ties:
    """Channels and which of them are tied."""

    def __init__(self) -> None:
        self._number = 0
        self._roots = torch.tensor([STAYS])
        self._pairs: list[Tensor] = []  # tied since then

    def __len__(self) -> int:
        return self._number

    def new(self, *shape: int) -> Tensor:
        """Make new channels, each tied to itself alone."""
        start = self._number
        self._number += torch.Size(shape).numel()
        return torch.arange(start, self._number).view(shape)

    def tie(self, a: Tensor, b: Tensor) -> Tensor:
        """Tie the channels of two tensors of one shape that lie at the same place.

        Returns:
            The channels that thereby always stay, because they met one that does.
        """
        a, b = without_repetition(a, b)
        pairs = torch.stack([a.flatten(), b.flatten()])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.shape[1] > 1:
            # As one number each, whose sorting is much faster than that of columns.
            numbers = ((pairs[0] + 1) * (len(self) + 1) + pairs[1] + 1).unique()
            pairs = torch.stack([numbers // (len(self) + 1), numbers % (len(self) + 1)]) - 1
        low, high = pairs.aminmax(dim=0)
        self._pairs.append(pairs[:, low != STAYS])
        return high[low == STAYS]

    def roots(self) -> Tensor:
        """Return the first of those that it is tied to for every channel, and STAYS for STAYS, which is the last index.

        Returns:
            int64 of shape (number of channels + 1,), not to be changed.
        """
        if len(self._roots) == self._number + 1 and not self._pairs:
            return self._roots
        new = torch.arange(len(self._roots) - 1, self._number)
        roots = torch.cat([self._roots[:-1], new, self._roots[-1:]])
        pairs = torch.cat([roots.new_empty(2, 0), *self._pairs], dim=1)
        # Every root that meets a smaller one comes under it, so that each round halves those that are left, at least.
        while pairs.numel():
            low, high = roots[pairs].aminmax(dim=0)
            apart = low != high
            pairs = pairs[:, apart]
            roots[high[apart]] = low[apart]
            while not torch.equal(above := roots[roots], roots):
                roots = above
        self._roots, self._pairs = roots, []
        return roots


def varying_axes(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which a tensor is not the same everywhere; NaN counts as equal to NaN."""
    return tuple(d for d in range(x.dim()) if x.shape[d] > 1 and x.stride(d) != 0)


def compressed(x: Tensor) -> Tensor:
    """Return a tensor with stride 0 along every dimension along which it is the same everywhere."""
    shape = x.shape
    if 0 in shape:
        return x
    for d in range(x.dim()):
        if shape[d] == 1:
            continue
        first = x.narrow(d, 0, 1)
        if x.stride(d) == 0 or _equal_along(x, first):
            x = first
    return x.expand(shape)


def _equal_along(x: Tensor, first: Tensor) -> bool:
    same = x == first
    if x.is_floating_point():
        same |= x.isnan() & first.isnan()
    return bool(same.all())


def without_repetition(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one shape, reduced to size 1 along the dimensions along which none of them varies."""
    for d in range(tensors[0].dim()):
        if tensors[0].shape[d] > 1 and all(t.stride(d) == 0 for t in tensors):
            tensors = tuple(t.narrow(d, 0, 1) for t in tensors)
    return tensors


class Staying:
    """The channels that stay so far.

    Args:
        roots: see `Ties.roots`.
        nothing_is_quiet: whether constant channels are read like all others.
    """

    def __init__(self, roots: Tensor, *, nothing_is_quiet: bool = False) -> None:
        self.nothing_is_quiet = nothing_is_quiet
        self._roots = roots
        self._stays = torch.zeros(len(roots), dtype=torch.bool)
        self._stays[STAYS] = True
        self._cause = torch.full((len(roots),), -1)

    def of(self, channels: Tensor) -> Tensor:
        """Return which of some channels stay, bool of their shape."""
        return self._stays[self._roots[channels]]

    def cause_of(self, channels: Tensor) -> Tensor:
        """Return the number of the constraint that first asked for each channel, -1 for those that leave."""
        return self._cause[self._roots[channels]]

    def add(self, channels: Tensor, cause: int) -> bool:
        """Let channels stay because of a constraint, and return whether one of them did not before."""
        roots = self._roots[channels.flatten()]
        roots = roots[~self._stays[roots]]
        self._stays[roots] = True
        self._cause[roots] = cause
        return len(roots) > 0


class Constraint(Protocol):
    """Something that has to hold for a smaller network to be whole."""

    def required(self, staying: Staying) -> Tensor:
        """Return channels that have to stay because of those that stay so far."""


_NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Stay:
    """Channels that stay whatever happens, such as those of the outputs."""

    channels: Tensor

    def required(self, staying: Staying) -> Tensor:
        """Return channels that have to stay, see `Constraint`."""
        return self.channels


@dataclass(frozen=True)
class Product:
    """The elements of a value that stay are a product of entries along each of its dimensions."""

    channels: Tensor

    def required(self, staying: Staying) -> Tensor:
        """Return channels that have to stay, see `Constraint`."""
        stays = staying.of(self.channels)
        product = torch.ones_like(stays)
        for d in range(stays.dim()):
            others = [i for i in range(stays.dim()) if i != d]
            product &= stays.any(dim=others, keepdim=True) if others else stays
        return self.channels[product & ~stays]


@dataclass(frozen=True)
class Whole:
    """Where one element stays, all stay that differ from it along some dimensions only."""

    channels: Tensor
    axes: tuple[int, ...]

    def required(self, staying: Staying) -> Tensor:
        """Return channels that have to stay, see `Constraint`."""
        stays = staying.of(self.channels)
        return self.channels[stays.any(dim=self.axes, keepdim=True) & ~stays]


@dataclass(frozen=True)
class SameEntries:
    """Two values keep the same entries along dimensions that they share.

    Attributes:
        first, second: channels of one number of dimensions, 1 along those that are not shared or not varied.
        axes: the shared dimensions.
    """

    first: Tensor
    second: Tensor
    axes: tuple[int, ...]

    def required(self, staying: Staying) -> Tensor:
        """Return channels that have to stay, see `Constraint`."""
        kept = [self._entries(channels, staying) for channels in (self.first, self.second)]
        wanted = kept[0] | kept[1]
        found = []
        for channels, has in zip((self.first, self.second), kept, strict=True):
            missing = (wanted & ~has).expand(channels.shape)
            if missing.any():
                others = [d for d in range(channels.dim()) if d not in self.axes]
                # What stays elsewhere along the other dimensions is enough, or everything where nothing does.
                elsewhere = staying.of(channels)
                for d in self.axes:
                    elsewhere = elsewhere.any(dim=d, keepdim=True)
                elsewhere = elsewhere if others and elsewhere.any() else torch.ones_like(elsewhere)
                found.append(channels[missing & elsewhere])
        return torch.cat(found) if found else _NONE

    def _entries(self, channels: Tensor, staying: Staying) -> Tensor:
        others = [d for d in range(channels.dim()) if d not in self.axes]
        stays = staying.of(channels)
        return stays.any(dim=others, keepdim=True) if others else stays


@dataclass(frozen=True)
class Joint:
    """Elements that carry several channels each: one stays where all of its channels do, and they where it does.

    Attributes:
        channels: the elements' own, of shape (number,).
        parts: what they carry, each of that shape.
    """

    channels: Tensor
    parts: tuple[Tensor, ...]

    def required(self, staying: Staying) -> Tensor:
        """Return channels that have to stay, see `Constraint`."""
        stays = staying.of(self.channels)
        parts_stay = torch.stack([staying.of(part) for part in self.parts])
        missing = [part[stays & ~its] for part, its in zip(self.parts, parts_stay, strict=True)]
        return torch.cat([*missing, self.channels[parts_stay.all(dim=0) & ~stays]])


@dataclass(frozen=True)
class Read:
    """Channels that are read wherever what they make stays.

    Attributes:
        channels: those that are read.
        by: channels of the same shape: each reads the one at its place. None: see ``by_any``.
        by_any: channels along the dimensions of a result: where something stays of each, all channels are read.
        quiet: bool of the shape of ``channels``: those that say nothing, as they are constant; None if none are.
    """

    channels: Tensor
    by: Tensor | None = None
    by_any: tuple[Tensor, ...] = ()
    quiet: Tensor | None = None

    def required(self, staying: Staying) -> Tensor:
        """Return channels that have to stay, see `Constraint`."""
        if not all(staying.of(channels).any() for channels in self.by_any):
            return _NONE
        read = torch.ones_like(self.channels, dtype=torch.bool)
        if self.quiet is not None and not staying.nothing_is_quiet:
            read &= ~self.quiet
        if self.by is not None:
            read &= staying.of(self.by)
        return self.channels[read]


@dataclass(frozen=True)
class EqualNumbers:
    """Equally many stay in every row of which something stays; those that stay to make it so come in order.

    Attributes:
        channels: of shape (rows, entries), or (rows, entries, parts) where an entry stays as long as a part of it does.
        places: as many of these stay, the first ones, as entries of a row; of shape (entries,), None if there are none.
        least: how many stay in any case of a row of which something stays.
    """

    channels: Tensor
    places: Tensor | None = None
    least: int = 0

    def required(self, staying: Staying) -> Tensor:
        """Return channels that have to stay, see `Constraint`."""
        parts = self.channels if self.channels.dim() == 3 else self.channels[..., None]
        parts_stay = staying.of(parts)
        stays = parts_stay.any(dim=2)
        numbers = stays.sum(dim=1, keepdim=True)
        most = max(int(numbers.max()), self.least) if numbers.numel() else 0
        found = []
        if self.places is not None:
            gone = ~staying.of(self.places)
            held = int((~gone).sum())
            found.append(self.places[gone & (gone.cumsum(dim=0) <= most - held)])
            most = max(most, held)
        missing = (most - numbers) * (numbers > 0)
        chosen = ~stays & ((~stays).cumsum(dim=1) <= missing)
        # Of an entry the parts that stay in others.
        found.append(parts[chosen[..., None] & parts_stay.any(dim=1, keepdim=True).any(dim=0, keepdim=True)])
        return torch.cat(found)


@dataclass(frozen=True)
class AtLeastOne:
    """Something stays: no layer is left with nothing.

    Attributes:
        channels: those of which something stays.
        number: how many of them, the first ones, stay where nothing else does.
    """

    channels: Tensor
    number: int = 1

    def required(self, staying: Staying) -> Tensor:
        """Return channels that have to stay, see `Constraint`."""
        return _NONE if staying.of(self.channels).any() else self.channels.flatten()[: self.number]


def smallest_staying(
    ties: Ties, constraints: Sequence[Constraint], *, nothing_is_quiet: bool = False
) -> Staying:
    """Return the smallest set of channels that satisfies all constraints.

    Args:
        ties: the channels.
        nothing_is_quiet: see `Staying`.
        constraints: in an order of computation. They are asked backwards, because needs travel from the outputs to
            the inputs; those that nothing needs, but that keep layers from being empty or uneven, are asked last.
    """
    staying = Staying(ties.roots(), nothing_is_quiet=nothing_is_quiet)
    backwards = list(enumerate(constraints))[::-1]
    first = [(i, c) for i, c in backwards if not isinstance(c, AtLeastOne | EqualNumbers)]
    last = [(i, c) for i, c in backwards if isinstance(c, AtLeastOne | EqualNumbers)]

    def asks(i: int, constraint: Constraint) -> bool:
        needed = constraint.required(staying)
        return needed.numel() > 0 and staying.add(needed, i)

    for i, constraint in enumerate(constraints):
        # Unconditional ones first: their reasons say most.
        if isinstance(constraint, Stay):
            asks(i, constraint)
    while True:
        while any([asks(i, c) for i, c in first]):  # noqa: C419 (each is to be asked)
            pass
        if not any(asks(i, c) for i, c in last):
            return staying
