"""When a training loop prunes, and how much the KL term counts at first."""

from __future__ import annotations

from dataclasses import dataclass

from bmrs.checks import check_integer, check_number


@dataclass(frozen=True)
class WarmUp:
    """A factor on the KL term that rises from 0 to 1, so that the data are heard before the prior.

    Args:
        epochs: how long it rises, evenly; 0 for a KL term that counts in full from the start.
    """

    epochs: float = 0.0

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, minimum=0.0)

    def __call__(self, epoch: float) -> float:
        """Return the factor, in [0, 1], when so many epochs are over; parts of epochs count."""
        return 1.0 if epoch >= self.epochs else max(epoch, 0.0) / self.epochs


@dataclass(frozen=True)
class PruningSchedule:
    """The epochs after which a network is pruned.

    Args:
        every: epochs from one pruning to the next.
        first: number of the first epoch after which it is pruned, counted from 1.
        last: number of the last such epoch; None for no end. It is pruned after that one in any case.
    """

    every: int = 1
    first: int = 1
    last: int | None = None

    def __post_init__(self) -> None:
        check_integer("every", self.every, minimum=1)
        check_integer("first", self.first, minimum=1)
        if self.last is not None:
            check_integer("last", self.last, minimum=self.first)

    def is_due(self, epoch: int) -> bool:
        """Return whether the network is pruned after an epoch, counted from 1."""
        if epoch < self.first or (self.last is not None and epoch > self.last):
            return False
        return epoch == self.last or (epoch - self.first) % self.every == 0
