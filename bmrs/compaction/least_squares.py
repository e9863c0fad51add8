"""Least squares with a ridge towards the weights that are there, chosen by rows that are kept apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 1e-3
"""How much the present weights count where examples are many, relative to the variance of the inputs."""
RIDGES = (RIDGE, 1e-2, 1e-1, 1.0, 10.0, math.inf)
"""What is tried on examples that were left out; with the last one weights stay, and the bias makes up for means."""


class _Sums:
    """Sums over rows (x, 1), float64: of their products with each other, and with y."""

    def __init__(self, weight: Tensor) -> None:
        outputs, inputs = weight.shape
        self.gram = weight.new_zeros(inputs + 1, inputs + 1)
        self.cross = weight.new_zeros(inputs + 1, outputs)

    @property
    def rows(self) -> Tensor:
        """Their number."""
        return self.gram[-1, -1]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x of shape (rows, inputs), y of shape (rows, outputs)."""
        x = F.pad(x, (0, 1), value=1.0)
        self.gram += x.T @ x
        self.cross += x.T @ y


class NormalEquations:
    """The least squares problem y ≈ x·Wᵀ + b over many rows.

    Args:
        weight: the present W, of shape (outputs, inputs).
        shifts: whether there is a b; a layer without a bias gets none, so that it does not grow.
    """

    def __init__(self, weight: Tensor, *, shifts: bool) -> None:
        self._weight, self._shifts = weight, shifts
        self._sums = _Sums(weight)
        self._apart: _Sums | None = None

    @property
    def count(self) -> int:
        """Rows so far."""
        return int(self._sums.rows) + (0 if self._apart is None else int(self._apart.rows))

    def part_here(self) -> None:
        """Keep rows that are added from now on apart."""
        self._apart = _Sums(self._weight)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x of shape (rows, inputs), y of shape (rows, outputs)."""
        (self._sums if self._apart is None else self._apart).add(x, y)

    def errors(self, ridges: Sequence[float]) -> Tensor:
        """Return the sums of squared errors of the rows that are apart, less that of predicting 0, for each ridge."""
        assert self._apart is not None
        errors = []
        for weight, shift in self._solutions(ridges):
            rows = torch.cat([weight, shift[:, None]], dim=1)
            error = (rows @ self._apart.gram * rows).sum() - 2 * (rows.T * self._apart.cross).sum()
            errors.append(error.nan_to_num(math.inf))
        return torch.stack(errors)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return W and b, which is 0 if the layer has none, of all rows."""
        if self._apart is not None:
            self._sums.gram += self._apart.gram
            self._sums.cross += self._apart.cross
            self._apart = None
        return next(self._solutions([ridge]))

    def _solutions(self, ridges: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield W and b of the rows that are not apart."""
        sums = self._sums
        # Columns of zeros are of pruned structures that stay: they go on being ignored.
        read = self._weight.any(dim=0)
        mean_x, mean_y = sums.gram[-1, :-1] / sums.rows, sums.cross[-1] / sums.rows
        if not self._shifts:
            mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        gram = sums.gram[:-1, :-1] / sums.rows - mean_x.outer(mean_x)
        missing = sums.cross[:-1] / sums.rows - mean_x.outer(mean_y) - gram @ self._weight.T
        # Inputs that never vary, and leave rounding errors only, leave their weights as they are.
        size = sums.gram.diagonal()[:-1].mean() / sums.rows
        mean, least = gram.diagonal().mean(), 1e-9 * size + torch.finfo(gram.dtype).tiny
        gram, missing = gram[read][:, read], missing[read]
        diagonal = gram.diagonal().clone()
        for ridge in ridges:
            weight = self._weight
            if math.isfinite(ridge):
                gram.diagonal().copy_(diagonal + ridge * mean + least)
                weight = weight.clone()
                weight[:, read] += torch.linalg.solve(gram, missing).T
            yield weight, mean_y - weight @ mean_x
