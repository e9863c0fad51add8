"""The noise of the fused kernels at uniforms of our choice, which the kernels themselves take from Philox."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.accuracy.contract import LOWER, UPPER
from bmrs_kernels.backend import INTERPRETING
from bmrs_kernels.multiplicative_noise import device_noise

# An interpreted program takes tens of milliseconds, whatever its size.
BLOCK = 4096 if INTERPRETING else 64


@triton.jit
def log_noise_kernel(
    mu_ptr,
    log_sigma_ptr,
    uniform_ptr,
    out_ptr,
    num_draws,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write log θ and its derivatives in μ and log σ, out [3, draws]; a program owns BLOCK draws."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < num_draws
    mu = tl.load(mu_ptr + index, mask=valid, other=0.0)
    log_sigma = tl.load(log_sigma_ptr + index, mask=valid, other=0.0)
    posterior = device_noise.posterior_constants(mu, log_sigma, LOWER, UPPER)
    uniform = tl.load(uniform_ptr + index, mask=valid, other=0.5)
    noise = device_noise.tile_log_noise(uniform, posterior, LOWER, UPPER, EXACT, True)
    for part in tl.static_range(3):
        tl.store(out_ptr + part * num_draws + index, noise[part], mask=valid)


def log_noise(mu: Tensor, log_sigma: Tensor, uniform: Tensor) -> Tensor:
    """Return log θ and its derivatives in μ and log σ, shape (3, draws), in the dtype of μ, float32 or float64.

    Args:
        mu: location μ, shape (draws,).
        log_sigma: log σ, like ``mu``.
        uniform: uniforms in (0, 1), like ``mu``.
    """
    out = torch.full((3, len(mu)), math.nan, dtype=mu.dtype, device=mu.device)
    exact = mu.dtype == torch.float64
    grid = (triton.cdiv(len(mu), BLOCK),)
    log_noise_kernel[grid](mu, log_sigma, uniform, out, len(mu), LOWER, UPPER, exact, BLOCK)
    return out
