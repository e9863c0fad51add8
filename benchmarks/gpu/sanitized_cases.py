"""One small case of each kernel, forward and backward: ``compute-sanitizer python -m benchmarks.gpu.sanitized_cases``.

Sizes leave blocks partly filled, where an access outside of a tensor would happen. Fails if a kernel of the package was
not run.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

import bmrs_kernels
from bmrs_kernels.dispatch import triton_launch
from bmrs_kernels.multiplicative_noise import triton_noise
from bmrs_kernels.options import Granularity

STRUCTURES = 6

# Name: shape, dim, channels_last, dtype, granularity, options. Between them they take every way through the launchers.
NOISE: dict[str, tuple[tuple[int, ...], int, bool, torch.dtype, Granularity, dict[str, Any]]] = {
    "rows aligned": ((2, 3, 4, 4), 1, False, torch.float32, "element", {"activation": "relu"}),
    "rows unaligned": ((2, 3, 5, 7), 1, False, torch.bfloat16, "element", {}),
    "rows masked": ((2, 3, 5, 7), 1, False, torch.float32, "element", {"mask": True}),
    "rows exact": ((2, 3, 5, 7), 1, False, torch.float64, "element", {}),
    "columns channels last": ((2, 6, 2, 2), 1, True, torch.float32, "element", {"mask": True}),
    "columns scattered": ((2, 6, 3, 5), 1, True, torch.float32, "element", {}),
    "columns with a table": ((9, 70), 1, False, torch.float32, "element", {"mask": True, "table": True}),
    "columns channels last with a table": ((2, 6, 2, 2), 1, True, torch.float32, "element", {"table": True}),
    "columns tokens": ((2, 5, 8), 2, False, torch.float32, "element", {"activation": "tanh"}),
    "shared rows": ((3, 5, 3, 3), 1, False, torch.float32, "sample", {"mask": True}),
    "shared columns": ((3, 5, 3, 3), 1, True, torch.float32, "sample", {"mask": True}),
    "shared by all": ((3, 6), 1, False, torch.bfloat16, "batch", {}),
}


def noise_case(
    device: torch.device,
    shape: tuple[int, ...],
    dim: int,
    channels_last: bool,
    dtype: torch.dtype,
    granularity: Granularity,
    options: dict[str, Any],
) -> None:
    """Run ``multiply_noise`` and its gradients; with ``table`` as if the activation were large."""
    options = dict(options)
    largest_without = 0 if options.pop("table", False) else triton_noise.LARGEST_WITHOUT_TABLE
    x = torch.randn(shape, device=device).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    parameters = posteriors(device, shape[dim], torch.float64 if dtype == torch.float64 else torch.float32)
    if "mask" in options:
        options = {**options, "mask": torch.arange(shape[dim], device=device) % 3 > 0}
    with mock.patch.object(triton_noise, "LARGEST_WITHOUT_TABLE", largest_without):
        out = bmrs_kernels.multiply_noise(
            x, *parameters, dim=dim, granularity=granularity, seed=1, backend="triton", **options
        )
        gradients = torch.autograd.grad(out, (x, *parameters), torch.randn_like(out))
    check(out, *gradients)


def structure_case(device: torch.device, function: Callable[..., Any], *, differentiable: bool) -> None:
    """Run a function of the structures' posteriors, and its gradients."""
    parameters = posteriors(device, STRUCTURES, torch.float32)
    result = function(*parameters, backend="triton")
    if differentiable:
        check(result, *torch.autograd.grad(result.sum(), parameters))
        with torch.no_grad():
            result = function(*parameters, backend="triton")
    check(*result) if isinstance(result, tuple) else check(result)


def sample_case(device: torch.device) -> None:
    """Run ``sample_noise`` and its gradients."""
    uniform = torch.rand(3, STRUCTURES, device=device).clamp_(1e-6, 1 - 1e-6)
    structure_case(
        device,
        lambda mu, log_sigma, **options: bmrs_kernels.sample_noise(mu, log_sigma, uniform, **options),
        differentiable=True,
    )


def uniform_case(device: torch.device) -> None:
    """Draw uniforms."""
    check(bmrs_kernels.philox_uniform(3, (7, 11), device=device, backend="triton"))


def cases(device: torch.device) -> dict[str, Callable[[], None]]:
    """Return the cases by name."""
    found: dict[str, Callable[[], None]] = {}
    for name, case in NOISE.items():
        found[name] = functools.partial(noise_case, device, *case)
    for function, differentiable in (
        (bmrs_kernels.kl_divergence, True),
        (bmrs_kernels.delta_f_lognormal, True),
        (bmrs_kernels.delta_f_loguniform, True),
        (bmrs_kernels.noise_mean, True),
        (bmrs_kernels.noise_snr, False),
    ):
        found[function.__name__] = functools.partial(
            structure_case, device, function, differentiable=differentiable
        )
    return found | {"sample_noise": lambda: sample_case(device), "philox": lambda: uniform_case(device)}


def posteriors(device: torch.device, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return leaf tensors μ and log σ inside, beside and far outside the interval."""
    mu = torch.linspace(-24.0, 4.0, count, dtype=dtype, device=device).requires_grad_()
    log_sigma = torch.linspace(1.0, -2.0, count, dtype=dtype, device=device).requires_grad_()
    return mu, log_sigma


def check(*results: Tensor) -> None:
    """Raise unless all numbers are finite."""
    for result in results:
        if not torch.isfinite(result).all():
            raise ArithmeticError(f"a result of shape {tuple(result.shape)} is not finite")


def package_kernels() -> set[str]:
    """Return the names of all kernels in bmrs_kernels."""
    names = set()
    for module in package_modules():
        for name, value in vars(module).items():
            if name.endswith("_kernel") and isinstance(value, triton.runtime.KernelInterface):
                names.add(name)
    return names


def package_modules() -> list[Any]:
    """Import and return all modules of bmrs_kernels."""
    found = pkgutil.walk_packages(bmrs_kernels.__path__, "bmrs_kernels.")
    return [importlib.import_module(module.name) for module in found]


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Collect the names of the kernels that are launched, in order."""
    names: list[str] = []
    original = triton_launch.launch

    def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        original(kernel, *arguments, **options)

    patches = [
        mock.patch.object(module, "launch", launch)
        for module in package_modules()
        if getattr(module, "launch", None) is original
    ]
    try:
        for patch in patches:
            patch.start()
        yield names
    finally:
        for patch in patches:
            patch.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; print the names of the kernels that ran; return 1 if one did not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitized_cases", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    device = parser.parse_args(arguments).device
    torch.manual_seed(0)
    with recorded_launches() as names:
        for name, case in cases(device).items():
            case()
            print(f"{name}: done", flush=True)
    launched = set(names)
    for name in sorted(launched):
        print(f"kernel {name}: launched")
    missing = sorted(package_kernels() - launched)
    for name in missing:
        print(f"kernel {name}: NOT LAUNCHED")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
