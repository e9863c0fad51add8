"""What comparisons of one network, one data set and one seed have in common: every way has as many epochs."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from benchmarks.experiments.deadline import Deadline
from bmrs.compaction.costs import flops, num_parameters
from bmrs.data import DataName, Dataset
from bmrs.training import TrainConfig, recipe
from bmrs.training.checkpoint import TrainingState
from bmrs.training.evaluation import accuracy
from bmrs.training.fit import fit, fitting_state

CPU = torch.device("cpu")


class Subject(NamedTuple):
    """A network on a data set, trained from a seed, which all ways prune."""

    data: DataName
    network: str
    seed: int


Row = dict[str, Any]


class Built(NamedTuple):
    """A network that has been made in one of the ways.

    Attributes:
        model: as trained to the end.
        before: test accuracies by name before any weight was trained after pruning.
        epochs: of training in all.
    """

    model: nn.Module
    before: dict[str, float]
    epochs: int


Way: TypeAlias = Callable[[], Built | None]
"""Trains a network; None if there is none of that size."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """All ways for one subject, which a comparison of a kind of network names.

    Attributes:
        subject: What is pruned.
        config: The options of the recipe; the others get as many epochs.
        data: Preprocessed images.
        deadline: Ends a training that is not done by then.
        methods: The ways that are wanted; None for all.
    """

    subject: Subject
    config: TrainConfig
    data: Dataset
    deadline: Deadline
    methods: Sequence[str] | None = None

    def rows(self, done: Sequence[Row]) -> Iterator[Row]:
        """Train what is not done yet, and yield a row for each network, the most informative ones first."""
        finished = {(row["size"], row["method"]) for row in done}
        for size, method, build in self.ways():
            if (size, method) in finished or (self.methods is not None and method not in self.methods):
                continue
            started = time.perf_counter()
            built = build()
            if built is None:
                continue
            yield {
                **self.about(size, method, built.model),
                "epochs": built.epochs,
                **{f"{name}_accuracy": value for name, value in built.before.items()},
                "accuracy": accuracy(built.model, self.data.test),
                "validation_accuracy": accuracy(built.model, self.data.validation),
                "seconds": round(time.perf_counter() - started, 2),
            }

    def about(self, size: str, method: str, model: nn.Module) -> Row:
        """Return what is said of each network that is compared."""
        return {
            **self.subject._asdict(),
            "size": size,
            "method": method,
            "settings": self.config.settings._asdict(),
            "widths": [len(model.get_submodule(name).weight) for name in self.layers],  # type: ignore[arg-type]
            "parameters": num_parameters(model),
            "flops": flops(model, self.data.test.examples(1)),
        }

    @property
    def layers(self) -> Sequence[str]:
        """Names of the layers whose outputs can be pruned."""
        raise NotImplementedError

    def ways(self) -> Iterator[tuple[str, str, Way]]:
        """Return size, name and way of each network."""
        raise NotImplementedError

    @functools.cached_property
    def trained(self) -> nn.Module:
        """The network that all pruning starts from."""
        return self.fit(recipe.untrained(self.config, self.data, CPU), self.config.settings.epochs)

    @functools.cached_property
    def noisy(self) -> nn.Module:
        """The trained network with learned posteriors."""
        state = recipe.noisy_state(self.trained, self.config, self.data, CPU)
        recipe.learn_noise(state, self.data, self.config, save=nothing, progress=self.deadline)
        return state.model

    def dense(self) -> Built:
        """Return the dense network, trained for all epochs."""
        epochs = recipe.total_epochs(self.config, self.data)
        return Built(self.fit(recipe.untrained(self.config, self.data, CPU), epochs), {}, epochs)

    def fit(self, model: nn.Module, epochs: int) -> nn.Module:
        """Return a copy of a network, trained for so many epochs."""
        model = copy.deepcopy(model)
        self.fit_in_place(model, epochs)
        return model

    def fit_in_place(self, model: nn.Module, epochs: int) -> None:
        """Train a network for so many epochs, with a schedule of its own."""
        state = fitting_state(model, self.config, CPU)
        fit(
            state,
            self.data,
            self.config,
            epochs=epochs,
            phase="fit",
            save=nothing,
            progress=self.deadline,
        )


def in_rounds(epochs: int) -> tuple[int, ...]:
    """Return how epochs are shared between three rounds: a quarter each, and the rest after the last one."""
    early = [max(1, epochs // 4)] * min(2, epochs - 1)
    return (*early, epochs - sum(early))


def nothing(state: TrainingState) -> None:
    """Keep no checkpoint."""
