"""Compaction: a masked network becomes a smaller one.

`compact` is the way from one to the other, `masked_model` what it starts from. `folding` finds the parameters around
the noise that take it up and `edits` changes them, or `kept_noise` narrows it, and `surgery` cuts the parameters of
the user's own classes. Where their code cannot run narrower, `describing` and `graph_network` put a network together
from operators, and `description` is what the one hands to the other. `comparison` checks the result,
`approximate_norms` fits layer norms that lost channels, `refit` makes up for what is gone, if asked to, by what
`products` sees, `rounding` gives structures back, `optimizer` carries moments over, `report` (found by `reporting`)
and `record` say what happened, `costs` what structures take, `cost_model` what networks of other widths would, from
`operation_flops`; `outlook` says what can become of noise before it is trained. What can leave is found by
`bmrs.graph`.
"""

from bmrs.compaction.compact import compact, compact_report, fold
from bmrs.compaction.costs import StructureCost, structure_costs, structure_prices
from bmrs.compaction.optimizer import compact_optimizer
from bmrs.compaction.outlook import LayerOutlook, NoiseOutlook, noise_outlook
from bmrs.compaction.report import Approximated, CompactReport, LayerCompaction, NormApproximation

__all__ = [
    "Approximated",
    "CompactReport",
    "LayerCompaction",
    "LayerOutlook",
    "NoiseOutlook",
    "NormApproximation",
    "StructureCost",
    "compact",
    "compact_optimizer",
    "compact_report",
    "fold",
    "noise_outlook",
    "structure_costs",
    "structure_prices",
]
