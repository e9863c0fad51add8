"""Errors of the project's functions and of the plain formulas against the reference."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.accuracy.contract import BOUNDS, DECISION_MARGIN
from benchmarks.accuracy.points import KINDS, Points
from benchmarks.accuracy.quantities import GRAD_LOG_SIGMA, GRAD_MU, VALUE, Evaluation, Quantity
from benchmarks.accuracy.table import Judged, Values
from bmrs_kernels.backend import INTERPRETING

WORST_POINTS = 3


class Setting(NamedTuple):
    """How the project's functions are run."""

    backend: str
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        """Return a name that serves as a file's."""
        return f"{self.backend}-{dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without the module."""
    return str(dtype).removeprefix("torch.")


class Worst(NamedTuple):
    """One of the points with the largest errors."""

    point: list[float]
    kind: str
    got: float
    true: float
    error: float
    # What moving the inputs by half a unit in their last place does to the value, as an error; None for gradients.
    input_rounding: float | None


class Summary(NamedTuple):
    """Errors of one output over all points, as fractions of the contract's scale."""

    non_finite: int
    largest: float  # a result that is not finite counts as infinitely wrong
    largest_finite: float
    percentile_99: float
    wrong_decisions: int | None  # None where the output decides nothing
    worst: list[Worst]


class Measured(NamedTuple):
    """One output of one quantity, both ways."""

    quantity: str
    output: str
    bound_name: str
    bound: float
    points: int
    project: Summary
    plain: Summary

    @property
    def name(self) -> str:
        """Return what is measured."""
        return f"{self.quantity}: {self.output}"

    def failure(self) -> str | None:
        """Return how the project's function misses the contract, with its worst point, or None."""
        found = self.project
        if found.largest <= self.bound and not found.wrong_decisions:
            return None
        worst = found.worst[0]
        return (
            f"{self.name}: error {found.largest:.3g} with a bound of {self.bound:.3g} ({self.bound_name}), "
            f"{found.wrong_decisions or 0} wrong decisions; worst at {worst.point}: got {worst.got!r}, true "
            f"value {worst.true!r}"
        )


@contextmanager
def few_programs() -> Iterator[None]:
    """Give programs many structures while kernels are interpreted: each takes long, whatever its size."""
    if not INTERPRETING:
        yield
        return
    from bmrs_kernels import device_quadrature

    usual = device_quadrature.STRUCTURES_PER_PROGRAM
    device_quadrature.STRUCTURES_PER_PROGRAM = 1024
    try:
        yield
    finally:
        device_quadrature.STRUCTURES_PER_PROGRAM = usual


def run(evaluate: Evaluation, where: Points, dtype: torch.dtype, device: str) -> NDArray[np.float64]:
    """Return the outputs at the points, shape (outputs, points)."""
    inputs = torch.from_numpy(where).to(device, dtype).unbind(1)
    with warnings.catch_warnings(), few_programs():
        # The interpreter computes in numpy, which warns where another regime's result is taken.
        warnings.simplefilter("ignore", RuntimeWarning)
        outputs = evaluate(*(part.contiguous() for part in inputs))
    return np.stack([output.detach().cpu().double().numpy() for output in outputs])


