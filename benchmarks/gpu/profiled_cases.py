"""What ``python -m benchmarks profile`` has profiled: every kernel at a size that fills a GPU.

Run as a program under Nsight Compute, it prints a line for each launch: the case and the kernel, apart by a tab.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import bmrs_kernels
from benchmarks.gpu import noise_times
from benchmarks.gpu.sanitized_cases import recorded_launches
from benchmarks.speed.activation_shapes import CHANNELS_LAST, LARGE, LINEAR
from benchmarks.speed.function_cases import OF_STRUCTURES, STRUCTURES

NOISE = (
    noise_times.Case(LARGE, "element", "float32"),
    noise_times.Case(LARGE, "element", "bfloat16"),
    noise_times.Case(LARGE, "sample", "float32"),
    noise_times.Case(LARGE, "batch", "float32"),
    noise_times.Case(CHANNELS_LAST, "element", "float32"),
    noise_times.Case(CHANNELS_LAST, "sample", "float32"),
    noise_times.Case(LINEAR, "element", "float32"),
)
NUM_STRUCTURES = STRUCTURES["ResNet-50"]
NUM_UNIFORMS = 1 << 25


def cases(device: torch.device) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Return the cases by name: what prepares the inputs and returns the call, forward and backward."""
    found: dict[str, Callable[[], Callable[[], Any]]] = {
        f"multiply_noise {case.name}": functools.partial(_noise, case, device) for case in NOISE
    }
    for name in OF_STRUCTURES:
        found[name] = functools.partial(_of_structures, getattr(bmrs_kernels, name), device)
    found["sample_noise"] = functools.partial(_sample, device)
    seed = torch.tensor(1, device=device)
    found["philox_uniform"] = lambda: functools.partial(
        bmrs_kernels.philox_uniform, seed, (NUM_UNIFORMS,), device=device, backend="triton"
    )
    return found


def _noise(case: noise_times.Case, device: torch.device) -> Callable[[], Any]:
    inputs, grad = noise_times.inputs_of(case, device)
    function = noise_times.implementations(case, None)["triton"]
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def _of_structures(function: Callable[..., Any], device: torch.device) -> Callable[[], Any]:
    parameters = noise_times.posteriors(NUM_STRUCTURES, device)

    def call() -> Any:
        result = function(*parameters, backend="triton")
        differentiable = isinstance(result, Tensor) and result.requires_grad
        return torch.autograd.grad(result.sum(), parameters) if differentiable else result

    return call


def _sample(device: torch.device) -> Callable[[], Any]:
    parameters = noise_times.posteriors(NUM_STRUCTURES, device)
    uniform = torch.rand(64, NUM_STRUCTURES, device=device).clamp_(1e-6, 1 - 1e-6)
    return functools.partial(bmrs_kernels.sample_noise, *parameters, uniform, backend="triton")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run each case once unprofiled, which compiles it, and once profiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profiled_cases", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    device = parser.parse_args(arguments).device
    on_gpu = device.type == "cuda"
    for name, prepare in cases(device).items():
        call = prepare()
        call()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        with recorded_launches() as launched:
            call()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        for kernel in launched:
            print(f"{name}\t{kernel}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
