"""What only a GPU can show: that compiled kernels agree with the reference, repeat themselves, and stay in bounds.

Every check takes its device and shapes, so that Triton's interpreter can rehearse it on a CPU, and returns a dictionary
with a summary, a list of failures and details.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import bmrs_kernels
from benchmarks import processes
from benchmarks.granularities import GRANULARITIES
from benchmarks.speed.activation_shapes import CHANNELS_LAST, LARGE, LINEAR, TOKENS, ActivationShape
from benchmarks.speed.stopwatch import capture
from bmrs_kernels.dispatch.backend import INTERPRETING
from bmrs_kernels.dispatch.validation import seed_tensor
from bmrs_kernels.options import Backend, Granularity
from bmrs_kernels.uniform import philox, torch_philox

SEEDS = (0, 1, 2**31 - 1, 2**32 + 5, 123_456_789_012_345, 2**63 - 1, 2**64 - 1)
# Relative to each element of the output and of x's gradient, and to the norm of the parameters' gradients.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    # Parameters stay float32. The interpreter truncates where a GPU rounds.
    torch.bfloat16: (2.0 ** (-7 if INTERPRETING else -8), 1e-5),
    torch.float64: (1e-10, 1e-10),
}
LOWER, UPPER = -20.0, 0.0
# Beyond this many elements indices take 64 bits.
WIDE_SIZES = (33, 64, 1024, 1024)
WIDE_WINDOW = 4096
WIDE_BYTES = 24 << 30


FEW = (ActivationShape((4, 64, 56, 56)), ActivationShape((5, 33, 27, 27), channels_last=True))
LARGE_LINEAR = ActivationShape((1536, 768))
MANY = (
    *FEW,
    ActivationShape((5, 33, 27, 27)),
    # Large enough for constants from a table, beside the small ones.
    ActivationShape((6, 64, 56, 56), channels_last=True),
    LARGE_LINEAR,
    ActivationShape((8, 197, 192), dim=2),
)
# Every dtype is compiled anew, which takes most of the time.
COMPARED = (
    *((activation, torch.float32) for activation in MANY),
    *((activation, dtype) for activation in FEW for dtype in (torch.bfloat16, torch.float64)),
    (LARGE_LINEAR, torch.bfloat16),
)
REPLAYED = ActivationShape((16, 64, 28, 28))
REPEATED = (LARGE, CHANNELS_LAST, LINEAR, TOKENS)
# What each tool of compute-sanitizer finds; their time is limited in all, so they run beside each other.
SANITIZERS = {
    "memcheck": "accesses outside of allocations",
    "racecheck": "races for shared memory",
    "initcheck": "reads of memory that nothing was written to",
}
UNIFORM_SHAPES = ((2**20 + 3,), (2, 64, 112, 112), (3, 5, 7))


def result(summary: str, failures: Sequence[str], **details: Any) -> dict[str, Any]:
    """Return what a check found."""
    return {"summary": summary, "failures": list(failures), **details}


def posteriors(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return leaf tensors μ and log σ, inside the interval and outside; values that float32 holds exactly."""
    generator = torch.Generator().manual_seed(count)
    mu, log_sigma = torch.rand(2, count, generator=generator)
    return (
        (mu * 28.0 - 24.0).to(device, dtype).requires_grad_(),
        (log_sigma * 6.0 - 4.0).to(device, dtype).requires_grad_(),
    )


