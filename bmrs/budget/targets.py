"""The targets of a budget: FLOPs and parameters, which are known, and latency, which is predicted and measured."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping
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
from bmrs.budget.worths import Evidence
from bmrs.compaction.compact import compact
from bmrs.compaction.cost_model import Cost, CostModel
from bmrs.criteria.evidence import BMRSNormal, BMRSOdds, BMRSUniform
from bmrs.graph.copies import copied
from bmrs.graph.inputs import Inputs
from bmrs.graph.masked_graph import MaskedGraph
from bmrs.noise.lookup import noise_layers

_TRIES = 3
# Of the target: a network that is faster still gives up more than it has to.
_CLOSE = 0.9


class OutOfReachError(ValueError):
    """No network with a structure in each layer that is not empty is within the budget."""


class Budget:
    """A search for masks within a target.

    Attributes:
        start: masks that it starts from, those of the criterion less layers that have to go whole.
        masks: what it keeps, by name of the noise layer.
    """

    def __init__(
        self,
        graph: MaskedGraph,
        costs: CostModel,
        evidence: Evidence,
        start: dict[str, Tensor],
        target: float,
        examples: Inputs | None,
    ) -> None:
        self.graph, self.costs, self.evidence, self.start, self.target = graph, costs, evidence, start, target
        self.examples = examples
        self.worths = [np.array(evidence.of(units)) for units in costs.units]
        self.by_evidence = [np.arange(len(units)) for units in costs.units]
        self.orders, self.jointly = self.by_evidence, [False] * len(costs.units)
        self.nothing = np.zeros(len(costs.units))
        self.everything = np.array([len(units) for units in costs.units], dtype=np.float64)
        self.masks = start

    def report(self) -> BudgetReport:
        """Search, and return what was found.

        Raises:
            OutOfReachError: see there.
        """
        raise NotImplementedError

    def masks_without(self, pruned: NDArray[Any]) -> dict[str, Tensor]:
        """Return what is left without so many units of each group."""
        masks = {name: mask.clone() for name, mask in self.start.items()}
        for units, order, number in zip(self.costs.units, self.orders, pruned, strict=True):
            for place in order[: int(number)]:
                for layer, structure in units[place].structures:
                    masks[layer][structure] = False
        return masks

    @functools.cached_property
    def losses_by_evidence(self) -> list[NDArray[np.float64]]:
        """Of each group what its structures are worth over what stays."""
        return [
            relative_losses(worths, self.evidence.staying(units, self.start))
            for worths, units in zip(self.worths, self.costs.units, strict=True)
        ]

    @functools.cached_property
    def losses_by_examples(self) -> list[NDArray[np.float64]] | None:
        """Of each group what the layers behind lose with its structures; None where that is not known of all."""
        return None if self.examples is None else self.joint_choice.rises(self.costs.units)

    @property
    def losses(self) -> list[NDArray[np.float64]]:
        """What the numbers that go of each group are to make least."""
        return self.losses_by_evidence if self.losses_by_examples is None else self.losses_by_examples

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
        """What layers read, for the examples."""
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

    def described(self, found: Found, *, least: float | None, **rest: Any) -> BudgetReport:
        """Return the report, with further entries by name.

        Args:
            found: what went.
            least: no choice loses less; None where that is not known.
            rest: the entries.
        """
        by_examples = bool(found.pruned.any()) and self.losses_by_examples is not None
        relative = found.lost
        if by_examples:
            pairs = zip(self.losses_by_evidence, found.pruned, strict=True)
            relative = sum(float(losses[:number].sum()) for losses, number in pairs)
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
            relative_loss=math.sqrt(relative),
            least_relative_loss=None if by_examples or least is None else math.sqrt(least),
            unexplained=found.lost if by_examples else None,
            least_unexplained=least if by_examples else None,
            with_examples=self.examples is not None,
            **rest,
        )


class CountedBudget(Budget):
    """For FLOPs and parameters, which are known exactly."""

    def __init__(
        self,
        graph: MaskedGraph,
        costs: CostModel,
        evidence: Evidence,
        start: dict[str, Tensor],
        measure: str,
        target: float,
        examples: Inputs | None,
    ) -> None:
        super().__init__(graph, costs, evidence, start, target, examples)
        self.measure = measure
        self.count = costs.flops if measure == "flops" else costs.parameters

    def report(self) -> BudgetReport:
        """Search; see `Budget.report`."""
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
        least = found.lost
        if not found.exact:
            needed = float(self.operations_alone(self.nothing)) - limit
            least = least_possible(self.losses, self._most_saved(), needed)
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
            least=least,
        )

    def _within(self, budget: float, limit: float) -> Found:
        if float(self.count(self.nothing)) <= budget:
            return Found(self.nothing.astype(np.int64), 0.0, True)
        found = least_loss(self.losses, self.count, budget)
        if found is None:
            smallest = round(float(self.count(self.everything)))
            whole = getattr(self.costs.dense, self.measure)
            raise OutOfReachError(_too_little(self.measure, self.target, limit, smallest, whole))
        return found

    def operations_alone(self, pruned: NDArray[Any]) -> NDArray[Any]:
        """Return the cost without biases that pruning makes necessary: it is never higher, and saves less and less."""
        return (self.costs.operations if self.measure == "flops" else self.costs.values)(pruned)

    def _most_saved(self) -> NDArray[Any]:
        one_each = np.eye(len(self.nothing))
        return np.asarray(self.operations_alone(self.nothing) - self.operations_alone(one_each))


class LatencyBudget(Budget):
    """For latency, which tables of the operations predict and whole networks confirm."""

    def __init__(
        self,
        model: nn.Module,
        graph: MaskedGraph,
        costs: CostModel,
        evidence: Evidence,
        start: dict[str, Tensor],
        inputs: Any,
        target: float,
        examples: Inputs | None = None,
    ) -> None:
        super().__init__(graph, costs, evidence, start, target, examples)
        self.model, self.inputs = model, inputs

    def check(self) -> None:
        """Raise if even the smallest network takes longer than the target."""
        networks = [self._compacted(masks) for masks in (self.start, self.masks_without(self.everything))]
        dense, least = Latency(self.graph, self.costs, self.inputs).of_networks(networks)
        self._check_reach(least, dense)

    def _check_reach(self, least: float, dense: float) -> None:
        if least > self.target:
            raise OutOfReachError(_too_little("latency", self.target, self.target, least, dense))

    def report(self) -> BudgetReport:
        """Search; see `Budget.report`."""
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
            least=None,
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
