"""The calls whose kernels are compiled, and how their launches are recorded without a GPU."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args
from unittest import mock

import torch
from torch import Tensor

import bmrs_kernels
from benchmarks.granularities import GRANULARITIES, distinct
from bmrs_kernels.dispatch import backend
from bmrs_kernels.options import Activation, Granularity

WIDEST_ACCESS = 16  # bytes

CONV_WIDE, CONV_NARROW, CONV_ODD = (64, 64, 56, 56), (64, 256, 14, 14), (32, 2048, 7, 7)
LINEAR, LINEAR_SMALL, LINEAR_ODD = (8192, 768), (128, 100), (128, 150)
TOKENS = (64, 197, 768)

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class CompiledCase:
    """A call of a public function, forward and backward."""

    shape: tuple[int, ...]
    operation: str = "multiply_noise"
    dtype: str = "float32"
    dim: int = 1
    granularity: Granularity = "element"
    channels_last: bool = False
    activation: Activation | None = None
    mask: bool = False
    gradients: bool = True
    in_gate: bool = True  # whether CI compiles it, or only whoever asks for all cases
    everywhere: bool = False  # whether CI compiles it for every target

    @property
    def name(self) -> str:
        """A name that tells cases apart."""
        parts = [self.operation, "x".join(map(str, self.shape)), self.dtype]
        if self.operation == "multiply_noise":
            parts += [
                self.granularity,
                f"dim {self.dim}" if self.dim != 1 else "",
                "channels_last" if self.channels_last else "",
                self.activation or "",
                "mask" if self.mask else "",
            ]
        if not self.gradients:
            parts.append("without gradients")
        return " ".join(filter(None, parts))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of x, or of μ where there is no x."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def elements(self) -> int:
        """Number of elements of x, or of structures where there is no x."""
        return math.prod(self.shape)

    @property
    def allows_wide_access(self) -> bool:
        """Whether every run of neighbours in memory that a program reads begins at a multiple of 16 bytes."""
        inner = math.prod(self.shape[self.dim + 1 :])
        run = self.shape[self.dim] if self.channels_last or inner == 1 else inner
        return run * self.torch_dtype.itemsize % WIDEST_ACCESS == 0


def all_cases() -> list[CompiledCase]:
    """Return every case."""
    return list(_multiply_noise_cases()) + list(_structure_cases())


def _multiply_noise_cases() -> Iterator[CompiledCase]:
    layouts: list[dict[str, Any]] = [
        {"shape": CONV_WIDE},
        {"shape": CONV_WIDE, "channels_last": True},
        {"shape": CONV_NARROW},
        {"shape": CONV_ODD},
        {"shape": LINEAR},
        {"shape": LINEAR_SMALL},
        {"shape": LINEAR_ODD},
        {"shape": TOKENS, "dim": 2},
    ]
    for layout in layouts:
        granularities = distinct(GRANULARITIES, of_matrices=len(layout["shape"]) == 2)
        for granularity, dtype in itertools.product(granularities, DTYPES):
            yield CompiledCase(
                **layout,
                granularity=granularity,
                dtype=dtype,
                in_gate=_is_in_gate(layout, granularity, dtype),
                everywhere=dtype == "float32" and (layout, granularity) in EVERYWHERE,
            )
    with_mask: tuple[Granularity, ...] = ("element", "batch")
    for shape, granularity, activation in itertools.product(
        (CONV_WIDE, LINEAR), with_mask, get_args(Activation)
    ):
        in_gate = granularity == "element" and (activation == "relu" or shape == CONV_WIDE)
        yield CompiledCase(
            shape=shape, granularity=granularity, activation=activation, mask=True, in_gate=in_gate
        )


# Every kernel of multiply_noise.
EVERYWHERE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"shape": CONV_WIDE}, "element"),
    ({"shape": CONV_WIDE}, "sample"),
    ({"shape": LINEAR}, "element"),
    ({"shape": LINEAR}, "batch"),
)


def _is_in_gate(layout: dict[str, Any], granularity: str, dtype: str) -> bool:
    """Return whether CI compiles a case: float16 is left out, as bfloat16 is like it, and most of the shared draws."""
    common = layout in ({"shape": CONV_WIDE}, {"shape": LINEAR})
    if dtype == "bfloat16":
        return common or (granularity == "element" and layout["shape"] not in (LINEAR_SMALL, LINEAR_ODD))
    if dtype == "float32":
        return granularity == "element" or layout["shape"] in (CONV_WIDE, LINEAR)
    return dtype == "float64" and common


def _structure_cases() -> Iterator[CompiledCase]:
    for operation in (
        "kl_divergence",
        "delta_f_lognormal",
        "delta_f_loguniform",
        "noise_mean",
        "sample_noise",
    ):
        yield CompiledCase(operation=operation, shape=(4096,), everywhere=True)
        yield CompiledCase(
            operation=operation, shape=(4096,), gradients=False, in_gate=operation == "sample_noise"
        )
        yield CompiledCase(operation=operation, shape=(4096,), dtype="float64", in_gate=False)
    for operation in ("noise_snr", "philox_uniform"):
        yield CompiledCase(operation=operation, shape=(4096,), gradients=False, everywhere=True)


class Launch(NamedTuple):
    """A kernel started with arguments."""

    kernel: Any  # a triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constexpr arguments and launch options

    @property
    def name(self) -> str:
        """The kernel's name."""
        name: str = self.kernel.__name__
        return name

    @property
    def programs(self) -> int:
        """Number of programs."""
        return math.prod(self.grid)

    @property
    def bound(self) -> dict[str, Any]:
        """Every argument of the kernel by name."""
        names = self.kernel.arg_names
        constants = {name: value for name, value in self.options.items() if name in names}
        return dict(zip(names, self.arguments, strict=False)) | constants

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the arguments."""
        return {name: value for name, value in self.bound.items() if isinstance(value, Tensor)}


def launches(case: CompiledCase) -> dict[str, list[Launch]]:
    """Return the launches of a case, in order, by "forward" and "backward"; no kernel runs."""
    recorded: dict[str, list[Launch]] = {"forward": [], "backward": []}
    with _recording(recorded["forward"]):
        output = _call(case)
    if output.requires_grad:
        with _recording(recorded["backward"]):
            output.backward(torch.empty_like(output))
    return recorded


@contextlib.contextmanager
def _recording(into: list[Launch]) -> Iterator[None]:
    """Let CPU tensors reach the kernels, and write launches down instead of starting them."""
    import triton

    def record(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        into.append(Launch(kernel, grid, arguments, options))

    with (
        mock.patch.object(backend, "INTERPRETING", True),
        mock.patch.object(triton.JITFunction, "run", record),
    ):
        yield


def _call(case: CompiledCase) -> Tensor:
    """Call a case's function on tensors that are never read."""
    if case.operation == "philox_uniform":
        return bmrs_kernels.philox_uniform(1, case.shape, device="cpu", backend="triton")
    if case.operation == "multiply_noise":
        return _multiply_noise(case)
    mu, log_sigma = _parameters(case.elements, case.torch_dtype, gradients=case.gradients)
    if case.operation == "sample_noise":
        uniform = torch.empty_like(mu)
        return bmrs_kernels.sample_noise(mu, log_sigma, uniform, backend="triton")
    function: Callable[..., Tensor] = getattr(bmrs_kernels, case.operation)
    return function(mu, log_sigma, backend="triton")


def _multiply_noise(case: CompiledCase) -> Tensor:
    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
    x = torch.empty(case.shape, dtype=case.torch_dtype, memory_format=memory_format)
    mu, log_sigma = _parameters(case.shape[case.dim], torch.float32, gradients=case.gradients)
    return bmrs_kernels.multiply_noise(
        x.requires_grad_(case.gradients),
        mu,
        log_sigma,
        dim=case.dim,
        mask=torch.ones_like(mu, requires_grad=False) if case.mask else None,
        granularity=case.granularity,
        activation=case.activation,
        seed=1,
        backend="triton",
    )


def _parameters(count: int, dtype: torch.dtype, *, gradients: bool) -> tuple[Tensor, Tensor]:
    mu = torch.zeros(count, dtype=dtype, requires_grad=gradients)
    return mu, torch.zeros_like(mu, requires_grad=gradients)
