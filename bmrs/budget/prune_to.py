"""`prune_to`: by evidence first, and beyond it in the order of relative evidence per cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bmrs.budget.report import BudgetReport
from bmrs.budget.targets import Budget, CountedBudget, LatencyBudget, OutOfReachError
from bmrs.budget.worths import Evidence
from bmrs.checks import check_choice, check_number, shown
from bmrs.compaction.cost_model import make_cost_model
from bmrs.compaction.costs import first_example
from bmrs.criteria import Criterion, check_criterion
from bmrs.graph.inputs import Inputs, as_inputs
from bmrs.graph.layer_norms import check_approximate
from bmrs.graph.masked_graph import MaskedGraph
from bmrs.noise.lookup import settled_noise_layers
from bmrs.noise.parameters import warn_of_weight_decay
from bmrs.pruning.emptying import emptied, without_layers
from bmrs.pruning.prune import check_finite, judge, write_masks


def prune_to(
    model: nn.Module,
    criterion: Criterion,
    *,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    flops: float | None = None,
    parameters: float | None = None,
    latency: float | None = None,
    examples: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    empty_layers: bool = False,
    approximate: Collection[str] = (),
) -> BudgetReport:
    """Prune by a criterion, and beyond it until the compacted network is within a budget, in place and for good.

    What `bmrs.prune` with ``example_inputs`` prunes goes first, whatever the budget. If that is not enough, further
    structures go, in each layer those first for which least speaks: ΔF or log odds in nats for criteria of evidence,
    the score itself for the others. How many go of each layer is chosen so that what is given up over what stays, in
    squares added up over the layers, is least: the sum itself would empty layers that are expensive. (``examples`` let
    them say both.) Costs are
    those of the compacted network, where a structure of one layer saves the less the fewer are left in the next; tied
    structures, and structures of a grouped convolution, go together. The structure of each layer that is most worth
    keeping stays, but for ``empty_layers``. With some hundred thousand combinations of widths at most all are tried,
    and nothing less would do; otherwise the report has a bound.

    Args:
        model: a model with noise layers that `bmrs.compact` takes.
        criterion: one of the criteria of `bmrs`.
        example_inputs: an input of the model, as `bmrs.compact` takes it.
        flops: floating-point operations of the compacted network for the first example, two for each multiply-add: a
            share of the dense network's, between 0 and 1, or a number from 1 on.
        parameters: values of its parameters, likewise.
        latency: milliseconds of its forward pass of all of ``example_inputs``, greater than 0, on their device and with
            as many threads as torch has now. Each operation is timed at a few widths, about 20 seconds at most once
            each has been timed once; then four to six networks are compacted and timed as a whole.
        examples: some thousand training examples, as ``example_inputs`` is given. What goes beyond the criterion is
            then not left to what each structure is worth alone. Those go of a layer that the layers which read them can
            best do without, by least squares on these examples: of those that do the same one is enough. As many go
            of each layer that the outputs lose as little of their variance as possible, to first order, for which the
            model is differentiated. The weights are those of the model with θ = 1, and what is chosen is meant for
            weights that are refitted (``refit_to`` of `bmrs.compact`) or fine-tuned. Structures that are read by
            anything but linear and convolution layers, such as heads, go by evidence, and so do those read by a layer
            of more than 8,192 inputs, kernel positions counted; where there are such, or the outputs have no gradients,
            evidence says for all layers how many go.
        empty_layers: True lets layers go whole as in `bmrs.prune`; beyond the criterion only where one structure in
            each layer is too much for the budget, those first that are worth least.
        approximate: what `bmrs.compact` will be asked to approximate, so that more can leave.

    Returns:
        What went by the criterion, what the budget took beyond, and what evidence that gave up.

    Raises:
        TypeError: ``model`` is not a module, ``criterion`` is not a criterion, a target is not a number, or
            ``example_inputs`` is nothing that `bmrs.compact` takes.
        ValueError: not exactly one target is given, it is out of range or smaller than the smallest possible network,
            or as `bmrs.prune` and `bmrs.compact`. Nothing is pruned then.
    """
    check_criterion(criterion)
    check_choice("empty_layers", empty_layers, (False, True))
    allowed = check_approximate(approximate)
    measure, target = _target(flops=flops, parameters=parameters, latency=latency)
    layers = settled_noise_layers(model)
    warn_of_weight_decay(layers)
    check_finite(layers)
    with torch.inference_mode(False), torch.no_grad():
        inputs = as_inputs(example_inputs, model)
        given = None if examples is None else _as_examples(examples, model)
        first = first_example(inputs)
        graph = MaskedGraph(model, inputs if measure == "latency" else first, "prune_to", approximate=allowed)
        judgement = judge(model, layers, criterion, graph.tied, example_inputs=example_inputs)
        if empty_layers:
            judgement = emptied(judgement, criterion, graph)
        evidence = Evidence(criterion, judgement)
        start: dict[str, Tensor] | None = judgement.masks
        while start is not None:
            costs = make_cost_model(graph, first, start, evidence.of, every_operation=measure == "latency")
            if measure == "latency":
                budget: Budget = LatencyBudget(model, graph, costs, evidence, start, inputs, target, given)
            else:
                budget = CountedBudget(graph, costs, evidence, start, measure, target, given)
            try:
                report = budget.report()
                break
            except OutOfReachError:
                if graph.equal_parts:
                    graph.equal_parts = False  # rather a graph than none that is small enough
                    continue
                start = _with_one_layer_less(start, evidence, graph) if empty_layers else None
                if start is None:
                    raise
        write_masks(layers, budget.masks)
    return report


def check_latency(
    model: nn.Module,
    criterion: Criterion,
    *,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    latency: float,
) -> None:
    """Refuse a latency that `prune_to` could not reach whatever the posteriors say, as before they are learned.

    Raises:
        ValueError: even with one structure left in each layer the network takes longer; the message says how long.
    """
    layers = settled_noise_layers(model)
    with torch.inference_mode(False), torch.no_grad():
        inputs = as_inputs(example_inputs, model)
        graph = MaskedGraph(model, inputs, "prune_to")
        evidence = Evidence(
            criterion, judge(model, layers, criterion, graph.tied, example_inputs=example_inputs)
        )
        start = {name: torch.ones_like(layer.mask) for name, layer in layers.items()}
        costs = make_cost_model(graph, first_example(inputs), start, evidence.of, every_operation=True)
        LatencyBudget(model, graph, costs, evidence, start, inputs, latency).check()


def _with_one_layer_less(
    start: Mapping[str, Tensor], evidence: Evidence, graph: MaskedGraph
) -> dict[str, Tensor] | None:
    """Return masks without the layer that is worth least and can be empty, None if there is none."""
    tied = {name: tuple(group) for group in graph.tied for name in group}
    groups = dict.fromkeys(tied.get(name, (name,)) for name, mask in start.items() if mask.any())
    for names in sorted(groups, key=lambda names: evidence.of_layers(names, start)):
        if (masks := without_layers(dict(start), names, graph)) is not None:
            return masks
    return None


def _as_examples(examples: Any, model: nn.Module) -> Inputs:
    try:
        return as_inputs(examples, model)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("example_inputs", "examples")) from None


def _target(**targets: float | None) -> tuple[str, float]:
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        got = ", ".join(f"{name}={shown(value)}" for name, value in given.items()) or "none"
        raise ValueError(f"prune_to takes one of flops, parameters and latency, got {got}")
    ((name, value),) = given.items()
    check_number(name, value, above=0.0)
    return name, float(value)
