"""Compaction: a masked network becomes a smaller one.

`folding` moves the noise into the parameters around it, `surgery` cuts the parameters, `graph_network` puts a network
together from operators where the user's own code cannot run narrower, `refit` makes up for what is gone, if asked to,
`report` says what happened. What can leave is found by `bmrs.graph`.
"""

from bmrs.compaction.compact import compact, compact_report, fold
from bmrs.compaction.optimizer import compact_optimizer
from bmrs.compaction.report import CompactReport, LayerCompaction

__all__ = ["CompactReport", "LayerCompaction", "compact", "compact_optimizer", "compact_report", "fold"]
