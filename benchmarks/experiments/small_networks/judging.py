"""Post-training pruning: one trained network, judged by every criterion at its own stopping point and all along.

Nothing here trains with noise. For each criterion structures go one by one, least worth first, and a few dozen networks
on the way are evaluated. Each structure is also masked alone, which is what the criteria try to foresee.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bmrs
from benchmarks.experiments.deadline import Deadline
from benchmarks.experiments.peers.budget import Chain
from benchmarks.experiments.small_networks import scores
from benchmarks.experiments.small_networks.narrow import narrowed
from benchmarks.experiments.small_networks.scores import RANKINGS, RULES, Worths
from benchmarks.experiments.small_networks.trunk import CPU, Row, Trunk
from bmrs.data import Dataset, TensorSplit
from bmrs.noise.lookup import noise_layers
from bmrs.training import TrainConfig
from bmrs.training.evaluation import accuracy, quality
from bmrs.training.fit import fit, fitting_state

POINTS = 40
"""Networks along each curve."""

IMAGES = 10_000
"""Training images on which the change of the training loss is measured."""

P1 = range(1, 21)
"""Bits at which BMRS_U is asked."""


class Outcome(NamedTuple):
    """A masked network.

    Attributes:
        pruned: structures that are gone.
        compression: the paper's, in percent.
        accuracy: on the test images, in percent.
        loss: mean cross entropy of the test images, in nats.
        train_loss: that of the first `IMAGES` training images.
    """

    pruned: int
    compression: float
    accuracy: float
    loss: float
    train_loss: float

    def rounded(self) -> list[float]:
        """Return what is written down."""
        return [
            self.pruned,
            round(self.compression, 3),
            round(self.accuracy, 2),
            round(self.loss, 5),
            round(self.train_loss, 6),
        ]


@dataclass(frozen=True, eq=False)
class Judging:
    """A trained network and what its pruned versions are measured on."""

    model: nn.Sequential
    data: Dataset

    @functools.cached_property
    def chain(self) -> Chain:
        """The network's layers, which tell what widths take."""
        return Chain.of(self.model, self.data.test.examples(1))

    @functools.cached_property
    def train_part(self) -> TensorSplit:
        """Training images on which the change of the loss is measured."""
        return TensorSplit(*next(self.data.train.in_order(IMAGES)))

    @functools.cached_property
    def worths(self) -> dict[str, Worths]:
        """The worth of every structure to every criterion."""
        return scores.worths(self.model, self.data.train, seed=0)

    def compression(self, kept: Sequence[Tensor]) -> float:
        """Return the paper's compression in percent, from the widths alone."""
        widths = [int(layer.sum()) for layer in kept]
        full = self.chain.cost(self.chain.widths).parameters + 2 * sum(self.chain.widths)
        return float(100 * (1 - (self.chain.cost(widths).parameters + 2 * sum(widths)) / full))

    def outcome(self, kept: Sequence[Tensor]) -> Outcome:
        """Measure the network with these structures alone."""
        network = narrowed(self.model, kept)
        test, train = quality(network, self.data.test), quality(network, self.train_part)
        gone = sum(int((~layer).sum()) for layer in kept)
        return Outcome(gone, self.compression(kept), 100 * test.accuracy, test.nll, train.nll)

    def curve(self, worths: Worths) -> list[Outcome]:
        """Measure networks on the way from all structures to one of each layer."""
        most = scores.most_prunable(worths)
        counts = sorted({round(most * step / (POINTS - 1)) for step in range(POINTS)})
        return [self.outcome(scores.kept_after(worths, count)) for count in counts]

    def stop(self, criterion: str) -> list[Tensor]:
        """Return what a criterion keeps; a ranking keeps as many as the rule that lends it the number."""
        if criterion in RULES:
            return scores.kept_by(self.model, criterion)
        gone = sum(int((~layer).sum()) for layer in self.stop(scores.GIVEN_BY))
        return scores.kept_after(self.worths[criterion], gone)

    @torch.no_grad()
    def alone(self) -> list[Tensor]:
        """Return by how much the mean training loss, in nats, rises when each structure alone is masked."""
        images, labels = self.train_part.images, self.train_part.labels
        stages = list(self.model.eval())
        changes = []
        values = images
        base = _loss(self.model, values, labels)
        for number, stage in enumerate(stages):
            values = torch.cat([stage(part) for part in values.split(2000)])
            if isinstance(stage, bmrs.NoiseLayer):
                rest = nn.Sequential(*stages[number + 1 :])
                change = []
                for structure in range(stage.num_structures):
                    own = values[:, structure].clone()
                    values[:, structure] = 0
                    change.append(_loss(rest, values, labels) - base)
                    values[:, structure] = own
                changes.append(torch.tensor(change))
        return changes


