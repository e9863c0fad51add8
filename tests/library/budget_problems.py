"""Small problems of widths: what structures are worth, and costs as those of chains of layers."""

import itertools

import numpy as np


class ChainProblem:
    """Groups of structures, each the input of the next one's layer; groups may share a layer's two sides."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.most = self.random.integers(1, 7, self.random.integers(2, 5))
        self.worths = [np.sort(self.random.gamma(0.5, 5.0, n)) for n in self.most]
        self.weights = self.random.integers(1, 50, len(self.most) + 1)
        self.square = self.random.integers(0, 10)
        highest, least = (float(self.cost(x)) for x in (np.zeros(len(self.most)), self.most))
        self.budget = least + self.random.random() * (highest - least)

    def cost(self, pruned) -> np.ndarray:
        kept = self.most + 1 - np.asarray(pruned, dtype=float)
        total = (
            self.weights[0] * kept[..., 0]
            + self.weights[-1] * kept[..., -1]
            + self.square * kept[..., 0] ** 2
        )
        for i, weight in enumerate(self.weights[1:-1]):
            total = total + weight * kept[..., i] * kept[..., i + 1]
        return total

    def least(self) -> float:
        """What is given up at the least, by trying everything."""
        choices = np.array(list(itertools.product(*(range(n + 1) for n in self.most))))
        lost = sum(np.concatenate([[0], np.cumsum(w)])[choices[:, g]] for g, w in enumerate(self.worths))
        return float(lost[self.cost(choices) <= self.budget].min())
