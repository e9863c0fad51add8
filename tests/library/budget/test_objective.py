import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmrs.budget.objective import relative_losses

WORTHS = st.lists(st.floats(0, 1e6), max_size=8).map(sorted).map(np.array)


@given(WORTHS, st.floats(0, 1e6))
def test_what_goes_over_what_stays(worths, more):
    staying = more + (worths.max() if len(worths) else 0.0)
    losses = relative_losses(worths, staying)
    assert (np.diff(losses, prepend=0.0) >= 0).all()
    for number in range(1, len(worths) + 1):
        going, kept = worths[:number].sum(), staying + worths[number:].sum()
        assert losses[:number].sum() == pytest.approx(
            (going / kept) ** 2 if going else 0.0, rel=1e-9, abs=1e-9
        )


def test_the_first_of_many_is_little_and_the_last_much():
    losses = relative_losses(np.ones(999), 1.0)
    assert losses[0] == pytest.approx(1e-6, rel=0.01)
    assert losses.sum() == pytest.approx(999**2)


def test_worthless_structures_cost_nothing_and_infinite_ones_are_last():
    assert (relative_losses(np.zeros(3), 0.0) == 0).all()
    losses = relative_losses(np.array([0.0, 1.0, np.inf]), np.inf)
    assert losses[0] == 0
    assert np.isfinite(losses[1])
    assert losses[2] == np.inf
    assert (relative_losses(np.array([]), 1.0) == np.zeros(0)).all()
    # As scores that are infinite are given to it.
    largest = np.finfo(np.float64).max
    assert relative_losses(np.array([1.0, largest]), np.inf).sum() == pytest.approx(1.0)
