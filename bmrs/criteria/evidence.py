"""Criteria that compare the evidence for a structure with the evidence for doing without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import bmrs_kernels
from bmrs.criteria.base import Decision, PosteriorCriterion, check_number
from bmrs.noise_layer import Backend

LN2 = math.log(2.0)


class _EvidenceCriterion(PosteriorCriterion):
    """Prune where the log evidence does not fall when the prior shrinks θ to 0; scores are ΔF in nats."""

    score_name: ClassVar[str] = "ΔF"
    prunes_high_scores: ClassVar[bool] = True
    tolerance: float

    def decide(self, scores: Tensor) -> Tensor:
        """True where ΔF ≥ -tolerance."""
        return scores >= -self.tolerance

    def decide_tied(self, decisions: Sequence[Decision], kept: Tensor) -> Decision:
        """The channel goes if the sum of ΔF + tolerance over its structures is ≥ 0; its score is the sum of ΔF.

        Prior and posterior are products over structures. With all of a channel's θ shrunk to 0 at once, the model
        evidence is then multiplied by the product of the single ratios, and ΔF is their sum. The sum is ≥ 0 wherever
        all of its terms are, and also where one structure's evidence outweighs another's.
        """
        scores = torch.stack([decision.scores for decision in decisions])
        allowed = (scores + self.tolerance).masked_fill(~kept, 0.0).sum(dim=0)
        return Decision(scores.masked_fill(~kept, 0.0).sum(dim=0), allowed >= 0)


@dataclass(frozen=True)
class BMRSNormal(_EvidenceCriterion):
    """Prune where ΔF ≥ 0 under a truncated log-normal reduced prior: BMRS_N (Eq. 8 of arXiv 2406.01345).

    Scores are ΔF in nats. A structure that the data say nothing about has its posterior near the prior, and its ΔF
    near 0: from below while ``mu`` lies in the upper half of [lower, upper], where training starts. A tolerance
    prunes such structures too. The authors' code, which leaves out the 2π of Eq. 8, acts as BMRS_N with
    tolerance ½ log 2π ≈ 0.919.

    Args:
        prior_mean: location of the reduced prior on log θ; None for the layer's lower bound.
        prior_std: its standard deviation before truncation, greater than 0.
        tolerance: log evidence in nats that a structure may be worth and still be pruned, at least 0.
    """

    prior_mean: float | None = None
    prior_std: float = 1e-6
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, minimum=0.0)
        if self.prior_mean is not None:
            check_number("prior_mean", self.prior_mean)
        check_number("prior_std", self.prior_std)
        if self.prior_std <= 0:
            raise ValueError(f"prior_std must be greater than 0, was {self.prior_std}")

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """ΔF in nats.

        Raises:
            ValueError: ``prior_mean`` lies outside [lower, upper].
        """
        if self.prior_mean is not None and not lower <= self.prior_mean <= upper:
            raise ValueError(
                f"prior_mean must lie in the noise layer's interval [{lower}, {upper}], was {self.prior_mean}"
            )
        return bmrs_kernels.delta_f_lognormal(
            mu,
            log_sigma,
            prior_mean=self.prior_mean,
            prior_std=self.prior_std,
            lower=lower,
            upper=upper,
            backend=backend,
        )


@dataclass(frozen=True)
class BMRSUniform(_EvidenceCriterion):
    """Prune where ΔF ≥ 0 under a log-uniform reduced prior: BMRS_U (arXiv 2406.01345).

    The reduced prior on log θ is uniform on [reduced_lower, -p1·ln 2], where p1-bit arithmetic rounds θ to 0.
    Scores are ΔF in nats.

    Args:
        p1: bits; the paper uses 4 and 8.
        reduced_lower: lower end of the reduced prior. With the paper's default, structures whose θ is smaller
            still are kept; None, for the layer's lower bound, prunes them too.
        tolerance: log evidence in nats that a structure may be worth and still be pruned, at least 0.
    """

    p1: float = 8
    reduced_lower: float | None = -23 * LN2
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, minimum=0.0)
        check_number("p1", self.p1)
        if self.reduced_lower is not None:
            check_number("reduced_lower", self.reduced_lower)
            if self.reduced_lower >= -self.p1 * LN2:
                raise ValueError(
                    "reduced_lower must be less than -p1·ln 2, "
                    f"were {self.reduced_lower:.4g} and {-self.p1 * LN2:.4g}"
                )

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """ΔF in nats.

        Raises:
            ValueError: the reduced interval is empty or not within [lower, upper].
        """
        reduced_lower = lower if self.reduced_lower is None else self.reduced_lower
        reduced_upper = -self.p1 * LN2
        if not lower <= reduced_lower < reduced_upper <= upper:
            raise ValueError(
                f"the reduced interval [{reduced_lower:.4g}, {reduced_upper:.4g}] of BMRSUniform must not be "
                f"empty and must lie within the noise layer's interval [{lower}, {upper}]"
            )
        return bmrs_kernels.delta_f_loguniform(
            mu,
            log_sigma,
            reduced_lower=reduced_lower,
            reduced_upper=reduced_upper,
            lower=lower,
            upper=upper,
            backend=backend,
        )
