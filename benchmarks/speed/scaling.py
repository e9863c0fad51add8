"""Time against size, and whether it grows faster than the size: ``python -m benchmarks scaling``.

Sizes are structures, elements or noise layers; what is differentiable is timed forward and backward. The slope is that
of the log of the shortest time against log size over the upper half of the sizes: 1 where time grows as the size does.
The exit code is 1 if a slope is above 1.1.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bmrs
import bmrs_kernels
from benchmarks import records
from benchmarks.environment import environment, one_line
from benchmarks.markdown import table
from benchmarks.options import add_device_and_record, positive
from benchmarks.speed.competitors import posteriors, project_backends
from benchmarks.speed.stopwatch import Call, Stopwatch, kept, summary
from bmrs_kernels.options import Backend, Granularity

ROUNDS = 3
STEEPEST = 1.1
LAYERS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
WIDTH, BATCH = 64, 32  # of the noise layers
# One example has 100 structures with 10 × 10 elements each.
MAPS = (100, 10, 10)
SMALLEST_STRUCTURES, SMALLEST_ELEMENTS = 10**2, 10**4
# With more elements, the intermediate results of the torch path fill a GPU.
LARGEST_ELEMENTS_OF_TORCH = 10**8


@dataclass(frozen=True)
class Sweep:
    """One thing to time at several sizes.

    Attributes:
        name: for people.
        unit: what the sizes count.
        backend: of the project.
        sizes: in increasing order, at least 3.
        prepare: makes what is timed from a size.
    """

    name: str
    unit: str
    backend: str
    sizes: tuple[int, ...]
    prepare: Callable[[int], Call]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    parser.add_argument("--structures", type=_size, default=10**6, help="largest number; default: 1e6")
    parser.add_argument(
        "--elements", type=_size, help="largest number; default: 1e7 on a CPU and 1e9 on a GPU"
    )
    parser.add_argument("--layers", type=_size, default=LAYERS[-1], help="largest number; default: 500")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="default: %(default)s")
    add_device_and_record(parser)
    options = parser.parse_args(arguments)
    for name, smallest in (("structures", SMALLEST_STRUCTURES), ("elements", SMALLEST_ELEMENTS)):
        largest = getattr(options, name)
        if largest is not None and largest < 10 * smallest:
            parser.error(
                f"--{name} must be at least {10 * smallest:,}, of 3 sizes for a slope, got {largest:,}"
            )
    if options.layers < LAYERS[2]:
        parser.error(f"--layers must be at least {LAYERS[2]}, of 3 sizes for a slope, got {options.layers}")
    device = torch.device(options.device)
    elements = options.elements or (10**9 if device.type == "cuda" else 10**7)
    keep_freed_memory()
    stopwatch = Stopwatch(device)
    found = []
    for sweep in sweeps(device, structures=options.structures, elements=elements, layers=options.layers):
        print(f"{sweep.name}, {sweep.backend} ...", file=sys.stderr, flush=True)
        found.append(timed(sweep, stopwatch, rounds=options.rounds))
    about = environment(options.commit, device)
    print(f"{one_line(about)}\n\n{report(found)}")
    if options.record:
        records.save("scaling", found, about, options.record)
    return int(any(row["defect"] for row in found))


def sweeps(device: torch.device, *, structures: int, elements: int, layers: int) -> list[Sweep]:
    """Return everything that is timed, up to the given sizes."""
    backends = project_backends(device)
    granularities: tuple[Granularity, ...] = ("element", "sample")
    counts = _steps(SMALLEST_STRUCTURES, structures)
    found = [
        Sweep(name, "structures", backend, counts, functools.partial(_of_structures, name, backend, device))
        for name in ("kl_divergence", "delta_f_lognormal", "noise_mean")
        for backend in backends
    ]
    found += [
        Sweep(
            f"multiply_noise, {granularity}",
            "elements",
            backend,
            _steps(
                SMALLEST_ELEMENTS,
                min(elements, LARGEST_ELEMENTS_OF_TORCH) if backend == "torch" else elements,
            ),
            functools.partial(_of_elements, granularity, backend, device),
        )
        for granularity in granularities
        for backend in backends
    ]
    depths = tuple(depth for depth in LAYERS if depth <= layers)
    preparations = {
        "bmrs.kl_divergence(model)": _of_kl_term,
        "bmrs.prune(model)": _of_pruning,
        "training step of a model": _of_model,
    }
    return found + [
        Sweep(name, "noise layers", "auto", depths, functools.partial(prepare, device))
        for name, prepare in preparations.items()
    ]


def timed(sweep: Sweep, stopwatch: Stopwatch, *, rounds: int) -> dict[str, Any]:
    """Return the times of a sweep; its sizes take turns, so that a drifting clock meets all of them."""
    plans = {}
    for size in sweep.sizes:
        call = sweep.prepare(size)
        call()
        # A slow call is timed in every round too.
        plans[str(size)] = stopwatch.plan(call)._replace(slow_ms=None)
    measured = stopwatch.compare(plans, rounds=rounds, evict=False).values()
    times = [summary(each) for each in measured]
    # Whatever else the machine does makes a time longer, never shorter.
    shortest = [min(time for part in each for time in part.milliseconds) for each in measured]
    slope = slope_of(sweep.sizes, shortest)
    return {
        "name": sweep.name,
        "unit": sweep.unit,
        "backend": sweep.backend,
        "sizes": list(sweep.sizes),
        "milliseconds": [kept(each) for each in times],
        "shortest": shortest,
        "fitted_from": _upper_half(sweep.sizes)[0],
        "slope": slope,
        "defect": slope > STEEPEST,
    }


def keep_freed_memory() -> None:
    """Have the C library keep large pieces of memory that were freed, where it is glibc.

    Tensors above 32 MiB are otherwise taken from the system each time, page by page, and cost 3 times as much to
    write: a step in every curve that says nothing about what is measured.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def slope_of(sizes: Sequence[int], milliseconds: Sequence[float]) -> float:
    """Return the slope of log time against log size, fitted over the upper half of the sizes."""
    upper = _upper_half(sizes)
    x = torch.tensor(upper, dtype=torch.float64).log()
    y = torch.tensor(milliseconds[-len(upper) :], dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def report(rows: Iterable[dict[str, Any]]) -> str:
    """Return the Markdown of a run: a row for each sweep, and the number of defects."""
    rows = list(rows)
    lines = [
        (
            *(row["name"], row["backend"]),
            f"{row['sizes'][0]:,} to {row['sizes'][-1]:,} {row['unit']}",
            *(f"{row['milliseconds'][end]['median']:.3f}" for end in (0, -1)),
            f"{row['slope']:.2f}{' DEFECT' if row['defect'] else ''}",
        )
        for row in rows
    ]
    found = sum(row["defect"] for row in rows)
    columns = ("what", "backend", "sizes", "ms at the smallest", "ms at the largest", "slope")
    return f"{table(columns, lines)}\n\n{found} of {len(rows)} slopes above {STEEPEST}."


def _of_structures(name: str, backend: Backend, device: torch.device, count: int) -> Call:
    function = functools.partial(getattr(bmrs_kernels, name), backend=backend)
    return _with_gradients(function, posteriors(count, device))


def _of_elements(granularity: Granularity, backend: Backend, device: torch.device, count: int) -> Call:
    x = torch.rand(count // SMALLEST_ELEMENTS, *MAPS, device=device)
    function = functools.partial(bmrs_kernels.multiply_noise, granularity=granularity, backend=backend)
    return _with_gradients(function, (x.requires_grad_(), *posteriors(MAPS[0], device)))


def _with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    grad = torch.ones_like(inputs[0])
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def _model(device: torch.device, depth: int) -> nn.Sequential:
    layers = [each for _ in range(depth) for each in (nn.Linear(WIDTH, WIDTH), bmrs.NoiseLayer(WIDTH))]
    return nn.Sequential(*layers).to(device)


def _of_kl_term(device: torch.device, depth: int) -> Call:
    model = _model(device, depth)
    parameters = [
        each for layer in model for each in (layer.parameters() if isinstance(layer, bmrs.NoiseLayer) else ())
    ]
    return lambda: torch.autograd.grad(bmrs.kl_divergence(model, weight="mean"), parameters)


def _of_pruning(device: torch.device, depth: int) -> Call:
    # New noise layers keep every structure, so that each call judges all of them.
    return functools.partial(bmrs.prune, _model(device, depth), bmrs.BMRSNormal())


def _of_model(device: torch.device, depth: int) -> Call:
    model = _model(device, depth)
    x = torch.randn(BATCH, WIDTH, device=device)
    return lambda: torch.autograd.grad(model(x).sum(), list(model.parameters()))


def _steps(smallest: int, largest: int) -> tuple[int, ...]:
    """Return 1 and 3 times each power of ten of the smallest size, up to the largest."""
    decades = [smallest * 10**power for power in range(12)]
    return tuple(each for decade in decades for each in (decade, 3 * decade) if each <= largest)


def _upper_half(sizes: Sequence[int]) -> Sequence[int]:
    return sizes[len(sizes) // 2 :]


def _size(text: str) -> int:
    return int(float(text))
