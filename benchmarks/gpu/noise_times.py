"""Times of ``multiply_noise`` on a GPU, launches hidden, against a copy, the torch path and a compiled plain formula.

The competitors, and the check of each before it is timed, are those of the function benchmarks. pytest-benchmark, which
times those, measures what a program waits for. Here the launches are queued before the GPU starts, which it cannot do,
so that the times are the kernels' own.

``python -m benchmarks.gpu.noise_times --part 0 --of 4`` runs every fourth case once, which leaves its compiled kernels
in the caches on disk: several such processes compile faster than one.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import bmrs_kernels
from benchmarks import processes
from benchmarks.granularities import GRANULARITIES, distinct
from benchmarks.speed.activation_shapes import CHANNELS_LAST, LARGE, LINEAR, TOKENS, ActivationShape
from benchmarks.speed.competitors import Contest, posteriors
from benchmarks.speed.function_cases import DIRECTIONS, DTYPES, STRUCTURES, FunctionCase
from benchmarks.speed.stopwatch import Call, Plan, Stopwatch, capture, ratio, summary
from bmrs_kernels.options import Backend

ROUNDS = 3
# Competitors as the report names them, and as the contest does.
COMPETITORS = {"copy": "copy", "triton": "triton", "eager": "torch", "compiled": "compiled"}
RIVALS = ("eager", "compiled")

SMALL, TINY = ActivationShape((64, 6, 28, 28)), ActivationShape((128, 100))
ACTIVATIONS = (
    LARGE,
    LINEAR,
    CHANNELS_LAST,
    ActivationShape((128, 256, 28, 28)),
    ActivationShape((128, 256, 28, 28), channels_last=True),
    ActivationShape((256, 64, 56, 56)),
    TOKENS,
    ActivationShape((32, 2048, 7, 7)),
    SMALL,
    TINY,
)
COMPILED = (
    *((LARGE, granularity, "float32") for granularity in GRANULARITIES),
    (LARGE, "element", "bfloat16"),
    (LINEAR, "element", "float32"),
    (SMALL, "element", "float32"),
)


def cases() -> list[FunctionCase]:
    """Return the cases, those that matter most first."""
    return [
        FunctionCase(
            "multiply_noise",
            activation,
            granularity,
            dtype,
            compiled=(activation, granularity, dtype) in COMPILED,
        )
        for activation in ACTIVATIONS
        for dtype in DTYPES
        for granularity in distinct(GRANULARITIES, of_matrices=len(activation.shape) == 2)
    ]


def warm_up(case: FunctionCase, device: torch.device) -> None:
    """Compile what the case needs: Triton's kernels and torch.compile's."""
    contest = Contest(case, device)
    for competitor in ("triton", *(["compiled"] if case.compiled else [])):
        contest.call(competitor, "both")()


def run_case(
    case: FunctionCase, stopwatch: Stopwatch, *, rounds: int = ROUNDS, failures: list[str]
) -> list[dict[str, Any]]:
    """Return a row for each direction; competitors that are wrong or raise are left out and in ``failures``."""
    contest = Contest(case, stopwatch.device)
    calls: dict[str, dict[str, Call]] = {}
    for name, competitor in COMPETITORS.items():
        if name == "compiled" and not case.compiled:
            continue
        try:
            calls[name] = {direction: contest.call(competitor, direction) for direction in DIRECTIONS}
        except Exception as error:
            if name == "triton":
                raise
            failures.append(f"{case.name}, {name}: {type(error).__name__}: {str(error)[:300]}")
    rows = []
    for direction in DIRECTIONS:
        plans = {name: stopwatch.plan(each[direction]) for name, each in calls.items()}
        measured = stopwatch.compare(plans, rounds=rounds, evict=case.tensor_bytes <= stopwatch.l2_bytes)
        rows.append(row(case, direction, {name: summary(each) for name, each in measured.items()}, plans))
    return rows


def row(
    case: FunctionCase, direction: str, times: dict[str, dict[str, Any]], plans: dict[str, Plan]
) -> dict[str, Any]:
    """Return a row of results from the competitors' times in milliseconds."""
    found: dict[str, Any] = {
        **case.activation._asdict(),
        "activation": case.activation.name,
        "dtype": case.dtype,
        "granularity": case.granularity,
        "direction": direction,
        "x_bytes": case.tensor_bytes,
        "bytes_moved": case.bytes_moved(direction),
        "times": times,
        "gb_per_s": case.bytes_moved(direction) / times["triton"]["median"] / 1e6,
        "share_of_copy": ratio(times["copy"], times["triton"]),
        "speedup": {name: ratio(times[name], times["triton"]) for name in times if name in RIVALS},
    }
    if direction == "both":
        found["peak_memory"] = {
            name: plan.peak_bytes / case.tensor_bytes
            for name, plan in plans.items()
            if name != "copy" and plan.peak_bytes is not None
        }
    return found


