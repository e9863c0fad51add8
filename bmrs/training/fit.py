"""Training of a network's weights: with a schedule, and an average of them and a teacher if there are any."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bmrs import processes
from bmrs.data import Batch, Dataset
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.epoch import Progress, train_epoch
from bmrs.training.evaluation import accuracy
from bmrs.training.finite import FiniteWatch
from bmrs.training.optimizers import new_optimizer, scheduled, set_learning_rate
from bmrs.training.training_step import DataLoss, cross_entropy, new_step, update_of

SOFTENING = 2.0
"""What the logits are divided by before the answers of teacher and network are compared."""


def fitting_state(model: nn.Module, config: TrainConfig, device: torch.device) -> TrainingState:
    """Return a network with a fresh optimizer, whose batches and random draws depend on the seed alone."""
    torch.manual_seed(config.seed)
    optimizer = new_optimizer(model.train(), config, device)
    average = None
    if config.average:
        average = AveragedModel(model, multi_avg_fn=_moving_average(config.average), use_buffers=True)
    return TrainingState(model, optimizer, order=torch.Generator().manual_seed(config.seed), average=average)


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
    watch = FiniteWatch(state.model, outputs=not config.compile)
    steps_an_epoch = math.ceil(len(data.train) / config.settings.batch_size)
    taken = len(state.history) * steps_an_epoch

    update = update_of(state, config, len(data.train), noise=False)
    data_loss = cross_entropy(config) if teacher is None else _distillation(teacher, config)
    step = new_step(state.model, config, watch, data_loss=data_loss, update=update)

    def scheduled_step(batch: Batch, weight: float) -> tuple[Tensor, ...]:
        nonlocal taken
        taken += 1
        rate = scheduled((taken - 0.5) / (epochs * steps_an_epoch), config)
        set_learning_rate(state.optimizer, config.settings.lr * rate)
        result = step(batch, weight)
        if state.average is not None:
            state.average.update_parameters(state.model)
        return result

    for epoch in range(len(state.history) + 1, epochs + 1):
        start = time.perf_counter()
        state.model.train()
        with watch:
            row: dict[str, Any] = {"epoch": epoch, "phase": phase}
            row |= train_epoch(scheduled_step, state, data.train, config, watch, progress)
        if state.average is not None and epoch == epochs:
            state.model.load_state_dict(state.average.module.state_dict())
        row["validation_accuracy"] = accuracy(state.averaged, data.validation)
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
    plain = cross_entropy(config)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            answers = (teacher(batch.images) / SOFTENING).softmax(dim=1)
        softened = F.log_softmax(logits / SOFTENING, dim=1)
        imitation = F.kl_div(softened, answers, reduction="batchmean") * SOFTENING**2
        return (1 - weight) * plain(logits, batch) + weight * imitation

    return loss


def _moving_average(decay: float) -> Callable[..., None]:
    """Return how an average moves on; at first faster, so that it does not hold on to weights hardly trained."""

    def move(averaged: Any, current: Any, count: Tensor) -> None:
        if not (averaged[0].is_floating_point() or averaged[0].is_complex()):
            # Counters, indices and masks, which are nothing to average.
            for its_own, its_new in zip(averaged, current, strict=True):
                its_own.copy_(its_new)
            return
        its_decay = min(decay, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(its_decay)(averaged, current, count)

    return move
