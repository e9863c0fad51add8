"""The public names of `bmrs`, which offers them."""

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
from bmrs.files import ExportReport, export, load, load_pretrained, save, save_pretrained
from bmrs.graph.suggestions import Suggestions, suggest
from bmrs.noise.divergence import kl_divergence
from bmrs.noise.hooks import restore_noise
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.parameters import parameter_groups
from bmrs.noise.placement import add_noise
from bmrs.prediction import Prediction, predict
from bmrs.pruning.posteriors import learn_posteriors
from bmrs.pruning.prune import prune
from bmrs.pruning.report import PruneReport
from bmrs.pruning.settling import PosteriorReport, unsettled

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
    "load_pretrained",
    "models",
    "negative_log_likelihood",
    "noise_outlook",
    "parameter_groups",
    "predict",
    "prune",
    "prune_to",
    "restore_noise",
    "save",
    "save_pretrained",
    "structure_costs",
    "structure_prices",
    "suggest",
    "unsettled",
]
