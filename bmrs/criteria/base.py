"""What a pruning criterion is: from a noise layer to one score per structure and a decision.

A criterion is called with a noise layer and, if ``needs_producer`` says so, with the linear or convolution
layer that produces its structures. `bmrs.prune` applies one to a whole model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bmrs.checks import shown
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.wrappers import whole
from bmrs_kernels.options import Backend


class Decision(NamedTuple):
    """What a criterion says about the structures of a layer, both of shape (num_structures,).

    Attributes:
        scores: the criterion's own quantity; NaN where it is undefined.
        prune: bool, True where the score asks for removal; never True for a NaN score.
    """

    scores: Tensor
    prune: Tensor


class Criterion(ABC):
    """Base of all criteria.

    Attributes:
        score_name: what the scores are, for reports.
        prunes_high_scores: True if the structures with the highest scores go first.
        needs_producer: True if the criterion looks at the weights that produce the structures.
    """

    score_name: ClassVar[str]
    prunes_high_scores: ClassVar[bool] = False
    needs_producer: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, layer: NoiseLayer, producer: nn.Module | None = None) -> Decision:
        """Judge every structure of a layer; structures pruned before are scored, but never counted."""

    def decide_tied(self, decisions: Sequence[Decision], kept: Tensor) -> Decision:
        """Return the one decision on structures of several layers that are parts of one channel.

        The channel goes if each of them should; its score is that of the one most worth keeping.

        Args:
            decisions: on each layer.
            kept: bool of shape (layers, num_structures), False for structures pruned before, which do not count.
        """
        scores = torch.stack([decision.scores for decision in decisions])
        worst = math.inf if self.prunes_high_scores else -math.inf
        scores = scores.masked_fill(~kept, worst)
        joint = scores.amin(dim=0) if self.prunes_high_scores else scores.amax(dim=0)
        asked = torch.stack([decision.prune for decision in decisions])
        return Decision(joint, (asked | ~kept).all(dim=0))

    def best_first(self, scores: Tensor) -> Tensor:
        """Return the indices of the scores, most worth keeping first; a NaN score counts as the best."""
        best = -math.inf if self.prunes_high_scores else math.inf
        scores = scores.masked_fill(scores.isnan(), best)
        return scores.argsort(descending=not self.prunes_high_scores, stable=True)


def check_criterion(criterion: object) -> None:
    """Raise TypeError unless something is a criterion, and say what to write instead."""
    if isinstance(criterion, type) and issubclass(criterion, Criterion):
        raise TypeError(f"criterion must be a criterion, got its class: write {criterion.__name__}()")
    if not isinstance(criterion, Criterion):
        raise TypeError(
            f"criterion must be one of those of bmrs, such as bmrs.BMRSOdds(), got {shown(criterion)}"
        )


class PosteriorCriterion(Criterion):
    """A criterion that looks at each structure's posterior alone, so that layers can be judged together."""

    @abstractmethod
    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """Return scores of the posteriors of any number of layers with equal bounds, of the shape of ``mu``."""

    @abstractmethod
    def decide(self, scores: Tensor) -> Tensor:
        """Return True where a score asks for removal; False for NaN."""

    @torch.no_grad()
    def __call__(self, layer: NoiseLayer, producer: nn.Module | None = None) -> Decision:
        """Judge every structure of a layer."""
        scores = self.scores(
            whole(layer.mu),
            whole(layer.log_sigma),
            lower=layer.lower,
            upper=layer.upper,
            backend=layer.backend,
        )
        return Decision(scores, self.decide(scores))
