"""One step of training, on its own or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmrs import processes
from bmrs.data import Batch
from bmrs.noise.divergence import kl_divergence
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.cuda_graph import GraphedStep
from bmrs.training.finite import FiniteWatch

Step: TypeAlias = Callable[[Batch, float], tuple[Tensor, ...]]
"""Of this process's part of a batch and the weight of its mean; see `bmrs.processes.part_of`."""
DataLoss: TypeAlias = Callable[[Tensor, Batch], Tensor]
"""Of the logits of a batch and the batch, to the mean loss in nats."""
Update: TypeAlias = Callable[[Tensor], Tensor]
"""Of the data loss: goes one step down and returns the KL term in nats, detached.

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
        config: the options; with `cuda_graph` the step is captured and replayed.
        watch: is asked for the step's probes.
        data_loss: what is to become small.
        update: how.

    Raises:
        ValueError: with several processes, the model has a batch norm of each process's own.
    """
    processes.check_statistics(model)

    def step(batch: Batch, weight: float) -> tuple[Tensor, ...]:
        logits = model(batch.images)
        loss = data_loss(logits, batch)
        kl = update(loss * weight)
        probes = watch.probes(loss + kl)
        correct = (logits.argmax(dim=1) == batch.labels).double().mean()
        return weight * torch.stack([loss.detach().double(), kl.double(), correct]), probes

    return GraphedStep(step, config.settings.batch_size) if config.cuda_graph else step


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Return the data loss of plain training."""
    return F.cross_entropy(logits, batch.labels)


def update_of(state: TrainingState, config: TrainConfig, dataset_size: int, *, noise: bool) -> Update:
    """Return the step of a state's optimizer, with noise on the loss plus the KL term that the options weigh."""

    def update(loss: Tensor) -> Tensor:
        kl = torch.zeros_like(loss)
        if noise:
            assert config.kl_weight is not None, "filled in for the recipe that has it"
            kl = kl_divergence(state.model, weight=config.kl_weight, dataset_size=dataset_size)
        state.optimizer.zero_grad()
        (loss + kl).backward()
        processes.average_gradients(state.model.parameters())
        state.optimizer.step()
        return kl.detach()

    return update
