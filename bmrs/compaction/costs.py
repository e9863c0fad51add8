"""What networks and their structures take: parameters and floating-point operations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bmrs.checks import check_number
from bmrs.compaction.cost_model import make_cost_model
from bmrs.compaction.flop_count import forward_flops
from bmrs.graph.inputs import Inputs, as_inputs, map_tensors
from bmrs.graph.layer_norms import check_approximate
from bmrs.graph.masked_graph import MaskedGraph, Structure, Unit
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


def structure_costs(
    model: nn.Module, example_inputs: ExampleInputs, *, approximate: Collection[str] = ()
) -> dict[str, StructureCost]:
    """Measure what the compacted network saves when one more structure of each noise layer is pruned.

    Structures that additions tie are pruned together, and so are those of the layers and directions of a recurrent
    layer, of which equally many stay; what that saves is divided among their noise layers.

    Args:
        model: a model that `bmrs.compact` takes, in any mode; it is left as it is.
        example_inputs: as for `bmrs.compact`; FLOPs are those of its first example.
        approximate: as for `bmrs.compact`.

    Returns:
        By qualified name of the noise layer. All zeros where a structure cannot be removed alone: as an output of the
        model, in a grouped convolution, or if it is the last one.

    Raises:
        TypeError, ValueError, RuntimeError: as `bmrs.compact`.
    """
    return _costs(model, example_inputs, check_approximate(approximate))[0]


def structure_prices(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    exponent: float = 0.5,
    approximate: Collection[str] = (),
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
        approximate: as for `bmrs.compact`.

    Returns:
        By qualified name of the noise layer.

    Raises:
        TypeError, ValueError, RuntimeError: as `bmrs.compact`, or ``exponent`` is not a finite number at least 0.
    """
    check_number("exponent", exponent, minimum=0.0)
    allowed = check_approximate(approximate)
    layers = settled_noise_layers(model)
    if exponent == 0:
        return dict.fromkeys(layers, 1.0)
    costs, whole = _costs(model, example_inputs, allowed)
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


def _costs(
    model: nn.Module, example_inputs: ExampleInputs, approximate: frozenset[str]
) -> tuple[dict[str, StructureCost], StructureCost]:
    """Return what `structure_costs` does, and what the whole network takes."""
    masks = {name: layer.kept.cpu() for name, layer in settled_noise_layers(model).items()}
    last = {name: Structure(name, int(mask.nonzero()[-1])) for name, mask in masks.items() if mask.any()}
    with torch.inference_mode(False), torch.no_grad():
        inputs = first_example(as_inputs(example_inputs, model))
        graph = MaskedGraph(model, inputs, "structure_costs", approximate=approximate)
        found = make_cost_model(graph, inputs, masks, _last_first, bundled=False)
        groups = {frozenset(unit.structures): g for g, units in enumerate(found.units) for unit in units}
        together = {name: tuple(group) for group in graph.tied for name in group}
        level = {name: group for group in graph.level for name in group}
        one_each = np.eye(len(found.units))
        pruned = {}
        for name in masks:
            groups_of_layers = dict.fromkeys(together.get(n, (n,)) for n in level.get(name, [name]))
            if all(int(masks[layers[0]].sum()) > 1 for layers in groups_of_layers):
                pruned[name] = frozenset(
                    Structure(layer, last[layers[0]].number)
                    for layers in groups_of_layers
                    for layer in layers
                )
        known = {
            structures: one_each[groups[structures]] for structures in pruned.values() if structures in groups
        }
        at_once = found.cost_of(graph.without(s for structures in known for s in structures))
        if at_once != found.cost(sum(known.values(), np.zeros(len(found.units)))):
            # They leave with others only.
            known = {}
        whole = found.cost(np.zeros(len(found.units)))
        costs = {}
        for name in masks:
            number, saved = len(pruned.get(name, ())), (0, 0)
            if name in pruned:
                counted = known.get(pruned[name])
                cost = found.cost_of(graph.without(pruned[name])) if counted is None else found.cost(counted)
                saved = (whole.parameters - cost.parameters, whole.flops - cost.flops)
            costs[name] = StructureCost(saved[0] / max(number, 1), saved[1] / max(number, 1))
    return costs, StructureCost(whole.parameters, whole.flops)


def _last_first(units: Sequence[Unit]) -> list[float]:
    return [-float(unit.structures[0].number) for unit in units]


def first_example(inputs: Inputs) -> Inputs:
    """Return the first example alone, if all tensors have equally many along their first dimension; otherwise all."""
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    if len({tensor.shape[:1] for tensor in tensors}) == 1:
        return map_tensors(lambda t: t[:1], inputs)
    return inputs
