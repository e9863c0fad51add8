"""State of training in one safetensors file, without pickle.

The tensors are the model's, the optimizer's and the random number generators' state. The history of the epochs, the
options of the run and a checksum are JSON in the file's metadata, so that one rename replaces everything at once. A
file is checked as a whole before anything of it is taken over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bmrs.checks import one_line, shown
from bmrs.files.atomic import write_atomically
from bmrs.training.checkpoint_checks import (
    check_history,
    check_masks,
    check_options,
    check_tensors,
    expected_of_optimizer,
    split_optimizer_state,
)
from bmrs.training.config import TrainConfig
from bmrs.training.run_folder import RunError

_METADATA_KEY = "bmrs_training"
_KEYS = ("checksum", "history", "options")
_KEYS_BEFORE_CHECKSUMS = ("history",)


@dataclass
class TrainingState:
    """All that the next epoch depends on, beside the global random number generators.

    Attributes:
        model: the network.
        optimizer: its optimizer.
        order: draws the order of the images.
        history: one row of metrics for each finished epoch.
        average: a moving average of the model, if there is one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: torch.Generator
    history: list[dict[str, Any]] = field(default_factory=list)
    average: AveragedModel | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def averaged(self) -> nn.Module:
        """The average if there is one, otherwise the model: what is as good as the training so far."""
        return self.model if self.average is None else self.average.module


def save_checkpoint(path: Path, state: TrainingState, config: TrainConfig) -> None:
    """Write the state, the global random number generators' and the run's options as one file, atomically."""
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    if state.average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in state.average.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        kept = {name: value for name, value in values.items() if value is not None}
        tensors.update({f"optimizer.{index}.{name}": value for name, value in kept.items()})
    if state.history:
        # A parameter that has had no gradient has no state: it would start with zeros.
        for name, like in expected_of_optimizer(state.optimizer).items():
            tensors.setdefault(name, torch.zeros(like.shape, dtype=like.dtype))
    tensors["random.order"] = state.order.get_state()
    tensors["random.cpu"] = torch.get_rng_state()
    if state.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(state.device)
    tensors = on_their_own(tensors)
    scalars = {"history": state.history, "options": config.deciding_options()}
    scalars["checksum"] = _checksum(tensors, scalars)
    write_atomically(path, serialize(tensors, metadata={_METADATA_KEY: json.dumps(scalars)}))


def load_checkpoint(path: Path, state: TrainingState, config: TrainConfig) -> None:
    """Bring a freshly built state, and the global random number generators, to what was saved.

    Files from before there were checksums and options in them are read without comparing these.

    Raises:
        RunError: the file is broken, of another network or of a run with other options. Nothing has been changed then.
    """
    try:
        with safe_open(path, framework="pt") as file:
            scalars = json.loads((file.metadata() or {})[_METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise RunError(f"{path} is broken: {type(error).__name__}: {one_line(error)}") from error
    try:
        _check_whole(scalars, tensors)
        check_options(scalars.get("options"), config)
        check_history(scalars["history"], state.model, config)
        check_tensors(
            tensors,
            model=state.model,
            average=state.average,
            optimizer=state.optimizer,
            order=state.order,
            finished=len(scalars["history"]),
        )
        check_masks(tensors, state.model)
    except ValueError as error:
        raise RunError(f"{path} is broken or of another network: {error}") from error
    state.model.load_state_dict(_below(tensors, "model."))
    if state.average is not None:
        state.average.load_state_dict(_below(tensors, "average."))
    param_groups = state.optimizer.state_dict()["param_groups"]
    optimizer = split_optimizer_state(_below(tensors, "optimizer."))
    state.optimizer.load_state_dict({"state": optimizer, "param_groups": param_groups})
    state.order.set_state(tensors["random.order"])
    torch.set_rng_state(tensors["random.cpu"])
    if state.device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], state.device)
    state.history[:] = scalars["history"]


def on_their_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share memory, as tied weights do: safetensors takes no others."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        shared = memory in seen
        result[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        seen.add(memory)
    return result


def _check_whole(scalars: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the metadata have their keys and the file is what was written."""
    keys = tuple(sorted(scalars)) if isinstance(scalars, dict) else ()
    if keys not in (_KEYS, _KEYS_BEFORE_CHECKSUMS):
        raise ValueError(f"its metadata have the keys {shown(keys)}, expected {', '.join(_KEYS)}")
    checksum = scalars.pop("checksum", None)
    if keys == _KEYS and checksum != _checksum(tensors, scalars):
        raise ValueError("the file is damaged, as its checksum is not that of what it holds")


def _checksum(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> str:
    """Return a hash of names, dtypes, shapes and values, and of the JSON beside them."""
    digest = hashlib.sha256(json.dumps(scalars, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        values = tensor.detach().cpu().contiguous()
        # A contiguous tensor of one element can have any stride.
        digest.update(values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
