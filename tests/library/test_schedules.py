import pytest

from bmrs.schedules import PruningSchedule, WarmUp


def test_warm_up_rises_evenly():
    warm_up = WarmUp(epochs=4)
    assert [warm_up(epoch) for epoch in (0, 1, 2.5, 4, 9)] == [0.0, 0.25, 0.625, 1.0, 1.0]
    assert WarmUp()(0) == 1.0


@pytest.mark.parametrize(
    ("schedule", "epochs"),
    [
        (PruningSchedule(), [1, 2, 3, 4, 5, 6, 7]),
        (PruningSchedule(every=3), [1, 4, 7]),
        (PruningSchedule(every=2, first=3), [3, 5, 7]),
        (PruningSchedule(every=3, first=3, last=5), [3, 5]),
        (PruningSchedule(first=5, last=5), [5]),
    ],
)
def test_epochs_after_which_pruning_is_due(schedule, epochs):
    assert [epoch for epoch in range(1, 8) if schedule.is_due(epoch)] == epochs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmUp(epochs=-1), "epochs must be finite and at least 0, got -1"),
        (lambda: PruningSchedule(every=0), "every must be at least 1, got 0"),
        (lambda: PruningSchedule(first=3, last=2), "last must be at least 3, got 2"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
