"""The names of the authors' public modules, on the kernels of this project: change the import, keep the code."""

from bmrs.compat.counting import get_true_parameter_compression_percent, total_parameters
from bmrs.compat.formulas import SNR, Etheta, LogN_cdf, LogU_cdf, Phi, kldiv, phi, reparameterize
from bmrs.compat.layers import (
    LogUniformAllBMRPruningLayer,
    LogUniformApproximateDiracBMRPruningLayer,
    LogUniformCDFBMRPruningLayer,
    LogUniformL2NormPruningLayer,
    LogUniformPruningLayer,
    PruningLayer,
)
from bmrs.compat.networks import (
    calculate_model_kl,
    compress,
    disable,
    enable,
    gather_pruning_layers,
    get_weight_l2,
    usable_neuron_pct,
)
from bmrs.compat.upgrading import upgrade

__all__ = [
    "SNR",
    "Etheta",
    "LogN_cdf",
    "LogU_cdf",
    "LogUniformAllBMRPruningLayer",
    "LogUniformApproximateDiracBMRPruningLayer",
    "LogUniformCDFBMRPruningLayer",
    "LogUniformL2NormPruningLayer",
    "LogUniformPruningLayer",
    "Phi",
    "PruningLayer",
    "calculate_model_kl",
    "compress",
    "disable",
    "enable",
    "gather_pruning_layers",
    "get_true_parameter_compression_percent",
    "get_weight_l2",
    "kldiv",
    "phi",
    "reparameterize",
    "total_parameters",
    "upgrade",
    "usable_neuron_pct",
]
