"""Times of ``multiply_noise`` against a copy of the same bytes, the torch reference and a compiled plain formula.

``python -m benchmarks.gpu.noise_times --part 0 --of 4`` runs every fourth case once, which leaves its compiled kernels
in the caches on disk: several such processes compile faster than one.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bmrs_kernels
from benchmarks import processes
from benchmarks.granularities import GRANULARITIES, distinct
from benchmarks.rivals import plain
from benchmarks.speed.activation_shapes import CHANNELS_LAST, LARGE, LINEAR, TOKENS, ActivationShape
from benchmarks.speed.competitors import Compiler, compiler, copy_of, directions_of
from benchmarks.speed.function_cases import DIRECTIONS, DTYPES, STRUCTURES, TENSORS_MOVED
from benchmarks.speed.stopwatch import Plan, Stopwatch, capture, ratio, summary

ROUNDS = 3
RIVALS = ("eager", "compiled")


class Case(NamedTuple):
    """An activation and how noise is drawn for it."""

    activation: ActivationShape
    granularity: str
    dtype: str
    compiled: bool = False  # whether torch.compile competes: each compilation takes long

    @property
    def x_bytes(self) -> int:
        """Size of x."""
        return math.prod(self.activation.shape) * DTYPES[self.dtype].itemsize

    def bytes_moved(self, direction: str) -> int:
        """Bytes that the direction reads and writes at least."""
        return TENSORS_MOVED["multiply_noise"][direction] * self.x_bytes

    @property
    def name(self) -> str:
        """A name for people."""
        return f"{self.activation.name} {self.dtype} {self.granularity}"

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``multiply_noise`` that the case fixes."""
        return {"dim": self.activation.dim, "granularity": self.granularity}


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


def cases() -> list[Case]:
    """Return the cases, those that matter most first."""
    return [
        Case(activation, granularity, dtype, (activation, granularity, dtype) in COMPILED)
        for activation in ACTIVATIONS
        for dtype in DTYPES
        for granularity in distinct(GRANULARITIES, of_matrices=len(activation.shape) == 2)
    ]


def reference_noise(x: Tensor, mu: Tensor, log_sigma: Tensor, *, dim: int, granularity: str) -> Tensor:
    """Return x · θ by the plain formula with torch's own generator, in x's dtype: what torch.compile is given."""
    return plain.multiply_noise(x, mu, log_sigma, dim=dim, granularity=granularity).to(x.dtype)


