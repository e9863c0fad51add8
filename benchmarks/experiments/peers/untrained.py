"""Every way to a smaller chain of layers where no weight is trained after pruning, and all are refitted alike."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

import bmrs
from benchmarks.experiments.peers.chains import RIVALS, SIZES, ChainComparison, masked_to
from benchmarks.experiments.peers.comparison import CPU, Row
from bmrs.noise.lookup import noise_layers
from bmrs.training import recipe
from bmrs.training.evaluation import accuracy

OF_THIS_RECIPE = ("bmrs", "bmrs, uniform")


class UntrainedComparison(ChainComparison):
    """What each way leaves is pruned from the same trained network, and refitted to it by `bmrs.compact`.

    That tells what the choice of structures and widths is worth from what refitting is, which rivals do not do.
    """

    def rows(self, done: Sequence[Row]) -> Iterator[Row]:
        """Prune and refit what is not done yet, and yield a row for each network."""
        finished = {(row["size"], row["method"]) for row in done}
        for size in SIZES:
            for method, choose in self._choices(size).items():
                if (size, method) in finished or (self.methods is not None and method not in self.methods):
                    continue
                self.deadline.check()
                started = time.perf_counter()
                model = choose()
                if model is None:
                    continue
                # Noise of others has learned nothing that could be expected.
                learned = method in OF_THIS_RECIPE
                pruned = bmrs.compact(model, self.examples, expected_noise=learned)
                refitted = bmrs.compact(model, self.examples, expected_noise=learned, refit_to=self.trained)
                yield {
                    **self.about(size, method, pruned),
                    "trained_accuracy": accuracy(self.trained, self.data.test),
                    "pruned_accuracy": accuracy(pruned, self.data.test),
                    "refitted_accuracy": accuracy(refitted, self.data.test),
                    "seconds": round(time.perf_counter() - started, 2),
                }

    def _choices(self, size: str) -> dict[str, Callable[[], nn.Module | None]]:
        """Return how each way chooses what stays, as the masks of a network with noise."""
        own = size == "own"
        choices: dict[str, Callable[[], nn.Module | None]] = {
            method: functools.partial(self.chosen, size, uniform=method != "bmrs")
            for method in OF_THIS_RECIPE
            if method == "bmrs" or not own
        }
        for method, (criterion, everywhere) in RIVALS.items():
            if not (own and everywhere):
                choices[method] = functools.partial(self._chosen_by_rival, size, criterion, everywhere)
        if not own:  # where that is what "random, uniform" is
            choices["random, this recipe's widths"] = functools.partial(self._random, size)
        return choices

    def _chosen_by_rival(self, size: str, criterion: str, everywhere: bool) -> nn.Module | None:
        stay = self.kept_by_rival(size, criterion, everywhere)
        if stay is None:
            return None
        model = copy.deepcopy(self._unlearned)
        for layer, indices in zip(noise_layers(model).values(), stay.values(), strict=True):
            layer.set_kept(torch.zeros_like(layer.mask).index_fill_(0, indices, True))
        return model

    def _random(self, size: str) -> nn.Module | None:
        widths = self.own_widths(size)
        if widths is None:
            return None
        generator = torch.Generator().manual_seed(self.subject.seed)
        scores = [torch.rand(width, generator=generator) for width in self.chain.widths]
        return masked_to(self._unlearned, scores, widths)

    @functools.cached_property
    def _unlearned(self) -> nn.Module:
        return recipe.noisy_state(self.trained, self.config, self.data, CPU).model
