"""Criteria that compare the evidence for a structure with the evidence for doing without it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import bmrs_kernels
from bmrs.checks import check_number
from bmrs.criteria.base import Decision, PosteriorCriterion
from bmrs_kernels.constants import HALF_LOG_2PI, LN2, PRIOR_STD, REDUCED_LOWER
from bmrs_kernels.options import Backend

PAPER_TOLERANCE = HALF_LOG_2PI
"""The tolerance with which `BMRSNormal` decides as the authors' code does, which leaves the 2π out of Eq. 8."""


class _EvidenceCriterion(PosteriorCriterion):
    """Prune where the log evidence does not fall when the prior shrinks θ to 0; scores are ΔF in nats."""

    score_name: ClassVar[str] = "ΔF"
    prunes_high_scores: ClassVar[bool] = True
    tolerance: float

    def decide(self, scores: Tensor) -> Tensor:
        """Return True where ΔF ≥ -tolerance."""
        return scores >= -self.tolerance

    def decide_tied(self, decisions: Sequence[Decision], kept: Tensor) -> Decision:
        """Prune a channel if the sum of ΔF + tolerance over its structures is ≥ 0; its score is the sum of ΔF.

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
    the tolerance ½ log 2π ≈ 0.919 (`bmrs.criteria.PAPER_TOLERANCE`).

    Args:
        prior_mean: location of the reduced prior on log θ; None for the layer's lower bound.
        prior_std: its standard deviation before truncation, greater than 0.
        tolerance: log evidence in nats that a structure may be worth and still be pruned, at least 0.
    """

    prior_mean: float | None = None
    prior_std: float = PRIOR_STD
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, minimum=0.0)
        if self.prior_mean is not None:
            check_number("prior_mean", self.prior_mean)
        check_number("prior_std", self.prior_std, above=0.0)

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """Return ΔF in nats.

        Raises:
            ValueError: ``prior_mean`` lies outside [lower, upper].
        """
        if self.prior_mean is not None and not lower <= self.prior_mean <= upper:
            raise ValueError(
                f"prior_mean must lie in the noise layer's interval [{lower}, {upper}], got {self.prior_mean}"
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
    reduced_lower: float | None = REDUCED_LOWER
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, minimum=0.0)
        check_number("p1", self.p1)
        if self.reduced_lower is not None:
            check_number("reduced_lower", self.reduced_lower)
            if self.reduced_lower >= -self.p1 * LN2:
                raise ValueError(
                    "reduced_lower must be less than -p1·ln 2, "
                    f"got {self.reduced_lower:.4g} and {-self.p1 * LN2:.4g}"
                )

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """Return ΔF in nats.

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


@dataclass(frozen=True)
class BMRSOdds(PosteriorCriterion):
    """Prune what is more likely off than on: the median probability model (Barbieri & Berger 2004).

    A structure counts as off where p1-bit arithmetic rounds its θ to 0, below 2^-p1. Scores are the log posterior
    odds log[Q(θ > 2^-p1) / Q(θ < 2^-p1)] in nats; a structure goes where they are at most 0, that is where
    Q(θ < 2^-p1) ≥ ½. There is no tolerance to choose, and the decision hardly depends on the lower end of the
    interval. Up to the log of the prior odds, which is a constant, the score is the difference of two ΔF: that of the
    reduced prior on [2^-p1, e^upper] and that of the one on [e^lower, 2^-p1].

    The odds are those of the posterior that the KL weight defines: `bmrs.learn_posteriors` states the temperature.

    Args:
        p1: bits; greater than 0.
    """

    p1: float = 8

    score_name: ClassVar[str] = "log odds"

    def __post_init__(self) -> None:
        check_number("p1", self.p1, above=0.0)

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """Return the log posterior odds of on against off, in nats.

        Raises:
            ValueError: 2^-p1 is not inside (e^lower, e^upper).
        """
        border = -self.p1 * LN2
        if not lower < border < upper:
            raise ValueError(
                f"p1={self.p1} of BMRSOdds puts the border between off and on at log θ = {border:.4g}, which must "
                f"lie inside the noise layer's interval ({lower}, {upper})"
            )
        # In float64, as the odds of a structure at the border are the difference of two numbers near log ½.
        log_mass = functools.partial(
            _log_mass, mu.double(), log_sigma.double(), lower=lower, upper=upper, backend=backend
        )
        return (log_mass(start=border, end=upper) - log_mass(start=lower, end=border)).to(mu.dtype)

    def decide(self, scores: Tensor) -> Tensor:
        """Return True where the log odds are at most 0."""
        return scores <= 0

    def decide_tied(self, decisions: Sequence[Decision], kept: Tensor) -> Decision:
        """Prune a channel if all of its structures together are more likely off than on.

        The posterior is a product over structures, so that the odds of all on against all off, the two states that
        a channel can be in, are the product of the single odds: the log odds add.
        """
        scores = torch.stack([decision.scores for decision in decisions])
        joint = scores.masked_fill(~kept, 0.0).sum(dim=0)
        return Decision(joint, joint <= 0)


def _log_mass(
    mu: Tensor,
    log_sigma: Tensor,
    *,
    start: float,
    end: float,
    lower: float,
    upper: float,
    backend: Backend,
) -> Tensor:
    """Return the log of the posterior mass of log θ between two points: ΔF without the gain in prior density."""
    delta_f = bmrs_kernels.delta_f_loguniform(
        mu,
        log_sigma,
        reduced_lower=start,
        reduced_upper=end,
        lower=lower,
        upper=upper,
        backend=backend,
    )
    return delta_f - math.log((upper - lower) / (end - start))