def reference_of(case: Case) -> Callable[..., Tensor]:
    """Return the plain formula as a function of (x, μ, log σ)."""

    def reference(x: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
        return reference_noise(x, mu, log_sigma, **case.options)

    return reference


def posteriors(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return leaf tensors μ and log σ inside the interval, where the plain formula holds too."""
    mu = torch.linspace(-3.0, -1.0, count, device=device).requires_grad_()
    return mu, torch.full((count,), -1.0, device=device).requires_grad_()


def inputs_of(case: Case, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return x, μ and log σ, and a gradient; random, since some chips are faster on zeros."""
    x, grad = (
        case.activation.laid_out(torch.randn(case.activation.shape, device=device).to(DTYPES[case.dtype]))
        for _ in range(2)
    )
    return (x.requires_grad_(), *posteriors(case.activation.structures, device)), grad


def implementations(case: Case, compile_function: Compiler | None) -> dict[str, Callable[..., Tensor]]:
    """Return the functions of (x, μ, log σ) that compete."""
    found: dict[str, Callable[..., Tensor]] = {
        "triton": functools.partial(bmrs_kernels.multiply_noise, backend="triton", **case.options),
        "eager": functools.partial(bmrs_kernels.multiply_noise, backend="torch", **case.options),
    }
    if compile_function is not None:
        found["compiled"] = compile_function(reference_of(case))
    return found


def copies(case: Case, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return copies that move the bytes of each direction: half of them read, half written."""
    return {direction: copy_of(case.bytes_moved(direction), device) for direction in DIRECTIONS}


def warm_up(case: Case, device: torch.device) -> None:
    """Compile what the case needs: Triton's kernels and torch.compile's."""
    inputs, grad = inputs_of(case, device)
    for name, function in implementations(case, compiler() if case.compiled else None).items():
        if name != "eager":
            torch.autograd.grad(function(*inputs), inputs, grad)


def run_case(
    case: Case,
    stopwatch: Stopwatch,
    *,
    rounds: int = ROUNDS,
    compile_function: Compiler | None = None,
    failures: list[str],
) -> list[dict[str, Any]]:
    """Return a row for each direction; competitors that raise are reported in ``failures`` and left out."""
    inputs, grad = inputs_of(case, stopwatch.device)
    calls = {"copy": copies(case, stopwatch.device)}
    for name, function in implementations(case, compile_function).items():
        try:
            calls[name] = directions_of(function, inputs, grad)
            calls[name]["backward"]()
        except Exception as error:
            if name == "triton":
                raise
            calls.pop(name, None)
            failures.append(f"{case.name}, {name}: {type(error).__name__}: {str(error)[:300]}")
    rows = []
    for direction in DIRECTIONS:
        plans = {name: stopwatch.plan(each[direction]) for name, each in calls.items()}
        measured = stopwatch.compare(plans, rounds=rounds, evict=case.x_bytes <= stopwatch.l2_bytes)
        rows.append(row(case, direction, {name: summary(each) for name, each in measured.items()}, plans))
    return rows


def row(
    case: Case, direction: str, times: dict[str, dict[str, Any]], plans: dict[str, Plan]
) -> dict[str, Any]:
    """Return a row of results from the competitors' times in milliseconds."""
    found: dict[str, Any] = {
        **case.activation._asdict(),
        "activation": case.activation.name,
        "dtype": case.dtype,
        "granularity": case.granularity,
        "direction": direction,
        "x_bytes": case.x_bytes,
        "bytes_moved": case.bytes_moved(direction),
        "times": times,
        "gb_per_s": case.bytes_moved(direction) / times["triton"]["median"] / 1e6,
        "share_of_copy": ratio(times["copy"], times["triton"]),
        "speedup": {name: ratio(times[name], times["triton"]) for name in times if name in RIVALS},
    }
    if direction == "both":
        found["peak_memory"] = {
            name: plan.peak_bytes / case.x_bytes
            for name, plan in plans.items()
            if name != "copy" and plan.peak_bytes is not None
        }
    return found


def time_tiny(
    stopwatch: Stopwatch, activation: ActivationShape = TINY, repeats: int = 200
) -> dict[str, float]:
    """Return wall milliseconds per forward and backward of a layer that is bound by its launches."""
    case = Case(activation, "element", "float32")
    inputs, grad = inputs_of(case, stopwatch.device)
    functions = implementations(case, None)
    functions["plain formula, eager"] = reference_of(case)
    calls = {name: directions_of(each, inputs, grad)["both"] for name, each in functions.items()}
    found = {name: stopwatch.wall_ms(call, repeats=repeats) for name, call in calls.items()}
    if stopwatch.on_gpu:
        _, replay = capture(calls["triton"])
        found["triton in a CUDA graph"] = stopwatch.wall_ms(replay, repeats=repeats)
    return found


def time_structures(
    stopwatch: Stopwatch, count: int = STRUCTURES["ResNet-50"], rounds: int = ROUNDS, repeats: int = 10
) -> list[dict[str, Any]]:
    """Return times of what a training step and a pruning decision compute for all structures of a network."""
    parameters = posteriors(count, stopwatch.device)

    def kl_with_gradients(backend: str) -> Any:
        return torch.autograd.grad(bmrs_kernels.kl_divergence(*parameters, backend=backend).sum(), parameters)

    def decision(backend: str) -> Tensor:
        with torch.no_grad():
            return bmrs_kernels.delta_f_lognormal(*parameters, backend=backend) >= 0

    rows = []
    for name, function in (
        ("KL and its gradients", kl_with_gradients),
        ("pruning decision by ΔF", decision),
    ):
        calls = {backend: functools.partial(function, backend) for backend in ("triton", "torch")}
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
        # A pool of compilers for each of these processes would be too many.
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
