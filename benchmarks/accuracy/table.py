"""The reference's values at the points, kept in ``reference.npz``; ``python -m benchmarks.accuracy.table`` makes it.

A value is kept as a float64 and a float32 whose sum it is: 23 digits, enough to judge float64 results by.
"""

from __future__ import annotations

import functools
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
from numpy.typing import NDArray

from benchmarks import processes
from benchmarks.accuracy import oracle, points
from benchmarks.accuracy.points import KINDS, Points
from benchmarks.accuracy.progress import progress
from benchmarks.accuracy.quantities import QUANTITIES, Quantity

TABLE_FILE = Path(__file__).with_name("reference.npz")
CHUNK = 32


class Values(NamedTuple):
    """True values of a quantity's outputs, shape (points, outputs): the sum of both arrays."""

    rounded: NDArray[np.float64]
    rest: NDArray[np.float32]

    def at(self, points: NDArray[np.bool_]) -> Values:
        """Return the values at the points that a mask chooses."""
        return Values(self.rounded[points], self.rest[points])

    def of(self, output: int) -> Values:
        """Return the values of one output, each of shape (points,)."""
        return Values(self.rounded[:, output], self.rest[:, output])


class Judged(NamedTuple):
    """Points, what each is for, and the true values there."""

    points: Points
    kinds: NDArray[np.uint8]  # indices into KINDS
    values: Values

    def of_kind(self, *kinds: str) -> Judged:
        """Return the points of some kinds."""
        return self.where(np.isin(self.kinds, [KINDS.index(kind) for kind in kinds]))

    def where(self, chosen: NDArray[np.bool_]) -> Judged:
        """Return the points that a mask chooses."""
        return Judged(self.points[chosen], self.kinds[chosen], self.values.at(chosen))


def compute(
    quantity: Quantity, where: Points, pool: Executor | None = None, *, title: str | None = None
) -> Values:
    """Return a quantity's true values at points, computed now; about 5 ms each.

    Args:
        quantity: what is computed.
        where: points, shape (points, 2 or 3).
        pool: processes that compute; None for this process alone.
        title: of a progress bar; None for no bar.
    """
    chunks = [where[start : start + CHUNK].tolist() for start in range(0, len(where), CHUNK)]
    parts = (pool.map if pool else map)(_compute_chunk, [quantity.name] * len(chunks), chunks)
    rounded = [np.empty((0, len(quantity.outputs)))]
    rest = [np.empty((0, len(quantity.outputs)), np.float32)]
    with ExitStack() as stack:
        advance = stack.enter_context(progress(title, len(chunks))) if title else lambda: None
        for part in parts:
            rounded.append(part.rounded)
            rest.append(part.rest)
            advance()
    return Values(np.concatenate(rounded), np.concatenate(rest))


def judged(
    quantity: Quantity, domain_points: int = points.DOMAIN_POINTS, pool: Executor | None = None
) -> Judged:
    """Return the points of a quantity with the true values, most of them from the table.

    Args:
        quantity: what is judged.
        domain_points: size of the set over the domain; what the table does not have is computed now.
        pool: processes to compute with.
    """
    table = _read()
    where, kinds = table[f"{_prefix(quantity)} points"], table[f"{_prefix(quantity)} kinds"]
    name = _reference_name(quantity)
    kept = Judged(where, kinds, Values(table[f"{name} rounded"], table[f"{name} rest"]))
    in_domain_set = kinds == KINDS.index("domain")
    parts = [kept.where(~in_domain_set | (np.cumsum(in_domain_set) <= domain_points))]
    more = points.over_domain(points.sobol(where.shape[1], domain_points))[points.DOMAIN_POINTS :]
    parts += [_judge(quantity, more, "domain", pool), _judge(quantity, points.found(quantity), "found")]
    rounded, rest = zip(*(part.values for part in parts), strict=True)
    return Judged(
        np.concatenate([part.points for part in parts]),
        np.concatenate([part.kinds for part in parts]),
        Values(np.concatenate(rounded), np.concatenate(rest)),
    )


def make(jobs: int) -> None:
    """Write the table anew."""
    arrays: dict[str, NDArray[Any]] = {}
    with processes.workers(jobs) as pool:
        for dimensions, adversarial in ((2, points.adversarial_structures), (3, points.adversarial_draws)):
            sets = [
                points.over_domain(points.sobol(dimensions, points.DOMAIN_POINTS)),
                points.near_ends(points.sobol(dimensions, points.ENDS_POINTS)),
                adversarial(),
            ]
            where = np.concatenate(sets)
            quantities = [quantity for quantity in QUANTITIES if quantity.at_uniforms == (dimensions == 3)]
            arrays[f"{_prefix(quantities[0])} points"] = where
            arrays[f"{_prefix(quantities[0])} kinds"] = np.repeat(
                np.arange(len(sets), dtype=np.uint8), [len(part) for part in sets]
            )
            for name, quantity in {_reference_name(quantity): quantity for quantity in quantities}.items():
                arrays[f"{name} rounded"], arrays[f"{name} rest"] = compute(
                    quantity, where, pool, title=f"reference of {name}"
                )
    np.savez_compressed(TABLE_FILE, **arrays)  # type: ignore[arg-type]


def _judge(quantity: Quantity, where: Points, kind: str, pool: Executor | None = None) -> Judged:
    kinds = np.full(len(where), KINDS.index(kind), np.uint8)
    title = f"reference of {quantity.name}" if pool else None
    return Judged(where, kinds, compute(quantity, where, pool, title=title))


@functools.cache
def _read() -> dict[str, NDArray[Any]]:
    with np.load(TABLE_FILE) as table:
        return dict(table)


def _prefix(quantity: Quantity) -> str:
    return "draws" if quantity.at_uniforms else "structures"


def _reference_name(quantity: Quantity) -> str:
    """Return the first quantity with the same reference: the two functions that draw noise share one."""
    return next(other.name for other in QUANTITIES if other.reference is quantity.reference)


def _compute_chunk(name: str, chunk: list[list[float]]) -> Values:
    quantity = next(quantity for quantity in QUANTITIES if quantity.name == name)
    exact = [list(quantity.reference(*point)) for point in chunk]
    rounded = np.array([[float(value) for value in row] for row in exact])
    with mp.workdps(oracle.DIGITS):
        rest = [
            [float(value - mp.mpf(near)) for value, near in zip(row, nearest, strict=True)]
            for row, nearest in zip(exact, rounded.tolist(), strict=True)
        ]
    return Values(rounded, np.array(rest, np.float32))


if __name__ == "__main__":
    import os

    make(os.cpu_count() or 1)
