"""`prune_to`: by evidence first, and beyond it in the order of relative evidence per cost."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bmrs.budget.joint_choice import JointChoice
from bmrs.budget.latency import Latency
from bmrs.budget.objective import relative_losses
from bmrs.budget.report import BudgetReport, LatencySetting, LayerBudget, NetworkCost
from bmrs.budget.search import Found, least_loss, least_possible
from bmrs.checks import check_choice, check_number, shown
from bmrs.compaction.compact import compact
from bmrs.compaction.cost_model import Cost, CostModel, make_cost_model
from bmrs.compaction.costs import first_example
from bmrs.criteria import Criterion, Decision, check_criterion
from bmrs.criteria.evidence import BMRSNormal, BMRSOdds, BMRSUniform
from bmrs.graph.capture import Inputs, as_inputs
from bmrs.graph.copies import copied
from bmrs.graph.layer_norms import check_approximate
from bmrs.graph.masked_graph import MaskedGraph, Unit
from bmrs.noise.lookup import noise_layers, settled_noise_layers
from bmrs.noise.parameters import warn_of_weight_decay
from bmrs.pruning.emptying import emptied, without_layers
from bmrs.pruning.prune import check_finite, judge, write_masks
from bmrs.pruning.report import Judgement

_TRIES = 3
# Of the target: a network that is faster still gives up more than it has to.
_CLOSE = 0.9


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
    squares added up over the layers, is least: the sum itself would empty layers that are expensive. Their costs are
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
        examples: some thousand training examples, as ``example_inputs`` is given. Which structures of a layer go beyond
            the criterion is then not left to what each is worth alone: of those that do the same one is enough, and
            those go that the layers which read them can best do without, by least squares on these examples. How many
            go stays as it is. The weights are those of the model with θ = 1, and what is chosen is meant for weights
            that are refitted (``refit_to`` of `bmrs.compact`) or fine-tuned. Structures that are read by anything
            but linear and convolution layers, such as heads, go by evidence, and so do those read by a layer of more
            than 4,096 inputs, kernel positions counted.
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
        judgement = judge(model, layers, criterion, graph.tied)
        if empty_layers:
            judgement = emptied(judgement, criterion, graph)
        evidence = _Evidence(criterion, judgement)
        start: dict[str, Tensor] | None = judgement.masks
        while start is not None:
            costs = make_cost_model(graph, first, start, evidence.of, every_operation=measure == "latency")
            if measure == "latency":
                budget: _Budget = _LatencyBudget(model, graph, costs, evidence, start, inputs, target)
            else:
                budget = _CountedBudget(graph, costs, evidence, start, measure, target)
            budget.examples = given
            try:
                report = budget.report(layers)
                break
            except _OutOfReachError:
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
        evidence = _Evidence(criterion, judge(model, layers, criterion, graph.tied))
        start = {name: torch.ones_like(layer.mask) for name, layer in layers.items()}
        costs = make_cost_model(graph, first_example(inputs), start, evidence.of, every_operation=True)
        _LatencyBudget(model, graph, costs, evidence, start, inputs, latency).check()


class _OutOfReachError(ValueError):
    """No network with a structure in each layer that is not empty is within the budget."""


def _with_one_layer_less(
    start: Mapping[str, Tensor], evidence: _Evidence, graph: MaskedGraph
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


class _Evidence:
    """What speaks for keeping units, by a criterion."""

    def __init__(self, criterion: Criterion, judgement: Judgement) -> None:
        self.criterion, self.judgement = criterion, judgement
        self._known: dict[Unit, float] = {}

    def of(self, units: Sequence[Unit]) -> list[float]:
        """Return what each unit is worth, at least 0; those of a unit that is pruned already are 0."""
        alike: dict[tuple[str, ...], list[Unit]] = defaultdict(list)
        for unit in units:
            alike[tuple(s.layer for s in unit.structures)].append(unit)
        for layers, its_units in alike.items():
            numbers = torch.tensor([[s.number for s in unit.structures] for unit in its_units]).T
            decisions, kept = [], []
            for layer, places in zip(layers, numbers, strict=True):
                whole = self.judgement.decisions[layer]
                decisions.append(Decision(whole.scores[places], whole.prune[places]))
                kept.append(self.judgement.masks[layer][places])
            joint = self.criterion.decide_tied(decisions, torch.stack(kept)).scores
            worth = self._for_keeping(joint).masked_fill(~torch.stack(kept).any(dim=0), 0.0)
            self._known |= dict(zip(its_units, worth.tolist(), strict=True))
        return [self._known[unit] for unit in units]

    def staying(self, units: Sequence[Unit], masks: Mapping[str, Tensor]) -> float:
        """Return what is worth keeping in the layers of some units beside these units, by masks."""
        rest = {s.layer: masks[s.layer].clone() for unit in units for s in unit.structures}
        for unit in units:
            for layer, number in unit.structures:
                rest[layer][number] = False
        return sum(self.of_structures(layer, mask) for layer, mask in rest.items())

    def of_layers(self, names: Sequence[str], masks: Mapping[str, Tensor]) -> float:
        """Return what all that is kept of some layers is worth by itself."""
        return sum(self.of_structures(name, masks[name]) for name in names)

    def of_structures(self, layer: str, pruned: Tensor) -> float:
        """Return what some structures of a layer are worth by themselves."""
        return float(self._for_keeping(self.judgement.decisions[layer].scores[pruned]).sum())

    def _for_keeping(self, scores: Tensor) -> Tensor:
        sign = -1.0 if self.criterion.prunes_high_scores else 1.0
        return (sign * scores.double()).nan_to_num(math.inf).clamp(min=0.0)


class _Budget:
    """A search for masks within a target.

    Attributes:
        start: masks that it starts from, those of the criterion less layers that have to go whole.
        masks: what it keeps, by name of the noise layer.
    """

    def __init__(
        self,
        graph: MaskedGraph,
        costs: CostModel,
        evidence: _Evidence,
        start: dict[str, Tensor],
        target: float,
    ) -> None:
        self.graph, self.costs, self.evidence, self.start, self.target = graph, costs, evidence, start, target
        self.worths = [np.array(evidence.of(units)) for units in costs.units]
        self.losses = [
            relative_losses(worths, evidence.staying(units, start))
            for worths, units in zip(self.worths, costs.units, strict=True)
        ]
        self.examples: Inputs | None = None
        self.by_evidence = [np.arange(len(units)) for units in costs.units]
        self.orders, self.jointly = self.by_evidence, [False] * len(costs.units)
        self.nothing = np.zeros(len(costs.units))
        self.everything = np.array([len(units) for units in costs.units], dtype=np.float64)
        self.masks = start

    def report(self, layers: Mapping[str, Any]) -> BudgetReport:
        raise NotImplementedError

    def masks_without(self, pruned: NDArray[Any]) -> dict[str, Tensor]:
        masks = {name: mask.clone() for name, mask in self.start.items()}
        for units, order, number in zip(self.costs.units, self.orders, pruned, strict=True):
            for place in order[: int(number)]:
                for layer, structure in units[place].structures:
                    masks[layer][structure] = False
        return masks

    def choose_jointly(self, pruned: NDArray[Any]) -> None:
        """Let those units of each group go first that the others make up for, where there are examples."""
        if self.examples is None or not pruned.any():
            return
        chosen = self.joint_choice.order(self.costs.units, pruned)
        self.jointly = [order is not None for order in chosen]
        self.orders = [
            plain if order is None else order for order, plain in zip(chosen, self.by_evidence, strict=True)
        ]

    @functools.cached_property
    def joint_choice(self) -> JointChoice:
        assert self.examples is not None, "asked only where there are some"
        return JointChoice(self.graph, self.costs.base, self.examples)

    def cost_with(self, masks: Mapping[str, Tensor]) -> Cost:
        """Return what compaction with these masks gives."""
        self.graph.set_masks(masks)
        return self.costs.cost_of(self.graph.without())

    def cost_by_evidence(self) -> Cost:
        """Return what the criterion alone leaves."""
        return self.cost_with(self.evidence.judgement.masks)

    def lost_at_the_start(self) -> float:
        """Return what layers that had to go whole were worth."""
        masks = self.evidence.judgement.masks
        return sum(
            self.evidence.of_structures(name, mask & ~self.start[name]) for name, mask in masks.items()
        )

    def described(self, found: Found, **rest: Any) -> BudgetReport:
        judgement, criterion = self.evidence.judgement, self.evidence.criterion
        pruned_by_units: dict[str, list[bool]] = defaultdict(list)
        jointly: set[str] = set()
        lost = self.lost_at_the_start()
        chosen = zip(self.costs.units, self.worths, self.orders, self.jointly, found.pruned, strict=True)
        for units, worths, order, together, number in chosen:
            lost += float(worths[order[:number]].sum())
            for unit in units:
                for structure in unit.structures:
                    jointly |= {structure.layer} if together else set()
                    pruned_by_units[structure.layer].append(len(units) == number)
        layers = tuple(
            LayerBudget(
                name=name,
                structures=len(mask),
                before=int(judgement.kept[name].sum()),
                by_evidence=int(mask.sum()),
                after=int(self.masks[name].sum()),
                lost=self.evidence.of_structures(name, mask & ~self.masks[name]),
                at_minimum=all(pruned_by_units[name]),
                jointly=name in jointly,
            )
            for name, mask in judgement.masks.items()
        )
        return BudgetReport(
            criterion=repr(criterion),
            score_name=criterion.score_name,
            in_nats=isinstance(criterion, BMRSNormal | BMRSUniform | BMRSOdds),
            target=self.target,
            met_by_evidence=not found.pruned.any() and self.start is judgement.masks,
            layers=layers,
            lost=lost,
            relative_loss=math.sqrt(found.lost),
            with_examples=self.examples is not None,
            **rest,
        )


class _CountedBudget(_Budget):
    """For FLOPs and parameters, which are known exactly."""

    def __init__(
        self,
        graph: MaskedGraph,
        costs: CostModel,
        evidence: _Evidence,
        start: dict[str, Tensor],
        measure: str,
        target: float,
    ) -> None:
        super().__init__(graph, costs, evidence, start, target)
        self.measure = measure
        self.count = costs.flops if measure == "flops" else costs.parameters

    def report(self, layers: Mapping[str, Any]) -> BudgetReport:
        dense, by_evidence = self.costs.dense, self.cost_by_evidence()
        whole = getattr(dense, self.measure)
        limit = self.target * whole if self.target < 1 else self.target
        budget = limit
        for _ in range(_TRIES):
            found = self._within(budget, limit)
            self.choose_jointly(found.pruned)
            self.masks = self.masks_without(found.pruned)
            after = self.cost_with(self.masks)
            if (now := getattr(after, self.measure)) <= limit:
                break
            # More of a network stays than the numbers say, where structures depend on each other.
            budget -= now - limit
        needed = float(self.operations_alone(self.nothing)) - limit
        least = found.lost if found.exact else least_possible(self.losses, self._most_saved(), needed)
        if self.start is not self.evidence.judgement.masks:
            least = 0.0  # which layers go whole was not searched for
        return self.described(
            found,
            measure=self.measure,
            limit=limit,
            met=getattr(after, self.measure) <= limit,
            dense=NetworkCost(dense.parameters, dense.flops),
            by_evidence=NetworkCost(by_evidence.parameters, by_evidence.flops),
            after=NetworkCost(after.parameters, after.flops),
            least_relative_loss=math.sqrt(least),
        )

    def _within(self, budget: float, limit: float) -> Found:
        found = least_loss(self.losses, self.count, budget)
        if found is None:
            smallest = round(float(self.count(self.everything)))
            whole = getattr(self.costs.dense, self.measure)
            raise _OutOfReachError(_too_little(self.measure, self.target, limit, smallest, whole))
        return found

    def operations_alone(self, pruned: NDArray[Any]) -> NDArray[Any]:
        """Return the cost without biases that pruning makes necessary: it is never higher, and saves less and less."""
        return (self.costs.operations if self.measure == "flops" else self.costs.values)(pruned)

    def _most_saved(self) -> NDArray[Any]:
        one_each = np.eye(len(self.nothing))
        return np.asarray(self.operations_alone(self.nothing) - self.operations_alone(one_each))


class _LatencyBudget(_Budget):
    """For latency, which tables of the operations predict and whole networks confirm."""

    def __init__(
        self,
        model: nn.Module,
        graph: MaskedGraph,
        costs: CostModel,
        evidence: _Evidence,
        start: dict[str, Tensor],
        inputs: Any,
        target: float,
    ) -> None:
        super().__init__(graph, costs, evidence, start, target)
        self.model, self.inputs = model, inputs

    def check(self) -> None:
        """Raise if even the smallest network takes longer than the target."""
        networks = [self._compacted(masks) for masks in (self.start, self.masks_without(self.everything))]
        dense, least = Latency(self.graph, self.costs, self.inputs).of_networks(networks)
        self._check_reach(least, dense)

    def _check_reach(self, least: float, dense: float) -> None:
        if least > self.target:
            raise _OutOfReachError(_too_little("latency", self.target, self.target, least, dense))

    def report(self, layers: Mapping[str, Any]) -> BudgetReport:
        everything_kept = {n: torch.ones_like(mask) for n, mask in self.masks.items()}
        smallest = self.masks_without(self.everything)
        networks = [self._compacted(m) for m in (everything_kept, self.masks, smallest)]
        latency = Latency(self.graph, self.costs, self.inputs)
        dense, now, least = latency.of_networks(networks)
        found = Found(self.nothing.astype(np.int64), 0.0, True)
        predicted, measured, tries = now, now, 0
        if now > self.target:
            self._check_reach(least, dense)
            latency.calibrate(self.nothing, now, self.everything, least)
            # Better is within the target, and of those what gives up least; of others what is fastest.
            best: tuple[bool, float] | None = None
            budget = self.target
            while tries < _TRIES:
                tries += 1
                tried = self._within(latency, budget)
                self.choose_jointly(tried.pruned)
                masks = self.masks_without(tried.pruned)
                time = latency.of_networks([networks[1], self._compacted(masks)])[1]
                rank = (True, -tried.lost) if time <= self.target else (False, -time)
                if best is None or rank > best:
                    best = rank
                    found, self.masks, measured = tried, masks, time
                    predicted = float(latency(tried.pruned.astype(np.float64)))
                if _CLOSE * self.target <= time <= self.target:
                    break
                budget *= self.target / time
        self.choose_jointly(found.pruned)  # the last try is not always the best
        kept, by_evidence = self.costs.dense, self.cost_by_evidence()
        after = self.cost_with(self.masks)
        return self.described(
            replace(found, exact=False),
            measure="latency",
            limit=self.target,
            met=measured <= self.target,
            dense=NetworkCost(kept.parameters, kept.flops, dense),
            by_evidence=NetworkCost(by_evidence.parameters, by_evidence.flops, now),
            after=NetworkCost(after.parameters, after.flops, measured),
            least_relative_loss=None,
            latency=LatencySetting(latency.batch, latency.threads, latency.device, predicted, tries),
        )

    def _within(self, latency: Latency, budget: float) -> Found:
        found = least_loss(self.losses, latency, budget)
        if found is None:
            # By the tables none is, by the measurement of the smallest network some are.
            everything = self.everything.astype(np.int64)
            found = Found(everything, sum(float(w.sum()) for w in self.losses), exact=False)
        return found

    def _compacted(self, masks: Mapping[str, Tensor]) -> nn.Module:
        masked = copied(self.model, share=False)
        for name, layer in noise_layers(masked).items():
            layer.set_kept(masks[name].to(layer.mask.device))
        args, kwargs = self.inputs
        return compact(masked, kwargs if kwargs else args, approximate=self.graph.captured.approximate)


def _too_little(measure: str, target: float, limit: float, smallest: float, dense: float) -> str:
    unit = {"flops": "FLOPs", "parameters": "parameters", "latency": "ms"}[measure]
    asked = f"{measure}={target:g}"
    if measure != "latency":
        asked += f" ({limit:,.0f})"
    numbers = ("{:,.0f}", "{:.4g}")[measure == "latency"]
    return (
        f"{asked} is less than the smallest possible network has: {numbers.format(smallest)} {unit} of "
        f"{numbers.format(dense)} ({smallest / dense:.1%}), with one structure left in each layer and what cannot "
        "leave; nothing was pruned"
    )
