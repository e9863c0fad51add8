"""Errors of the project's functions and of the plain formulas against the reference."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.accuracy import oracle
from benchmarks.accuracy.contract import BOUNDS, DECISION_MARGINS
from benchmarks.accuracy.points import KINDS, Points
from benchmarks.accuracy.quantities import VALUE, Evaluation, Quantity
from benchmarks.accuracy.table import Judged, Values
from bmrs_kernels.dispatch.backend import INTERPRETING
from bmrs_kernels.options import Backend

WORST_POINTS = 3
# Points beyond a bound are excused where rounding the inputs to float64 causes a larger error, but not many, and not
# large errors. float32 results are computed from the very inputs, and never excused.
MOST_UNDETERMINED, LARGEST_UNDETERMINED = 5, 1e-7


class Setting(NamedTuple):
    """How the project's functions are run."""

    backend: Backend
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        """Return a name of the setting that is good for a file, too."""
        how = "-interpreted" if self.backend == "triton" and INTERPRETING else ""
        where = "" if self.device == "cpu" else f"-{self.device}"
        return f"{self.backend}{how}{where}-{dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


class Worst(NamedTuple):
    """One of the points with the largest errors."""

    point: list[float]
    kind: str
    got: float
    true: float
    error: float
    input_rounding: float


class ErrorSummary(NamedTuple):
    """Errors of one output over all points, as fractions of the contract's scale."""

    non_finite: int
    non_finite_share: float  # among the points spread evenly over the domain, as is the next share
    wrong_share: float | None
    largest: float  # a result that is not finite counts as infinitely wrong
    largest_finite: float
    percentile_99: float
    wrong_decisions: int | None  # None where the output decides nothing
    worst: list[Worst]
    # Points beyond the bound where the inputs do not determine the value; they count nowhere else.
    undetermined: list[Worst]


class Measured(NamedTuple):
    """One output of one quantity, both ways."""

    quantity: str
    output: str
    bound_name: str
    bound: float
    points: int
    project: ErrorSummary
    plain: ErrorSummary

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
            f"{found.wrong_decisions or 0} wrong decisions; at {worst.point}: got {worst.got!r}, true "
            f"value {worst.true!r}"
        )


@contextmanager
def few_programs() -> Iterator[None]:
    """Have few programs with many structures each while kernels are interpreted: a program is slow at any size."""
    if not INTERPRETING:
        yield
        return
    from bmrs_kernels.truncated_normal import triton_quadrature

    usual = triton_quadrature.STRUCTURES_PER_PROGRAM
    triton_quadrature.STRUCTURES_PER_PROGRAM = 1024
    try:
        yield
    finally:
        triton_quadrature.STRUCTURES_PER_PROGRAM = usual


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


def run_both(quantity: Quantity, judged: Judged, setting: Setting) -> list[NDArray[np.float64]]:
    """Return the outputs of the project's function and of the plain formulas."""
    ways = (quantity.project(setting.backend), quantity.plain)
    return [run(evaluate, judged.points, setting.dtype, setting.device) for evaluate in ways]


def measure(quantity: Quantity, judged: Judged, setting: Setting) -> list[Measured]:
    """Return the errors of every output of a quantity."""
    project, plain = run_both(quantity, judged, setting)
    return [
        Measured(
            quantity.name,
            output,
            quantity.bound_of(output),
            BOUNDS[quantity.bound_of(output)].of(setting.dtype),
            len(judged.points),
            _summarise(quantity, index, project[index], judged, setting.dtype, describe_inputs=True),
            _summarise(quantity, index, plain[index], judged, setting.dtype, describe_inputs=False),
        )
        for index, output in enumerate(quantity.outputs)
    ]


def errors_of_both(
    quantity: Quantity, judged: Judged, setting: Setting
) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """Return, for every output, its name and the errors of the project's function and of the plain formulas."""
    project, plain = run_both(quantity, judged, setting)
    found = []
    for index, output in enumerate(quantity.outputs):
        floor = BOUNDS[quantity.bound_of(output)].floor
        true = judged.values.of(index)
        found.append((output, errors(project[index], true, floor), errors(plain[index], true, floor)))
    return found


