"""What a transformers model has that its class does not build from its config: replayed onto a freshly built one."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.checks import one_line, shown
from bmrs.compaction.record import joined, record_of
from bmrs.files.installation import describe_changes, install

KEY = "bmrs"
"""Under which `config.json` has the description."""
_VERSION = 1


def built(model_class: type[nn.Module], config: Any) -> nn.Module:
    """Return a model of a class and config, in no memory where the class can do that."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return model_class(copy.deepcopy(config))
        except (NotImplementedError, RuntimeError):
            return model_class(copy.deepcopy(config))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a model saves, by name."""
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def describe_narrowing(model: nn.Module, full: nn.Module) -> dict[str, Any]:
    """Return what makes a model of a class the compacted one, ready for JSON.

    Args:
        model: the compacted model.
        full: one of its class as its config has it built.

    Returns:
        ``"version"``; ``"shapes"``, of those tensors that have another one or are not in ``full``, such as ``"24x32"``;
        and what `install` takes, where there is any.

    Raises:
        ValueError: the compacted model lacks a tensor.
    """
    own, before = shapes_of(model), shapes_of(full)
    if lost := sorted(before.keys() - own.keys()):
        raise ValueError(
            f"the model ({type(model).__name__}) has no {lost[0]!r}, which its class builds from its config: save it "
            "with bmrs.save"
        )
    record = record_of(model)
    sizes = _with_earlier(model, "sizes", record.code_sizes if record else {})
    changes = describe_changes(model)
    del changes["frozen"]  # which these folders never say
    groups_before = describe_changes(full)["groups"]
    changes["groups"] = {n: g for n, g in changes["groups"].items() if g != groups_before.get(n)}
    return {
        "version": _VERSION,
        "shapes": {n: "x".join(map(str, shape)) for n, shape in own.items() if shape != before.get(n)},
        **{k: v for k, v in {**changes, "sizes": sizes, "numbers": numbers_of(model)}.items() if v},
    }


def numbers_of(model: nn.Module) -> dict[str, Any]:
    """Return attributes of a model's modules that changed with its sizes, as ε, by qualified name."""
    record = record_of(model)
    return _with_earlier(model, "numbers", record.numbers if record else {})


def _with_earlier(model: nn.Module, key: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return attributes that a compaction changed, with those that an earlier one had."""
    earlier = getattr(model.config, KEY, None)
    return joined(earlier.get(key, {}) if isinstance(earlier, dict) else {}, found)


def narrow(model: nn.Module, description: Any) -> None:
    """Make a freshly built model the compacted one of a description, in place; the tensors that change are empty.

    Raises:
        ValueError: the description is not one, or not of such a model; what is wrong is said.
    """
    if not isinstance(description, dict):
        raise ValueError(f"its {KEY!r} must be a mapping, got {shown(description)}")
    if description.get("version") != _VERSION:
        raise ValueError(
            f"its {KEY!r} has version {shown(description.get('version'))}, and this version of bmrs reads {_VERSION}"
        )
    shapes = description.get("shapes")
    if not isinstance(shapes, dict):
        raise ValueError(f"its {KEY!r} has no shapes, which are a mapping: got {shown(shapes)}")
    own: dict[str, Tensor] = {
        n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)
    }
    device = next((t.device for t in own.values()), None)
    tensors = dict(own)
    for name, shape in shapes.items():
        tensors[name] = torch.empty(_sizes(name, shape), dtype=_dtype(name, description, own), device=device)
    frozen = [n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    try:
        install(model, {**description, "frozen": frozen}, tensors)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"its {KEY!r} does not fit {type(model).__name__}: {one_line(error)}") from error


def _sizes(name: str, shape: Any) -> list[int]:
    if not isinstance(shape, str) or not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", shape, re.ASCII):
        raise ValueError(f"its shape of {shown(name)} must be sizes such as '24x32', got {shown(shape)}")
    return [int(size) for size in shape.split("x")]


def _dtype(name: str, description: Mapping[str, Any], own: Mapping[str, Tensor]) -> torch.dtype:
    if name in own:
        return own[name].dtype
    path, _, last = name.rpartition(".")
    if path in description.get("noise", {}):
        return torch.bool if last in ("mask", "pruned") else torch.float32
    sibling = own.get(f"{path}.weight")
    return torch.get_default_dtype() if sibling is None else sibling.dtype
