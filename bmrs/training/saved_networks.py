"""The networks of a run, loaded from its folder and checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bmrs.checks import one_line
from bmrs.data import Dataset
from bmrs.files import load as load_model
from bmrs.training import algorithm1, recipe
from bmrs.training.checkpoint import TrainingState, load_checkpoint
from bmrs.training.config import TrainConfig
from bmrs.training.fit import fitting_state
from bmrs.training.networks import dense_network
from bmrs.training.run_folder import NetworkName, RunError, RunFolder


def load_dense(folder: RunFolder, config: TrainConfig, data: Dataset, device: torch.device) -> nn.Module:
    """Return a run's dense network.

    Raises:
        RunError: its file is broken.
    """
    dense = recipe.untrained(config, data, device)
    _load(folder.dense.name, lambda: dense.load_state_dict(load_file(folder.dense, device=str(device))))
    _check_suits(dense, data, folder.dense.name)
    return dense


def load_compacted(
    folder: RunFolder, name: str, config: TrainConfig, data: Dataset, device: torch.device
) -> nn.Module:
    """Return a network that a run saved, by the name of its file.

    Raises:
        RunError: the file is missing or broken.
    """
    path = folder.network(name)
    if not path.is_file():
        raise RunError(f"{folder.path} lacks {path.name}")
    network: nn.Module = _load(path.name, lambda: _read(path, config, data, device))
    _check_suits(network, data, path.name)
    return network


def load_state(
    folder: RunFolder, network: NetworkName, config: TrainConfig, data: Dataset, device: torch.device
) -> TrainingState:
    """Return a network with noise, or one that was trained, as its last checkpoint has it.

    Raises:
        RunError: the checkpoint is broken or of another run.
    """
    if config.recipe == "paper":
        state = algorithm1.new_state(config, data, noise=True, device=device)
    elif network == "noisy":
        state = recipe.noisy_state(recipe.untrained(config, data, device), config, data, device)
    else:
        state = fitting_state(recipe.untrained(config, data, device), config, device)
    load_checkpoint(folder.checkpoint(network), state, config)
    return state


def _check_suits(network: nn.Module, data: Dataset, name: str) -> None:
    """Raise RunError unless a network has finite parameters and takes the data's images to their classes."""
    for parameter, values in network.state_dict().items():
        if isinstance(values, Tensor) and values.is_floating_point() and not values.isfinite().all():
            raise RunError(f"{name} is broken: {parameter} holds NaN or infinity")
    images = data.test.examples(2)
    try:
        with torch.inference_mode():
            outputs = network.eval()(images)
        shape = tuple(outputs.shape)
    except Exception as error:  # it runs whatever the file describes
        raise RunError(
            f"{name} is broken or of another run: it does not take the images of {data.name}, of shape "
            f"{tuple(images.shape[1:])}: {one_line(error)}"
        ) from error
    if shape != (len(images), data.num_classes) or not outputs.isfinite().all():
        raise RunError(
            f"{name} is broken or of another run: its outputs for {len(images)} images of {data.name} have the shape "
            f"{shape}, expected {(len(images), data.num_classes)} and finite values"
        )


def _load(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise RunError(f"{name} is broken: {one_line(error)}") from error


def _read(path: Path, config: TrainConfig, data: Dataset, device: torch.device) -> nn.Module:
    """Return a network from its file; as one of its own class, where it has one, as the dense network is."""
    if not config.is_sequence:
        try:
            return load_model(path, model=dense_network(config, data), device=device)
        except (TypeError, ValueError):  # it became a graph
            pass
    return load_model(path, device=device)