def judge(trunk: Trunk, data: Dataset, *, tune_epochs: int) -> Row:
    """Judge a trained network by all criteria and return the row, with every curve.

    Args:
        trunk: what was trained.
        data: preprocessed images.
        tune_epochs: epochs in which the weights of each compacted network are trained, without noise.
    """
    started = time.perf_counter()
    judging = Judging(trunk.load(data), data)
    deadline = Deadline(trunk.conditions.deadline)
    layers = noise_layers(judging.model)
    found: dict[str, Any] = {}
    nothing = [torch.ones_like(layer.mask) for layer in layers.values()]
    full_tuned = _tuned(judging.model, nothing, trunk, data, tune_epochs)
    tuned = {_text(nothing): full_tuned}
    for criterion in (*RULES, *RANKINGS):
        deadline.check()
        kept = judging.stop(criterion)
        outcome = judging.outcome(kept)
        if _text(kept) not in tuned:
            tuned[_text(kept)] = _tuned(judging.model, kept, trunk, data, tune_epochs)
        found[criterion] = {
            "stop": outcome.rounded(),
            "widths": [int(layer.sum()) for layer in kept],
            "tuned_accuracy": round(100 * tuned[_text(kept)], 2),
        }
        if criterion != "bmrs-n":  # has the order of the one with the authors' tolerance
            curve = judging.curve(judging.worths[criterion])
            found[criterion]["curve"] = [point.rounded() for point in curve]
    alone = judging.alone()
    return {
        **trunk.subject._asdict(),
        "settings": trunk.config.settings._asdict(),
        "tune_epochs": tune_epochs,
        "full": judging.outcome(nothing).rounded(),
        "full_tuned_accuracy": round(100 * full_tuned, 2),
        "criteria": found,
        "p1": [[p1, *_with_p1(judging, p1).rounded()] for p1 in P1],
        "layers": list(layers),
        "structures": {
            "mu": [_numbers(layer.mu) for layer in layers.values()],
            "log_sigma": [_numbers(layer.log_sigma) for layer in layers.values()],
            "l2": [_numbers(each) for each in judging.worths["l2"]],
            "gradient": [_numbers(each) for each in judging.worths["gradient"]],
            "loss_alone": [_numbers(each) for each in alone],
        },
        "seconds": round(time.perf_counter() - started, 1),
    }


def _text(kept: Sequence[Tensor]) -> str:
    return str([layer.tolist() for layer in kept])


def _with_p1(judging: Judging, p1: int) -> Outcome:
    model = copy.deepcopy(judging.model)
    bmrs.prune(model, bmrs.BMRSUniform(p1=p1))
    return judging.outcome([layer.kept for layer in noise_layers(model).values()])


def _tuned(model: nn.Module, kept: Sequence[Tensor], trunk: Trunk, data: Dataset, epochs: int) -> float:
    """Return the test accuracy of the compacted network after its weights were trained, in [0, 1]."""
    masked = copy.deepcopy(model)
    scores.set_kept(masked, kept)
    config = TrainConfig(
        data=trunk.subject.data,
        data_dir=trunk.config.data_dir,
        model=trunk.subject.network,
        seed=trunk.subject.seed,
        device="cpu",
        batch_size=trunk.config.settings.batch_size,
        lr=trunk.config.settings.lr,
    ).resolved()
    state = fitting_state(bmrs.compact(masked, data.train.examples(2)), config, CPU)
    fit(
        state,
        data,
        config,
        epochs=epochs,
        phase="fine-tune",
        save=lambda state: None,
        progress=Deadline(trunk.conditions.deadline),
    )
    return accuracy(state.model, data.test)


def _loss(model: nn.Module, values: Tensor, labels: Tensor) -> float:
    logits = torch.cat([model(part) for part in values.split(2000)])
    return float(F.cross_entropy(logits.double(), labels))


def _numbers(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
