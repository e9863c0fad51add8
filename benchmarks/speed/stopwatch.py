"""Times of calls that take turns, the memory that they take, and their capture in a CUDA graph.

On a GPU, the calls of a round are timed by events. A pause of the GPU before the round lets the CPU launch all of them
before the first one runs: the times are then the GPU's own. Without the pause they are those of a program, whose
launches may be slower than the GPU. On a CPU each call is timed by the wall clock.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bmrs.training import cuda_graph

ROUND_MS = 20.0  # of one competitor before the next one's turn
MAX_REPEATS = 30
# A longer call is timed once, by the wall clock, whose error is small beside it.
SLOW_MS = 200.0
MAX_PAUSE_MS = 100.0

Call = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


class Plan(NamedTuple):
    """How a warmed-up call is measured."""

    call: Call
    repeats: int
    pause_ms: float  # of the GPU before a round; 0 where launches are to count
    peak_bytes: int | None  # see `peak_bytes`
    slow_ms: float | None  # the time of a call that is too slow to be timed again


class Round(NamedTuple):
    """A competitor's times between those of the others."""

    milliseconds: list[float]
    queued: bool  # whether all calls were launched before the first one ran; true on a CPU


class Stopwatch:
    """Times calls on a device.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.l2_bytes, self.cycles_per_ms = 0, 0.0
        self.evicting: torch.Tensor | None = None
        if self.on_gpu:
            self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.evicting = torch.ones(4 * self.l2_bytes // 4, device=device)
            self.cycles_per_ms = self._calibrated()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def plan(self, call: Call) -> Plan:
        """Return how to measure a call that has run before."""
        first: list[tuple[float, float]] = []
        peak = peak_bytes(lambda: first.append(self._one(call)), self.device)
        ((_, total_ms),) = first
        if total_ms > SLOW_MS:
            return Plan(call, 1, 0.0, peak, total_ms)
        host_ms, total_ms = min(self._one(call) for _ in range(3))
        repeats = max(1, min(MAX_REPEATS, int(ROUND_MS / total_ms)))
        pause_ms = min(MAX_PAUSE_MS, 2.0 * (host_ms + 0.05) * repeats)
        return Plan(call, repeats, pause_ms, peak, None)

    def measure(self, plan: Plan, *, evict: bool) -> Round:
        """Return a round's times; ``evict`` empties the L2 cache before each call."""
        if plan.slow_ms is not None:
            return Round([plan.slow_ms], queued=False)
        if not self.on_gpu:
            return Round([self._one(plan.call)[1] for _ in range(plan.repeats)], queued=True)
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(plan.repeats)]
        torch.cuda._sleep(int(plan.pause_ms * self.cycles_per_ms))
        for start, end in events:
            if evict and self.evicting is not None:
                # Only read: cache lines that were written would be stored during the measured call.
                self.evicting.sum()
            start.record()
            plan.call()
            end.record()
        queued = not events[0][0].query()
        self.synchronize()
        return Round([start.elapsed_time(end) for start, end in events], queued)

    def compare(self, plans: Mapping[Name, Plan], *, rounds: int, evict: bool) -> dict[Name, list[Round]]:
        """Return each plan's rounds; the plans take turns, so that a drifting clock meets all of them."""
        results: dict[Name, list[Round]] = {name: [] for name in plans}
        for number in range(rounds):
            for name, plan in plans.items():
                if number == 0 or plan.slow_ms is None:
                    results[name].append(self.measure(plan, evict=evict))
        return results

    def wall_ms(self, call: Call, *, repeats: int) -> float:
        """Return the wall time per call of a series, launches included."""
        for _ in range(min(repeats, 10)):
            call()
        self.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        self.synchronize()
        return 1e3 * (time.perf_counter() - started) / repeats

    def _one(self, call: Call) -> tuple[float, float]:
        """Return the milliseconds until a call returns and until its work is done."""
        self.synchronize()
        started = time.perf_counter()
        call()
        returned = time.perf_counter()
        self.synchronize()
        return 1e3 * (returned - started), 1e3 * (time.perf_counter() - started)

    def _calibrated(self) -> float:
        cycles = 20_000_000
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)  # the clocks rise
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        self.synchronize()
        return cycles / start.elapsed_time(end)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Run a call and return how much memory it allocated at most, on top of what there was; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_bytes_on_cpu(call: Call) -> int:
    """Run a call under torch's profiler and return how much memory tensors on the CPU took at most.

    What was there before does not count, and may not be freed by the call.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text("utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return max(
        itertools.accumulate((size for _, size in sorted(changes, key=lambda change: change[0])), initial=0)
    )


def quantiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Return median, p20 and p80, what a row says of times."""
    times = torch.tensor(milliseconds, dtype=torch.float64)
    p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the quantiles over all calls, the rounds' medians, and whether all rounds were queued."""
    times = [time for part in rounds for time in part.milliseconds]
    medians = [torch.tensor(part.milliseconds, dtype=torch.float64).median().item() for part in rounds]
    return {**quantiles(times), "rounds": medians, "queued": all(part.queued for part in rounds)}


def kept(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the times of a summary that a row keeps."""
    return {name: found[name] for name in ("median", "p20", "p80")}


def ratio(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, float]:
    """Return the ratio of two summaries' medians and its smallest and largest value in a round."""
    by_round = [a / b for a, b in zip(first["rounds"], second["rounds"], strict=False)]
    return {"value": first["median"] / second["median"], "low": min(by_round), "high": max(by_round)}


def capture(call: Call) -> tuple[Any, Call]:
    """Capture a call in a CUDA graph; return its outputs and the function that computes them anew in place."""
    stream = torch.cuda.Stream()
    for _ in range(cuda_graph.WARM_UPS):
        cuda_graph.warm_up(call, stream)
    return cuda_graph.capture(call, stream)
