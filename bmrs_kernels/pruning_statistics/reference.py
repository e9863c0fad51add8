"""The pruning statistics in pure torch: the four references, one after the other."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from bmrs_kernels.evidence_change import reference as evidence_change_reference
from bmrs_kernels.noise_moments import reference as noise_moments_reference


class PruningStatistics(NamedTuple):
    """What the criteria read; each field has the shape and dtype of μ."""

    delta_f_lognormal: Tensor  # in nats
    delta_f_loguniform: Tensor  # in nats
    mean: Tensor  # E[θ]
    signal_to_noise: Tensor  # E[θ]/sd(θ)


def pruning_statistics(
    mu: Tensor,
    log_sigma: Tensor,
    prior_mean: float,
    prior_std: float,
    reduced_lower: float,
    reduced_upper: float,
    lower: float,
    upper: float,
    *,
    evidence_change: ModuleType = evidence_change_reference,
    noise_moments: ModuleType = noise_moments_reference,
) -> PruningStatistics:
    """Return ΔF for both reduced priors, E[θ] and the signal-to-noise ratio, from two modules' functions."""
    parts = (
        evidence_change.delta_f_lognormal(
            mu, log_sigma, prior_mean, prior_std, lower, upper, with_gradients=False
        ).value,
        evidence_change.delta_f_loguniform(
            mu, log_sigma, reduced_lower, reduced_upper, lower, upper, with_gradients=False
        ).value,
        noise_moments.noise_mean(mu, log_sigma, lower, upper, with_gradients=False).value,
        noise_moments.noise_snr(mu, log_sigma, lower, upper),
    )
    return PruningStatistics(*(part.reshape(mu.shape) for part in parts))
