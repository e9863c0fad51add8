"""An optimizer's state for the compacted network, so that training goes on where it was."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bmrs.compaction.cutting import Selection
from bmrs.compaction.record import record_of
from bmrs.graph.copies import unwrapped

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)


def compact_optimizer(optimizer: OptimizerT, model: nn.Module, compacted: nn.Module) -> OptimizerT:
    """Return an optimizer of the compacted network that goes on with the state of one of the masked network.

    Moments and the like are cut as their parameters were; parameters of noise are left out, and biases that compaction
    added start without a state. Weights that expected noise was folded into have its factors in them since, and their
    moments have not; ``compact(expected_noise=False)`` makes no such difference.

    Args:
        optimizer: of the masked model, of a kind that keeps its state by parameter, as torch's do but for LBFGS and
            ``ZeroRedundancyOptimizer``; it is left as it is. Its hooks and its scheduler stay with it: the result has
            none, and groups with the ``initial_lr`` that a scheduler noted, from which another one would start.
        model: the masked model that was compacted.
        compacted: what `bmrs.compact` made of it.

    Returns:
        An optimizer of the same kind with the same options.

    Raises:
        TypeError: ``compacted`` is not a network that `bmrs.compact` returned.
        ValueError: the optimizer has a parameter that is not one of the model, or state that cannot be cut.
    """
    record = record_of(compacted)
    if record is None:
        raise TypeError(
            f"compact_optimizer needs a network that bmrs.compact returned, got {type(compacted).__name__}"
        )
    own = _own_attributes(optimizer)
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    every_name = {name for aliases in names.values() for name in aliases}
    new = dict(compacted.named_parameters())
    own_names = {id(parameter): name for name, parameter in new.items()}
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    groups = []
    for group in optimizer.param_groups:
        parameters = []
        for old in group["params"]:
            if id(old) not in names:
                raise ValueError(
                    f"the optimizer has a parameter of shape {tuple(old.shape)} that is not one of the model "
                    f"({type(model).__name__})"
                )
            for alias in names[id(old)]:
                bias = f"{alias.rpartition('.')[0]}.bias".lstrip(".")
                if alias.endswith("weight") and bias in new and bias not in every_name:
                    parameters.append(new[bias])
            # Of a shared one the network may have lost the first name.
            name = next((alias for alias in names[id(old)] if alias in new), "")
            if not name:
                continue
            parameters.append(new[name])
            selection = record.selections.get(name, Selection({}))
            for key, value in optimizer.state.get(old, {}).items():
                cut = _cut(value, old.shape, selection)
                if cut is None:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {key!r} for {name!r}, {_shown(value)} for a parameter of "
                        f"shape {tuple(old.shape)}, which cannot be cut as that was: build a new optimizer for the "
                        "compacted network"
                    )
                state[new[name]][key] = cut
        options = {key: _copied(value) for key, value in group.items() if key != "params"}
        if "param_names" in options:  # of an optimizer that was given named parameters
            options["param_names"] = [own_names[id(parameter)] for parameter in parameters]
        groups.append({**options, "params": parameters})
    result: OptimizerT = type(optimizer).__new__(type(optimizer))
    result.__dict__.update(own)
    result.param_groups, result.state = groups, state
    return result


def _own_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what a copy of an optimizer has beside its groups and state: no hooks, and no step of a scheduler.

    Raises:
        ValueError: it keeps tensors or another optimizer there, so that its state is not by parameter.
    """
    own: dict[str, Any] = {}
    for name, value in vars(optimizer).items():
        if name in ("param_groups", "state"):
            continue
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            own[name] = OrderedDict()
            continue
        # A scheduler puts a step of its own there, which refers to the old optimizer.
        if callable(value) and hasattr(type(optimizer), name):
            continue
        if name != "defaults" and any(_holds_state(leaf) for leaf in tree_leaves(value)):
            raise ValueError(
                f"compact_optimizer needs an optimizer whose state is by parameter, and {type(optimizer).__name__} "
                f"has more in {name!r}: give it the optimizer inside, or build a new one for the compacted network"
            )
        own[name] = _copied(value)
    return own


def _holds_state(value: Any) -> bool:
    return isinstance(value, Tensor | nn.Module | torch.optim.Optimizer)


def _cut(value: Any, shape: torch.Size, selection: Selection) -> Any:
    """Return what of a parameter's state stays with what stays of the parameter, None if nobody can tell."""
    if not isinstance(value, Tensor):
        return None if any(map(_holds_state, tree_leaves(value))) else _copied(value)
    is_whole = not selection.axes and selection.columns is None
    if value.numel() <= 1 or is_whole:
        return value.clone()
    if value.shape == shape:
        return selection.of(value).clone()
    # One number for all entries along some dimensions.
    fits = value.dim() == len(shape) and all(n in (1, of) for n, of in zip(value.shape, shape, strict=True))
    if not fits or selection.columns is not None:
        return None
    axes = {axis: entries for axis, entries in selection.axes.items() if value.shape[axis] > 1}
    return Selection(axes).of(value).clone()


def _shown(value: Any) -> str:
    return (
        f"of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__} with tensors"
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return copy.copy(value) if isinstance(value, dict | list | set) else value
