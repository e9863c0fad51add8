"""The pruning statistics in compiled CPU loops: those of the four functions, one after the other."""

from __future__ import annotations

import functools

from bmrs_kernels.evidence_change import loops as evidence_change
from bmrs_kernels.noise_moments import loops as noise_moments
from bmrs_kernels.pruning_statistics import reference

pruning_statistics = functools.partial(
    reference.pruning_statistics, evidence_change=evidence_change, noise_moments=noise_moments
)
