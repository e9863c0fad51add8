"""The criteria that the options name, with the options that each of them has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bmrs.checks import one_line
from bmrs.training.options import ConfigError

if TYPE_CHECKING:
    from bmrs.criteria import Criterion

CriterionName: TypeAlias = Literal[
    "bmrs-odds", "bmrs-normal", "bmrs-uniform", "snr", "mean", "l2", "gradient-norm"
]

_OPTIONS: dict[CriterionName, tuple[str, ...]] = {
    "bmrs-odds": ("p1",),
    "bmrs-normal": ("prior_mean", "tolerance"),
    "bmrs-uniform": ("p1", "tolerance"),
    "snr": ("threshold",),
    "mean": ("threshold",),
    "l2": ("ratio",),
    "gradient-norm": ("ratio",),
}


def foreign_options(name: CriterionName) -> dict[str, str]:
    """Return the options that a criterion does not have but others do, each with the names of these."""
    options = dict.fromkeys(option for its in _OPTIONS.values() for option in its)
    return {
        option: " or ".join(other for other, its in _OPTIONS.items() if option in its)
        for option in options
        if option not in _OPTIONS[name]
    }


def build_criterion(name: CriterionName, options: Mapping[str, Any]) -> Criterion:
    """Return a criterion with its own options, as given or, where they are None, their defaults.

    Raises:
        ConfigError: an option is missing or out of its range.
    """
    given = {option: options[option] for option in _OPTIONS[name] if options[option] is not None}
    if "ratio" in _OPTIONS[name] and not given:
        raise ConfigError(f"--criterion {name} needs --ratio")
    # What options are wrong for other reasons is said without torch.
    from bmrs import criteria
    from bmrs.noise.layer import NoiseLayer

    # The tolerance of bmrs-normal is what the paper's own code amounts to, which leaves the 2π out of Eq. 8: the exact
    # ΔF of a structure without evidence comes to 0 from below.
    kinds: dict[CriterionName, tuple[type[Criterion], dict[str, float]]] = {
        "bmrs-odds": (criteria.BMRSOdds, {"p1": 8}),
        "bmrs-normal": (criteria.BMRSNormal, {"tolerance": criteria.PAPER_TOLERANCE}),
        "bmrs-uniform": (criteria.BMRSUniform, {"p1": 8}),
        "snr": (criteria.SNR, {"threshold": 1.0}),
        "mean": (criteria.Mean, {"threshold": 0.1}),
        "l2": (criteria.L2, {}),
        "gradient-norm": (criteria.GradientNorm, {}),
    }
    kind, defaults = kinds[name]
    try:
        criterion = kind(**defaults | given)
        if not criterion.needs_producer:
            # Some limits are those of the layer's interval. torch has nothing to compile for that.
            criterion(NoiseLayer(1, backend="torch"))
    except ValueError as error:
        raise ConfigError(f"--criterion {name}: {one_line(error)}") from error
    return criterion
