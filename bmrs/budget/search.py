"""The least loss for a given cost.

Of structures that cost the same the one least worth keeping goes first, so that all there is to choose is how many go
of each group. What is lost with them adds up; what they cost does not, as a layer's weight is a product of the numbers
kept on both of its sides. Where few enough combinations exist all of them are tried. Otherwise the search goes down the
path of Lagrangian optima, group by group, and down a second path that takes the least worth per saving at every step;
from where these end, and from the smallest network, it changes the numbers of two groups at a time until no such change
is better. For costs that save less the more is gone, a fractional knapsack with the first saving of each group gives up
no more than any solution; that bounds how far from the least the result can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
CostFunction = Callable[[Floats], Floats]

# Combinations that are tried one by one, a second or two.
_MOST_COMBINATIONS = 1_000_000
_ROUNDS = 50
# Powers of ten of the loss of everything over the cost of everything; losses of groups can lie far apart.
_PRICES, _HALVINGS = (-30.0, 4.0), 24
# In place of infinite losses, which have no differences.
_ENDLESS = 1e100
_STEPS = (0, 1, -1, 2, -2, 4, -4, 8, -8, 16, -16, 32, -32, 64, -64)


@dataclass(frozen=True)
class Found:
    """How many structures go.

    Attributes:
        pruned: of each group.
        lost: what they are worth together.
        exact: whether nothing less would do, as everything was tried.
    """

    pruned: Counts
    lost: float
    exact: bool


def least_loss(worths: Sequence[Floats], cost: CostFunction, budget: float) -> Found | None:
    """Find how many structures of each group to prune so that a cost is within a budget.

    Args:
        worths: of each group what its structures are worth, at least 0 and rising.
        cost: of numbers pruned, shape (..., groups), the cost, shape (...); never rising with any of them.
        budget: the highest cost allowed.

    Returns:
        The numbers, None if even with all pruned the cost is higher.
    """
    most = np.array([len(w) for w in worths], dtype=np.int64)
    lost = [np.concatenate([[0.0], np.cumsum(np.minimum(w, _ENDLESS))]) for w in worths]
    if float(cost(np.zeros(len(most)))) <= budget:
        return Found(np.zeros_like(most), 0.0, True)
    if float(cost(most.astype(np.float64))) > budget:
        return None
    problem = _Problem(lost, most, cost, budget)
    widest = int(most.argmax())
    if math.prod(int(n) + 1 for g, n in enumerate(most) if g != widest) * math.log2(most[widest] + 2) <= (
        _MOST_COMBINATIONS
    ):
        return problem.found(problem.by_trial(widest), exact=True)
    starts = [problem.by_steps(), problem.by_multipliers(), most]  # of equals the first, which keeps most
    return problem.found(min(map(problem.improved, starts), key=problem.loss), exact=False)


def least_possible(worths: Sequence[Floats], savings: Floats, needed: float) -> float:
    """Return a loss that no choice is below that saves what is needed.

    Args:
        worths: see `least_loss`.
        savings: of each group the most that pruning one structure saves.
        needed: what has to be saved.
    """
    worth = np.concatenate([*worths, np.empty(0)])
    saving = np.concatenate(
        [np.full(len(w), s) for w, s in zip(worths, savings, strict=True)] + [np.empty(0)]
    )
    worth, saving = worth[saving > 0], saving[saving > 0]
    order = np.argsort(worth / saving, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(saving[order])[:-1]])
    share = np.clip((needed - before) / saving[order], 0.0, 1.0)
    taken = share > 0
    return float(share[taken] @ worth[order][taken])


class _Problem:
    def __init__(self, lost: list[Floats], most: Counts, cost: CostFunction, budget: float) -> None:
        self.lost, self.most, self.cost, self.budget = lost, most, cost, budget
        self.groups = np.arange(len(most))
        # Padded with infinity, so that losses of many combinations are one look-up.
        self.table = np.full((len(most), int(most.max()) + 1), np.inf)
        for g, values in enumerate(lost):
            self.table[g, : len(values)] = values

    def found(self, pruned: Counts, *, exact: bool) -> Found:
        lost = float(self.loss(pruned))
        return Found(pruned, lost if lost < _ENDLESS else math.inf, exact)

    def loss(self, pruned: Counts) -> Floats:
        return np.asarray(self.table[self.groups, pruned].sum(axis=-1))

    def completed(self, pruned: Counts, group: Counts) -> tuple[Counts, NDArray[np.bool_]]:
        """Prune of one group of each combination as few as the budget allows, and say where it can be met.

        Args:
            pruned: combinations, (K, groups).
            group: the group of each, (K,).
        """
        rows = np.arange(len(pruned))
        pruned = pruned.copy()
        low, high = np.full(len(pruned), -1), self.most[group]
        pruned[rows, group] = high
        feasible = self.cost(pruned.astype(np.float64)) <= self.budget
        while (high - low > 1).any():
            middle = (low + high) // 2
            pruned[rows, group] = np.maximum(middle, 0)
            within = (self.cost(pruned.astype(np.float64)) <= self.budget) & (middle >= 0)
            active = high - low > 1
            high = np.where(active & within, middle, high)
            low = np.where(active & ~within, middle, low)
        pruned[rows, group] = high
        return pruned, feasible

    def by_trial(self, last: int) -> Counts:
        """Return the best of all combinations; the number of one group follows from the others."""
        others = [g for g in self.groups if g != last]
        shape = tuple(int(self.most[g]) + 1 for g in others)
        best, least = self.most, math.inf
        for start in range(0, math.prod(shape), 100_000):
            places = np.arange(start, min(start + 100_000, math.prod(shape)))
            pruned = np.zeros((len(places), len(self.most)), dtype=np.int64)
            if others:
                pruned[:, others] = np.stack(np.unravel_index(places, shape), axis=1)
            pruned, feasible = self.completed(pruned, np.full(len(places), last))
            losses = np.where(feasible, self.loss(pruned), np.inf)
            if losses.min() < least:
                best, least = pruned[losses.argmin()], float(losses.min())
        return best

    def by_multipliers(self) -> Counts:
        """Return the best of what is optimal group by group for prices of the cost, down to the lowest that does."""
        finite = sum(float(values[values < _ENDLESS][-1]) for values in self.lost)
        scale = finite / max(float(self.cost(np.zeros(len(self.most)))), 1e-300)
        best, least = self.most, float(self.loss(self.most))
        pruned, (low, high) = np.zeros_like(self.most), _PRICES
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            tried = self._optimal(pruned, scale * 10**middle)
            if float(self.cost(tried.astype(np.float64))) <= self.budget:
                high = middle
                if self.loss(tried) < least:
                    best, least = tried, float(self.loss(tried))
            else:
                low, pruned = middle, tried
        return best

    def _optimal(self, pruned: Counts, price: float) -> Counts:
        for _ in range(20):
            before = pruned.copy()
            for g in self.groups:
                tried = np.repeat(pruned[None], self.most[g] + 1, axis=0)
                tried[:, g] = np.arange(self.most[g] + 1)
                total = self.lost[g] + price * self.cost(tried.astype(np.float64))
                pruned = tried[int(total.argmin())]
            if np.array_equal(before, pruned):
                break
        return pruned

    def by_steps(self) -> Counts:
        """Return where one goes that always takes the least worth per saving, in steps of about a hundredth."""
        pruned = np.zeros_like(self.most)
        now = float(self.cost(pruned.astype(np.float64)))
        while now > self.budget:
            step = np.maximum(1, (self.most - pruned) // 100)
            tried = np.minimum(pruned + np.diag(step), self.most)
            open_ = (tried != pruned).any(axis=1)
            saved = np.maximum(now - self.cost(tried.astype(np.float64)), 0.0)
            worth = self.loss(tried) - self.loss(pruned)
            ratio = np.where(open_, worth / np.maximum(saved, 1e-12 * now), np.inf)
            pruned = tried[int(ratio.argmin())]
            now = float(self.cost(pruned.astype(np.float64)))
        return pruned

    def improved(self, pruned: Counts) -> Counts:
        """Change one group, and another so that the budget is met, until no such change gives up less."""
        for _ in range(_ROUNDS):
            before = float(self.loss(pruned))
            for g in self.groups:
                numbers = np.unique(np.clip(pruned[g] + np.array(_STEPS), 0, self.most[g]))
                others = self.groups[self.groups != g]
                tried = np.repeat(pruned[None], len(numbers) * len(others), axis=0)
                tried[:, g] = np.tile(numbers, len(others))
                tried, feasible = self.completed(tried, np.repeat(others, len(numbers)))
                losses = np.where(feasible, self.loss(tried), np.inf)
                if losses.min() < self.loss(pruned):
                    pruned = tried[int(losses.argmin())]
            if float(self.loss(pruned)) >= before:
                break
        return pruned
