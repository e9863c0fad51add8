"""What ``python -m benchmarks profile`` has profiled: every kernel at a size that fills a GPU.

Run as a program under Nsight Compute, it prints a line for each launch: the case and the kernel, apart by a tab.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.sanitized_cases import recorded_launches
from benchmarks.speed.activation_shapes import CHANNELS_LAST, LARGE, LINEAR, ActivationShape
from benchmarks.speed.competitors import Contest
from benchmarks.speed.function_cases import OF_STRUCTURES, STRUCTURES, FunctionCase
from benchmarks.speed.stopwatch import Call

NOISE = (
    FunctionCase("multiply_noise", LARGE, "element", "float32"),
    FunctionCase("multiply_noise", LARGE, "element", "bfloat16"),
    FunctionCase("multiply_noise", LARGE, "sample", "float32"),
    FunctionCase("multiply_noise", LARGE, "batch", "float32"),
    FunctionCase("multiply_noise", CHANNELS_LAST, "element", "float32"),
    FunctionCase("multiply_noise", CHANNELS_LAST, "sample", "float32"),
    FunctionCase("multiply_noise", LINEAR, "element", "float32"),
)
NUM_STRUCTURES = STRUCTURES["ResNet-50"]
NUM_UNIFORMS = 1 << 25


def cases(device: torch.device) -> dict[str, Callable[[], Call]]:
    """Return the cases by name: what prepares the inputs and returns the call, forward and backward."""
    functions = [
        *NOISE,
        *(FunctionCase(name, ActivationShape((NUM_STRUCTURES,), dim=0)) for name in OF_STRUCTURES),
        FunctionCase("sample_noise", ActivationShape((64, NUM_STRUCTURES))),
        FunctionCase("philox_uniform", ActivationShape((NUM_UNIFORMS,), dim=0)),
    ]
    return {case.name: functools.partial(_contested, case, device) for case in functions}


def _contested(case: FunctionCase, device: torch.device) -> Call:
    return Contest(case, device).call("triton", case.directions[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run each case once unprofiled where that compiles it, on a GPU, and once profiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profiled_cases", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    device = parser.parse_args(arguments).device
    on_gpu = device.type == "cuda"
    for name, prepare in cases(device).items():
        call = prepare()
        if on_gpu:
            call()
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
