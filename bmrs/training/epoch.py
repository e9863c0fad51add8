"""One epoch of training, whatever a step does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bmrs import processes
from bmrs.data import Batch, Split
from bmrs.data.augmentation import augment
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
    state: TrainingState,
    split: Split,
    config: TrainConfig,
    watch: FiniteWatch,
    progress: Progress,
) -> dict[str, float]:
    """Train on all images once and return means over them; with noise, accuracy is that of the noisy network.

    Several processes train together; the order of the images and the result are the same on all of them.

    Args:
        step: trains on a batch.
        state: whose next epoch this is; its generator draws the order of the images and how they are augmented.
        split: the images.
        config: the options.
        watch: looks for NaN.
        progress: told about steps.
    """
    epoch = len(state.history) + 1
    totals = torch.zeros(3, dtype=torch.float64, device=split.device)
    seen = 0
    wholes = batches_of(state, split, config)
    parts = [processes.part_of(whole) for whole in wholes]
    batches = _augmented(split.batches(own for own, _ in parts), len(wholes), state, config)
    for number, (batch, (_, weight), whole) in enumerate(zip(batches, parts, wholes, strict=True), start=1):
        means, probes = step(batch, weight)
        watch.record(probes)
        seen += len(whole)
        totals += len(whole) * means
        if number % CHECK_EVERY == 0 or number == len(wholes):
            watch.check(epoch)
            nll, kl, train_accuracy = processes.average(totals / seen).tolist()
            progress.step(epoch=epoch, step=number, steps=len(wholes), loss=nll + kl, kl=kl)
    watch.check_parameters(epoch)
    return {"loss": nll + kl, "nll": nll, "kl": kl, "train_accuracy": train_accuracy}


def _augmented(
    batches: Iterator[Batch], count: int, state: TrainingState, config: TrainConfig
) -> Iterator[Batch]:
    if config.settings.augmentation == "none":
        yield from batches
        return
    # A seed for each batch, drawn before the first: all processes have drawn alike then, whatever their parts are.
    seeds = torch.randint(2**62, (count,), generator=state.order).tolist()
    for batch, seed in zip(batches, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed + processes.rank())
        shift = batch.images.shape[-1] // 8
        flip = config.settings.augmentation == "crop-flip"
        yield batch._replace(images=augment(batch.images, padding=shift, flip=flip, generator=generator))
