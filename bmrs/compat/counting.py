"""How many parameters a network has, and how many of them pruning takes away."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.checks import check_module
from bmrs.compaction.compact import compact
from bmrs.compat.layers import PruningLayer
from bmrs.compat.networks import named_pruning_layers
from bmrs.compat.upgrading import upgrade
from bmrs.graph.stock_layers import BATCH_NORMS
from bmrs.noise.producers import STOCK_PRODUCERS, TRANSPOSED_CONVOLUTIONS, by_output
from bmrs.noise.wrappers import inside_wrappers


def total_parameters(model: nn.Module) -> int:
    """Return the number of trained parameters, μ and log σ included."""
    check_module(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def get_true_parameter_compression_percent(
    model: nn.Module, example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None
) -> float:
    """Return how many per cent of the trained parameters the masks take away; the model stays as it is.

    Args:
        model: a model with pruning layers.
        example_inputs: with an input of the model the answer is what `bmrs.compact` really removes, all μ and log σ
            with it. Without, it is counted in module order: the outputs of the layer in front of a pruning layer, with
            biases and batch norms, the inputs of the next one, and μ and log σ of the pruned structures. That is right
            for layers in a chain, registered as they are used, and too much where a residual connection still feeds
            the next layer.

    Raises:
        ValueError: the model has no pruning layer or no trained parameter, or `bmrs.compact` does not take it.
    """
    layers, total = named_pruning_layers(model), total_parameters(model)
    if not layers or total == 0:
        what = "trained parameter" if layers else "pruning layer: put those of bmrs.compat into it"
        raise ValueError(f"the model has no {what}")
    if example_inputs is not None:
        return 100.0 * (1 - total_parameters(_compacted(model, example_inputs)) / total)
    return 100.0 * _counted_in_module_order(model) / total


def _compacted(model: nn.Module, example_inputs: Any) -> nn.Module:
    return compact(upgrade(copy.deepcopy(inside_wrappers(model))), example_inputs)


def _counted_in_module_order(model: nn.Module) -> int:
    gone: dict[nn.Parameter, Tensor] = {}  # True where an entry leaves; a shared weight counts once
    source: nn.Module | None = None
    norms: list[nn.Module] = []  # behind the source
    waiting: Tensor | None = None  # what is pruned of the last pruning layer, until the next weights come
    for module in inside_wrappers(model).modules():
        if isinstance(module, STOCK_PRODUCERS):
            if waiting is not None:
                _mark_inputs(gone, module, waiting)
            source, norms, waiting = module, [], None
        elif isinstance(module, BATCH_NORMS):
            norms.append(module)
        elif isinstance(module, PruningLayer):
            waiting = ~module.kept.flatten().cpu()
            for parameter in (module.mu, module.logsigma):
                _mark(gone, parameter, waiting.view(parameter.shape))
            if source is not None and len(by_output(source, source.get_parameter("weight"))) == len(waiting):
                _mark_outputs(gone, source, waiting)
                for norm in norms:
                    _mark_vectors(gone, norm, waiting)
    return sum(int(entries.sum()) for parameter, entries in gone.items() if parameter.requires_grad)


def _mark(gone: dict[nn.Parameter, Tensor], parameter: nn.Parameter, entries: Tensor) -> None:
    if parameter not in gone:
        gone[parameter] = torch.zeros(parameter.shape, dtype=torch.bool)
    gone[parameter] |= entries


def _mark_vectors(gone: dict[nn.Parameter, Tensor], module: nn.Module, pruned: Tensor) -> None:
    for parameter in module.parameters(recurse=False):
        if parameter.shape == pruned.shape:
            _mark(gone, parameter, pruned)


def _mark_outputs(gone: dict[nn.Parameter, Tensor], source: nn.Module, pruned: Tensor) -> None:
    weight: nn.Parameter = source.weight  # type: ignore[assignment]
    entries = torch.zeros(weight.shape, dtype=torch.bool)
    if isinstance(source, TRANSPOSED_CONVOLUTIONS):
        by_group = pruned.view(source.groups, 1, -1, *[1] * (weight.dim() - 2))
        entries = (entries.unflatten(0, (source.groups, -1)) | by_group).flatten(0, 1)
    else:
        entries[pruned] = True
    _mark(gone, weight, entries)
    if isinstance(source.bias, nn.Parameter):
        _mark(gone, source.bias, pruned)


def _mark_inputs(gone: dict[nn.Parameter, Tensor], module: nn.Module, pruned: Tensor) -> None:
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    entries = torch.zeros(weight.shape, dtype=torch.bool)
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        if weight.shape[0] == len(pruned):
            entries[pruned] = True
    elif weight.shape[1] == len(pruned):
        entries[:, pruned] = True
    elif isinstance(module, nn.Linear) and weight.shape[1] % len(pruned) == 0:
        # Flattening puts the pixels of a channel behind each other.
        entries[:, pruned.repeat_interleave(weight.shape[1] // len(pruned))] = True
    _mark(gone, weight, entries)
