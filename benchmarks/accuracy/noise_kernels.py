"""The noise of the fused kernels at uniforms of our choice, which the kernels themselves take from Philox."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.accuracy.contract import LOWER, UPPER
from bmrs_kernels.dispatch.backend import INTERPRETING
from bmrs_kernels.dispatch.triton_launch import launch
from bmrs_kernels.multiplicative_noise.triton_constants import load_posterior, table_column
from bmrs_kernels.multiplicative_noise.triton_log_noise import tile_log_noise, tile_regimes
from bmrs_kernels.multiplicative_noise.triton_noise import STRUCTURES_PER_CONSTANTS_PROGRAM, constants
from bmrs_kernels.multiplicative_noise.triton_tiles import exponential

# An interpreted program takes tens of milliseconds, whatever its size.
BLOCK = 4096 if INTERPRETING else 64
STRUCTURES_PER_PROGRAM = 4096 if INTERPRETING else STRUCTURES_PER_CONSTANTS_PROGRAM


@triton.jit
def noise_kernel(
    table_ptr,
    uniform_ptr,
    out_ptr,
    num_draws,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write θ and the derivatives of log θ in μ and log σ, out [3, draws]; a program owns BLOCK draws.

    Each draw is of a structure of its own, whose constants are in the table.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < num_draws
    structure = tl.where(valid, index, 0)
    posterior = load_posterior(table_column(table_ptr, structure, EXACT))
    uniform = tl.load(uniform_ptr + index, mask=valid, other=0.5)
    x, grad_mu, grad_log_sigma = tile_log_noise(
        uniform, posterior, tile_regimes(posterior), table_ptr, structure, LOWER, UPPER, EXACT, True
    )
    tl.store(out_ptr + index, exponential(x, EXACT), mask=valid)
    tl.store(out_ptr + num_draws + index, grad_mu, mask=valid)
    tl.store(out_ptr + 2 * num_draws + index, grad_log_sigma, mask=valid)


def noise(mu: Tensor, log_sigma: Tensor, uniform: Tensor) -> Tensor:
    """Return θ and the derivatives of log θ in μ and log σ, shape (3, draws), in μ's dtype, float32 or float64.

    Args:
        mu: location μ, shape (draws,).
        log_sigma: log σ, like ``mu``.
        uniform: uniforms in (0, 1), like ``mu``.
    """
    out = torch.full((3, len(mu)), math.nan, dtype=mu.dtype, device=mu.device)
    exact = mu.dtype == torch.float64
    launch(
        noise_kernel,
        (triton.cdiv(len(mu), BLOCK),),
        constants(mu, log_sigma, LOWER, UPPER, structures_per_program=STRUCTURES_PER_PROGRAM),
        uniform,
        out,
        len(mu),
        LOWER=LOWER,
        UPPER=UPPER,
        EXACT=exact,
        BLOCK=BLOCK,
    )
    return out
