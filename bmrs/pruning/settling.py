"""Whether learned posteriors have settled: what is decided no longer depends on the rule or on when it is asked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bmrs.criteria import SNR, BMRSNormal
from bmrs.criteria.evidence import PAPER_TOLERANCE
from bmrs.noise.lookup import required_noise_layers
from bmrs.noise.wrappers import whole

LEAST_DISTANCE = 10.0
"""Learning rate times steps before which nothing counts as settled.

The KL term alone, with Adam, drives a structure that the data say nothing about past SNR = 1 after 6.4 and past
ΔF_N = -0.919 after 8.5. Before that all structures are kept by every rule, because none has had the time to leave.
"""
SETTLED = 0.02
"""Share of the structures that may still be undecided when the posteriors count as settled."""

# Of the structures that the KL term drives to the prior, the lax rule prunes early on the way and the strict one late.
LAX, STRICT = SNR(threshold=1.0), BMRSNormal(tolerance=PAPER_TOLERANCE)


@dataclass(frozen=True)
class PosteriorReport:
    """How learning the posteriors went; ``str()`` says it in a sentence.

    Attributes:
        temperature: T of the likelihood.
        steps: batches that were trained on.
        distance: learning rate times steps, which is about how far a parameter can have moved.
        unsettled: share of the kept structures on which rules that agree for converged posteriors still disagree.
        changed: share of the kept structures that are judged otherwise than at the check before.
        settled: False if learning was cut off before decisions stopped changing.
        kept: structures of each noise layer that the criterion would keep: by default those more likely on (θ > 2⁻⁸)
            than off, or, where the layer's interval lies on one side of 2⁻⁸, with an SNR above 1.
    """

    temperature: float
    steps: int
    distance: float
    unsettled: float
    changed: float
    settled: bool
    kept: dict[str, int]

    @property
    def emptied(self) -> tuple[str, ...]:
        """Names of noise layers of which the criterion would keep no structure."""
        return tuple(name for name, kept in self.kept.items() if not kept)

    def __str__(self) -> str:
        way = f"{self.steps} steps at temperature {self.temperature:g}"
        text = (
            f"posteriors settled after {way}"
            if self.settled
            else f"posteriors still move after {way}: rules disagree on {self.unsettled:.1%} of the structures and "
            f"{self.changed:.1%} changed since the last check; train them longer before you prune"
        )
        if self.emptied:
            text += (
                f"; at this temperature nothing is left of {', '.join(map(repr, self.emptied))}: the evidence is for "
                "no network at all, so lower it"
            )
        return text


def unsettled(model: nn.Module) -> float:
    """Return how far the posteriors are from converged: 0 where the decisions no longer depend on the rule.

    A structure that the data say nothing about travels from its start towards the prior, and each rule is a line
    across its way: SNR ≤ 1 is crossed early, ΔF_N ≥ -0.919 late. The share of kept structures between the two lines is
    what a decision taken now would owe to the rule and the clock. At the very start it is 0 as well, because nothing
    has left yet.

    Returns:
        A share of the kept structures, in [0, 1].

    Raises:
        ValueError: the model has no noise layer.
    """
    between, kept = 0, 0
    for layer in required_noise_layers(model).values():
        disagree = LAX(layer).prune != STRICT(layer).prune
        its_kept = whole(layer.kept)
        between += int((disagree & its_kept).sum())
        kept += int(its_kept.sum())
    return between / max(kept, 1)