def kernel_tests(limit_s: float) -> dict[str, Any]:
    """Run the kernels' tests with pytest in a process of its own."""
    options = ["-m", "kernels", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    # The tests make errors of warnings; this one is about the machine and not about its GPU.
    options += ["-W", "ignore:numba is installed but cannot be used:UserWarning"]
    command = [sys.executable, "-m", "pytest", "tests/kernels", *options]
    # Most of the time goes into compilation on the CPU.
    workers = min(6, (os.cpu_count() or 1) // 3)
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    finished = processes.run(command, limit_s, cwd=processes.ROOT, without=("TRITON_INTERPRET",))
    counts = pytest_counts(finished.output)
    failures = finished.problems()
    if not counts.get("passed"):
        failures.append("no test passed")
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no result"
    return result(summary, failures, counts=counts, output=finished.tail())


def pytest_counts(output: str) -> dict[str, int]:
    """Return the counts in pytest's last line."""
    outcomes = "passed|failed|skipped|deselected|xfailed|xpassed|errors?|warnings?"
    for line in reversed(output.splitlines()):
        found = re.findall(rf"(\d+) ({outcomes})\b", line)
        if found and re.search(r" in [\d.]+s", line):
            return {outcome: int(count) for count, outcome in found}
    return {}


def uniforms(
    device: torch.device,
    shapes: Sequence[tuple[int, ...]] = UNIFORM_SHAPES,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Compare the uniforms of the kernel and of torch on the device with those of torch on the CPU, bit for bit."""
    failures = []
    for seed in seeds:
        for shape in shapes:
            expected = bmrs_kernels.philox_uniform(seed, shape, device="cpu")
            drawn = {
                "kernel": bmrs_kernels.philox_uniform(seed, shape, device=device, backend="triton"),
                "torch on the device": bmrs_kernels.philox_uniform(
                    seed, shape, device=device, backend="torch"
                ),
            }
            for name, actual in drawn.items():
                if not same_bits(actual.cpu(), expected):
                    different = (actual.cpu() != expected).sum().item()
                    failures.append(f"{name}, seed {seed}, shape {shape}: {different} uniforms differ")
    number = sum(math.prod(shape) for shape in shapes)
    return result(f"{len(seeds)} seeds x {number:,} uniforms, bit for bit", failures)


def values(
    device: torch.device, compared: Sequence[tuple[ActivationShape, torch.dtype]] = COMPARED
) -> dict[str, Any]:
    """Compare output and gradients on the device with the reference in float64 on the CPU at the same seed."""
    failures: list[str] = []
    worst: dict[str, float] = {}
    for activation, dtype in compared:
        for granularity in GRANULARITIES:
            errors = noise_errors(activation, granularity, dtype, device)
            for index, (name, error) in enumerate(errors.items()):
                bound = TOLERANCES[dtype][index > 1]
                key = f"{name}, {str(dtype).removeprefix('torch.')}"
                worst[key] = max(worst.get(key, 0.0), error)
                if not error <= bound:  # NaN fails
                    failures.append(
                        f"{activation.name} {granularity} {key}: relative error {error:.1e}, bound {bound:.1e}"
                    )
    count = len(compared) * len(GRANULARITIES)
    narrow = max((error for key, error in worst.items() if "float32" in key), default=math.nan)
    return result(f"{count} cases, largest relative error in float32 {narrow:.1e}", failures, worst=worst)


def noise_errors(
    activation: ActivationShape, granularity: Granularity, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Return the relative errors of output, x's gradient and the parameters' gradients."""
    generator = torch.Generator().manual_seed(7)
    x, grad = (torch.randn(activation.shape, generator=generator).to(dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ways: tuple[tuple[Backend, torch.device, torch.dtype, torch.dtype], ...] = (
        ("triton", device, dtype, wide),
        ("torch", torch.device("cpu"), torch.float64, torch.float64),
    )
    runs = []
    for backend, place, x_dtype, dtype_of_parameters in ways:
        inputs = (
            activation.laid_out(x.to(place, x_dtype)).requires_grad_(),
            *posteriors(activation.structures, dtype_of_parameters, place),
        )
        out = bmrs_kernels.multiply_noise(
            *inputs, dim=activation.dim, granularity=granularity, seed=11, backend=backend
        )
        gradients = torch.autograd.grad(out, inputs, activation.laid_out(grad.to(place, x_dtype)))
        runs.append([tensor.detach().cpu().double() for tensor in (out, *gradients)])
    errors = {}
    for name, actual, expected in zip(("out", "grad_x", "grad_mu", "grad_log_sigma"), *runs, strict=True):
        if name in ("out", "grad_x"):
            # Where x is 0, both are.
            relative = (actual - expected).abs() / expected.abs().clamp(min=1e-300)
            errors[name] = relative.max().item()
        else:
            errors[name] = ((actual - expected).norm() / expected.norm()).item()
    return errors


def wide_index(device: torch.device, sizes: tuple[int, ...] = WIDE_SIZES) -> dict[str, Any]:
    """Compare a bfloat16 activation of more than 2³¹ elements with the reference: the first, the middle, the last."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < WIDE_BYTES:
        return result("skipped: not enough free memory", [], skipped=True)
    failures = []
    mu, log_sigma = (part.detach() for part in posteriors(sizes[1], torch.float32, device))
    count, half = math.prod(sizes), WIDE_WINDOW // 2
    middle = min(2**31, count // 2)
    elements = torch.cat(
        [
            torch.arange(max(0, first), min(count, first + WIDE_WINDOW))
            for first in (0, middle - half, count - WIDE_WINDOW)
        ]
    )
    index = torch.unravel_index(elements, sizes)
    granularities: tuple[Granularity, ...] = ("element", "sample")
    for channels_last in (False, True):
        for granularity in granularities:
            draws = elements if granularity == "element" else index[0] * sizes[1] + index[1]
            mu_at, log_sigma_at = (part.cpu().double()[index[1]] for part in (mu, log_sigma))
            expected = bmrs_kernels.sample_noise(mu_at, log_sigma_at, uniforms_at(13, draws).double())
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            x = torch.empty(sizes, dtype=torch.bfloat16, device=device, memory_format=memory_format)
            x.fill_(1.0).requires_grad_()
            out = bmrs_kernels.multiply_noise(
                x, mu, log_sigma, granularity=granularity, seed=13, backend="triton"
            )
            on_device = tuple(axis.to(device) for axis in index)
            found = {"out": out.detach()[on_device].cpu().double()}
            (grad_x,) = torch.autograd.grad(out, x, torch.ones_like(out))
            del out
            found["grad_x"] = grad_x[on_device].cpu().double()
            for name, actual in found.items():
                error = ((actual - expected).abs() / expected).max().item()
                if not error <= TOLERANCES[torch.bfloat16][0]:
                    failures.append(
                        f"channels_last={channels_last} {granularity} {name}: relative error {error:.1e}"
                    )
            del x, grad_x, found
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result(f"{count:,} elements, both layouts, element and sample", failures)


def uniforms_at(seed: int, numbers: Tensor) -> Tensor:
    """Return the uniforms of a seed at given places of the sequence, without drawing those before them."""
    counter = numbers.div(philox.LANES, rounding_mode="floor")
    zero = torch.zeros_like(counter)
    words = torch_philox.philox_4x32(
        (counter & torch_philox.WORD, counter >> torch_philox.HALF, zero, zero.clone()),
        torch_philox.round_keys(seed_tensor(seed, numbers.device)),
    )
    word = torch.stack(words).gather(0, (numbers % philox.LANES)[None])[0]
    return ((word >> (32 - philox.UNIFORM_BITS)).float() + 0.5) * 2.0**-philox.UNIFORM_BITS


def cuda_graph(
    device: torch.device,
    activation: ActivationShape = REPLAYED,
    replays: int = 5,
    granularities: Sequence[Granularity] = GRANULARITIES,
) -> dict[str, Any]:
    """Replay a captured forward and backward: fresh noise on every replay, and given seeds obeyed."""
    failures = []
    x = activation.laid_out(torch.ones(activation.shape, device=device)).requires_grad_()
    inputs = (x, *posteriors(activation.structures, torch.float32, device))
    for granularity in granularities:
        step = functools.partial(_step, inputs, activation.dim, granularity)
        outputs, replay = capture(functools.partial(step, None))
        seen: list[Tensor] = []
        for _ in range(replays):
            replay()
            out, *gradients = (part.detach().clone() for part in outputs)
            if not ((out >= math.exp(LOWER) * (1 - 1e-5)) & (out <= math.exp(UPPER))).all():
                failures.append(f"{granularity}: noise outside the interval")
            if not all(torch.isfinite(gradient).all() for gradient in gradients):
                failures.append(f"{granularity}: a gradient is not finite")
            if any(torch.equal(out, earlier) for earlier in seen):
                failures.append(f"{granularity}: two replays drew the same noise")
            seen.append(out)
        seed = torch.zeros((), dtype=torch.int64, device=device)
        outputs, replay = capture(functools.partial(step, seed))
        for number in (5, 2**40 + 1):
            seed.fill_(number)
            replay()
            for captured, direct in zip(outputs, step(number), strict=True):
                if not same_bits(captured, direct):
                    failures.append(f"{granularity}: replay and direct call differ at seed {number}")
    return result(f"{replays} replays of each granularity, and replays at given seeds", failures)


def _step(
    inputs: tuple[Tensor, Tensor, Tensor], dim: int, granularity: Granularity, seed: Tensor | int | None
) -> tuple[Tensor, ...]:
    out = bmrs_kernels.multiply_noise(*inputs, dim=dim, granularity=granularity, seed=seed, backend="triton")
    return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))


def determinism(
    device: torch.device,
    activations: Sequence[ActivationShape] = REPEATED,
    runs: int = 100,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> dict[str, Any]:
    """Repeat forward and backward at one seed and compare all bits."""
    failures = []
    names = ("out", "grad_x", "grad_mu", "grad_log_sigma")
    for activation in activations:
        for dtype in dtypes:
            x, grad = (
                activation.laid_out(torch.randn(activation.shape, device=device).to(dtype)) for _ in range(2)
            )
            inputs = (
                x.requires_grad_(),
                *posteriors(activation.structures, torch.float32, device),
            )
            for granularity in GRANULARITIES:
                first: tuple[Tensor, ...] | None = None
                different = set()
                for _ in range(runs):
                    out = bmrs_kernels.multiply_noise(
                        *inputs, dim=activation.dim, granularity=granularity, seed=3, backend="triton"
                    )
                    results = (out.detach(), *torch.autograd.grad(out, inputs, grad))
                    first = results if first is None else first
                    different |= {
                        name for name, a, b in zip(names, first, results, strict=True) if not same_bits(a, b)
                    }
                failures += [
                    f"{activation.name} {dtype} {granularity}: {name} differs" for name in sorted(different)
                ]
    count = len(activations) * len(dtypes) * len(GRANULARITIES)
    return result(f"{count} cases, {runs} runs each, bitwise", failures)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors hold the same bits."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    return torch.equal(first.view(bits), second.view(bits))


def kernels_run(limit_s: float) -> dict[str, Any]:
    """Run a small case of each kernel; also leaves them compiled for the run under the sanitizer."""
    command = [sys.executable, "-m", "benchmarks.gpu.sanitized_cases"]
    finished = processes.run(command, limit_s, cwd=processes.ROOT, without=("TRITON_INTERPRET",))
    number = len(re.findall(r": launched$", finished.output, re.M))
    return result(f"{number} kernels launched", finished.problems(), output=finished.tail())


def sanitize(tool: str, limit_s: float) -> dict[str, Any]:
    """Run the same cases under a tool of compute-sanitizer, one of ``SANITIZERS``."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if program is None:
        return result("skipped: compute-sanitizer is not on the PATH", [], skipped=True)
    options = ["--tool", tool, "--target-processes", "all"]
    if tool == "memcheck":
        # Errors of API calls are left out: torch probes the driver with calls that may fail.
        options += ["--report-api-errors", "no"]
    command = [program, *options, sys.executable, "-m", "benchmarks.gpu.sanitized_cases"]
    # Without torch's cache every tensor is an allocation of its own, whose ends and contents the sanitizer knows.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    finished = processes.run(
        command, limit_s, cwd=processes.ROOT, settings=settings, without=("TRITON_INTERPRET",)
    )
    errors = sanitizer_errors(finished.output)
    number = len(re.findall(r": launched$", finished.output, re.M))
    failures = finished.problems()
    if errors is None:
        failures.append("no summary of errors in the output")
    elif errors:
        places = ", ".join(sanitizer_places(finished.output)) or "unknown kernels"
        failures.append(f"{errors} errors of {SANITIZERS[tool]}, in {places}")
    count = "unknown" if errors is None else errors
    return result(f"{number} kernels, {count} errors", failures, output=finished.tail())


def sanitizer_errors(output: str) -> int | None:
    """Return the sum of compute-sanitizer's error summaries, None if there is none.

    Those of racecheck count hazards, of which errors and warnings are kinds.
    """
    found = re.findall(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+) (?:error|hazard)", output)
    return sum(map(int, found)) if found else None


def sanitizer_places(output: str) -> list[str]:
    """Return the names of the kernels that compute-sanitizer's reports name, in alphabetical order."""
    return sorted(set(re.findall(r"^=+ .*?\bat (?:void )?([A-Za-z_][\w:]*)[^\n]*?\+0x", output, re.M)))
