"""A network small enough to be timed within a test."""

from __future__ import annotations

import functools

import bmrs
from benchmarks.speed.networks import TimedNetwork, with_noise_inside

# The hidden width is even, so that half of its structures are as many as the other half.
TINY = TimedNetwork(
    name="tiny",
    batch=4,
    input_shape=(1, 4, 4),
    build=with_noise_inside(functools.partial(bmrs.models.MLP, in_features=16, num_blocks=1, hidden=6)),
    paper_ratio=2.5,
)