def time_tiny(
    stopwatch: Stopwatch, activation: ActivationShape = TINY, repeats: int = 200
) -> dict[str, float]:
    """Return the milliseconds by the wall clock of forward and backward of a layer that is bound by its launches."""
    contest = Contest(FunctionCase("multiply_noise", activation, "element"), stopwatch.device)
    competitors = {"triton": "triton", "eager": "torch", "plain formula, eager": "plain"}
    calls = {name: contest.call(competitor, "both") for name, competitor in competitors.items()}
    found = {name: stopwatch.wall_ms(call, repeats=repeats) for name, call in calls.items()}
    if stopwatch.on_gpu:
        _, replay = capture(step_on_new_leaves(contest))
        found["triton in a CUDA graph"] = stopwatch.wall_ms(replay, repeats=repeats)
    return found


def step_on_new_leaves(contest: Contest) -> Call:
    """Return forward and backward for a graph: autograd ties a leaf to the stream on which it is used first."""
    leaves = [each.detach().requires_grad_() for each in contest.inputs]
    activation = contest.case.activation

    def step() -> tuple[Tensor, ...]:
        x, mu, log_sigma = leaves
        out = bmrs_kernels.multiply_noise(
            x, mu, log_sigma, dim=activation.dim, granularity="element", backend="triton"
        )
        return torch.autograd.grad(out, leaves, contest.grad)

    return step


def time_structures(
    stopwatch: Stopwatch, count: int = STRUCTURES["ResNet-50"], rounds: int = ROUNDS, repeats: int = 10
) -> list[dict[str, Any]]:
    """Return times of what a training step and a pruning decision compute for all structures of a network."""
    contest = Contest(FunctionCase("kl_divergence", ActivationShape((count,), dim=0)), stopwatch.device)
    parameters = posteriors(count, stopwatch.device)

    def decision(backend: Backend) -> Tensor:
        with torch.no_grad():
            return bmrs_kernels.delta_f_lognormal(*parameters, backend=backend) >= 0

    backends: tuple[Backend, ...] = ("triton", "torch")
    functions: dict[str, dict[str, Call]] = {
        "KL and its gradients": {backend: contest.call(backend, "both") for backend in backends},
        "pruning decision by ΔF": {backend: functools.partial(decision, backend) for backend in backends},
    }
    rows = []
    for name, calls in functions.items():
        for call in calls.values():
            call()
        plans = {backend: stopwatch.plan(call) for backend, call in calls.items()}
        measured = stopwatch.compare(plans, rounds=rounds, evict=False)
        times = {backend: summary(each) for backend, each in measured.items()}
        walls = {backend: stopwatch.wall_ms(call, repeats=repeats) for backend, call in calls.items()}
        speedup = ratio(times["torch"], times["triton"])
        rows.append({"name": name, "structures": count, "times": times, "wall_ms": walls, "speedup": speedup})
    return rows


def compile_cases(limit_s: float) -> dict[str, Any]:
    """Compile the kernels of all cases in several processes."""
    memory_per_process = 8 << 30
    memory = torch.cuda.get_device_properties(0).total_memory // memory_per_process
    count = max(1, min(4, (os.cpu_count() or 1) // 4, memory))

    def part(number: int) -> processes.Finished:
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.noise_times",
            "--part",
            str(number),
            "--of",
            str(count),
        ]
        # Otherwise each of these processes would start several compilers.
        settings = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        return processes.run(
            command, limit_s, cwd=processes.ROOT, settings=settings, without=("TRITON_INTERPRET",)
        )

    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(part, range(count)))
    failures = [
        f"part {number}: {problem}" for number, each in enumerate(parts) for problem in each.problems()
    ]
    compiled = sum(each.output.count(": compiled\n") for each in parts)
    return {"summary": f"{compiled} cases in {count} processes", "failures": failures}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part of the cases once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.noise_times", description=__doc__)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parsed = parser.parse_args(arguments)
    for case in cases()[parsed.part :: parsed.of]:
        warm_up(case, torch.device("cuda"))
        print(f"{case.name}: compiled", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
