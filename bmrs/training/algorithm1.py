"""Recipe "paper": Algorithm 1 of arXiv 2406.01345, which trains with noise and prunes on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bmrs import processes
from bmrs.data import Batch, Dataset
from bmrs.noise.lookup import noise_layers
from bmrs.pruning.prune import prune
from bmrs.pruning.settling import unsettled
from bmrs.schedules import PruningSchedule, WarmUp
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.epoch import Progress, train_epoch
from bmrs.training.evaluation import accuracy, compression
from bmrs.training.finite import FiniteWatch
from bmrs.training.networks import dense_network, example_of_ties, noisy_network
from bmrs.training.optimizers import new_optimizer
from bmrs.training.training_step import Step, cross_entropy, new_step, update_of


def new_state(config: TrainConfig, data: Dataset, *, noise: bool, device: torch.device) -> TrainingState:
    """Return an untrained network; with and without noise it has the same weights and sees the same batches."""
    torch.manual_seed(config.seed)
    model = noisy_network(config, data) if noise else dense_network(config, data)
    model = model.to(device)
    optimizer = new_optimizer(model, config, device)
    return TrainingState(model, optimizer, order=torch.Generator().manual_seed(config.seed))


def train(
    state: TrainingState,
    data: Dataset,
    config: TrainConfig,
    *,
    save: Callable[[TrainingState], None],
    progress: Progress,
) -> None:
    """Train from the state's epoch to the last one and, if there is noise, prune on the way.

    After the epochs of training nothing more is pruned, and what was pruned stays so. The fine-tuning epochs then
    train the weights alone, in the network that compaction will make smaller: E[θ] in place of noise, no KL,
    posteriors frozen. With `config.fine_tune_noise` they go on as before, as the paper does.

    Args:
        state: where to start from; changed in place.
        data: preprocessed images on the model's device.
        config: the options.
        save: called with the state after each epoch.
        progress: told about steps and epochs.

    Raises:
        NonFiniteError: a NaN or an infinity turned up; its epoch is not saved.
    """
    settings = config.settings
    criterion, schedule = config.build_criterion(), _schedule(config)
    example = example_of_ties(config, data)
    layers = noise_layers(state.model)
    watch = FiniteWatch(state.model, outputs=not config.compile)
    kl_factor = torch.ones((), device=state.device) if config.kl_warm_up else None
    steps: dict[bool, Step] = {}  # with noise and without: each can be a CUDA graph of its own
    for epoch in range(len(state.history) + 1, settings.epochs + settings.fine_tune_epochs + 1):
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch, "phase": "train" if epoch <= settings.epochs else "fine-tune"}
        noise = bool(layers) and (epoch <= settings.epochs or bool(config.fine_tune_noise))
        state.model.train()
        if noise not in steps:
            update = update_of(state, config, len(data.train), noise=noise, kl_factor=kl_factor)
            step = new_step(state.model, config, watch, data_loss=cross_entropy(config), update=update)
            steps = {noise: step if kl_factor is None else _warming_up(step, state, data, config, kl_factor)}
        with nullcontext() if noise else _without_noise(state.model), watch:
            row |= train_epoch(steps[noise], state, data.train, config, watch, progress)
        if layers:
            if schedule.is_due(epoch):
                row["pruning"] = prune(state.model, criterion, example_inputs=example).to_dict()
            row["kept"] = {name: int(layer.mask.sum()) for name, layer in layers.items()}
            row["unsettled"] = unsettled(state.model)
            before: dict[str, Any] = state.history[-1] if state.history else {}
            row["compression_percent"] = (
                before["compression_percent"]
                if before.get("kept") == row["kept"]
                else compression(state.model, data.validation.examples(1))
            )
        row["validation_accuracy"] = accuracy(state.model, data.validation)
        row["seconds"] = time.perf_counter() - start
        state.history.append(processes.of_first(row.copy))
        save(state)
        progress.epoch(row)


def _warming_up(
    step: Step, state: TrainingState, data: Dataset, config: TrainConfig, kl_factor: Tensor
) -> Step:
    """Return a step before which the factor on the KL term is set to where the epochs have come to."""
    assert config.kl_warm_up is not None, "filled in for this recipe"
    warm_up = WarmUp(config.kl_warm_up)
    steps_an_epoch = math.ceil(len(data.train) / config.settings.batch_size)
    taken = len(state.history) * steps_an_epoch

    def warmed_up(batch: Batch, weight: float) -> tuple[Tensor, ...]:
        nonlocal taken
        kl_factor.fill_(warm_up(taken / steps_an_epoch))
        taken += 1
        return step(batch, weight)

    return warmed_up


def _schedule(config: TrainConfig) -> PruningSchedule:
    last, every = config.settings.epochs, config.prune_every
    assert every is not None, "filled in for this recipe"
    first = last if config.mode == "post-training" else min(every, last)
    return PruningSchedule(every=every, first=first, last=last)


@contextmanager
def _without_noise(model: nn.Module) -> Iterator[None]:
    """Have noise layers multiply by E[θ] and not train."""
    layers = noise_layers(model).values()
    for layer in layers:
        layer.eval().requires_grad_(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.requires_grad_(True)
