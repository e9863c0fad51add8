"""Criteria that put a threshold on moments of the noise: baselines of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import bmrs_kernels
from bmrs.checks import check_number
from bmrs.criteria.base import PosteriorCriterion
from bmrs_kernels.options import Backend


@dataclass(frozen=True)
class _ThresholdCriterion(PosteriorCriterion):
    """Prune where a moment is on the wrong side of a threshold."""

    threshold: float

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, minimum=0.0)


@dataclass(frozen=True)
class SNR(_ThresholdCriterion):
    """Prune where the signal-to-noise ratio E[θ]/sd(θ) is at most a threshold (arXiv 1705.07283).

    Args:
        threshold: greater than or equal to 0.
    """

    threshold: float = 1.0

    score_name: ClassVar[str] = "SNR"

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """Return E[θ]/sd(θ), without unit."""
        return bmrs_kernels.noise_snr(mu, log_sigma, lower=lower, upper=upper, backend=backend)

    def decide(self, scores: Tensor) -> Tensor:
        """Return True where the ratio is at most the threshold."""
        return scores <= self.threshold


@dataclass(frozen=True)
class Mean(_ThresholdCriterion):
    """Prune where E[θ] is less than a threshold.

    Args:
        threshold: greater than or equal to 0.
    """

    threshold: float = 0.1

    score_name: ClassVar[str] = "E[θ]"

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """Return E[θ], in [e^lower, e^upper]."""
        return bmrs_kernels.noise_mean(mu, log_sigma, lower=lower, upper=upper, backend=backend)

    def decide(self, scores: Tensor) -> Tensor:
        """Return True where E[θ] is less than the threshold."""
        return scores < self.threshold
