"""Numbers that several functions share, each typed here and nowhere else."""

from __future__ import annotations

import math

LN2 = math.log(2.0)
SQRT2 = math.sqrt(2.0)
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

LOWER, UPPER = -20.0, 0.0
"""Default interval [a, b] of log θ, in nats."""

LOG_SIGMA_MIN, LOG_SIGMA_MAX = -20.0, 5.0
"""Range to which log σ is clamped where it is used."""

REDUCED_LOWER, REDUCED_UPPER = -23.0 * LN2, -8.0 * LN2
"""Default interval of the log-uniform reduced prior: what 8-bit arithmetic rounds to 0."""

PRIOR_STD = 1e-6
"""Default standard deviation of the log-normal reduced prior, before truncation."""
