"""A search for the points at which the contract is closest to broken."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import points
from benchmarks.accuracy.contract import BOUNDS, LOG_SIGMA_RANGE, MU_RANGE, SMALLEST_UNIFORM
from benchmarks.accuracy.errors import Measured, Setting, errors, input_rounding, is_undetermined, run
from benchmarks.accuracy.points import Points
from benchmarks.accuracy.progress import progress
from benchmarks.accuracy.quantities import QUANTITIES, Quantity
from benchmarks.accuracy.table import compute

POPULATION_PER_DIMENSION = 16
# Half the side of the box around the worst point that is known, as a share of the domain.
NEIGHBOURHOOD = 1e-3

Chart = Callable[[NDArray[np.float64]], Points]


class Attacked(NamedTuple):
    """The largest error of one output that the search met."""

    quantity: str
    output: str
    bound: float
    tried: int
    error: float
    point: list[float]
    input_rounding: float

    @property
    def breaks_the_contract(self) -> bool:
        """Return whether the error is beyond the bound; the search keeps none that rounding of the inputs explains."""
        return self.error > self.bound

    @property
    def name(self) -> str:
        """Return what was attacked."""
        return f"{self.quantity}: {self.output}"


def attack(
    measured: Sequence[Measured],
    setting: Setting,
    seconds: float,
    pool: Executor | None = None,
    *,
    seed: int = 0,
) -> list[Attacked]:
    """Search for larger errors than those measured, for so many seconds shared by all outputs.

    Every output is attacked by differential evolution on three charts: the domain, the neighbourhood of both ends in
    units of σ, and the neighbourhood of the worst point that is known.

    Args:
        measured: what is attacked, with the worst points so far.
        setting: how the functions are run.
        seconds: time in all.
        pool: processes that compute the reference.
        seed: of the search; another one finds other points.
    """
    quantities = {quantity.name: quantity for quantity in QUANTITIES}
    attacked = []
    deadline = time.monotonic()
    with progress("attack", len(measured)) as advance:
        for one in measured:
            deadline += seconds / len(measured)
            attacked.append(_attack_output(quantities[one.quantity], one, setting, deadline, pool, seed))
            advance()
    return attacked


def keep(attacked: Sequence[Attacked], measured: Sequence[Measured]) -> int:
    """Add the points with larger errors than those measured to the adversarial set; return how many."""
    known = json.loads(points.FOUND_FILE.read_text("utf-8")) if points.FOUND_FILE.exists() else {}
    added = 0
    for one, before in zip(attacked, measured, strict=True):
        kept = known.setdefault(one.quantity, [])
        if one.error > before.project.largest and one.point not in kept:
            kept.append(one.point)
            added += 1
    points.FOUND_FILE.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    return added


def _attack_output(
    quantity: Quantity,
    one: Measured,
    setting: Setting,
    deadline: float,
    pool: Executor | None,
    seed: int,
) -> Attacked:
    from scipy.optimize import differential_evolution

    index = quantity.outputs.index(one.output)
    floor = BOUNDS[one.bound_name].floor
    evaluate = quantity.project(setting.backend)
    dimensions = 3 if quantity.at_uniforms else 2
    best, best_point, tried = 0.0, one.project.worst[0].point, 0

    def error_on(chart: Chart) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
        def negative_error(unit: NDArray[np.float64]) -> NDArray[np.float64]:
            nonlocal best, best_point, tried
            where = chart(unit.T)
            got = run(evaluate, where, setting.dtype, setting.device)[index]
            found = errors(got, compute(quantity, where, pool).of(index), floor)
            tried += len(where)
            # Where the inputs do not determine the value, errors count as 0, or the search would stay there.
            for place in np.flatnonzero(found > one.bound):
                rounding = input_rounding(quantity, index, where[place].tolist(), setting.dtype)
                if is_undetermined(found[place], rounding, setting.dtype):
                    found[place] = 0.0
            largest = int(found.argmax())
            if found[largest] > best:
                best, best_point = float(found[largest]), where[largest].tolist()
            # Not infinite, since the search subtracts.
            return -np.minimum(found, 1e30)

        return negative_error

    charts = (points.over_domain, points.near_ends, _around(one.project.worst[0].point))
    start = time.monotonic()
    for turn, chart in enumerate(charts, start=1):
        until = start + (deadline - start) * turn / len(charts)
        if time.monotonic() > until:
            continue
        differential_evolution(
            error_on(chart),
            [(0.0, 1.0)] * dimensions,
            popsize=POPULATION_PER_DIMENSION,
            init="sobol",
            tol=0.0,
            maxiter=10**6,
            polish=False,
            vectorized=True,
            updating="deferred",
            seed=seed,
            callback=lambda *_, until=until, **__: time.monotonic() > until,
        )
    rounding = input_rounding(quantity, index, best_point, setting.dtype)
    return Attacked(quantity.name, one.output, one.bound, tried, best, best_point, rounding)


def _around(centre: Sequence[float]) -> Chart:
    """Return the map of the unit cube onto a small box around a point, cut off at the domain."""
    limits = np.array([MU_RANGE, LOG_SIGMA_RANGE, (SMALLEST_UNIFORM, 1.0 - SMALLEST_UNIFORM)][: len(centre)])
    reach = NEIGHBOURHOOD * (limits[:, 1] - limits[:, 0])

    def chart(unit: NDArray[np.float64]) -> Points:
        box = np.array(centre) + (2.0 * unit - 1.0) * reach
        return box.clip(limits[:, 0], limits[:, 1]).astype(np.float32)

    return chart
