import numpy as np
import pytest
from budget_problems import ChainProblem

from bmrs.budget import search
from bmrs.budget.search import least_loss, least_possible

SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_small_problems_are_solved_exactly(seed):
    problem = ChainProblem(seed)
    found = least_loss(problem.worths, problem.cost, problem.budget)
    assert found.exact
    assert found.lost == pytest.approx(problem.least())
    assert problem.cost(found.pruned) <= problem.budget
    lost = sum(w[:n].sum() for w, n in zip(problem.worths, found.pruned, strict=True))
    assert found.lost == pytest.approx(lost)


def test_what_is_found_without_trying_all_is_nearly_as_good(monkeypatch):
    monkeypatch.setattr(search, "_MOST_COMBINATIONS", 0)
    gaps = []
    for seed in SEEDS:
        problem = ChainProblem(seed)
        found = least_loss(problem.worths, problem.cost, problem.budget)
        assert not found.exact
        assert problem.cost(found.pruned) <= problem.budget
        savings = problem.cost(np.zeros(len(problem.most))) - problem.cost(np.eye(len(problem.most)))
        needed = problem.cost(np.zeros(len(problem.most))) - problem.budget
        bound, least = least_possible(problem.worths, savings, needed), problem.least()
        assert bound <= least + 1e-9 <= found.lost + 2e-9
        gaps.append(found.lost - least)
    assert np.mean(np.array(gaps) < 1e-9) >= 0.95


def test_a_problem_of_many_widths_is_close_to_its_bound():
    random = np.random.default_rng(0)
    worths = [np.sort(random.gamma(0.5, 5.0, 40)) for _ in range(8)]
    cost = lambda pruned: (41 - pruned) @ np.arange(1.0, 9.0)  # noqa: E731
    found = least_loss(worths, cost, 700.0)
    bound = least_possible(worths, np.arange(1.0, 9.0), float(cost(np.zeros(8))) - 700.0)
    assert not found.exact
    assert cost(found.pruned) <= 700
    # A knapsack with fractions gives up less than one of its structures less.
    assert (
        bound <= found.lost <= bound + max(w[n - 1] for w, n in zip(worths, found.pruned, strict=True) if n)
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("combinations", [0, 1_000_000])
def test_worths_of_zero_and_without_an_end(combinations, monkeypatch):
    monkeypatch.setattr(search, "_MOST_COMBINATIONS", combinations)

    def cost(pruned):
        return (5 - np.asarray(pruned)).prod(axis=-1)

    nothing = least_loss([np.zeros(4)] * 2, cost, 20.0)
    assert (nothing.lost, nothing.pruned.sum()) == (0.0, 1)  # no more than has to
    worths = [np.array([1.0, 2.0, np.inf, np.inf])] * 2
    assert least_loss(worths, cost, 9.0).lost == 6.0
    assert least_loss(worths, cost, 8.0).lost == np.inf
    assert least_possible(worths, np.array([5.0, 5.0]), 16.0) == pytest.approx(4.4)


def test_nothing_goes_where_the_budget_is_met_and_nothing_is_found_where_it_cannot_be():
    problem = ChainProblem(0)
    whole, least = float(problem.cost(0 * problem.most)), float(problem.cost(problem.most))
    assert not least_loss(problem.worths, problem.cost, whole).pruned.any()
    assert least_loss(problem.worths, problem.cost, least - 1) is None
    assert (least_loss(problem.worths, problem.cost, least).pruned == problem.most).all()
