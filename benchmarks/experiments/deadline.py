"""The time limit of the commands that train."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any


class OutOfTimeError(Exception):
    """The time limit came while a network was trained."""


class Deadline:
    """Ends a training when its time is up: what training reports its progress to.

    Args:
        at: the end, in seconds since the epoch.
    """

    def __init__(self, at: float = math.inf) -> None:
        self.at = at

    def check(self) -> None:
        """Raise OutOfTimeError if time is up."""
        if time.time() > self.at:
            raise OutOfTimeError

    def step(self, **_: Any) -> None:
        """Look at the clock after a step of training."""
        self.check()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Do nothing after an epoch: its last step has looked at the clock."""
