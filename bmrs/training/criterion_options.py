"""The criteria that the options name, with the options that each of them has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from bmrs.checks import one_line
from bmrs.criteria import (
    L2,
    PAPER_TOLERANCE,
    SNR,
    BMRSNormal,
    BMRSOdds,
    BMRSUniform,
    Criterion,
    GradientNorm,
    Mean,
)
from bmrs.noise.layer import NoiseLayer
from bmrs.training.options import ConfigError

CriterionName: TypeAlias = Literal[
    "bmrs-odds", "bmrs-normal", "bmrs-uniform", "snr", "mean", "l2", "gradient-norm"
]

# With the defaults of a run. The tolerance of bmrs-normal is what the paper's own code amounts to, which leaves the 2π
# out of Eq. 8: the exact ΔF of a structure without evidence comes to 0 from below.
_CRITERIA: dict[CriterionName, tuple[type[Criterion], dict[str, float | None]]] = {
    "bmrs-odds": (BMRSOdds, {"p1": 8}),
    "bmrs-normal": (BMRSNormal, {"prior_mean": None, "tolerance": PAPER_TOLERANCE}),
    "bmrs-uniform": (BMRSUniform, {"p1": 8, "tolerance": 0.0}),
    "snr": (SNR, {"threshold": 1.0}),
    "mean": (Mean, {"threshold": 0.1}),
    "l2": (L2, {"ratio": None}),
    "gradient-norm": (GradientNorm, {"ratio": None}),
}


def foreign_options(name: CriterionName) -> dict[str, str]:
    """Return the options that a criterion does not have but others do, each with the names of these."""
    options = dict.fromkeys(option for _, its in _CRITERIA.values() for option in its)
    return {
        option: " or ".join(other for other, (_, its) in _CRITERIA.items() if option in its)
        for option in options
        if option not in _CRITERIA[name][1]
    }


def build_criterion(name: CriterionName, options: Mapping[str, Any]) -> Criterion:
    """Return a criterion with its own options, as given or, where they are None, their defaults.

    Raises:
        ConfigError: an option is missing or out of its range.
    """
    kind, defaults = _CRITERIA[name]
    given = {option: options[option] for option in defaults if options[option] is not None}
    if "ratio" in defaults and not given:
        raise ConfigError(f"--criterion {name} needs --ratio")
    try:
        criterion = kind(**defaults | given)
        if not criterion.needs_producer:
            criterion(NoiseLayer(1))  # some limits are those of the layer's interval
    except ValueError as error:
        raise ConfigError(f"--criterion {name}: {one_line(error)}") from error
    return criterion
