"""What a checkpoint has to hold, checked before any of it is taken over.

Kernels of fused optimizers take the shapes of their state for granted, and a generator its own position: a file in
which these are others would have them read and write beside their memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.checks import is_finite, one_line, shown
from bmrs.data import FOLDER
from bmrs.noise.lookup import noise_layers
from bmrs.training.config import TrainConfig
from bmrs.training.options import flag

# What Adam, and SGD with momentum, keep of a parameter; Adam beside its number of steps.
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MOMENTUM = "momentum_buffer"
_STEP = "step"


def check_options(saved: Any, config: TrainConfig) -> None:
    """Raise ValueError unless the options of the run that wrote a file, None if unknown, are those of this one.

    With another seed, images that the network has been trained on would be validation images now.
    """
    if saved is None:
        return
    if not isinstance(saved, dict):
        raise ValueError("its options are not a mapping")
    for name, value in config.deciding_options().items():
        before = saved.get(name, value)
        if name == "data" and all(
            isinstance(each, str) and each.startswith(FOLDER) for each in (before, value)
        ):
            continue  # a folder may have been moved
        if before != value:
            raise ValueError(
                f"it is of a run with {flag(name)} {shown(saved[name])}, and this run's config.json says {value}; "
                "put back the config or the checkpoint that belongs here, or start a new run"
            )


def check_tensors(
    tensors: Mapping[str, Tensor],
    *,
    model: nn.Module,
    average: nn.Module | None = None,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
    finished: int,
) -> None:
    """Raise ValueError unless the tensors of a file are those of a model, its optimizer and the generators.

    Args:
        tensors: by their names in the file.
        model: what they are meant for.
        average: the model's, if there is one.
        optimizer: the model's.
        order: draws the order of the images.
        finished: epochs in the file's history; before the first one an optimizer has no state.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    expected: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if average is not None:
        expected |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    if finished:
        expected |= expected_of_optimizer(optimizer)
    expected |= {"random.order": order.get_state(), "random.cpu": torch.get_rng_state()}
    if on_gpu and "random.cuda" in tensors:
        expected["random.cuda"] = torch.cuda.get_rng_state(device)
    found = {name: tensor for name, tensor in tensors.items() if on_gpu or name != "random.cuda"}
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"it lacks {one_line(missing[0])}{_and_more(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise ValueError(f"it holds {one_line(unknown[0])}{_and_more(unknown)}, which this run has not")
    for name, tensor in expected.items():
        if (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{name} is {_kind(found[name])}, expected {_kind(tensor)}")
    for name, tensor in found.items():
        if tensor.is_floating_point() and not name.endswith(".exp_avg_sq") and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
        if name.endswith(f".{_STEP}") and not _is_count(tensor):
            raise ValueError(f"{name} is {tensor.item():g}, expected a number of steps")
    _check_generator("random.order", found["random.order"], "cpu", seed=order.initial_seed())
    _check_generator("random.cpu", found["random.cpu"], "cpu")
    if "random.cuda" in found:
        _check_generator("random.cuda", found["random.cuda"], device)


def check_masks(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise ValueError if a noise layer would be left without a structure, which pruning never does."""
    for name in noise_layers(model):
        if not tensors[f"model.{name}.mask"].any():
            raise ValueError(f"its mask of noise layer {name!r} leaves no structure")


def split_optimizer_state(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return an optimizer's state by parameter, from tensors with names such as "0.exp_avg"."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = tensor
    return state


def expected_of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return tensors such as an optimizer keeps once every parameter has had a gradient, by their names in the file."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, torch.optim.SGD):
        has_momentum = bool(optimizer.defaults["momentum"])
        return {f"optimizer.{i}.{_MOMENTUM}": p for i, p in enumerate(parameters) if has_momentum}
    expected = {f"optimizer.{i}.{_STEP}": torch.empty((), device="meta") for i in range(len(parameters))}
    for i, parameter in enumerate(parameters):
        expected |= {f"optimizer.{i}.{name}": parameter for name in _MOMENTS}
    return expected


def _is_count(step: Tensor) -> bool:
    return step.item() >= 0 and step.item() == int(step.item())


def _check_generator(name: str, values: Tensor, device: torch.device | str, seed: int | None = None) -> None:
    generator = torch.Generator(device=device)
    try:
        generator.set_state(values)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} is no state of a generator: {one_line(error)}") from error
    if generator.device.type == "cpu" and not _is_inside(values):
        raise ValueError(f"{name} is no state of a generator: it points beyond its numbers")
    if seed is not None and generator.initial_seed() != seed:
        raise ValueError(f"{name} is of --seed {generator.initial_seed()}, and this run has --seed {seed}")


def _is_inside(values: Tensor) -> bool:
    """Return whether a CPU generator stays among its 624 numbers until it makes new ones; torch does not check it."""
    # torch's layout: seed, numbers left (the last one makes new ones instead), whether it is seeded, the next one.
    _, left, _, following = struct.unpack_from("=QiiQ", values.numpy().data)
    return bool(following + left <= 625)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


# The history.


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and is_finite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_Check = Callable[[Any], bool]
_OF_EVERY_ROW: dict[str, _Check] = {
    "epoch": _is_whole,
    "phase": lambda value: isinstance(value, str),
    "loss": _is_number,
    "nll": _is_number,
    "kl": _is_number,
    "train_accuracy": _is_share,
    "validation_accuracy": _is_share,
    "seconds": _is_number,
}
_WITH_NOISE: dict[str, dict[str, _Check]] = {
    "paper": {"compression_percent": _is_number},
    "bmrs": {
        "temperature": lambda value: _is_number(value) and value > 0,
        "steps": _is_whole,
        "unsettled": _is_share,
        "changed": _is_share,
        "settled": lambda value: isinstance(value, bool),
        "emptied": _is_list_of_names,
    },
}
# Only in rows after a pruning, or of this version.
_NOT_IN_ALL_ROWS: dict[str, _Check] = {
    "unsettled": _is_share,
    "pruning": lambda value: isinstance(value, dict) and _are_layers(value.get("layers", [])),
}


def check_history(history: Any, model: nn.Module, config: TrainConfig) -> None:
    """Raise ValueError unless a history is a list of rows with the metrics that are read from it."""
    if not isinstance(history, list):
        raise ValueError(f"its history is a {type(history).__name__}, expected a list of epochs")
    layers = noise_layers(model)
    checks = dict(_OF_EVERY_ROW)
    if layers:
        sizes = {name: layer.num_structures for name, layer in layers.items()}
        checks |= {"kept": lambda value: _is_kept(value, sizes), **_WITH_NOISE[config.recipe]}
    for number, row in enumerate(history, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"epoch {number} of its history is a {type(row).__name__}, expected a mapping")
        if missing := sorted(checks.keys() - row.keys()):
            raise ValueError(f"epoch {number} of its history lacks {missing[0]!r}{_and_more(missing)}")
        for key, fits in (_NOT_IN_ALL_ROWS | checks).items():
            if key in row and not fits(row[key]):
                raise ValueError(f"epoch {number} of its history has {key!r} {shown(row[key])}")
        if row["epoch"] != number:
            raise ValueError(f"epoch {number} of its history says that it is epoch {row['epoch']}")


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(layer, dict)
        and isinstance(layer.get("name"), str)
        and isinstance(layer.get("best_kept"), bool)
        for layer in value
    )


def _is_kept(value: Any, sizes: Mapping[str, int]) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == sizes.keys()
        and all(_is_whole(kept) and kept <= sizes[name] for name, kept in value.items())
    )
