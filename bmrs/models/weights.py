"""Weights from files of other programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bmrs.checks import check_module, one_line, shown
from bmrs.noise.lookup import noise_layers
from bmrs.noise.wrappers import inside_wrappers

_KEYS_OF_STATES = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
# Names in torchvision's published vision transformers, and those that its layers have since.
_RENAMED = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}
_FEW = 3


@dataclass(frozen=True)
class LoadedWeights:
    """What `load_weights` did; ``str()`` says it in a line.

    Attributes:
        loaded: names of the parameters and buffers that came from the file.
        left_out: names of the classifier's, where it stayed as it was.
    """

    loaded: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        rest = f"; the classifier ({', '.join(self.left_out)}) is untrained" if self.left_out else ""
        return f"{len(self.loaded)} tensors loaded{rest}"


def load_weights(
    model: nn.Module, file: str | os.PathLike[str], *, new_classifier: bool = False
) -> LoadedWeights:
    """Load weights from a file into a model, in place.

    The file is one of safetensors, or of ``torch.save``, of which only tensors are read (``weights_only=True``). It
    holds a state_dict, or a mapping with one under ``"state_dict"``, ``"model_state_dict"`` or ``"model"``. Prefixes
    ``module.`` and ``_orig_mod.`` are taken off. Noise may be missing: a noise layer that the file does not know stays
    as it is. So may counters of batches, and of tied weights all but one name.

    Args:
        model: any module, with or without noise.
        file: path of the file.
        new_classifier: whether the model's last linear layer may stay as it is: it does where the file has another
            number of classes, or no such layer.

    Returns:
        Which tensors were loaded and which left out.

    Raises:
        TypeError: ``model`` is not a module.
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read or holds no state_dict, its names or shapes are not the model's, or a
            value is NaN or infinite. The model is then unchanged.
    """
    check_module(model)
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no file with weights at {path}")
    inner = inside_wrappers(model)
    own = inner.state_dict()
    if without_values := [name for name, tensor in own.items() if tensor.is_meta]:
        raise ValueError(
            f"{_named(without_values)} of the model have no memory (device meta): call model.to_empty(device=...) first"
        )
    tensors, remark = _read(path)
    found = _with_names_of(own, tensors, path)
    left_out = _new_classifier(inner, found) if new_classifier else []
    found = {name: tensor for name, tensor in found.items() if name not in left_out}
    if differences := _differences(inner, own, found, left_out):
        raise ValueError(
            f"{path} does not fit the model ({type(inner).__name__}): {'; '.join(differences)}{remark}"
        )
    converted = {name: tensor.to(own[name].dtype) for name, tensor in found.items()}
    # A buffer may have infinities of its own, as masks of attention do.
    if broken := [
        name
        for name, tensor in converted.items()
        if not (tensor.isfinite() | (tensor == own[name].to(tensor.device))).all()
    ]:
        raise ValueError(f"{path} holds NaN or infinity in {_named(broken)}")
    inner.load_state_dict(converted, strict=False)
    return LoadedWeights(tuple(converted), tuple(left_out))


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return what a file holds by name, and what else there is to say where it does not fit."""
    with path.open("rb") as file:
        start = file.read(9)
    remark = ""
    state: Any
    if start[8:] == b"{":  # behind the length of the header
        try:
            with safe_open(path, framework="pt") as opened:
                if "bmrs" in (opened.metadata() or {}):
                    remark = "; it is a file of bmrs.save, which bmrs.load reads"
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {one_line(error)}") from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a pickle of any origin can bring about
            raise ValueError(
                f"{path} is neither a safetensors file nor one of torch.save with tensors alone, which could be read "
                f"without running code from it; save model.state_dict() ({type(error).__name__}: "
                f"{one_line(error, limit=80)})"
            ) from error
    for key in _KEYS_OF_STATES:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds no state_dict but {_kind(state)}: save model.state_dict()")
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{path} holds no state_dict: {shown(others[0])} in it is {_kind(state[others[0]])}, not a tensor; a "
            f"state_dict may lie under one of the keys {', '.join(map(repr, _KEYS_OF_STATES))}"
        )
    return dict(state), remark


def _with_names_of(own: Mapping[str, Tensor], tensors: Mapping[Any, Tensor], path: Path) -> dict[str, Tensor]:
    """Return tensors by the names that the model has for them, where it has any."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = str(key)
        while name not in own and name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        for old, new in _RENAMED.items():
            if name not in own and name.replace(old, new) in own:
                name = name.replace(old, new)
        if name in found:
            raise ValueError(f"{path} holds {name!r} twice, once of them as {str(key)!r}")
        found[name] = tensor
    return found


def _new_classifier(model: nn.Module, found: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the last linear layer's tensors where the file's has other outputs, or there is none."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        return []
    name, layer = linear[-1]
    names = [f"{name}.{key}".lstrip(".") for key, _ in layer.named_parameters(recurse=False)]
    weight = found.get(names[0])
    same_inputs = weight is None or weight.shape[1:] == layer.weight.shape[1:]
    return names if same_inputs and (weight is None or len(weight) != layer.out_features) else []


def _differences(
    model: nn.Module, own: Mapping[str, Tensor], found: Mapping[str, Tensor], left_out: Sequence[str]
) -> list[str]:
    """Return in what the tensors of a file are not those of a model."""
    noise = _may_be_missing(model, found)
    at_hand = {_memory(own[name]) for name in found if name in own}
    missing = [
        name
        for name, tensor in own.items()
        if name not in found
        and name not in left_out
        and not name.endswith("num_batches_tracked")
        and name not in noise
        and _memory(tensor) not in at_hand
    ]
    unknown = [name for name in found if name not in own]
    other = [
        f"{name!r} {_shape(tensor)} instead of {_shape(own[name])}"
        for name, tensor in found.items()
        if name in own
        and (tensor.shape, tensor.is_floating_point()) != (own[name].shape, own[name].is_floating_point())
    ]
    differences = []
    if missing:
        differences.append(f"it lacks {len(missing)} of {len(own)} tensors ({_named(missing)})")
    if unknown:
        differences.append(f"it holds {len(unknown)} that the model has not ({_named(unknown)})")
    if other:
        differences.append(f"{len(other)} of another shape or kind ({', '.join(other[:_FEW])}{_more(other)})")
        if _new_classifier(model, found):
            differences.append("new_classifier leaves out the classifier")
    return differences


def _may_be_missing(model: nn.Module, found: Mapping[str, Tensor]) -> set[str]:
    """Return the names of noise that a file does not know, and of the buffer that earlier versions had not."""
    names = set()
    for layer, noise in noise_layers(model).items():
        own = {key: f"{layer}.{key}".lstrip(".") for key in noise.state_dict()}
        names |= set(own.values()) if found.keys().isdisjoint(own.values()) else {own["pruned"]}
    return names


def _memory(tensor: Tensor) -> tuple[int, torch.Size]:
    return (tensor.data_ptr(), tensor.shape)


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_FEW])) + _more(names)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - _FEW} more" if len(names) > _FEW else ""


def _kind(value: object) -> str:
    return "nothing" if value in (None, {}, []) else f"a value of type {type(value).__name__}"
