"""Threshold-free Bayesian structured pruning (BMRS) for PyTorch."""

import bmrs_kernels
from bmrs import compat, models
from bmrs.compaction import (
    CompactReport,
    NoiseOutlook,
    StructureCost,
    compact,
    compact_optimizer,
    compact_report,
    fold,
    noise_outlook,
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
    "CompactReport",
    "GradientNorm",
    "Mean",
    "NoiseLayer",
    "NoiseOutlook",
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
    "noise_outlook",
    "parameter_groups",
    "prune",
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
