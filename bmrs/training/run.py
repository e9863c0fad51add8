"""A whole run: train with and without noise, compact, save, reload, measure, draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save as serialize

import bmrs
from bmrs.data import Dataset, Split, load_dataset, preprocess
from bmrs.training import loop
from bmrs.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from bmrs.training.config import TrainConfig
from bmrs.training.picture import draw
from bmrs.training.progress import TrainingProgress
from bmrs.training.run_folder import (
    Network,
    RunError,
    RunFolder,
    write_atomically,
    write_json,
    write_json_lines,
)
from bmrs.training.summary import Summary, summarise

_TITLES: dict[Network, str] = {"noisy": "with noise", "dense": "dense"}


class InterruptedRunError(Exception):
    """Training was interrupted by the user; `path` is the run's folder, from which it can be resumed."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"interrupted; continue with: bmrs train --resume {path}")
        self.path = path


def train(config: TrainConfig, *, output: Path | None = None, console: Console | None = None) -> Summary:
    """Start a run and bring it to its end.

    Args:
        config: The options.
        output: The run's folder, empty or not there yet; None for a fresh numbered one in `runs`.
        console: Where progress and result are shown.

    Raises:
        RunError: The folder or the device cannot be used.
        DataError, FileNotFoundError: The data cannot be read.
        NonFiniteError: A NaN or an infinity turned up.
        InterruptedRunError: The user pressed Ctrl-C; the run can be resumed.
    """
    config = config.resolved()
    device = device_of(config)
    data = load(config, device)
    return _finish(RunFolder.create(config, output), config, data, device, console or Console())


def resume(path: Path, *, console: Console | None = None) -> Summary:
    """Bring an interrupted run to its end; on the CPU with bitwise the result that it would have had."""
    folder, config = RunFolder.open(path)
    device = device_of(config)
    return _finish(folder, config, load(config, device), device, console or Console())


def evaluate(
    path: Path, *, data_dir: str | None = None, device: str | None = None, console: Console | None = None
) -> Summary:
    """Measure a finished run's networks again.

    Args:
        path: The run's folder.
        data_dir: Where the data lie now, if not where they were.
        device: Where to measure, if not on the run's device.
        console: Where the result is shown.

    Raises:
        RunError: Files of the run are missing or broken, or the device cannot be used.
        DataError, FileNotFoundError: The data cannot be read.
    """
    folder, config = RunFolder.open(path)
    config = replace(
        config, data_dir=data_dir or config.data_dir, device=device or config.device, cuda_graph=False
    )
    chosen = device_of(config)
    summary = summarise(folder, config, load(config, chosen), chosen)
    summary.show(console or Console(), _title(config))
    return summary


def _finish(
    folder: RunFolder, config: TrainConfig, data: Dataset, device: torch.device, console: Console
) -> Summary:
    console.print(f"run folder: {folder.path}", soft_wrap=True)
    try:
        noisy = _train_network("noisy", folder, config, data, device, console)
        dense = _train_network("dense", folder, config, data, device, console)
    except KeyboardInterrupt:
        raise InterruptedRunError(folder.path) from None
    write_atomically(folder.dense, serialize(dense.model.state_dict()))
    bmrs.save(folder.compacted, bmrs.compact(noisy.model, data.validation.images[:8]))
    summary = summarise(folder, config, data, device)
    write_json(folder.summary, summary.to_dict())
    summary.show(console, _title(config))
    try:
        draw(folder.picture, noisy=noisy, dense=dense, config=config)
        console.print(f"picture: {folder.picture}", soft_wrap=True)
    except ModuleNotFoundError as error:
        console.print(
            f"no picture, as {error.name} is missing: pip install 'bmrs-kernels\\[plot]'", soft_wrap=True
        )
    return summary


def _train_network(
    network: Network,
    folder: RunFolder,
    config: TrainConfig,
    data: Dataset,
    device: torch.device,
    console: Console,
) -> TrainingState:
    """Train one network from its checkpoint, or from the start if there is none."""

    def save(state: TrainingState) -> None:
        save_checkpoint(folder.checkpoint(network), state)
        write_json_lines(folder.metrics(network), state.history)

    state = loop.new_state(config, data, noise=network == "noisy", device=device)
    if folder.checkpoint(network).exists():
        load_checkpoint(folder.checkpoint(network), state)
    save(state)
    epochs = config.settings.epochs + config.settings.fine_tune_epochs
    with TrainingProgress(console, _TITLES[network], epochs=epochs, done=len(state.history)) as progress:
        loop.train(state, data, config, save=save, progress=progress)
    return state


def load(config: TrainConfig, device: torch.device) -> Dataset:
    """Read the data and preprocess them once, on the device that they are used on.

    Raises:
        DataError, FileNotFoundError: The data cannot be read.
    """
    data = load_dataset(config.data, config.data_dir, seed=config.seed)

    def ready(split: Split) -> Split:
        return Split(preprocess(split.images.to(device), name=config.data), split.labels.to(device))

    return replace(data, train=ready(data.train), validation=ready(data.validation), test=ready(data.test))


def device_of(config: TrainConfig) -> torch.device:
    """Return the device that the options name.

    Raises:
        RunError: It cannot be used, or not with the other options.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"--device {name} cannot be used: {reason}") from error
    if config.cuda_graph and device.type != "cuda":
        raise RunError(f"--cuda-graph true needs a GPU, but --device is {device}")
    return device


def _title(config: TrainConfig) -> str:
    return f"{config.model} on {config.data}, {config.mode} pruning by {config.criterion}"
