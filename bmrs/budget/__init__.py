"""Pruning to a budget: `prune_to` prunes by evidence, and beyond it until the network is as small as was asked for.

`worths` says what speaks for each structure and `objective` what a network loses with it; `search` finds how many of
each layer go, and `joint_choice` which ones. `targets` puts these together for sizes and for latency, which `latency`
predicts; `report` says what it cost.
"""

from bmrs.budget.prune_to import prune_to
from bmrs.budget.report import BudgetReport

__all__ = ["BudgetReport", "prune_to"]