def input_rounding(quantity: Quantity, index: int, point: Sequence[float], dtype: torch.dtype) -> float:
    """Return the error that rounding the inputs to a dtype makes, with no further error: the output's condition.

    It is the change of the true value when each coordinate moves by half a unit in its last place. A uniform near 1
    moves by as much as one that is as near to 0.
    """
    smallest = torch.finfo(dtype).tiny
    with mp.workdps(oracle.DIGITS):
        true = quantity.reference(*point)[index]
        change = mp.mpf(0)
        for axis, coordinate in enumerate(point):
            moved = [mp.mpf(other) for other in point]
            size = max(min(coordinate, 1.0 - coordinate) if axis == 2 else abs(coordinate), smallest)
            moved[axis] += 2.0 ** math.floor(math.log2(size)) * torch.finfo(dtype).eps / 2
            change += abs(quantity.reference(*moved)[index] - true)
        return float(change / max(abs(true), BOUNDS[quantity.bound_of(quantity.outputs[index])].floor))


def is_undetermined(error: float, rounding: float, dtype: torch.dtype) -> bool:
    """Return whether an error may be that of the inputs, which were rounded to float64."""
    return dtype == torch.float64 and error <= min(rounding, LARGEST_UNDETERMINED)


def _summarise(
    quantity: Quantity,
    index: int,
    got: NDArray[np.float64],
    judged: Judged,
    dtype: torch.dtype,
    *,
    describe_inputs: bool,
) -> ErrorSummary:
    output = quantity.outputs[index]
    contract = BOUNDS[quantity.bound_of(output)]
    true = judged.values.of(index)
    error = errors(got, true, contract.floor)
    finite = np.isfinite(got)
    wrong = _wrong_decisions(quantity, got, true, dtype) if output == VALUE else None

    def describe(place: int) -> Worst:
        point = judged.points[place].tolist()
        return Worst(
            point=point,
            kind=KINDS[judged.kinds[place]],
            got=float(got[place]),
            true=float(true.rounded[place]),
            error=float(error[place]),
            input_rounding=input_rounding(quantity, index, point, dtype) if describe_inputs else math.nan,
        )

    undetermined: dict[int, Worst] = {}
    beyond = np.flatnonzero(error > contract.of(dtype)).tolist()
    if describe_inputs and len(beyond) <= MOST_UNDETERMINED:
        described = [(place, describe(place)) for place in beyond]
        undetermined = {
            place: worst
            for place, worst in described
            if is_undetermined(worst.error, worst.input_rounding, dtype)
        }
    spread = judged.kinds == KINDS.index("domain")
    kept = np.ones(len(error), bool)
    kept[list(undetermined)] = False
    # A wrong decision comes before any error.
    rank = -error if wrong is None else np.where(wrong, -np.inf, -error)
    order = [place for place in np.argsort(rank, kind="stable").tolist() if kept[place]][:WORST_POINTS]
    return ErrorSummary(
        non_finite=int((~finite).sum()),
        non_finite_share=_share(~finite[spread]),
        wrong_share=None if wrong is None else _share(wrong[spread]),
        largest=float(error[kept].max(initial=0.0)),
        largest_finite=float(error[finite & kept].max(initial=0.0)),
        percentile_99=float(np.quantile(error[kept], 0.99, method="higher")) if kept.any() else 0.0,
        wrong_decisions=None if wrong is None else int(wrong.sum()),
        worst=[describe(place) for place in order],
        undetermined=list(undetermined.values()),
    )


def _share(chosen: NDArray[np.bool_]) -> float:
    return float(chosen.mean()) if len(chosen) else 0.0


def _wrong_decisions(
    quantity: Quantity, got: NDArray[np.float64], true: Values, dtype: torch.dtype
) -> NDArray[np.bool_] | None:
    """Return where the reference decides clearly and the result decides otherwise, or is NaN."""
    if quantity.decision is None:
        return None
    margin = quantity.decision.margin(true.rounded)
    wrong = (quantity.decision.margin(got) >= 0.0) != (margin >= 0.0)
    return np.asarray((wrong | np.isnan(got)) & (np.abs(margin) > DECISION_MARGINS[dtype]))


def failures(measured: Sequence[Measured]) -> list[str]:
    """Return how the project's functions miss the contract."""
    return [failure for one in measured if (failure := one.failure()) is not None]


def as_record(measured: Measured) -> dict[str, Any]:
    """Return data for JSON; of the plain formulas without their worst points."""
    record = measured._asdict()
    for way in ("project", "plain"):
        summary = record[way]._asdict()
        for points in ("worst", "undetermined"):
            summary[points] = [worst._asdict() for worst in summary[points]]
        record[way] = summary
    del record["plain"]["worst"], record["plain"]["undetermined"]
    return record
