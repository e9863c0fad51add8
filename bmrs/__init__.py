"""Threshold-free Bayesian structured pruning (BMRS) for PyTorch."""

import bmrs_kernels
from bmrs import compat, models
from bmrs.budget import BudgetReport, prune_to
from bmrs.calibration import expected_calibration_error, negative_log_likelihood
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
from bmrs.files import ExportReport, export, load, save
from bmrs.graph.suggestions import Suggestions, suggest
from bmrs.noise.divergence import kl_divergence
from bmrs.noise.hooks import restore_noise
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.parameters import parameter_groups
from bmrs.noise.placement import add_noise
from bmrs.prediction import Prediction, predict
from bmrs.pruning.posteriors import PosteriorReport, learn_posteriors, unsettled
from bmrs.pruning.prune import prune
from bmrs.pruning.report import PruneReport

__all__ = [
    "L2",
    "SNR",
    "BMRSNormal",
    "BMRSOdds",
    "BMRSUniform",
    "BudgetReport",
    "CompactReport",
    "ExportReport",
    "GradientNorm",
    "Mean",
    "NoiseLayer",
    "NoiseOutlook",
    "PosteriorReport",
    "Prediction",
    "PruneReport",
    "StructureCost",
    "Suggestions",
    "add_noise",
    "compact",
    "compact_optimizer",
    "compact_report",
    "compat",
    "expected_calibration_error",
    "export",
    "fold",
    "kl_divergence",
    "learn_posteriors",
    "load",
    "models",
    "negative_log_likelihood",
    "noise_outlook",
    "parameter_groups",
    "predict",
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
