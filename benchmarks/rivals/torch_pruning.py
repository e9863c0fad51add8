"""Structures chosen and removed by Torch-Pruning, and the scores that it gives them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmrs.data import Split

CALIBRATION = 2560
"""Training images whose gradient Taylor's scores are made from."""


def scores(model: nn.Module, names: Sequence[str], split: Split, *, seed: int) -> dict[str, list[Tensor]]:
    """Return Torch-Pruning's importance of each structure of the named layers, by criterion: "random", "L2", "Taylor".

    By its default, each group's scores are divided by their mean, which makes them comparable between layers.
    """
    import torch_pruning as tp

    model = copy.deepcopy(model).eval()
    examples, labels = next(split.in_order(CALIBRATION))
    model.zero_grad()
    F.cross_entropy(model(examples), labels).backward()
    graph = tp.DependencyGraph().build_dependency(model, examples[:2])
    torch.manual_seed(seed)
    importances = {
        "random": tp.importance.RandomImportance(),
        "L2": tp.importance.GroupMagnitudeImportance(p=2),
        "Taylor": tp.importance.GroupTaylorImportance(),
    }
    return {
        criterion: [importance(_group(graph, model, name)).detach() for name in names]
        for criterion, importance in importances.items()
    }


def pruned(model: nn.Module, kept: Mapping[str, Tensor], example: Tensor) -> nn.Module:
    """Return a copy of a model from which Torch-Pruning has removed all structures of the named layers but these."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    for name, indices in kept.items():
        structures = len(model.get_submodule(name).weight)  # type: ignore[arg-type]
        gone = sorted(set(range(structures)) - set(indices.tolist()))
        if gone:
            graph = tp.DependencyGraph().build_dependency(model, example)
            _group(graph, model, name, gone).prune()
    return model


def _group(graph: Any, model: nn.Module, name: str, indices: Sequence[int] | None = None) -> Any:
    layer = model.get_submodule(name)
    if indices is None:
        indices = range(len(layer.weight))  # type: ignore[arg-type]
    return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(indices))
