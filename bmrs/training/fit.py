"""Training of a network's weights: Adam, a learning rate that falls as a cosine, and a teacher if there is one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmrs import processes
from bmrs.data import Batch, Dataset
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.epoch import Progress, batches_of, train_epoch
from bmrs.training.evaluation import accuracy
from bmrs.training.finite import FiniteWatch
from bmrs.training.training_step import DataLoss, cross_entropy, new_step

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""

SOFTENING = 2.0
"""What the logits are divided by before the answers of teacher and network are compared."""


def fitting_state(model: nn.Module, config: TrainConfig, device: torch.device) -> TrainingState:
    """Return a network with a fresh optimizer, whose batches and random draws depend on the seed alone."""
    torch.manual_seed(config.seed)
    graph = device.type == "cuda" and config.cuda_graph
    rate = config.settings.lr
    optimizer = torch.optim.Adam(
        model.train().requires_grad_(True).parameters(),
        # A graph reads the learning rate where it is.
        lr=torch.tensor(rate, device=device) if graph else rate,
        fused=True,
        capturable=graph,
    )
    return TrainingState(model, optimizer, order=torch.Generator().manual_seed(config.seed))


def cosine(progress: float) -> float:
    """Return the learning rate in units of `--lr`, from 2 to 0 after a warm-up, at a share of the steps in [0, 1)."""
    return (1 + math.cos(math.pi * progress)) * min(1.0, progress / WARM_UP)


def fit(
    state: TrainingState,
    data: Dataset,
    config: TrainConfig,
    *,
    epochs: int,
    phase: str,
    save: Callable[[TrainingState], None],
    progress: Progress,
    teacher: nn.Module | None = None,
) -> None:
    """Train the weights from the state's epoch to the last one.

    Args:
        state: where to start from; changed in place.
        data: preprocessed images on the model's device.
        config: the options.
        epochs: how many there are in all.
        phase: what the rows of metrics say that this is.
        save: called with the state after each epoch.
        progress: told about steps and epochs.
        teacher: a network whose answers to the same images are imitated, with the weight `config.distillation`.

    Raises:
        NonFiniteError: a NaN or an infinity turned up; its epoch is not saved.
    """
    watch = FiniteWatch(state.model)
    steps_an_epoch = math.ceil(len(data.train) / config.settings.batch_size)
    taken = len(state.history) * steps_an_epoch

    def update(loss: Tensor) -> Tensor:
        state.optimizer.zero_grad()
        loss.backward()
        processes.average_gradients(state.model.parameters())
        state.optimizer.step()
        return torch.zeros_like(loss.detach())

    data_loss = cross_entropy if teacher is None else _distillation(teacher, config)
    step = new_step(state.model, config, watch, data_loss=data_loss, update=update)

    def scheduled_step(batch: Batch, weight: float) -> tuple[Tensor, ...]:
        nonlocal taken
        taken += 1
        _set_learning_rate(state, config.settings.lr * cosine((taken - 0.5) / (epochs * steps_an_epoch)))
        return step(batch, weight)

    for epoch in range(len(state.history) + 1, epochs + 1):
        start = time.perf_counter()
        state.model.train()
        with watch:
            indices = batches_of(state, data.train, config)
            row = {"epoch": epoch, "phase": phase} | train_epoch(
                scheduled_step, data.train, indices, epoch, watch, progress
            )
        row["validation_accuracy"] = accuracy(state.model, data.validation)
        row["seconds"] = time.perf_counter() - start
        state.history.append(processes.of_first(row.copy))
        save(state)
        progress.epoch(row)
    state.model.eval()


def _distillation(teacher: nn.Module, config: TrainConfig) -> DataLoss:
    """Return the mean of the losses against labels and teacher (Hinton et al. 2015, arXiv 1503.02531)."""
    weight = config.distillation
    assert weight is not None, "filled in for the recipe that has it"
    teacher.eval()

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            answers = (teacher(batch.images) / SOFTENING).softmax(dim=1)
        softened = F.log_softmax(logits / SOFTENING, dim=1)
        imitation = F.kl_div(softened, answers, reduction="batchmean") * SOFTENING**2
        return (1 - weight) * F.cross_entropy(logits, batch.labels) + weight * imitation

    return loss


def _set_learning_rate(state: TrainingState, rate: float) -> None:
    for group in state.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
