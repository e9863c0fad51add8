"""Pruning to a budget: `prune_to` prunes by evidence, and beyond it until the network is as small as was asked for.

`search` finds the least evidence to give up, `latency` measures what operations take, `report` says what it cost.
"""

from bmrs.budget.prune_to import prune_to
from bmrs.budget.report import BudgetReport

__all__ = ["BudgetReport", "prune_to"]
