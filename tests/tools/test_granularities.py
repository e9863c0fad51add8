"""Which granularities of noise are the same, held against what a layer draws."""

from __future__ import annotations

import pytest
import torch

import bmrs_kernels
from benchmarks.granularities import GRANULARITIES, distinct, equivalent


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 2)], ids=["matrix", "images"])
def test_granularities_are_equivalent_where_they_draw_as_many_values(shape):
    def draws(granularity):
        noise = (torch.full((4,), value) for value in (-3.0, 0.0))
        return len(
            bmrs_kernels.multiply_noise(torch.ones(shape), *noise, granularity=granularity, seed=1).unique()
        )

    for one in GRANULARITIES:
        alike = {other for other in GRANULARITIES if draws(other) == draws(one)}
        assert set(equivalent(one, of_matrices=len(shape) == 2)) == alike


def test_each_kind_of_draw_is_named_once():
    assert distinct(GRANULARITIES, of_matrices=False) == GRANULARITIES
    assert distinct(GRANULARITIES, of_matrices=True) == ("element", "batch")
    assert distinct(["sample", "element", "sample"], of_matrices=False) == ("sample", "element")
    assert distinct(["sample"], of_matrices=True) == ("element",)