def errors(got: NDArray[np.float64], true: Values, floor: float) -> NDArray[np.float64]:
    """Return |got - true| / max(floor, |true|) of one output; infinite where the result is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs((got - true.rounded) - true.rest)
        scaled = difference / np.maximum(np.abs(true.rounded), floor)
    scaled = np.where(difference == 0.0, 0.0, scaled)
    return np.where(np.isfinite(got), scaled, np.inf)


def measure(quantity: Quantity, judged: Judged, setting: Setting) -> list[Measured]:
    """Return the errors of every output of a quantity."""
    ways = [
        run(evaluate, judged.points, setting.dtype, setting.device)
        for evaluate in (quantity.project(setting.backend), quantity.plain)
    ]
    measured = []
    for index, output in enumerate(quantity.outputs):
        bound_name = quantity.bound_of(output)
        project, plain = (_summarise(quantity, index, got, judged, setting.dtype) for got in ways)
        bound = BOUNDS[bound_name].of(setting.dtype)
        measured.append(
            Measured(quantity.name, output, bound_name, bound, len(judged.points), project, plain)
        )
    return measured


def error_maps(
    quantity: Quantity, judged: Judged, setting: Setting
) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """Return, for every output, its name and the errors of the project's function and of the plain formulas."""
    maps = []
    project, plain = (
        run(evaluate, judged.points, setting.dtype, setting.device)
        for evaluate in (quantity.project(setting.backend), quantity.plain)
    )
    for index, output in enumerate(quantity.outputs):
        floor = BOUNDS[quantity.bound_of(output)].floor
        true = judged.values[:, index]
        maps.append((output, errors(project[index], true, floor), errors(plain[index], true, floor)))
    return maps


def _summarise(
    quantity: Quantity, index: int, outputs: NDArray[np.float64], judged: Judged, dtype: torch.dtype
) -> Summary:
    output = quantity.outputs[index]
    floor = BOUNDS[quantity.bound_of(output)].floor
    got, true = outputs[index], judged.values[:, index]
    error = errors(got, true, floor)
    finite = np.isfinite(got)
    order = np.argsort(-error, kind="stable")[:WORST_POINTS]
    rounding = _input_rounding(quantity, judged, dtype, floor) if output == VALUE else None
    return Summary(
        non_finite=int((~finite).sum()),
        largest=float(error.max(initial=0.0)),
        largest_finite=float(error[finite].max(initial=0.0)),
        percentile_99=float(np.quantile(error, 0.99, method="higher")) if len(error) else 0.0,
        wrong_decisions=_wrong_decisions(quantity, got, true) if output == VALUE else None,
        worst=[
            Worst(
                point=judged.points[place].tolist(),
                kind=KINDS[judged.kinds[place]],
                got=float(got[place]),
                true=float(true.rounded[place]),
                error=float(error[place]),
                input_rounding=None if rounding is None else float(rounding[place]),
            )
            for place in order
        ],
    )


def _wrong_decisions(quantity: Quantity, got: NDArray[np.float64], true: Values) -> int | None:
    """Count the decisions that differ from the reference's where that is clear; a NaN decides nothing and is wrong."""
    if quantity.decision is None:
        return None
    margin = quantity.decision.margin(true.rounded)
    wrong = (quantity.decision.margin(got) >= 0.0) != (margin >= 0.0)
    return int(((wrong | np.isnan(got)) & (np.abs(margin) > DECISION_MARGIN)).sum())


def _input_rounding(
    quantity: Quantity, judged: Judged, dtype: torch.dtype, floor: float
) -> NDArray[np.float64] | None:
    """Return the error that rounding μ and log σ to ``dtype`` would cause by itself: the value's condition."""
    if GRAD_MU not in quantity.outputs:
        return None
    true = judged.values.rounded
    relative = 0.5 * torch.finfo(dtype).eps
    inputs = judged.points[:, :2].astype(np.float64)
    gradients = true[:, [quantity.outputs.index(output) for output in (GRAD_MU, GRAD_LOG_SIGMA)]]
    change = (np.abs(gradients * inputs) * relative).sum(1)
    value = np.abs(true[:, 0])
    # The gradients of draws are those of log θ.
    return np.asarray(change if quantity.at_uniforms else change / np.maximum(value, floor))


def failures(measured: Sequence[Measured]) -> list[str]:
    """Return how the project's functions miss the contract."""
    return [failure for one in measured if (failure := one.failure()) is not None]


def as_record(measured: Measured) -> dict[str, Any]:
    """Return plain data for JSON."""
    record = measured._asdict()
    for way in ("project", "plain"):
        summary = record[way]._asdict()
        record[way] = summary | {"worst": [worst._asdict() for worst in summary["worst"]]}
    return record
