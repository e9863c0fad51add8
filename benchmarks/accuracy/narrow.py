"""Activations of 16 bits: errors of ``multiply_noise`` from end to end, at the uniforms that it draws itself.

Parameters and arithmetic are float32 there; only the activation, the output and x's gradient are narrow. True values
are those of the float64 reference, which the report of float64 measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import bmrs_kernels
from benchmarks.accuracy.contract import BOUNDS, LOWER, UPPER
from benchmarks.accuracy.errors import Setting, dtype_name
from benchmarks.accuracy.points import over_domain, sobol
from bmrs_kernels.dispatch.backend import INTERPRETING
from bmrs_kernels.multiplicative_noise import reference

SEED = 20
# An interpreted program takes tens of milliseconds, and each structure of a feature map has programs of its own.
STRUCTURES = 32 if INTERPRETING else 512
SHAPES = {"feature maps": (8, STRUCTURES, 16), "matrix": (128, STRUCTURES)}
# Of the result, in units in the last place; Triton's interpreter cuts bfloat16 off instead.
ROUNDING = {torch.bfloat16: 1.0 if INTERPRETING else 0.5, torch.float16: 0.5}
OF_LAST_PLACE, OF_MAGNITUDES = "units in the last place", "of the terms' magnitudes"


class NarrowErrors(NamedTuple):
    """The largest error of one result for one dtype of the activation, over all shapes."""

    dtype: str
    result: str
    unit: str
    bound: float
    largest: float

    def failure(self) -> str | None:
        """Return how the result misses its bound, or None."""
        if self.largest <= self.bound:
            return None
        return (
            f"multiply_noise of a {self.dtype} activation, {self.result}: error {self.largest:.3g} {self.unit} with a "
            f"bound of {self.bound:.3g}"
        )


def measure_narrow(setting: Setting) -> list[NarrowErrors]:
    """Return the errors of every result for activations of 16 bits; none where parameters are not float32."""
    if setting.dtype != torch.float32:
        return []
    found = []
    for dtype in ROUNDING:
        largest: dict[tuple[str, str], float] = {}
        for shape in SHAPES.values():
            for result, unit, error in _errors(setting, dtype, shape):
                largest[result, unit] = max(largest.get((result, unit), 0.0), error)
        found += [
            NarrowErrors(dtype_name(dtype), result, unit, _bound(dtype, unit), error)
            for (result, unit), error in largest.items()
        ]
    return found


def _bound(dtype: torch.dtype, unit: str) -> float:
    if unit == OF_MAGNITUDES:
        return BOUNDS["gradient of log drawn θ"].float32
    # A unit in the last place is at least half of the dtype's precision of the value.
    return ROUNDING[dtype] + BOUNDS["drawn factor"].float32 / (0.5 * torch.finfo(dtype).eps)


def _errors(setting: Setting, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[tuple[str, str, float]]:
    points = torch.from_numpy(over_domain(sobol(2, STRUCTURES))).to(setting.device)
    mu, log_sigma = points.unbind(1)
    generator = torch.Generator().manual_seed(SEED)
    x, upstream = (torch.randn(shape, generator=generator).to(setting.device, dtype) for _ in range(2))
    leaves = [part.clone().requires_grad_() for part in (x, mu, log_sigma)]
    out = bmrs_kernels.multiply_noise(*leaves, seed=SEED, backend=setting.backend)
    results = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    along = (1, STRUCTURES, *(1 for _ in shape[2:]))
    uniform = bmrs_kernels.philox_uniform(SEED, shape, device=setting.device)
    true = reference.log_noise(
        mu.double().view(along), log_sigma.double().view(along), uniform, LOWER, UPPER, with_gradients=True
    )
    theta = true.value.exp()
    for name, got, factor in (("value", results[0], x), ("d/dx", results[1], upstream)):
        yield name, OF_LAST_PLACE, _in_last_place(got, factor.double() * theta)
    weight = upstream.double() * x.double() * theta
    others = [axis for axis in range(len(shape)) if axis != 1]
    for name, got, slope in (
        ("d/dμ", results[2], true.grad_mu),
        ("d/dlog σ", results[3], true.grad_log_sigma),
    ):
        magnitudes = (weight * slope.abs().clamp(min=1.0)).abs().sum(others)
        error = (got.double() - (weight * slope).sum(others)).abs() / magnitudes
        yield name, OF_MAGNITUDES, _largest(error)


def _in_last_place(got: Tensor, true: Tensor) -> float:
    """Return the largest error in units in the last place of ``got``'s dtype at the true value."""
    finfo = torch.finfo(got.dtype)
    exponent = true.abs().clamp(min=finfo.smallest_normal).log2().floor()
    return _largest((got.double() - true).abs() / (finfo.eps * exponent.exp2()))


def _largest(errors: Tensor) -> float:
    """Return the largest error; one that is not a number is infinitely large."""
    return errors.nan_to_num(nan=float("inf")).max().item()
