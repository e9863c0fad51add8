"""Pruning to a budget: `prune_to` prunes by evidence, and beyond it until the network is as small as was asked for.

`objective` says what a network loses with the evidence that is given up, `search` finds the least of it, `latency`
measures what operations take, `report` says what it cost.
"""

from bmrs.budget.prune_to import prune_to
from bmrs.budget.report import BudgetReport

__all__ = ["BudgetReport", "prune_to"]
