"""Every way to a smaller ResNet-20 for CIFAR-10, in a stated fraction of the training that it usually gets."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

import bmrs
from benchmarks.experiments.peers.comparison import Built, Comparison, Subject, Way, in_rounds
from benchmarks.rivals import torch_pruning
from bmrs.compaction.costs import flops, num_parameters
from bmrs.data import Dataset, TensorSplit
from bmrs.training import TrainConfig, recipe
from bmrs.training.evaluation import accuracy

SHARES = {"50 %": 0.5, "25 %": 0.25}
"""Of the dense network's FLOPs."""

IMAGES = 10_000
"""Training images, of the 40,000 that are not left out for validation."""

RIVALS = {
    "L2, uniform": ("L2", False, False),
    "Taylor, uniform": ("Taylor", False, False),
    "random, uniform": ("random", False, False),
    "L2, global": ("L2", True, False),
    "Taylor, global": ("Taylor", True, False),
    "L2, in rounds": ("L2", False, True),
    "Taylor, in rounds": ("Taylor", False, True),
}
"""Torch-Pruning's importance, whether layers are compared, and whether it prunes and trains by turns."""


def config_of(subject: Subject, data_dir: str | None, **epochs: int) -> TrainConfig:
    """Return what `bmrs train` would be told: the defaults of ResNets, but for a schedule that a CPU can do.

    In so few epochs each counts. Posteriors get one of them, at a rate at which they settle well enough, and weights
    start from refitted ones; both were chosen on validation images of seed 0.

    Args:
        subject: what is pruned.
        data_dir: folder of the official files.
        epochs: ``epochs``, ``noise_epochs`` or ``fine_tune_epochs``, where they are to be other than usual.
    """
    schedule: dict[str, Any] = {"epochs": 8, "noise_epochs": 1, "fine_tune_epochs": 7} | epochs
    return TrainConfig(
        data=subject.data,
        data_dir=data_dir,
        model=subject.network,
        seed=subject.seed,
        device="cpu",
        batch_size=64,
        noise_lr=1e-1,
        fine_tune_from="refitted",
        **schedule,
    ).resolved()


def first_images(data: Dataset) -> Dataset:
    """Return the data with as many training images as are used here."""
    train = data.train
    assert isinstance(train, TensorSplit), "CIFAR-10 is held in memory"
    train = TensorSplit(train.images[:IMAGES], train.labels[:IMAGES], train.prepare)
    return Dataset(data.name, data.num_classes, train, data.validation, data.test, image_size=data.image_size)


class ResidualComparison(Comparison):
    """All ways for a residual network.

    Torch-Pruning narrows all channels, of blocks and of the stream between them; this recipe has its noise on the inner
    channels of blocks alone. All take the FLOPs of Torch-Pruning's uniform network, and this recipe no more parameters
    either.
    """

    def ways(self) -> Iterator[tuple[str, str, Way]]:
        """Return size, name and way of each network, the most informative ones first."""
        yield "dense", "trained", lambda: Built(self.trained, {}, self.config.settings.epochs)
        for size in SHARES:
            yield size, "bmrs", functools.partial(self._bmrs, size)
            for method, (criterion, everywhere, rounds) in RIVALS.items():
                yield size, method, functools.partial(self._rival, size, criterion, everywhere, rounds)
            yield size, "scratch", functools.partial(self._scratch, size)
        yield "dense", "dense", self.dense

    @functools.cached_property
    def layers(self) -> Sequence[str]:
        """Names of the convolutions."""
        return [name for name, module in self.trained.named_modules() if isinstance(module, nn.Conv2d)]

    def _bmrs(self, size: str) -> Built:
        noisy = self._budgeted(size)
        examples = recipe.refitting_examples(self.data)
        before = {
            "pruned": accuracy(bmrs.compact(noisy, examples), self.data.test),
            "refitted": accuracy(bmrs.compact(noisy, examples, refit_to=self.trained), self.data.test),
        }
        start = recipe.start_of_fine_tuning(noisy, self.trained, self.config, self.data)
        epochs = recipe.total_epochs(self.config, self.data)
        return Built(self.fit(start, self.config.settings.fine_tune_epochs), before, epochs)

    def _scratch(self, size: str) -> Built:
        same = bmrs.compact(self._budgeted(size), self.data.train.examples(2), expected_noise=False)
        epochs = recipe.total_epochs(self.config, self.data)
        return Built(self.fit(recipe.untrained_copy(same, self.config), epochs), {}, epochs)

    def _rival(self, size: str, criterion: str, everywhere: bool, rounds: bool) -> Built:
        before = {}
        epochs = recipe.total_epochs(self.config, self.data)
        after = epochs - self.config.settings.epochs

        def train(model: nn.Module, epochs: int) -> None:
            if not rounds:
                before["pruned"] = accuracy(model, self.data.test)
            self.fit_in_place(model, epochs)

        model = torch_pruning.pruned_to(
            self.trained,
            flops(self._uniform(size), self.data.train.examples(1)),
            criterion,
            self.data.train,
            everywhere=everywhere,
            seed=self.subject.seed,
            epochs=in_rounds(after) if rounds else (after,),
            train=train,
        )
        return Built(model, before, epochs)

    @functools.cache  # noqa: B019 - as long as the comparison lives
    def _uniform(self, size: str) -> nn.Module:
        """Torch-Pruning's uniform network, whose FLOPs all others are to take."""
        example = self.data.train.examples(1)
        return torch_pruning.pruned_to(
            self.trained,
            SHARES[size] * flops(self.trained, example),
            "L2",
            self.data.train,
            everywhere=False,
            seed=0,
            epochs=(0,),
            train=lambda model, epochs: None,
        )

    @functools.cache  # noqa: B019 - as long as the comparison lives
    def _budgeted(self, size: str) -> nn.Module:
        """The network with noise, pruned to parameters and FLOPs of the uniform one."""
        example = self.data.train.examples(1)
        uniform = self._uniform(size)
        noisy = copy.deepcopy(self.noisy)
        prune_to = functools.partial(
            bmrs.prune_to,
            noisy,
            self.config.build_criterion(),
            example_inputs=example,
            examples=recipe.refitting_examples(self.data),
        )
        prune_to(parameters=num_parameters(uniform))
        prune_to(flops=flops(uniform, example))
        return noisy
