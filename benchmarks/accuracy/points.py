"""Where accuracy is measured: low-discrepancy sets over the whole domain, and the places where trouble is expected.

Points are (μ, log σ) or (μ, log σ, uniform) and exact in float32, so that float32 functions get them unrounded.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.accuracy.contract import LOG_SIGMA_RANGE, LOWER, MU_RANGE, SMALLEST_UNIFORM, UPPER
from benchmarks.accuracy.quantities import LN2, QUANTITIES, REDUCED_LOWER, Quantity
from bmrs_kernels.truncated_normal import regimes
from bmrs_kernels.truncated_normal.regimes import NEARLY_CONSTANT, WINDOW_EXPONENT

# What a set is for, in the order in which sets lie in the table.
KINDS = ("domain", "ends", "adversarial", "found")
# A power of two: the set over the domain then has one point in every cell of a 64 x 64 map.
DOMAIN_POINTS = 4096
ENDS_POINTS = 2048
# How far the set near the ends reaches from them, in σ.
ENDS_REACH = 15.0

UNIFORMS = (2.0**-24, 1e-5, 1e-3, 0.1, 0.3125, 0.5, 0.6875, 0.9, 1 - 2.0**-10, 1 - 2.0**-17, 1 - 2.0**-24)
LOG_SIGMAS = (-20, -14.5, -10, -7, -5, -3, -1.5, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5)

FOUND_FILE = Path(__file__).with_name("found.json")
Points = NDArray[np.float32]


def single(value: float) -> float:
    """Return the float32 nearest to a number, as a Python float."""
    return float(np.float32(value))


def neighbours(value: float, steps: int = 1) -> list[float]:
    """Return the float32 nearest to a number and so many to either side of it."""
    centre = np.float32(value)
    below = above = centre
    found = [float(centre)]
    for _ in range(steps):
        below, above = np.nextafter(below, np.float32(-np.inf)), np.nextafter(above, np.float32(np.inf))
        found += [float(below), float(above)]
    return found


def in_domain(mu: float, log_sigma: float) -> bool:
    """Return whether the contract covers a posterior."""
    return MU_RANGE[0] <= mu <= MU_RANGE[1] and LOG_SIGMA_RANGE[0] <= log_sigma <= LOG_SIGMA_RANGE[1]


def sobol(dimensions: int, count: int) -> NDArray[np.float64]:
    """Return the first points of the Sobol sequence in the unit cube, shape (count, dimensions)."""
    from scipy.stats import qmc

    # Powers of two keep the sequence balanced; it has no randomness, so that a longer one starts with a shorter one.
    drawn = qmc.Sobol(dimensions, scramble=False).random_base2(math.ceil(math.log2(max(count, 1))))
    return np.asarray(drawn[:count])


def over_domain(unit: NDArray[np.float64]) -> Points:
    """Stretch points of the unit cube over the domain; a third coordinate is the uniform."""
    columns = [_stretch(unit[:, 0], *MU_RANGE), _stretch(unit[:, 1], *LOG_SIGMA_RANGE)]
    if unit.shape[1] == 3:
        columns.append(unit[:, 2])
    return _as_points(columns)


def near_ends(unit: NDArray[np.float64]) -> Points:
    """Stretch points of the unit cube over modes within a few σ of the interval's ends, and uniforms near 0 and 1."""
    log_sigma = _stretch(unit[:, 1], *LOG_SIGMA_RANGE)
    upper = unit[:, 0] < 0.5
    multiple = _stretch((2.0 * unit[:, 0]) % 1.0, -ENDS_REACH, ENDS_REACH)
    mu = np.where(upper, UPPER, LOWER) + multiple * np.exp(log_sigma)
    columns = [mu.clip(*MU_RANGE), log_sigma]
    if unit.shape[1] == 3:
        tail = 2.0 ** -_stretch(np.abs(2.0 * unit[:, 2] - 1.0), 1.0, -math.log2(SMALLEST_UNIFORM))
        columns.append(np.where(unit[:, 2] < 0.5, tail, 1.0 - tail))
    return _as_points(columns)


def grid() -> list[tuple[float, float]]:
    """Return both ends, both far tails, the quantile's borders between regimes, and the whole range of σ."""
    mus = (-40, -30, -22, -20, -19, -12, -10, -5, -1, 0, 2, 10, 20)
    points: set[tuple[float, float]] = set(itertools.product(mus, LOG_SIGMAS))
    multiples = (-40, -13.3, -8, -5, -3, -1, -1e-3, 1e-3, 1, 3, 5, 9)
    for log_sigma, multiple in itertools.product(LOG_SIGMAS, multiples):
        for end, sign in ((UPPER, 1), (LOWER, -1)):
            points.add((single(end + sign * multiple * math.exp(log_sigma)), log_sigma))
    for end, log_sigma in itertools.product((UPPER, LOWER), (-20, -5)):
        points.update((mu, log_sigma) for mu in neighbours(end))
    return sorted((float(mu), float(log_sigma)) for mu, log_sigma in points if in_domain(mu, log_sigma))


