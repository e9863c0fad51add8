"""One step of training, on its own or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmrs import processes
from bmrs.data import Batch
from bmrs.noise.divergence import kl_divergence
from bmrs.pruning.losses import backward
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.cuda_graph import GraphedStep
from bmrs.training.finite import FiniteWatch

Step: TypeAlias = Callable[[Batch, float], tuple[Tensor, ...]]
"""Of this process's part of a batch and the weight of its mean; see `bmrs.processes.part_of`."""
DataLoss: TypeAlias = Callable[[Tensor, Batch], Tensor]
"""Of the logits of a batch and the batch, to the mean loss in nats."""
Update: TypeAlias = Callable[[Iterable[Tensor]], Tensor]
"""Of the summands of the data loss: goes one step down and returns the KL term in nats, detached.

A summand is computed once it is asked for.

With several processes the step is that of their average loss; the gradients that are left are averages too.
"""


def new_step(
    model: nn.Module,
    config: TrainConfig,
    watch: FiniteWatch,
    *,
    data_loss: DataLoss,
    update: Update,
) -> Step:
    """Return a function that trains on a batch and waits for nothing on the device.

    It returns means over the batch, float64 of shape (3,): the data loss and the KL term in nats and the share of
    images that were classified rightly, with noise by the noisy network; and what `watch` is to record. With several
    processes each trains on its part of the batch, and the average over the processes is the mean over the batch.

    Args:
        model: the network.
        config: the options; with `cuda_graph` the step is captured and replayed, with `accumulate` a batch is trained
            on in parts.
        watch: is asked for the step's probes.
        data_loss: what is to become small.
        update: how.

    Raises:
        ValueError: with several processes, the model has a batch norm of each process's own.
    """
    processes.check_statistics(model)
    network = torch.compile(model) if config.compile else model
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def outcome(part: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean loss and the number of images that are classified rightly."""
        images = part.images.contiguous(memory_format=layout)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = network(images)
        return data_loss(logits.float(), part), (logits.argmax(dim=1) == part.labels).sum()

    def step(batch: Batch, weight: float) -> tuple[Tensor, ...]:
        losses, right = [], []

        def summands() -> Iterator[Tensor]:
            for part in _parts(batch, config.accumulate):
                share = len(part.labels) / len(batch.labels)
                loss, its_right = outcome(part)
                losses.append(share * loss.detach())
                right.append(its_right)
                yield loss * (share * weight)

        kl = update(summands())
        loss = torch.stack(losses).sum()
        probes = watch.probes(loss + kl)
        correct = torch.stack(right).sum().double() / len(batch.labels)
        return weight * torch.stack([loss.double(), kl.double(), correct]), probes

    return GraphedStep(step, config.settings.batch_size) if config.cuda_graph else step


def _parts(batch: Batch, count: int) -> Iterator[Batch]:
    count = min(count, len(batch.labels))  # empty parts would take time and memory
    if count == 1:
        yield batch
        return
    for images, labels in zip(
        batch.images.tensor_split(count), batch.labels.tensor_split(count), strict=True
    ):
        yield Batch(images, labels)


def cross_entropy(config: TrainConfig) -> DataLoss:
    """Return the data loss of plain training."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits, batch.labels, label_smoothing=config.label_smoothing)

    return loss


def update_of(
    state: TrainingState,
    config: TrainConfig,
    dataset_size: int,
    *,
    noise: bool,
    kl_factor: Tensor | None = None,
) -> Update:
    """Return the step of a state's optimizer, with noise on the loss plus the KL term that the options weigh.

    Args:
        state: what is trained.
        config: the options.
        dataset_size: number of training images.
        noise: whether there is a KL term.
        kl_factor: a factor on it, read anew at each step; a tensor, so that a CUDA graph reads it too.
    """

    def update(losses: Iterable[Tensor]) -> Tensor:
        kl = torch.zeros((), device=state.device)
        if noise:
            assert config.kl_weight is not None, "filled in for the recipe that has it"
            kl = kl_divergence(state.model, weight=config.kl_weight, dataset_size=dataset_size)
            kl = kl if kl_factor is None else kl_factor * kl
        state.optimizer.zero_grad()
        backward(losses, kl)
        processes.average_gradients(state.model.parameters())
        state.optimizer.step()
        return kl.detach()

    return update
