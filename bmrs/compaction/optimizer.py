"""An optimizer's state for the compacted network, so that training goes on where it was."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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
        optimizer: of the masked model, of any of torch's kinds; it is left as it is.
        model: the masked model that was compacted.
        compacted: what `bmrs.compact` made of it.

    Returns:
        An optimizer of the same kind with the same options.

    Raises:
        TypeError: ``compacted`` is not a network that `bmrs.compact` returned.
        ValueError: the optimizer has a parameter that is not one of the model.
    """
    record = record_of(compacted)
    if record is None:
        raise TypeError(
            f"compact_optimizer needs a network that bmrs.compact returned, got {type(compacted).__name__}"
        )
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    every_name = {name for aliases in names.values() for name in aliases}
    new = dict(compacted.named_parameters())
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
                cut = isinstance(value, Tensor) and value.shape == old.shape
                state[new[name]][key] = selection.of(value).clone() if cut else _copied(value)
        groups.append({**group, "params": parameters})
    result: OptimizerT = type(optimizer).__new__(type(optimizer))
    result.__dict__.update(optimizer.__dict__)
    result.param_groups, result.state = groups, state
    return result


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
