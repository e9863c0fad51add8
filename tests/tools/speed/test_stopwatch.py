"""What the stopwatch says of the times that it took, and its captured calls."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from gpu_rows import times

from benchmarks.speed import stopwatch

CPU = torch.device("cpu")


def test_calls_take_turns_and_a_slow_one_has_a_single_round(monkeypatch):
    monkeypatch.setattr(stopwatch, "SLOW_MS", 20.0)
    order = []

    def slow():
        order.append("slow")
        end = time.perf_counter() + 0.05
        while time.perf_counter() < end:
            pass

    watch = stopwatch.Stopwatch(CPU)
    plans = {"quick": watch.plan(lambda: order.append("quick")), "slow": watch.plan(slow)}
    assert [plan.slow_ms is None for plan in plans.values()] == [True, False]
    assert order.count("slow") == 1
    plans["quick"] = plans["quick"]._replace(repeats=2)
    order.clear()
    measured = watch.compare(plans, rounds=3, evict=False)
    assert order == ["quick"] * 6
    assert [len(part.milliseconds) for part in measured["quick"]] == [2, 2, 2]
    (only,) = measured["slow"]
    assert only.milliseconds == [plans["slow"].slow_ms] >= [50.0]


def test_on_a_cpu_there_is_no_peak_of_memory_but_the_call_runs():
    calls = []
    assert stopwatch.peak_bytes(lambda: calls.append(1), CPU) is None
    assert calls == [1]


def test_ratios_carry_the_spread_of_the_rounds():
    found = stopwatch.ratio(times(2.0, 3.0, 5.0), times(1.0, 1.0, 2.0))
    assert found == {"value": 3.0, "low": 2.0, "high": 3.0}
    # A slow competitor has one round.
    assert stopwatch.ratio(times(8.0), times(1.0, 2.0, 4.0)) == {"value": 4.0, "low": 8.0, "high": 8.0}


def test_summary_of_all_calls():
    rounds = [stopwatch.Round([1.0, 2.0, 3.0], queued=True), stopwatch.Round([4.0, 5.0, 6.0], queued=False)]
    found = stopwatch.summary(rounds)
    assert found["rounds"] == [2.0, 5.0]
    assert (found["p20"], found["median"], found["p80"]) == pytest.approx((2.0, 3.5, 5.0))
    assert not found["queued"]


def test_a_captured_call_lives_as_long_as_its_replays(monkeypatch):
    """A graph holds no reference: freed memory that it writes to would be another tensor's."""
    graph = mock.Mock()
    stream = SimpleNamespace(wait_stream=lambda other: None, device=None)
    fakes = {
        **{name: lambda *_: stream for name in ("Stream", "current_stream")},
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: graph,
        "graph": lambda graph, stream: contextlib.nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    class Step:
        calls = 0

        def __call__(self):
            self.calls += 1
            return self.calls

    step = Step()
    alive = weakref.ref(step)
    outputs, replay = stopwatch.capture(step)
    assert outputs == 4  # warmed up before
    del step
    gc.collect()
    assert alive() is not None
    replay()
    graph.replay.assert_called_once_with()
    assert alive().calls == 4
    del replay
    gc.collect()
    assert alive() is None
