"""What reaches the GPU's driver when kernels are started, with a driver that only writes it down."""

from __future__ import annotations

import pytest
import torch

from benchmarks.machine_code.compilation import gpu_target
from bmrs_kernels import kl_divergence, multiply_noise
from bmrs_kernels.dispatch import backend, triton_launch

pytest.importorskip("triton")


class Driver:
    """A driver for an H100 that starts nothing, and writes down what it was to start."""

    def __init__(self) -> None:
        self.started: list[tuple[object, ...]] = []
        self.utils, self.launcher_cls = self, lambda _source, _metadata: self.start

    def start(self, *arguments: object) -> None:
        self.started.append(arguments)

    def load_binary(self, name: str, *_: object) -> tuple[object, str, int, int, int]:
        return None, name, 32, 0, 1024

    def get_device_properties(self, _device: object) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_current_target(self) -> object:
        return gpu_target("sm_90")

    def get_current_device(self) -> str:
        return "no real device"

    def get_current_stream(self, _device: object) -> int:
        return 0


@pytest.fixture
def driver(monkeypatch):
    from triton.runtime import driver as drivers

    if backend.INTERPRETING:
        pytest.skip("the interpreter starts nothing through a driver")
    driver = Driver()
    monkeypatch.setattr(drivers, "_active", driver)
    monkeypatch.setattr(backend, "INTERPRETING", True)  # lets CPU tensors reach the kernels
    monkeypatch.setattr(triton_launch, "_COMPILED", {})
    return driver


@pytest.mark.parametrize(
    "options",
    [{"shape": (64, 16)}, {"shape": (64, 16), "mask": True}, {"shape": (4, 16, 6, 6)}]
    + [{"shape": (4, 16, 6, 6), "granularity": granularity} for granularity in ("sample", "batch")],
)
def test_a_second_launch_gives_the_driver_what_triton_gives_it(driver, options, monkeypatch):
    shape, mask = options["shape"], torch.ones(16, dtype=torch.bool) if options.get("mask") else None
    x, mu, log_sigma = torch.ones(shape), torch.zeros(16), torch.zeros(16)
    tensors = [tensor.requires_grad_() for tensor in (x, mu, log_sigma)]
    granularity = options.get("granularity", "element")

    def started() -> list[tuple[object, ...]]:
        driver.started.clear()
        out = multiply_noise(*tensors, mask=mask, granularity=granularity, seed=1, backend="triton")
        torch.autograd.grad(out, tensors, torch.ones_like(out))
        kl_divergence(mu, log_sigma, backend="triton")
        return [tuple(map(described, arguments)) for arguments in driver.started]

    by_triton = started()
    monkeypatch.setattr(triton_launch, "_start", never_by_triton(triton_launch._start))
    again = started()
    assert len(by_triton) >= 4
    assert again == by_triton


class Refusing:
    """A kernel that Triton must not be asked for."""

    def __init__(self, kernel) -> None:
        self.fn, self.arg_names = kernel.fn, kernel.arg_names

    def __getitem__(self, _grid):
        raise AssertionError(f"{self.fn.__name__} was looked for by Triton")


def never_by_triton(start):
    """Return `_start`, for what was compiled before only."""
    return lambda kernel, *rest: start(Refusing(kernel), *rest)


def described(argument: object) -> object:
    """Return what an argument has in common with that of a launch with other tensors."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, tuple(argument.shape)
    # For profilers' hooks; made anew for each launch.
    return type(argument) if type(argument).__name__ == "LazyDict" else argument
