"""Pruning criteria; `base` says what one is."""

from bmrs.criteria.base import Criterion, Decision, PosteriorCriterion, check_criterion
from bmrs.criteria.evidence import PAPER_TOLERANCE, BMRSNormal, BMRSOdds, BMRSUniform
from bmrs.criteria.moments import SNR, Mean
from bmrs.criteria.norms import L2, GradientNorm

__all__ = [
    "L2",
    "PAPER_TOLERANCE",
    "SNR",
    "BMRSNormal",
    "BMRSOdds",
    "BMRSUniform",
    "Criterion",
    "Decision",
    "GradientNorm",
    "Mean",
    "PosteriorCriterion",
    "check_criterion",
]
