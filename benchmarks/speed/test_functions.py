"""Time of every function against its competitors: ``python -m pytest benchmarks --benchmark-only``.

pytest-benchmark times, shows, saves and compares: ``--benchmark-save=NAME`` keeps a run, ``--benchmark-compare=NUMBER``
shows a later run beside it, ``--benchmark-json=FILE`` writes every time that was taken. A case in one direction is a
group, whose competitors take turns, so that a machine whose speed drifts is fair to all of them. ``--help`` lists more
options under "function benchmarks".
"""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch

from benchmarks.speed.competitors import Contest, competitors_of
from benchmarks.speed.function_cases import FunctionCase, cases
from benchmarks.speed.function_device import device_of
from benchmarks.speed.function_results import description, turn_name

TURNS = 3
GPU_ROUND_SECONDS = 1e-3  # many launches between two waits for the GPU

# Only one, since the tensors of a case may fill much of a GPU; its competitors follow each other.
contest_of = functools.lru_cache(maxsize=1)(Contest)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device = device_of(config)
    only_once = config.getoption("benchmark_disable")
    large = device.type == "cuda" or config.getoption("large")
    options: dict[str, Any] = {"min_rounds": 2, "max_time": config.getoption("turn_seconds")}
    if device.type == "cuda":
        options |= {"min_time": GPU_ROUND_SECONDS, "timer": synchronized_time}
    metafunc.parametrize(
        ("case", "direction", "turn", "competitor"),
        [
            pytest.param(
                case,
                direction,
                turn,
                competitor,
                id=turn_name(group, competitor, turn),
                marks=pytest.mark.benchmark(group=group, **options),
            )
            for case in cases(device, large=large, only_small=only_once)
            for direction in case.directions
            for group in [f"{case.name} {direction}"]
            for turn in range(1, 2 if only_once else TURNS + 1)
            for competitor in competitors_of(case, device)
        ],
    )


def synchronized_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def test_function(
    benchmark: Any,
    case: FunctionCase,
    direction: str,
    turn: int,
    competitor: str,
    pytestconfig: pytest.Config,
) -> None:
    contest = contest_of(case, device_of(pytestconfig))
    benchmark(contest.call(competitor, direction))
    if turn == 1 and benchmark.stats is not None:
        benchmark.extra_info.update(description(contest, direction, competitor))
