"""State of training in one safetensors file, without pickle.

The tensors are the model's, the optimizer's and the random number generators' state; the history of the
epochs is JSON in the file's metadata, so that one rename replaces everything at once. Options such as the learning
rate are the run's config's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from bmrs.files.atomic import write_atomically
from bmrs.training.run_folder import RunError

_METADATA_KEY = "bmrs_training"


@dataclass
class TrainingState:
    """All that the next epoch depends on, beside the global random number generators.

    Attributes:
        model: the network.
        optimizer: its optimizer.
        order: draws the order of the images.
        history: one row of metrics for each finished epoch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: torch.Generator
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def save_checkpoint(path: Path, state: TrainingState) -> None:
    """Write the state and the global random number generators' as one file, atomically."""
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": value for name, value in values.items()})
    tensors["random.order"] = state.order.get_state()
    tensors["random.cpu"] = torch.get_rng_state()
    if state.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(state.device)
    content = serialize(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={_METADATA_KEY: json.dumps({"history": state.history})},
    )
    write_atomically(path, content)


def load_checkpoint(path: Path, state: TrainingState) -> None:
    """Bring a freshly built state, and the global random number generators, to what was saved.

    Raises:
        RunError: the file is broken or of another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            scalars = json.loads((file.metadata() or {})[_METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state.model.load_state_dict(_below(tensors, "model."))
        optimizer: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(tensors, "optimizer.").items():
            index, key = name.split(".")
            optimizer.setdefault(int(index), {})[key] = tensor
        param_groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": optimizer, "param_groups": param_groups})
        state.order.set_state(tensors["random.order"])
        torch.set_rng_state(tensors["random.cpu"])
        if state.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], state.device)
        state.history[:] = scalars["history"]
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} is broken or of another network: {error}") from error


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
