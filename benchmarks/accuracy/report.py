"""The accuracy report as Markdown and JSON, and what a change may not make worse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.attack import Attacked
from benchmarks.accuracy.contract import (
    ALLOWED_LOSS,
    DECISION_MARGINS,
    LOG_SIGMA_RANGE,
    LOWER,
    MU_RANGE,
    UPPER,
)
from benchmarks.accuracy.errors import Measured, Setting, Worst, as_record, dtype_name
from benchmarks.accuracy.narrow import NarrowErrors
from benchmarks.environment import one_line
from benchmarks.markdown import table
from benchmarks.records import RESULTS
from bmrs_kernels.dispatch.backend import INTERPRETING

WORST_COLUMNS = ("quantity", "point", "set", "got", "true", "error", "rounding")
ACCURACY_RESULTS = RESULTS / "accuracy"


def regressions(measured: Sequence[Measured], setting: Setting) -> list[str]:
    """Return what is worse than the committed report of the same setting achieved, by more than is allowed.

    Raises:
        FileNotFoundError: there is no committed report of the setting.
    """
    committed = json.loads(committed_report(setting).read_text("utf-8"))["measured"]
    achieved = {(record["quantity"], record["output"]): record["project"] for record in committed}
    found = []
    for one in measured:
        best = achieved.get((one.quantity, one.output))
        if best is None:
            found.append(f"{one.name} is not in the committed report")
            continue
        for figure, title in (("largest", "error"), ("percentile_99", "error of all but 1 % of the points")):
            error, before = getattr(one.project, figure), best[figure]
            if before is not None and error > ALLOWED_LOSS * before:
                found.append(
                    f"{one.name}: {title} {error:.3g}, the committed report achieved {before:.3g}; worst at "
                    f"{one.project.worst[0].point}"
                )
        known = [worst["point"] for worst in best["undetermined"]]
        found += [
            f"{one.name}: error {worst.error:.3g} at {worst.point}, which the inputs do not determine; the committed "
            "report has no such point"
            for worst in one.project.undetermined
            if worst.point not in known
        ]
    return found


def committed_report(setting: Setting) -> Path:
    """Return where the committed report of a setting is, or would be."""
    return ACCURACY_RESULTS / f"{setting}.json"


def as_json(
    measured: Sequence[Measured],
    narrow: Sequence[NarrowErrors],
    attacked: Sequence[Attacked],
    about: dict[str, Any],
) -> str:
    """Return everything as JSON; infinite errors are null."""
    data = {
        "environment": about,
        "measured": [as_record(one) for one in measured],
        "narrow": [one._asdict() for one in narrow],
        "attacked": [one._asdict() for one in attacked],
    }
    return json.dumps(_without_infinities(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_markdown(
    measured: Sequence[Measured],
    narrow: Sequence[NarrowErrors],
    attacked: Sequence[Attacked],
    objections: Sequence[str],
    about: dict[str, Any],
) -> str:
    """Return the report for people."""
    margins = ", ".join(f"{margin:g} in {dtype_name(dtype)}" for dtype, margin in DECISION_MARGINS.items())
    parts = [
        f"# Accuracy: {about['setting']}",
        one_line(about),
        f"μ in [{MU_RANGE[0]:g}, {MU_RANGE[1]:g}], log σ in [{LOG_SIGMA_RANGE[0]:g}, {LOG_SIGMA_RANGE[1]:g}], "
        f"interval [{LOWER:g}, {UPPER:g}]; inputs exact in float32, true values with 150 digits. Errors are relative "
        "to max(1, |true value|), those of the factors (θ, E[θ], SNR) relative to the value; gradients of θ and E[θ] "
        "are those of their logarithms. *Plain*: the paper's formulas evaluated as printed, in the same dtype. A "
        f"decision is wrong if the true one is clear (|ΔF| or |SNR - 1| above {margins}); a NaN decides nothing and "
        "counts as wrong. Points: spread evenly over the domain, near both ends in units of σ, and where formulas "
        "change or a decision does; the plain formulas' shares are of the first alone.",
        "## Objections",
        "\n".join(f"- {objection}" for objection in objections) or "None.",
        "## Errors",
        table(
            (
                *("quantity", "points", "bound", "not finite", "largest", "99 % below", "wrong decisions"),
                *("plain: not finite", "largest finite", "decisions wrong or NaN"),
            ),
            [_row(one) for one in measured],
        ),
        "## Worst points",
        "Rounding: the error that half a unit in the last place of each input would cause by itself, the condition of "
        "the value.",
        table(WORST_COLUMNS, [row for one in measured for row in _worst_rows(one, one.project.worst)]),
    ]
    if any(one.project.undetermined for one in measured):
        parts += [
            "## Where the inputs do not determine the value",
            "Beyond the bound, but by less than rounding the inputs would cause; not counted above.",
            table(
                WORST_COLUMNS, [row for one in measured for row in _worst_rows(one, one.project.undetermined)]
            ),
        ]
    if narrow:
        parts += [
            "## Activations of 16 bits",
            "`multiply_noise` from end to end, with the uniforms that it draws itself, against the float64 reference. "
            "Rounding the result alone makes an error of half a unit in the last place"
            + ("; the interpreter cuts bfloat16 off instead." if INTERPRETING else "."),
            table(
                ("activation", "result", "largest error", "bound", "unit"),
                [
                    (one.dtype, one.result, f"{one.largest:.4g}", f"{one.bound:.4g}", one.unit)
                    for one in narrow
                ],
            ),
        ]
    if attacked:
        parts += [
            "## Attack",
            "Differential evolution for the largest error, and what it found beside the points above.",
            table(
                ("quantity", "points tried", "largest error", "bound", "rounding", "at"),
                [
                    (
                        *(one.name, one.tried, _number(one.error), _number(one.bound)),
                        *(_number(one.input_rounding), ", ".join(f"{value:.9g}" for value in one.point)),
                    )
                    for one in attacked
                ],
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _row(one: Measured) -> tuple[str, ...]:
    project, plain = one.project, one.plain
    return (
        one.name,
        str(one.points),
        _number(one.bound),
        str(project.non_finite),
        _number(project.largest),
        _number(project.percentile_99),
        "" if project.wrong_decisions is None else str(project.wrong_decisions),
        f"{plain.non_finite_share:.1%}",
        _number(plain.largest_finite),
        "" if plain.wrong_share is None else f"{plain.wrong_share:.1%}",
    )


def _worst_rows(one: Measured, points: Sequence[Worst]) -> list[tuple[str, ...]]:
    return [
        (
            one.name,
            ", ".join(f"{coordinate:.9g}" for coordinate in worst.point),
            worst.kind,
            f"{worst.got:.17g}",
            f"{worst.true:.17g}",
            _number(worst.error),
            _number(worst.input_rounding),
        )
        for worst in points
    ]


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _without_infinities(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_infinities(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_infinities(value) for value in data]
    return None if isinstance(data, float) and not abs(data) < float("inf") else data
