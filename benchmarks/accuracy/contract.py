"""The numerics contract: the domain, what counts as an error, and the one table of bounds, the same everywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch

LOWER, UPPER = -20.0, 0.0
# How far μ may lie outside the interval, and where log σ is clamped.
MU_RANGE = (LOWER - 20.0, UPPER + 20.0)
LOG_SIGMA_RANGE = (-20.0, 5.0)
# Uniforms go down to this from either end.
SMALLEST_UNIFORM = 2.0**-24

# A prune decision may differ from the reference's only where ΔF (in nats) or SNR - 1 is smaller than this.
DECISION_MARGINS = {torch.float32: 1e-5, torch.float64: 1e-11}

# A change may not make an error larger than what the committed report achieved, times this.
ALLOWED_LOSS = 2.0


class Bound(NamedTuple):
    """A bound on |got - true| / max(floor, |true|), by dtype of the parameters."""

    float32: float
    float64: float
    floor: float = 1.0

    def of(self, dtype: torch.dtype) -> float:
        """Return the bound for parameters of this dtype."""
        return {torch.float32: self.float32, torch.float64: self.float64}[dtype]


# Rounding to float32 takes 6e-8. Where a gradient is divided by its value, both have been rounded.
ROUNDED = 1.2e-7
# What multiply_noise draws is float32 arithmetic all the way: log θ up to 20 in magnitude costs 2.3e-6 alone.
DRAWN = 5e-6

BOUNDS = {
    "log evidence": Bound(ROUNDED, 1e-12),  # KL, ΔF
    "gradient of KL": Bound(ROUNDED, 1e-12),
    "gradient of ΔF": Bound(ROUNDED, 1e-12),
    "factor": Bound(ROUNDED, 1e-12, floor=0.0),  # E[θ], SNR, θ of sample_noise
    "gradient of log E[θ]": Bound(ROUNDED, 1e-12),
    # Their σ-free scale is 1: a shift of μ, or of σ's share in log θ, by one unit.
    "gradient of log θ": Bound(ROUNDED, 1e-12),
    "drawn factor": Bound(DRAWN, 1e-12, floor=0.0),  # θ of multiply_noise
    "gradient of log drawn θ": Bound(DRAWN, 1e-12),
}
