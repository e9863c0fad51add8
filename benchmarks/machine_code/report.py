"""The measurements as Markdown and JSON."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.environment import git_commit
from benchmarks.machine_code import sass
from benchmarks.machine_code.counts import FLOOR_TARGET, H100, TYPICAL_PATH, KernelCounts, PathCost
from benchmarks.markdown import table

_SHORT_CLASSES = ("fp32", "fp64", "int", "convert", "special", "load", "store", "spill", "shared", "control")


def environment(triton: str) -> dict[str, str]:
    """Return the versions and the commit that were measured."""
    return {
        "triton": triton,
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def as_json(measurements: Sequence[KernelCounts], failures: Sequence[str], about: dict[str, str]) -> str:
    """Return everything as JSON."""
    data: dict[str, Any] = {
        **about,
        "gpu": H100._asdict() | {"lanes_per_clock": sass.LANES_PER_CLOCK},
        "failures": list(failures),
        "measurements": [
            vars(measurement)
            | {
                "accesses": [vars(access) for access in measurement.accesses],
                "paths": [
                    path._asdict() | {"per_element": path.per_element, "floor_us": path.floor_us}
                    for path in measurement.paths
                ],
            }
            for measurement in measurements
        ],
    }
    return json.dumps(data, indent=1) + "\n"


def as_markdown(measurements: Sequence[KernelCounts], failures: Sequence[str], about: dict[str, str]) -> str:
    """Return tables of everything."""
    lanes = ", ".join(f"{name} {rate}" for name, rate in sass.LANES_PER_CLOCK.items())
    timed = [measurement for measurement in measurements if measurement.target == FLOOR_TARGET]
    lines = [
        "# Machine code of the kernels",
        "",
        f"Triton {about['triton']}, commit {about['commit']}, {about['date']}.",
        "",
        "## Failures",
        "",
        *([f"- {failure}" for failure in failures] or ["None."]),
        "",
        "## Kernels",
        "",
        "Warps: those of a multiprocessor that registers have room for. Accesses: number and bytes of a lane's loads "
        "and stores of what is as large as x, in the code and not per path; others are constants and sums.",
        "",
        table(
            ("target", "case", "kernel", "programs", "registers", "warps", "spills", "shared", "x and alike"),
            (_kernel_row(measurement) for measurement in measurements),
        ),
    ]
    if timed:
        lines += [
            "",
            f"## Paths on {FLOOR_TARGET}",
            "",
            "Instructions of lanes per element of x, or per structure where there is no x, idle lanes included; the "
            "path is what the program's structures need. Lower bounds of the time on an "
            f"{H100.name}: issue, {H100.multiprocessors} multiprocessors × {H100.schedulers} schedulers × one "
            f"instruction of a warp per clock at {H100.clock_hz / 1e9:.3f} GHz; unit, the busiest one of a "
            f"multiprocessor "
            f"at results per clock of {lanes}; memory, every tensor once at {H100.copy_bytes_per_s / 1e12:.1f} "
            "TB/s, what a device copy reaches. Copy: time of the same bytes in a copy over the largest bound, the "
            "share of the copy's rate that the kernel can at most reach.",
            "",
            table(
                (
                    *("case", "kernel", "path", "per element", *_SHORT_CLASSES),
                    *("issue µs", "unit µs", "memory µs", "floor µs", "copy"),
                ),
                (_path_row(measurement, path) for measurement in timed for path in measurement.paths),
            ),
            "",
            f"## Calls on {FLOOR_TARGET}",
            "",
            f'All launches of a call one after the other, each on its path "{TYPICAL_PATH}" if it has one and on its '
            "longest otherwise; without the time between launches. Copy: as above, for the bytes of x and alike.",
            "",
            table(("case", "stage", "launches", "per element", "floor µs", "copy"), _call_rows(timed)),
        ]
    return "\n".join(lines) + "\n"


def _kernel_row(measurement: KernelCounts) -> tuple[str, ...]:
    on_nvidia = measurement.target.startswith("sm_")
    accesses = [
        f"{access.pointer} {access.direction} {access.count}×{access.bytes} B"
        for access in measurement.accesses
        if set(access.pointer.split(" or ")) & set(measurement.activations)
    ]
    return (
        measurement.target,
        measurement.case,
        f"{measurement.stage} {measurement.kernel}",
        str(measurement.programs),
        str(measurement.registers),
        str(measurement.resident_warps) if on_nvidia else "",
        measurement.spills or "none",
        str(measurement.shared_bytes),
        ", ".join(accesses),
    )


def _path_row(measurement: KernelCounts, path: PathCost) -> tuple[str, ...]:
    return (
        measurement.case,
        f"{measurement.stage} {measurement.kernel}",
        path.name,
        _number(path.per_element),
        *(_number(path.instructions[name]) for name in sass.CLASSES),
        _number(path.issue_us),
        f"{_number(path.unit_us)} {path.unit}",
        _number(path.memory_us),
        _number(path.floor_us),
        f"{path.memory_us / path.floor_us:.0%}",
    )


def _call_rows(measurements: Iterable[KernelCounts]) -> Iterable[tuple[str, ...]]:
    for (case, stage), group in itertools.groupby(
        measurements, key=lambda measurement: (measurement.case, measurement.stage)
    ):
        launched = list(group)
        floor = sum(measurement.typical.floor_us for measurement in launched)
        memory = max(measurement.typical.memory_us for measurement in launched)
        yield (
            case,
            stage,
            str(len(launched)),
            _number(sum(measurement.typical.per_element for measurement in launched)),
            _number(floor),
            f"{memory / floor:.0%}",
        )


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}" if value < 100 else f"{value:.0f}"
