"""Whether the network that the options name fits into memory, said before it is built."""

from __future__ import annotations

import math
import os

import torch

from bmrs.data import Dataset
from bmrs.training.config import TrainConfig
from bmrs.training.run_folder import RunError

# Weights, gradients and two moments of Adam, float32.
_BYTES_OF_PARAMETER = 16
# An activation and its gradient, float32.
_BYTES_OF_ACTIVATION = 8


def check_memory(config: TrainConfig, data: Dataset, device: torch.device) -> None:
    """Raise RunError if training one network takes more memory than the device has."""
    if config.model != "mlp":
        return  # nothing is known of it before it is built
    hidden, blocks = config.settings.hidden, config.settings.num_blocks
    assert hidden is not None, "settings have it for every MLP"
    assert blocks is not None, "settings have it for every MLP"
    inputs = math.prod(data.train.image_shape)
    parameters = (inputs + data.num_classes + 1 + blocks * (hidden + 1)) * hidden + data.num_classes
    activations = min(config.settings.batch_size, len(data.train)) * (blocks + 1) * hidden
    needed = _BYTES_OF_PARAMETER * parameters + _BYTES_OF_ACTIVATION * activations
    there = _memory_of(device)
    if there is not None and needed > there:
        raise RunError(
            f"--hidden {hidden} with --num-blocks {blocks} needs at least {_gigabytes(needed)} of memory, and {device} "
            f"has {_gigabytes(there)}: choose fewer"
        )


def _memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory of a device, None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
