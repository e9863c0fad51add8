"""Recipe "paper": Algorithm 1 of arXiv 2406.01345, which trains with noise and prunes on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from bmrs import processes
from bmrs.data import Dataset
from bmrs.models import MLP, LeNet5
from bmrs.noise.lookup import noise_layers
from bmrs.pruning.posteriors import unsettled
from bmrs.pruning.prune import prune
from bmrs.schedules import PruningSchedule
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.epoch import Progress, batches_of, train_epoch
from bmrs.training.evaluation import accuracy, compression
from bmrs.training.finite import FiniteWatch
from bmrs.training.training_step import Step, cross_entropy, new_step, update_of


def new_state(config: TrainConfig, data: Dataset, *, noise: bool, device: torch.device) -> TrainingState:
    """Return an untrained network; with and without noise it has the same weights and sees the same batches."""
    torch.manual_seed(config.seed)
    model = build_model(config, data, noise=noise).to(device)
    of_noise = [parameter for layer in noise_layers(model).values() for parameter in layer.parameters()]
    identities = {id(parameter) for parameter in of_noise}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in identities]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": of_noise, "lr": config.settings.noise_lr}]
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(
        groups,
        lr=config.settings.lr,
        fused=True,
        capturable=on_gpu and config.cuda_graph,
    )
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
    layers = noise_layers(state.model)
    watch = FiniteWatch(state.model)
    steps: dict[bool, Step] = {}  # with noise and without: each can be a CUDA graph of its own
    for epoch in range(len(state.history) + 1, settings.epochs + settings.fine_tune_epochs + 1):
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch, "phase": "train" if epoch <= settings.epochs else "fine-tune"}
        noise = bool(layers) and (epoch <= settings.epochs or bool(config.fine_tune_noise))
        state.model.train()
        if noise not in steps:
            update = update_of(state, config, len(data.train), noise=noise)
            step = new_step(state.model, config, watch, data_loss=cross_entropy, update=update)
            steps = {noise: step}
        with nullcontext() if noise else _without_noise(state.model), watch:
            indices = batches_of(state, data.train, config)
            row |= train_epoch(steps[noise], data.train, indices, epoch, watch, progress)
        if layers:
            if schedule.is_due(epoch):
                row["pruning"] = prune(state.model, criterion).to_dict()
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


def build_model(config: TrainConfig, data: Dataset, *, noise: bool) -> nn.Module:
    """Return the untrained network that the options name."""
    channels, height, width = data.train.image_shape
    granularity = config.settings.granularity
    if config.model == "lenet5":
        return LeNet5(
            in_channels=channels, num_classes=data.num_classes, noise=noise, granularity=granularity
        )
    num_blocks, hidden = config.settings.num_blocks, config.settings.hidden
    assert num_blocks is not None, "settings have it for every MLP"
    assert hidden is not None, "settings have it for every MLP"
    return MLP(
        in_features=channels * height * width,
        num_blocks=num_blocks,
        hidden=hidden,
        num_classes=data.num_classes,
        noise=noise,
        granularity=granularity,
    )


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
