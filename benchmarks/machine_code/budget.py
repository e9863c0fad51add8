"""What CI demands of the machine code: no spills, wide accesses, and no more instructions than the committed budget."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine_code.cases import WIDEST_ACCESS
from benchmarks.machine_code.counts import FLOOR_TARGET, KernelCounts
from benchmarks.machine_code.source_lines import PACKAGE

BUDGET_FILE = Path(__file__).parent / "budget.json"
MARGIN, SIGNIFICANT_DIGITS = 0.02, 3
# In these kernels a thread holds the constants of every structure that it reads, and with accesses of 16 bytes it would
# spill registers.
NARROWEST_ALLOWED = {"multiply_columns_forward_kernel": 4, "multiply_columns_backward_kernel": 4}


class Budget(NamedTuple):
    """The most instructions per element, by case, then by stage, kernel and path; for one version of Triton.

    Attributes:
        triton: that version.
        instructions: the numbers.
        sources: hash of the kernels that were last compiled and met all demands, and of these numbers.
    """

    triton: str
    instructions: dict[str, dict[str, float]]
    sources: str = ""

    @classmethod
    def read(cls) -> Budget:
        """Return the committed budget."""
        data = json.loads(BUDGET_FILE.read_text())
        return cls(data["triton"], data["instructions_per_element"], data["sources"])

    @classmethod
    def of(cls, measurements: Iterable[KernelCounts], triton: str, before: Budget | None = None) -> Budget:
        """Return the budget that allows these measurements of today's kernels and little more.

        What the one before allows is not raised without need.
        """
        instructions: dict[str, dict[str, float]] = {}
        known = {} if before is None or before.triton != triton else before.instructions
        for measurement in measurements:
            if measurement.target != FLOOR_TARGET:
                continue
            for key, number in _numbers(measurement).items():
                allowed = _rounded_up(number * (1 + MARGIN))
                old = known.get(measurement.case, {}).get(key, 0.0)
                instructions.setdefault(measurement.case, {})[key] = (
                    min(old, allowed) if number <= old else allowed
                )
        return cls(triton, instructions, hash_of_sources(instructions))

    def is_met_already(self, triton: str) -> bool:
        """Return whether nothing has changed since kernels were last compiled, by this version, and met all demands."""
        return (self.triton, self.sources) == (triton, hash_of_sources(self.instructions))

    def write(self) -> None:
        """Replace the committed budget."""
        data = {
            "target": FLOOR_TARGET,
            "triton": self.triton,
            "sources": self.sources,
            "margin": MARGIN,
            "instructions_per_element": self.instructions,
        }
        BUDGET_FILE.write_text(json.dumps(data, indent=1) + "\n")


def hash_of_sources(instructions: Mapping[str, Mapping[str, float]]) -> str:
    """Return a hash of all that machine code and its judgement depend on, beside the compiler."""
    found = hashlib.sha256(json.dumps([MARGIN, instructions]).encode())
    here = Path(__file__).parent
    files = [*PACKAGE.rglob("*.py"), *here.rglob("*.py"), *here.parent.glob("*.py")]
    for file in sorted(files):
        found.update(f"{file.name} {file.stat().st_size}\n".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def failures(measurements: Sequence[KernelCounts], budget: Budget | None) -> list[str]:
    """Return what CI objects to; without a budget, instructions are not counted."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for measurement in measurements:
        objections = _spills(measurement) + _narrow_accesses(measurement)
        if budget is not None and measurement.target == FLOOR_TARGET:
            objections += _excess(measurement, budget)
        for objection in objections:
            title = f"{measurement.stage} {measurement.kernel}"
            cases.setdefault((measurement.target, title, objection), []).append(measurement.case)
    return [
        f"{target}, {title} {objection}, in {'; '.join(names)}"
        for (target, title, objection), names in cases.items()
    ]


def _spills(measurement: KernelCounts) -> list[str]:
    return [f"spills registers ({measurement.spills})"] if measurement.spills else []


def _narrow_accesses(measurement: KernelCounts) -> list[str]:
    if not measurement.needs_wide_access or not measurement.paths:
        return []
    found = []
    for pointer in measurement.activations:
        accesses = [access for access in measurement.accesses if pointer in access.pointer.split(" or ")]
        if not accesses:
            found.append(f"has no access to {pointer} that could be found")
        found += [
            f"has {access.direction}s of {access.pointer} that are {access.bytes} bytes wide"
            for access in accesses
            if access.bytes < NARROWEST_ALLOWED.get(measurement.kernel, WIDEST_ACCESS)
        ]
    return found


def _excess(measurement: KernelCounts, budget: Budget) -> list[str]:
    found = []
    allowed = budget.instructions.get(measurement.case, {})
    for key, number in _numbers(measurement).items():
        path = key.rpartition(": ")[2]
        if key not in allowed:
            found.append(f"is not in the budget with the path {path}")
        elif number > allowed[key]:
            found.append(
                f"takes {number:.4g} instructions per element on the path {path}, budget {allowed[key]:.4g}"
            )
    return found


def _numbers(measurement: KernelCounts) -> dict[str, float]:
    return {
        f"{measurement.stage} {measurement.kernel}: {path.name}": path.per_element
        for path in measurement.paths
    }


def _rounded_up(number: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(number)) + 1 - SIGNIFICANT_DIGITS)
    return float(f"{math.ceil(number / unit) * unit:.{SIGNIFICANT_DIGITS}g}")
