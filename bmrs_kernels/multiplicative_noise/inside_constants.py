"""What Triton's and numba's arithmetic of an element takes of a structure in the regime that most structures are in."""

from __future__ import annotations

from typing import Any, NamedTuple


class Inside(NamedTuple):
    """Constants of structures whose mode is inside the interval or not far outside; probabilities are doubled."""

    mu: Any
    sigma: Any
    below: Any  # 2 Φ(α)
    above: Any  # 2 (1 - Φ(β))
    mass: Any  # 2 (Φ(β) - Φ(α))
    lower_density: Any  # φ(α)
    upper_density: Any  # φ(β)
    from_lower: Any  # μ - lower
    from_upper: Any  # μ - upper
