"""Structures chosen and removed by Torch-Pruning, and the scores that it gives them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmrs.compaction.costs import flops
from bmrs.data import Split

CALIBRATION = 2560
"""Training images whose gradient Taylor's scores are made from."""

_STEPS = 400

_STEPS_OF_A_GRADIENT = 40


def scores(model: nn.Module, names: Sequence[str], split: Split, *, seed: int) -> dict[str, list[Tensor]]:
    """Return Torch-Pruning's importance of each structure of the named layers, by criterion: "random", "L2", "Taylor".

    By its default, each group's scores are divided by their mean, which makes them comparable between layers.
    """
    import torch_pruning as tp

    model = copy.deepcopy(model).eval()
    _make_gradients(model, split)
    graph = tp.DependencyGraph().build_dependency(model, next(split.in_order(2))[0])
    torch.manual_seed(seed)
    return {
        criterion: [importance(_group(graph, model, name)).detach() for name in names]
        for criterion, importance in _importances().items()
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


def pruned_in_rounds(
    model: nn.Module,
    widths: Mapping[str, int],
    criterion: str,
    split: Split,
    *,
    epochs: Sequence[int],
    train: Callable[[nn.Module, int], None],
) -> nn.Module:
    """Return a copy that Torch-Pruning's own pruner has narrowed in as many steps as there are numbers of epochs.

    In each step every layer loses as many structures, those with the least scores of the network as it is then.

    Args:
        model: the trained network.
        widths: structures that stay of each named layer in the end.
        criterion: "L2" or "Taylor".
        split: training images, for Taylor's gradient.
        epochs: of training after each step.
        train: trains a network in place for a number of epochs.
    """
    import torch_pruning as tp

    model = copy.deepcopy(model)
    layers = {model.get_submodule(name): width for name, width in widths.items()}
    pruner = tp.pruner.BasePruner(
        model,
        next(split.in_order(2))[0],
        importance=_importances()[criterion],
        pruning_ratio=0.0,  # of layers that are not named
        # It rounds what stays down; the half keeps the last step safe from rounding errors.
        pruning_ratio_dict={layer: 1 - (width + 0.5) / len(layer.weight) for layer, width in layers.items()},  # type: ignore[arg-type]
        iterative_steps=len(epochs),
    )
    for number in epochs:
        if criterion == "Taylor":
            _make_gradients(model.eval(), split)
        pruner.step()
        train(model, number)
    return model


def pruned_to(
    model: nn.Module,
    most: float,
    criterion: str,
    split: Split,
    *,
    everywhere: bool,
    seed: int,
    epochs: Sequence[int],
    train: Callable[[nn.Module, int], None],
) -> nn.Module:
    """Return a copy that takes so many FLOPs at most, got to as Torch-Pruning's own benchmarks do: in small steps.

    Its pruner takes a four-hundredth of the channels at a time, whatever is coupled together, and scores what is left
    anew each time, by Taylor with the gradient of every fortieth step.

    Args:
        model: the trained network.
        most: FLOPs that it may take.
        criterion: "random", "L2" or "Taylor".
        split: training images, for Taylor's gradient.
        everywhere: whether the scores of all layers are compared; otherwise all are narrowed alike.
        seed: of the random choice.
        epochs: of training after each part of the way, of which all save the same share of what is left.
        train: trains a network in place for a number of epochs.

    Raises:
        ValueError: it does not get there.
    """
    import torch_pruning as tp

    model = copy.deepcopy(model)
    example = next(split.in_order(1))[0]
    full = flops(model, example)
    torch.manual_seed(seed)
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=_importances()[criterion],
        global_pruning=everywhere,
        pruning_ratio=1.0,
        ignored_layers=[layer for layer in model.modules() if isinstance(layer, nn.Linear)],  # the classifier
        iterative_steps=_STEPS,
    )
    for part, number in enumerate(epochs, start=1):
        wanted = full * (most / full) ** (part / len(epochs))
        steps = 0
        while flops(model, example) > wanted:
            if criterion == "Taylor" and steps % _STEPS_OF_A_GRADIENT == 0:
                _make_gradients(model.eval(), split)
            if pruner.current_step == _STEPS:
                raise ValueError(f"Torch-Pruning leaves {flops(model, example):,} FLOPs, not {wanted:,.0f}")
            pruner.step()
            steps += 1
        train(model, number)
    return model


def _importances() -> dict[str, Any]:
    import torch_pruning as tp

    return {
        "random": tp.importance.RandomImportance(),
        "L2": tp.importance.GroupMagnitudeImportance(p=2),
        "Taylor": tp.importance.GroupTaylorImportance(),
    }


def _make_gradients(model: nn.Module, split: Split) -> None:
    examples, labels = next(split.in_order(CALIBRATION))
    model.zero_grad()
    F.cross_entropy(model(examples), labels).backward()


def _group(graph: Any, model: nn.Module, name: str, indices: Sequence[int] | None = None) -> Any:
    layer = model.get_submodule(name)
    if indices is None:
        indices = range(len(layer.weight))  # type: ignore[arg-type]
    return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(indices))