def random_points(count: int, seed: int = 0) -> list[tuple[float, float]]:
    """Return random (μ, log σ), uniform over the domain."""
    generator = np.random.default_rng(seed)
    mu = generator.uniform(*MU_RANGE, count).astype(np.float32)
    log_sigma = generator.uniform(*LOG_SIGMA_RANGE, count).astype(np.float32)
    return list(zip(mu.tolist(), log_sigma.tolist(), strict=True))


def regime_borders() -> Iterator[tuple[float, float]]:
    """Yield posteriors to either side of the places where the code changes its formula from one to the other."""
    log_sigmas = np.linspace(*LOG_SIGMA_RANGE, 26)
    for log_sigma, outside in itertools.product(
        log_sigmas, (0.0, regimes.TAIL_START, regimes.REFERENCE_TAIL_START)
    ):
        step = outside * math.exp(single(log_sigma))
        for mu in (*neighbours(UPPER + step), *neighbours(LOWER - step)):
            yield mu, single(log_sigma)
    for log_sigma in (
        *neighbours(math.log(regimes.WIDE_SIGMA)),
        *neighbours(math.log(regimes.NARROW_SPREAD)),
    ):
        for mu in (-40, -25, -20, -15, -10, -5, 0, 5, 20):
            yield mu, log_sigma
    # Outside the interval the spread is σ divided by the distance in σ.
    for log_sigma in log_sigmas:
        distance = math.exp(2.0 * single(log_sigma)) / regimes.NARROW_SPREAD
        for mu in (*neighbours(UPPER + distance), *neighbours(LOWER - distance)):
            yield mu, single(log_sigma)
    # Inside it the logarithm of θ changes by this much over the quadrature's window.
    for log_sigma in neighbours(math.log(NEARLY_CONSTANT / math.sqrt(2.0 * WINDOW_EXPONENT))):
        for mu in (-15, -10, -5):
            yield mu, log_sigma
    for end, log_sigma in itertools.product((REDUCED_LOWER, -8.0 * LN2, -4.0 * LN2), LOG_SIGMAS):
        for mu in neighbours(end):
            yield mu, log_sigma


def decision_borders() -> Iterator[tuple[float, float]]:
    """Yield posteriors to either side of every change of a prune decision along μ."""
    mu = torch.linspace(*MU_RANGE, 1501, dtype=torch.float64)
    for quantity in QUANTITIES:
        if quantity.decision is None:
            continue
        for log_sigma in np.linspace(*LOG_SIGMA_RANGE, 51):
            margin = _margin(quantity, single(log_sigma))
            values = margin(mu)
            for index in np.flatnonzero(np.diff(np.sign(values))):
                crossing = _bisect(margin, float(mu[index]), float(mu[index + 1]))
                yield from ((neighbour, single(log_sigma)) for neighbour in neighbours(crossing, 2))


def adversarial_structures() -> Points:
    """Return (μ, log σ) where trouble is expected."""
    return _unique(itertools.chain(grid(), regime_borders(), decision_borders()))


def adversarial_draws() -> Points:
    """Return (μ, log σ, uniform) where trouble is expected."""
    structures = [*grid()[::4], *list(regime_borders())[::5]]
    return _unique((*structure, y) for structure in structures for y in UNIFORMS)


def found(quantity: Quantity) -> Points:
    """Return the points at which an earlier search found a quantity's largest errors."""
    points = json.loads(FOUND_FILE.read_text()) if FOUND_FILE.exists() else {}
    kept = points.get(quantity.name, [])
    return np.array(kept, np.float32).reshape(-1, 3 if quantity.at_uniforms else 2)


def _margin(quantity: Quantity, log_sigma: float) -> Callable[[torch.Tensor], NDArray[np.float64]]:
    evaluate = quantity.project("torch")
    decision = quantity.decision
    assert decision is not None

    def margin(mu: torch.Tensor) -> NDArray[np.float64]:
        value = evaluate(mu, torch.full_like(mu, log_sigma))[0].numpy()
        return np.asarray(decision.margin(value))

    return margin


def _bisect(margin: Callable[[torch.Tensor], NDArray[np.float64]], low: float, high: float) -> float:
    from scipy.optimize import brentq

    root = brentq(lambda mu: float(margin(torch.tensor([mu], dtype=torch.float64))[0]), low, high, xtol=1e-12)
    return float(root)


def _stretch(unit: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * unit


def _as_points(columns: list[NDArray[np.float64]]) -> Points:
    points = np.stack(columns, axis=1).astype(np.float32)
    if points.shape[1] == 3:
        points[:, 2] = points[:, 2].clip(SMALLEST_UNIFORM, 1.0 - SMALLEST_UNIFORM)
    return points


def _unique(points: Iterable[tuple[float, ...]]) -> Points:
    kept = {tuple(map(single, point)) for point in points}
    return np.array(sorted(point for point in kept if in_domain(point[0], point[1])), np.float32)
