"""What pruning to a budget did, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bmrs.text_table import table_lines


@dataclass(frozen=True)
class NetworkCost:
    """What a network takes once it is compacted.

    Attributes:
        parameters: values of all parameters.
        flops: floating-point operations for the first example, two for each multiply-add.
        latency: measured milliseconds of a forward pass of all examples; None where latency was not the target.
    """

    parameters: int
    flops: int
    latency: float | None = None


@dataclass(frozen=True)
class LayerBudget:
    """What became of one noise layer.

    Attributes:
        name: qualified name of the noise layer.
        structures: all its structures.
        before: structures kept before.
        by_evidence: structures that the criterion alone would keep.
        after: structures kept now.
        lost: scores of the structures between the two, as far as they speak for keeping them.
        at_minimum: whether nothing more can leave it.
        jointly: whether ``examples`` said which of its structures went beyond the criterion.
    """

    name: str
    structures: int
    before: int
    by_evidence: int
    after: int
    lost: float
    at_minimum: bool
    jointly: bool = False


@dataclass(frozen=True)
class LatencySetting:
    """How latency was measured.

    Attributes:
        batch: examples of a forward pass.
        threads: of torch on the CPU.
        device: where the model is.
        predicted: milliseconds by the tables of the layers.
        tries: networks that were compacted and measured until the target was met.
    """

    batch: int
    threads: int
    device: str
    predicted: float
    tries: int


@dataclass(frozen=True)
class BudgetReport:
    """What `bmrs.prune_to` did; ``str()`` gives a text.

    Attributes:
        criterion: the criterion as text.
        score_name: what its scores are.
        in_nats: whether scores are log evidence or log odds, in nats; others only rank structures.
        measure: ``"flops"``, ``"parameters"`` or ``"latency"``.
        target: as it was given.
        limit: the target as an absolute number; milliseconds for latency.
        met: whether the network is within it.
        met_by_evidence: whether the criterion alone was enough, so that nothing else went.
        dense: what the network takes with all structures.
        by_evidence: what it would take with those that the criterion keeps.
        after: what it takes now.
        layers: one entry for each noise layer, in module order.
        lost: the scores that the budget gave up beyond the criterion, those of tied structures together.
        relative_loss: of each layer the scores given up over those that stay; the root of the sum of their squares,
            which the choice of numbers makes least without ``examples``. With them it is that of as many structures
            that are least worth keeping, and not of those that went.
        least_relative_loss: no choice within the budget has less than this; ``relative_loss`` itself where that was
            found by trying all, None for latency and where ``examples`` chose the numbers.
        unexplained: what ``examples`` made least: the share of the variance of the model's outputs that structures
            which stay cannot stand in for, to first order and added up over the layers, as if each went alone; None
            where evidence chose the numbers.
        least_unexplained: likewise, as ``least_relative_loss``.
        latency: how latency was measured, None for the other targets.
        with_examples: whether ``examples`` were given.
    """

    criterion: str
    score_name: str
    in_nats: bool
    measure: str
    target: float
    limit: float
    met: bool
    met_by_evidence: bool
    dense: NetworkCost
    by_evidence: NetworkCost
    after: NetworkCost
    layers: tuple[LayerBudget, ...]
    lost: float
    relative_loss: float
    least_relative_loss: float | None
    unexplained: float | None = None
    least_unexplained: float | None = None
    latency: LatencySetting | None = None
    with_examples: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, ready for JSON."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        header = ("layer", "structures", "before", "by evidence", "after", f"{self.score_name} given up")
        rows = [
            (
                layer.name or "(model)",
                *map(str, (layer.structures, layer.before, layer.by_evidence, layer.after)),
                f"{layer.lost:.4g}",
            )
            for layer in self.layers
        ]
        sums = [
            sum(getattr(x, key) for x in self.layers)
            for key in ("structures", "before", "by_evidence", "after")
        ]
        lines = [
            f"pruned by {self.criterion} to {_NAMES[self.measure]} of at most {_number(self.limit)}",
            *table_lines([header, *rows, ("total", *map(str, sums), f"{self.lost:.4g}")], left=0),
            *self._costs(),
        ]
        if self.met_by_evidence:
            lines.append("the criterion alone is within the target: nothing went beyond it")
        else:
            lines += [self._given_up(), *self._chosen()]
        minimum = [layer.name or "(model)" for layer in self.layers if layer.at_minimum]
        if minimum:
            lines.append(f"nothing more can leave: {', '.join(minimum)}")
        return "\n".join(lines)

    def _costs(self) -> list[str]:
        lines = []
        for key in ("parameters", "flops", "latency"):
            dense, evidence, after = (getattr(c, key) for c in (self.dense, self.by_evidence, self.after))
            if dense is not None:
                share = f"{100 * after / dense:.1f} %" if dense else "no change"
                lines.append(
                    f"{_NAMES[key]}: {_number(dense)} dense, {_number(evidence)} by evidence, "
                    f"{_number(after)} after ({share})"
                )
        if self.latency is not None:
            said = self.latency
            lines.append(
                f"latency of {said.batch} examples on {said.device}, {said.threads} threads: "
                f"{said.predicted:.4g} ms predicted from the layers, {self.after.latency:.4g} ms measured"
                f"{'' if self.met else f': not within the target after {said.tries} tries'}"
            )
        return lines

    def _chosen(self) -> list[str]:
        went = [layer for layer in self.layers if layer.after < layer.by_evidence and not layer.at_minimum]
        if not self.with_examples or not went:
            return []
        together = [layer.name or "(model)" for layer in went if layer.jointly]
        alone = [layer.name or "(model)" for layer in went if not layer.jointly]
        lines = []
        if together:
            lines.append(f"which ones went was chosen jointly, by the examples: {', '.join(together)}")
        if alone:
            lines.append(
                f"which ones went was left to evidence in spite of the examples, as others than linear and convolution "
                f"layers of up to 8,192 inputs read them: {', '.join(alone)}"
            )
        if self.unexplained is None:
            lines.append(
                "how many went of each layer was left to evidence in spite of the examples, as of some layer it is not "
                "known what the outputs lose with it"
            )
        return lines

    def _given_up(self) -> str:
        lost = f"the budget gave up {self.lost:.4g} of {self.score_name} beyond the criterion"
        if self.in_nats:
            lost += " (nats, if the posteriors have settled; before, a rank of structures)"
        else:
            lost += " (a rank of structures, no evidence)"
        if self.unexplained is not None:
            lost += (
                "; how many went of each layer was chosen by the examples: to first order the outputs lose "
                f"{self.unexplained:.4g} of their variance for good"
            )
            return lost + _compared(self.unexplained, self.least_unexplained)
        of = " of the least worth keeping" if any(layer.jointly for layer in self.layers) else ""
        lost += "; over what stays, the root of the sum of squares over the layers, that is "
        lost += f"{self.relative_loss:.4g}{of}"
        return lost + _compared(self.relative_loss, self.least_relative_loss)


def _compared(loss: float, least: float | None) -> str:
    if least is None:
        return ""
    return f", and no choice gives up less{'' if least >= loss else f' than {least:.4g}'}"


_NAMES = {"parameters": "parameters", "flops": "FLOPs", "latency": "latency in ms"}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or float(value).is_integer() else f"{value:.4g}"
