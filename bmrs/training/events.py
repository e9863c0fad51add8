"""A run in TensorBoard: the metrics of every epoch, and where the noise is."""

from __future__ import annotations

import math
from pathlib import Path

from bmrs.noise.lookup import noise_layers
from bmrs.tensorboard import write_noise
from bmrs.training.checkpoint import TrainingState
from bmrs.training.options import ConfigError

_NOT_PLOTTED = ("epoch", "steps")


def check_tensorboard() -> None:
    """Raise ConfigError unless events can be written."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--tensorboard true needs TensorBoard, which is missing: pip install tensorboard"
        ) from error


def write_epoch(folder: Path, state: TrainingState) -> None:
    """Write the last epoch of a network's training.

    Numbers of its metrics are ``metrics/<name>``; a network with noise has what `bmrs.tensorboard.write_noise` writes.

    Args:
        folder: where the network's events are.
        state: its training, after an epoch.
    """
    from torch.utils.tensorboard import SummaryWriter

    row = state.history[-1]
    epoch = row["epoch"]
    # What an interrupted run wrote of later epochs is not shown any more.
    with SummaryWriter(str(folder), purge_step=epoch) as writer:
        for name, value in row.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and math.isfinite(value) and name not in _NOT_PLOTTED:
                writer.add_scalar(f"metrics/{name}", value, epoch)
        if noise_layers(state.model):
            write_noise(writer, state.model, step=epoch, kl=row["kl"])
