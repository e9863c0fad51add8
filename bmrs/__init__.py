"""Threshold-free Bayesian structured pruning (BMRS) for PyTorch."""

import bmrs_kernels
from bmrs import compat, models
from bmrs.budget import BudgetReport, prune_to
from bmrs.compaction import (
    CompactReport,
    StructureCost,
    compact,
    compact_optimizer,
    compact_report,
    fold,
    structure_costs,
    structure_prices,
)
from bmrs.criteria import L2, SNR, BMRSNormal, BMRSOdds, BMRSUniform, GradientNorm, Mean
from bmrs.files import load, save
from bmrs.graph.suggestions import Suggestions, suggest
from bmrs.noise.divergence import kl_divergence
from bmrs.noise.hooks import restore_noise
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.parameters import parameter_groups
from bmrs.noise.placement import add_noise
from bmrs.pruning.posteriors import PosteriorReport, learn_posteriors, unsettled
from bmrs.pruning.prune import PruneReport, prune

__all__ = [
    "L2",
    "SNR",
    "BMRSNormal",
    "BMRSOdds",
    "BMRSUniform",
    "BudgetReport",
    "CompactReport",
    "GradientNorm",
    "Mean",
    "NoiseLayer",
    "PosteriorReport",
    "PruneReport",
    "StructureCost",
    "Suggestions",
    "add_noise",
    "compact",
    "compact_optimizer",
    "compact_report",
    "compat",
    "fold",
    "kl_divergence",
    "learn_posteriors",
    "load",
    "models",
    "parameter_groups",
    "prune",
    "prune_to",
    "restore_noise",
    "save",
    "structure_costs",
    "structure_prices",
    "suggest",
    "unsettled",
]


def __getattr__(name: str) -> str:
    """Return ``__version__``, which is not read before it is asked for."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return bmrs_kernels.__version__
