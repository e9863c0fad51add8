"""The pruning statistics as one Triton kernel: the twin of ``reference``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bmrs_kernels.device_math import store
from bmrs_kernels.device_quadrature import (
    gauss_legendre,
    launch_structures,
    load_structures,
    program_structures,
)
from bmrs_kernels.evidence_change.kernels import (
    compute_delta_f_lognormal,
    compute_delta_f_loguniform,
    lognormal_options,
    loguniform_options,
)
from bmrs_kernels.noise_moments.kernels import compute_noise_mean, compute_noise_snr
from bmrs_kernels.pruning_statistics.reference import PruningStatistics


def pruning_statistics(
    mu: Tensor,
    log_sigma: Tensor,
    prior_mean: float,
    prior_std: float,
    reduced_lower: float,
    reduced_upper: float,
    lower: float,
    upper: float,
) -> PruningStatistics:
    """Return ΔF for both reduced priors, E[θ] and the signal-to-noise ratio, in one launch."""
    results = PruningStatistics(*(mu.new_empty(mu.shape) for _ in PruningStatistics._fields))
    launch_structures(
        pruning_statistics_kernel,
        mu,
        log_sigma,
        results,
        **lognormal_options(prior_mean, prior_std, lower, upper),
        **loguniform_options(reduced_lower, reduced_upper, lower, upper),
        LOWER=lower,
        UPPER=upper,
    )
    return results


@triton.jit(do_not_specialize=["num_structures"])
def pruning_statistics_kernel(
    mu_ptr,
    log_sigma_ptr,
    delta_f_lognormal_ptr,
    delta_f_loguniform_ptr,
    mean_ptr,
    signal_to_noise_ptr,
    num_structures,
    PRIOR_MEAN: tl.constexpr,
    PRIOR_STD: tl.constexpr,
    PRIOR_ANCHOR: tl.constexpr,
    PRIOR_LOG_GAIN: tl.constexpr,
    REDUCED_LOWER: tl.constexpr,
    REDUCED_UPPER: tl.constexpr,
    LOG_DENSITY_GAIN: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    STRUCTURES: tl.constexpr,
):
    """ΔF = log E_q[p̃(x)/p(x)] for both reduced priors, E[θ] = E_q[exp(x)] and E[θ]/sd(θ).

    Parameters and results have shape [num_structures]; a program computes STRUCTURES of them. The four integrate
    some densities in common, which the compiler does once.
    """
    index, exists = program_structures(num_structures, STRUCTURES)
    mu = load_structures(mu_ptr, index, exists)
    log_sigma = load_structures(log_sigma_ptr, index, exists)
    rule = gauss_legendre()
    lognormal = compute_delta_f_lognormal(
        mu, log_sigma, rule, PRIOR_MEAN, PRIOR_STD, PRIOR_ANCHOR, PRIOR_LOG_GAIN, LOWER, UPPER, False
    )
    loguniform = compute_delta_f_loguniform(
        mu, log_sigma, rule, REDUCED_LOWER, REDUCED_UPPER, LOG_DENSITY_GAIN, LOWER, UPPER, False
    )
    mean = compute_noise_mean(mu, log_sigma, rule, LOWER, UPPER, False)
    signal_to_noise = compute_noise_snr(mu, log_sigma, rule, LOWER, UPPER)
    store(delta_f_lognormal_ptr + index, lognormal.value, exists)
    store(delta_f_loguniform_ptr + index, loguniform.value, exists)
    store(mean_ptr + index, mean.value, exists)
    store(signal_to_noise_ptr + index, signal_to_noise, exists)
