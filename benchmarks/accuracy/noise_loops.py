"""The noise of the compiled loops at uniforms of our choice, which the loops themselves take from Philox."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.contract import LOWER, UPPER
from bmrs_kernels.dispatch.numba_compile import loop
from bmrs_kernels.multiplicative_noise.numba_log_noise import IN_RANGE, NUM_CONSTANTS, structure_constants
from bmrs_kernels.multiplicative_noise.numba_strips import typed_strip_noise


def noise(mu: Tensor, log_sigma: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return θ and the derivatives of log θ for activations of μ's dtype, float32 or float64."""
    results = [torch.empty_like(mu) for _ in range(3)]
    inputs = [part.detach().double().numpy() for part in (mu, log_sigma)]
    noise_loop(*inputs, uniform.numpy(), LOWER, UPPER, *(result.numpy() for result in results))
    return results[0], results[1], results[2]


@loop
def noise_loop(mu, log_sigma, uniform, lower, upper, theta, grad_mu, grad_log_sigma):  # type: ignore[no-untyped-def]
    """Write the noise of strips of one element."""
    row = np.zeros(NUM_CONSTANTS)
    for i in range(mu.size):
        structure_constants(mu[i], log_sigma[i], lower, upper, row)
        strip = (theta[i : i + 1], grad_mu[i : i + 1], grad_log_sigma[i : i + 1])
        typed_strip_noise(uniform[i : i + 1], row, lower, upper, strip, True)
        grad_log_sigma[i] *= row[IN_RANGE]
