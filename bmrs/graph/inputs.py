"""Examples that users give: arguments of a forward pass."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bmrs.checks import shown
from bmrs.graph.copies import unwrapped

Inputs: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"


def as_inputs(example_inputs: Any, model: nn.Module | None = None) -> Inputs:
    """Return positional and keyword arguments of a forward pass, from what users give.

    Args:
        example_inputs: one tensor, a sequence of positional arguments, or a mapping of keyword arguments; or a mapping
            that is itself the only argument of the model.
        model: the model.

    Raises:
        TypeError: anything else, or no tensor in it.
        ValueError: a tensor is empty or sparse.
    """
    if isinstance(example_inputs, Tensor):
        inputs: Inputs = ((example_inputs,), {})
    elif isinstance(example_inputs, Mapping):
        inputs = _mapped_inputs(dict(example_inputs), model)
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        inputs = (tuple(example_inputs), {})
    else:
        raise TypeError(
            "example_inputs must be a tensor, a sequence of positional arguments or a mapping of keyword arguments, "
            f"got {_how_to_give(example_inputs) or type(example_inputs).__name__}"
        )
    leaves = tree_flatten(inputs)[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        how = next(filter(None, map(_how_to_give, leaves)), None)
        raise TypeError(f"example_inputs must hold a tensor, got {how or shown(example_inputs)}")
    for tensor in tensors:
        if tensor.layout not in (torch.strided, torch.jagged):
            layout = str(tensor.layout).removeprefix("torch.")
            raise ValueError(
                f"example_inputs must hold dense tensors, which can be followed, got a {layout} one"
            )
        if tensor.numel() == 0:
            raise ValueError(f"example_inputs must hold an example, got shape {tuple(tensor.shape)}")
    return inputs


def _how_to_give(value: Any) -> str:
    """Return the class of a dataclass, without its values, and how its tensors are found; "" for anything else."""
    if not is_dataclass(value):
        return ""
    name = type(value).__qualname__
    return (
        f"{name}, a dataclass, whose tensors are found in a sequence or mapping, as in (example,), once "
        f"torch.export.register_dataclass({name}) has been called"
    )


def is_dataclass(value: Any) -> bool:
    """Return whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _mapped_inputs(mapping: dict[str, Any], model: nn.Module | None) -> Inputs:
    if model is not None:
        parameters = list(inspect.signature(unwrapped(model).forward).parameters.values())
        named = {p.name for p in parameters}
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not any_name and not named.issuperset(mapping) and len(parameters) == 1:
            return (mapping,), {}
    return (), mapping


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Return inputs with a function applied to each tensor."""
    mapped: Inputs = tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, inputs)
    return mapped


def several_examples(inputs: Inputs) -> Inputs:
    """Return two examples where there is one: torch.export takes a size of 1 for one that never changes."""
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.dim()]
    if any(tensor.shape[0] != 1 for tensor in tensors):
        return inputs
    return map_tensors(lambda t: torch.cat([t, t]) if t.dim() else t, inputs)


def more_examples(inputs: Inputs, *, odd: bool) -> Inputs | None:
    """Return twice as many examples, or one more, the same ones again; None where tensors have not all as many."""
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    if len({tensor.shape[0] if tensor.dim() else -1 for tensor in tensors}) != 1 or not tensors[0].dim():
        return None
    return map_tensors(lambda t: torch.cat([t, t, t[:odd]]), inputs)


def in_batches(examples: Inputs, size: int) -> Iterator[Inputs]:
    """Cut all tensors along their first dimension, where that is the same for all, into parts that fit the memory."""
    leaves, tree = tree_flatten(examples)
    lengths = {len(leaf) if leaf.dim() else 0 for leaf in leaves if isinstance(leaf, Tensor)}
    if len(lengths) != 1 or (number := lengths.pop()) <= size:
        yield examples
        return
    for start in range(0, number, size):
        yield tree_unflatten(
            [leaf[start : start + size] if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree
        )
