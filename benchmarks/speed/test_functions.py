"""Time of every function against its competitors: ``python -m pytest benchmarks --benchmark-only``.

The competitors of a case take turns, so that a machine whose speed drifts is fair to all of them. ``--help`` lists the
options under "function benchmarks".
"""

from __future__ import annotations

import functools
import time

import pytest
import torch

from benchmarks.conftest import MEASUREMENTS, device_of
from benchmarks.speed.competitors import Contest, competitors_of
from benchmarks.speed.function_cases import cases
from benchmarks.speed.function_results import Item

TURNS = 3
GPU_ROUND_SECONDS = 1e-3  # many launches between two waits for the GPU

# Only one, since the tensors of a case may fill much of a GPU; its competitors follow each other.
contest_of = functools.lru_cache(maxsize=1)(Contest)


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device = device_of(config)
    only_once = config.getoption("benchmark_disable")
    large = device.type == "cuda" or config.getoption("large")
    options = {"min_rounds": 2, "max_time": config.getoption("turn_seconds")}
    if device.type == "cuda":
        options |= {"min_time": GPU_ROUND_SECONDS, "timer": synchronized_time}
    items = [
        Item(case, direction, turn, competitor)
        for case in cases(device, large=large, only_small=only_once)
        for direction in case.directions
        for turn in range(1 if only_once else TURNS)
        for competitor in competitors_of(case, device)
    ]
    metafunc.parametrize(
        "item",
        [
            pytest.param(item, id=item.name, marks=pytest.mark.benchmark(group=item.group, **options))
            for item in items
        ],
    )


def synchronized_time():
    torch.cuda.synchronize()
    return time.perf_counter()


def test_function(benchmark, item, pytestconfig):
    contest = contest_of(item.case, device_of(pytestconfig))
    benchmark(contest.call(item.competitor, item.direction))
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.data
        pytestconfig.stash[MEASUREMENTS].add(item, [1e3 * each for each in seconds], contest)
