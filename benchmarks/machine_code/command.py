"""Compile every kernel as it is launched and read the machine code: ``python -m benchmarks machine-code``.

Needs Triton, but no GPU. The exit code is 0, or 1 if --check found something or a kernel did not compile, or 2 if
Triton cannot be used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from benchmarks.machine_code.budget import BUDGET_FILE, Budget, failures
from benchmarks.machine_code.cases import all_cases
from benchmarks.machine_code.compilation import TARGETS
from benchmarks.machine_code.counts import FLOOR_TARGET, CaseCounts, Task, measure_all
from benchmarks.machine_code.report import as_json, as_markdown, environment
from bmrs_kernels.dispatch import backend


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = ArgumentParser(prog="python -m benchmarks machine-code", description=__doc__)
    parser.add_argument(
        "--targets", default=",".join(TARGETS), help="GPUs to compile for, separated by commas"
    )
    parser.add_argument(
        "--cases",
        choices=("gate", "all"),
        default="all",
        help=f"all, or what CI compiles: most for {FLOOR_TARGET}, few for the others",
    )
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument(
        "--output", metavar="DIR", type=str, help="folder for machine_code.md and machine_code.json"
    )
    parser.add_argument(
        "--check", action="store_true", help="fail on spills, narrow accesses and excess instructions"
    )
    parser.add_argument(
        "--update-budget",
        action="store_true",
        help=f"write {BUDGET_FILE.name} from CI's cases, unless they fail otherwise; CI compiles few kernels until the "
        "next one changes",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    if obstacle := why_not():
        print(f"machine-code: {obstacle}", file=sys.stderr)
        return 2
    if options.update_budget:
        return update_budget(options.jobs)
    targets = options.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"--targets must be of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    tasks = selected(targets, gate=options.cases == "gate")
    work = [task for task in tasks if options.only in task.case.name]
    outcome = measure_all(work, options.jobs)
    found = objections(outcome)
    report = (outcome.measurements, found, environment(triton_version()))
    markdown = as_markdown(*report)
    print(markdown)
    if options.output is not None:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "machine_code.md").write_text(markdown)
        (folder / "machine_code.json").write_text(as_json(*report))
    return 1 if outcome.errors or (options.check and found) else 0


def why_not() -> str | None:
    """Return why kernels cannot be compiled here, or None."""
    if not backend.TRITON_IS_INSTALLED:
        return "Triton is not installed"
    return "TRITON_INTERPRET is set, so that nothing is compiled" if backend.INTERPRETING else None


def triton_version() -> str:
    """Return the version of Triton."""
    import triton

    version: str = triton.__version__
    return version


def selected(targets: Sequence[str], *, gate: bool) -> list[Task]:
    """Return the cases to compile for each target; for others than ``FLOOR_TARGET`` the gate looks for spills alone."""
    return [
        Task(case, target, disassemble=not gate or target == FLOOR_TARGET)
        for target in targets
        for case in all_cases()
        if not gate or (case.in_gate if target == FLOOR_TARGET else case.everywhere)
    ]


def objections(outcome: CaseCounts) -> list[str]:
    """Return what CI objects to; instructions count only with the budget's version of Triton."""
    budget = Budget.read()
    if budget.triton != triton_version():
        print(
            f"machine-code: the budget is for Triton {budget.triton}, this is {triton_version()}: "
            "instructions are not checked",
            file=sys.stderr,
        )
    applicable = budget if budget.triton == triton_version() else None
    return outcome.errors + failures(outcome.measurements, applicable)


def update_budget(jobs: int) -> int:
    """Write the budget and return the exit code."""
    outcome = measure_all(selected(TARGETS, gate=True), jobs)
    objections = outcome.errors + failures(outcome.measurements, None)
    for objection in objections:
        print(f"machine-code: {objection}", file=sys.stderr)
    if objections:
        return 1
    before = Budget.read() if BUDGET_FILE.exists() else None
    Budget.of(outcome.measurements, triton_version(), before).write()
    print(f"wrote {BUDGET_FILE}")
    return 0
