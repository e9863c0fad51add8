"""Test and time the kernels on this machine's GPU: ``python -m benchmarks gpu-check --output DIR``.

Writes DIR/gpu_check.json and DIR/gpu_check.md. The exit code is 0 if every stage passed, 1 if one failed, 2 without a
usable GPU; a target that is missed is reported and does not count as a failure.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import processes
from benchmarks.environment import environment
from benchmarks.gpu.report import Report
from benchmarks.speed.function_cases import FunctionCase
from benchmarks.speed.stopwatch import Stopwatch
from bmrs_kernels.dispatch import backend

# Limits of the programs that run beside each other; most of their time is compilation.
TESTS_S, CASES_S, SANITIZER_S, COMPILATION_S = 240.0, 150.0, 120.0, 240.0
# Kept for the timings, and for writing the results.
TIMING_SHARE, RESERVE_S, SMALL_TIMINGS_S = 0.35, 10.0, 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-check", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time in all (default: 8)")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parsed = parser.parse_args(arguments)
    obstacle = why_not()
    if obstacle is not None:
        print(f"gpu-check: {obstacle}", file=sys.stderr)
        return 2
    # If this program is ended from outside, it ends those that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report(parsed.output, environment(parsed.commit, "cuda"))
    try:
        check(report, torch.device("cuda", torch.cuda.current_device()), 60.0 * parsed.minutes)
    finally:
        processes.stop_all()
    print(f"results: {parsed.output / 'gpu_check.md'}; failed: {', '.join(report.failed) or 'nothing'}")
    return 1 if report.failed else 0


def why_not() -> str | None:
    """Return why this machine cannot run the check, or None."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use was found"
    if not backend.TRITON_IS_INSTALLED:
        return "Triton is not installed"
    if backend.INTERPRETING:
        return "TRITON_INTERPRET is set: the kernels would be interpreted and not compiled; unset it"
    return None


def check(report: Report, device: torch.device, limit_s: float) -> None:
    """Run all stages: first correctness, with several programs at a time, then timing, with nothing beside it."""
    from benchmarks.gpu import correctness, noise_times

    def left_before_timing() -> float:
        return max(0.0, (1.0 - TIMING_SHARE) * limit_s - report.elapsed_s)

    def within(limit: float, function: Callable[[float], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        return lambda: function(min(limit, left_before_timing()))

    def sanitizers() -> None:
        # Before the others, since it leaves the kernels compiled.
        report.stage("every kernel runs", within(CASES_S, correctness.kernels_run))
        with ThreadPoolExecutor(len(correctness.SANITIZERS)) as tools:
            for stage in [
                tools.submit(
                    report.stage, tool, within(SANITIZER_S, functools.partial(correctness.sanitize, tool))
                )
                for tool in correctness.SANITIZERS
            ]:
                stage.result()

    with ThreadPoolExecutor(3) as pool:
        programs = [
            pool.submit(report.stage, "kernel tests", within(TESTS_S, correctness.kernel_tests)),
            pool.submit(sanitizers),
            pool.submit(report.stage, "compilation", within(COMPILATION_S, noise_times.compile_cases)),
        ]
        try:
            report.stage("uniforms", lambda: correctness.uniforms(device))
            report.stage("values", lambda: correctness.values(device))
            report.stage("CUDA graph", lambda: correctness.cuda_graph(device))
            report.stage("determinism", lambda: correctness.determinism(device))
            report.stage("beyond 32-bit indices", lambda: correctness.wide_index(device))
            for program in programs:
                program.result()
        except BaseException:
            processes.stop_all()
            raise
    time_everything(report, device, limit_s - RESERVE_S)


def time_everything(report: Report, device: torch.device, deadline_s: float) -> None:
    """Run the timing stages until the deadline, in seconds since the report's start."""
    from benchmarks.gpu import noise_times

    stopwatch = Stopwatch(device)

    def small_things() -> dict[str, Any]:
        report.data["structures"] = noise_times.time_structures(stopwatch)
        report.data["tiny"] = noise_times.time_tiny(stopwatch)
        return {"summary": "functions of the structures, and a layer bound by its launches", "failures": []}

    report.stage(
        "timings", lambda: time_cases(report, stopwatch, noise_times.cases(), deadline_s - SMALL_TIMINGS_S)
    )
    # Last, as they record graphs, and a recording that fails (seen on an H200) spoils what its process does next.
    report.stage("small timings", small_things)


def time_cases(
    report: Report,
    stopwatch: Stopwatch,
    cases: Sequence[FunctionCase],
    deadline_s: float,
    rounds: int = 3,
) -> dict[str, Any]:
    """Time the cases one after the other; those for which no time is left are recorded."""
    from benchmarks.gpu import noise_times

    failures: list[str] = []
    skipped = []
    for case in cases:
        if report.elapsed_s > deadline_s:
            skipped.append(case.name)
            continue
        try:
            rows = noise_times.run_case(case, stopwatch, rounds=rounds, failures=failures)
        except Exception as error:
            failures.append(f"{case.name}: {type(error).__name__}: {str(error)[:500]}")
            continue
        report.data["timing"] += rows
        report.write()
        shares = ", ".join(f"{row['direction']} {100 * row['share_of_copy']['value']:.0f} %" for row in rows)
        report.say(f"{case.name}: of the copy's rate {shares}")
    summary = f"{len(cases) - len(skipped)} cases" + (
        f", {len(skipped)} left out for time" if skipped else ""
    )
    return {"summary": summary, "failures": failures, "left_out": skipped}
