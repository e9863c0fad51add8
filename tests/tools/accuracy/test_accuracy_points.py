"""The points where accuracy is measured, and the table of the reference's values there."""

from __future__ import annotations

import mpmath as mp
import numpy as np
import pytest
from judged_points import BY_NAME, KL, few

from benchmarks.accuracy import oracle, points, table
from benchmarks.accuracy.contract import LOG_SIGMA_RANGE, MU_RANGE
from benchmarks.accuracy.heat_map import cell_errors
from benchmarks.accuracy.quantities import QUANTITIES
from benchmarks.accuracy.table import Values


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda quantity: quantity.name)
def test_the_table_holds_the_reference(quantity):
    judged = table.judged(quantity).of_kind("domain", "ends", "adversarial")
    chosen = judged.where(np.arange(len(judged.points)) % 419 == 0)
    computed = table.compute(quantity, chosen.points)
    np.testing.assert_array_equal(chosen.values.rounded, computed.rounded)
    np.testing.assert_array_equal(chosen.values.rest, computed.rest)


def test_values_are_kept_with_more_digits_than_float64_has():
    judged = few(KL, 5)
    for point, rounded, rest in zip(judged.points.tolist(), *judged.values, strict=True):
        with mp.workdps(oracle.DIGITS):
            exact = oracle.quantities(*point).kl
            assert abs(mp.mpf(rounded[0].item()) + mp.mpf(rest[0].item()) - exact) < mp.mpf("1e-22") * exact


def test_points_cover_the_domain_and_are_the_tables():
    structures, draws = table.judged(KL), table.judged(BY_NAME["sample_noise"])
    for judged, dimensions in ((structures, 2), (draws, 3)):
        where = judged.points
        for axis, (low, high) in enumerate(
            (MU_RANGE, LOG_SIGMA_RANGE, (2.0**-24, 1 - 2.0**-24))[:dimensions]
        ):
            assert low <= where[:, axis].min()
            assert where[:, axis].max() <= high
        assert len(np.unique(where, axis=0)) > 0.99 * len(where)
        spread = judged.of_kind("domain")
        unit = points.sobol(dimensions, points.DOMAIN_POINTS)
        np.testing.assert_array_equal(spread.points, points.over_domain(unit))
        adversarial = points.adversarial_structures if dimensions == 2 else points.adversarial_draws
        np.testing.assert_array_equal(judged.of_kind("adversarial").points, adversarial())
        np.testing.assert_array_equal(
            judged.of_kind("ends").points, points.near_ends(points.sobol(dimensions, points.ENDS_POINTS))
        )
    cells = cell_errors(structures.of_kind("domain").points, np.zeros(points.DOMAIN_POINTS), 64)
    assert not np.isnan(cells).any(), "every cell of the map has its point"
    outside = structures.points[np.isin(structures.kinds, [1, 2]), 0]
    assert (np.abs(outside) < 1e-6).sum() > 100, "posteriors at the very end"


def test_borders_of_decisions_are_on_both_sides():
    for name in ("delta_f_lognormal", "delta_f_loguniform, p1 = 8", "noise_snr"):
        quantity = BY_NAME[name]
        judged = table.judged(quantity).of_kind("adversarial")
        margin = quantity.decision.margin(judged.values.rounded[:, 0])
        close = np.abs(margin) < 1e-3
        assert (margin[close] >= 0).sum() >= 10
        assert (margin[close] < 0).sum() >= 10


def nothing(where):
    return Values(np.zeros((len(where), 3)), np.zeros((len(where), 3), np.float32))


def test_fewer_points_are_a_part_and_more_are_computed(monkeypatch):
    whole, part = table.judged(KL), table.judged(KL, 100)
    spread = part.of_kind("domain")
    assert len(spread.points) == 100
    np.testing.assert_array_equal(spread.points, whole.of_kind("domain").points[:100])
    assert len(whole.points) - len(part.points) == points.DOMAIN_POINTS - 100
    computed = []
    monkeypatch.setattr(
        table, "compute", lambda quantity, where, pool, title: computed.append(where) or nothing(where)
    )
    assert (
        len(table.judged(KL, points.DOMAIN_POINTS + 5).of_kind("domain").points) == points.DOMAIN_POINTS + 5
    )
    assert len(computed[0]) == 5


def test_neighbours_are_one_step_apart():
    below, above = sorted(points.neighbours(0.0))[0], sorted(points.neighbours(0.0))[-1]
    assert -below == above == 2.0**-149
    assert sorted(points.neighbours(1.0, 2)) == [1 - 2.0**-23, 1 - 2.0**-24, 1.0, 1 + 2.0**-23, 1 + 2.0**-22]
