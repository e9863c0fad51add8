"""One epoch of training, whatever a step does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bmrs import processes
from bmrs.data import Split
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.finite import FiniteWatch
from bmrs.training.training_step import Step

CHECK_EVERY = 50
"""Steps between two looks at the device, for the progress report and for NaN."""


class Progress(Protocol):
    """What is told while training goes on."""

    def step(self, *, epoch: int, step: int, steps: int, loss: float, kl: float) -> None:
        """Take note of a step; `loss` and `kl` are means over the epoch so far, in nats."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Take note of a finished and saved epoch with these metrics."""


def batches_of(state: TrainingState, split: Split, config: TrainConfig) -> Sequence[Tensor]:
    """Return the indices of an epoch's batches, in random order; the last one may be smaller."""
    return torch.randperm(len(split), generator=state.order).split(config.settings.batch_size)


def train_epoch(
    step: Step,
    split: Split,
    indices: Sequence[Tensor],
    epoch: int,
    watch: FiniteWatch,
    progress: Progress,
) -> dict[str, float]:
    """Train on all images once and return means over them; with noise, accuracy is that of the noisy network.

    Several processes train together; indices and result are the same on all of them.

    Args:
        step: trains on a batch.
        split: the images.
        indices: those of each batch, as `batches_of` gives them.
        epoch: the epoch's number, from 1 on.
        watch: looks for NaN.
        progress: told about steps.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=split.device)
    seen = 0
    parts = [processes.part_of(batch) for batch in indices]
    batches = split.batches(own for own, _ in parts)
    for number, (batch, (_, weight), whole) in enumerate(zip(batches, parts, indices, strict=True), start=1):
        means, probes = step(batch, weight)
        watch.record(probes)
        seen += len(whole)
        totals += len(whole) * means
        if number % CHECK_EVERY == 0 or number == len(indices):
            watch.check(epoch)
            nll, kl, train_accuracy = processes.average(totals / seen).tolist()
            progress.step(epoch=epoch, step=number, steps=len(indices), loss=nll + kl, kl=kl)
    watch.check_parameters(epoch)
    return {"loss": nll + kl, "nll": nll, "kl": kl, "train_accuracy": train_accuracy}
