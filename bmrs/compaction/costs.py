"""What networks and their structures take: parameters and floating-point operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bmrs.checks import check_number
from bmrs.compaction.compact import compact_report, compacted
from bmrs.compaction.comparison import forward_flops
from bmrs.compaction.masked_model import MaskedModel
from bmrs.graph.analysis import analyse
from bmrs.graph.capture import as_inputs, map_tensors
from bmrs.graph.ties import tied_in
from bmrs.noise.lookup import settled_noise_layers

ExampleInputs: TypeAlias = "Tensor | Sequence[Any] | Mapping[str, Any]"

# Of the mean price, for structures whose removal saves nothing.
_LEAST_PRICE = 1e-3


@dataclass(frozen=True)
class StructureCost:
    """What the network saves without one structure of a layer.

    Attributes:
        parameters: trainable values.
        flops: floating-point operations for one example, two for each multiply-add.
    """

    parameters: float
    flops: float


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def flops(model: nn.Module, example: Tensor) -> int:
    """Return the floating-point operations of a forward pass, two for each multiply-add."""
    with torch.no_grad():
        return forward_flops(model.eval(), ((example,), {}))


def structure_costs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, StructureCost]:
    """Measure what the compacted network saves when one more structure of each noise layer is pruned.

    Structures that additions tie are pruned together, and what that saves is divided among their layers.

    Args:
        model: a model that `bmrs.compact` takes, in any mode; it is left as it is.
        example_inputs: as for `bmrs.compact`; FLOPs are those of its first example.

    Returns:
        By qualified name of the noise layer. All zeros where a structure cannot be removed alone: as an output of the
        model, in a grouped convolution, or if it is the last one.

    Raises:
        TypeError, ValueError, RuntimeError: as `bmrs.compact`.
    """
    return _measured(model, example_inputs)[1]


def structure_prices(
    model: nn.Module, example_inputs: ExampleInputs, *, exponent: float = 0.5
) -> dict[str, float]:
    """Return prices that make pruning save parameters and operations, for `bmrs.learn_posteriors`.

    ΔF and odds know no cost: they empty cheap linear layers and leave expensive filters alone. A price is a declared
    factor on the temperature of a layer's structures. Here it is a power of the mean of the two shares, of the
    network's parameters and of its FLOPs, that one of them takes; the mean price of all structures is 1.

    Args:
        model: see `structure_costs`.
        example_inputs: see `structure_costs`.
        exponent: 0 has all structures pay alike, 1 in proportion to what they take. With ½, the default, LeNet-5 on
            images keeps its accuracy with fewer parameters and fewer FLOPs than with either.

    Returns:
        By qualified name of the noise layer.

    Raises:
        TypeError, ValueError, RuntimeError: as `bmrs.compact`, or ``exponent`` is not a finite number at least 0.
    """
    check_number("exponent", exponent, minimum=0.0)
    layers = settled_noise_layers(model)
    if exponent == 0:
        return dict.fromkeys(layers, 1.0)
    whole, costs = _measured(model, example_inputs)
    shares = {
        name: (cost.parameters / whole.parameters + cost.flops / max(whole.flops, 1)) / 2
        for name, cost in costs.items()
    }
    if not any(shares.values()):
        return dict.fromkeys(layers, 1.0)
    raised = {name: share**exponent if share else 0.0 for name, share in shares.items()}
    structures = {name: int(layer.mask.sum()) for name, layer in layers.items()}
    mean = sum(raised[name] * count for name, count in structures.items()) / sum(structures.values())
    return {name: max(price / mean, _LEAST_PRICE) for name, price in raised.items()}


def _first_example(example_inputs: ExampleInputs) -> ExampleInputs:
    """Return the first example alone, if all tensors have equally many along their first dimension; otherwise all."""
    args, kwargs = as_inputs(example_inputs)
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    if len({tensor.shape[:1] for tensor in tensors}) == 1:
        args, kwargs = map_tensors(lambda t: t[:1], (args, kwargs))
    return kwargs if kwargs else args


def _measured(
    model: nn.Module, example_inputs: ExampleInputs
) -> tuple[StructureCost, dict[str, StructureCost]]:
    """Return what the compacted network takes, and what one structure of each noise layer does."""
    names = list(settled_noise_layers(model))
    with torch.inference_mode(False), torch.no_grad():
        masked = MaskedModel(model, as_inputs(_first_example(example_inputs), model))
        whole = _cost(masked)
        costs: dict[str, StructureCost] = {}
        for group in _groups(masked):
            masks = {name: masked.layers[name].mask for name in group}
            kept = masks[group[0]].nonzero().flatten()
            less = whole
            if len(kept) > 1:
                for name, mask in masks.items():
                    masked.set_kept(name, mask.index_fill(0, kept[-1], False))
                less = _cost(masked)
                for name, mask in masks.items():
                    masked.set_kept(name, mask)
            share = StructureCost(
                (whole.parameters - less.parameters) / len(group), (whole.flops - less.flops) / len(group)
            )
            costs.update(dict.fromkeys(group, share))
    # By the model's own names, which differ where it is itself a noise layer.
    return whole, {name: costs[its] for name, its in zip(names, masked.layers, strict=True)}


def _groups(masked: MaskedModel) -> list[list[str]]:
    """Return the noise layers that have to prune a structure together, or alone."""
    for factors in masked.factors.values():
        factors.fill_(1.0)
    tied = tied_in(masked.captured, masked.factors)
    for name in masked.layers:
        masked.update_factors(name)
    together = {name for group in tied for name in group}
    return [*tied, *([name] for name in masked.layers if name not in together)]


def _cost(masked: MaskedModel) -> StructureCost:
    report = compact_report(compacted(masked, analyse(masked.captured)))
    return StructureCost(report.parameters_after, report.flops_after)
