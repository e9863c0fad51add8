"""What bounds each kernel on this machine's GPU: ``python -m benchmarks profile --output DIR``.

Nsight Compute (ncu) replays one launch of every kernel with hardware counters. Writes DIR/kernel_profile.md, and beside
it kernel_profile.csv with all that was measured. The exit code is 1 if ncu failed, 2 without a usable GPU or ncu.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import processes
from benchmarks.environment import environment, one_line
from benchmarks.gpu.check import why_not
from benchmarks.markdown import table

SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats"),
    *("WarpStateStats", "LaunchStats", "Occupancy"),
)
# Metrics of these sections, the first that a version of ncu has.
DURATION = ("gpu__time_duration.sum",)
BANDWIDTH = ("dram__bytes.sum.per_second",)
SHARE_OF_BANDWIDTH = (
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)
ISSUE_SLOTS = (
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
)
ACTIVE_WARPS = ("sm__warps_active.avg.pct_of_peak_sustained_active",)
REGISTERS = ("launch__registers_per_thread",)
# How many warps wait for a reason while one is issued.
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?!.*_not_issued)(\w+?)_per_issue_active\.ratio")
NUM_STALLS = 3
# To milliseconds and GB/s; versions of ncu abbreviate differently.
UNITS = {
    **dict.fromkeys(("nsecond", "ns"), 1e-6),
    **dict.fromkeys(("usecond", "us"), 1e-3),
    **dict.fromkeys(("msecond", "ms"), 1.0),
    **dict.fromkeys(("byte/second", "byte/s"), 1e-9),
    **dict.fromkeys(("Kbyte/second", "Kbyte/s"), 1e-6),
    **dict.fromkeys(("Mbyte/second", "Mbyte/s"), 1e-3),
    **dict.fromkeys(("Gbyte/second", "Gbyte/s"), 1.0),
    **dict.fromkeys(("Tbyte/second", "Tbyte/s"), 1e3),
}

Launch = tuple[str, str]  # the case and the kernel
NOTE = (
    "One launch each, with empty caches and the clocks as they are. *Of peak* is the share of the memory's bandwidth, "
    "*issue slots* the share of cycles in which a scheduler issues, *warps* the share of those that could be resident, "
    "*stalls* how many warps wait for a reason while one is issued."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks profile", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time in all (default: 8)")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    options = parser.parse_args(arguments)
    program = shutil.which("ncu", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    obstacle = why_not() or (None if program else "ncu (Nsight Compute) is not on the PATH")
    if program is None or obstacle is not None:
        print(f"profile: {obstacle}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        finished = processes.run(
            command(program, log), 60.0 * options.minutes, cwd=processes.ROOT, without=("TRITON_INTERPRET",)
        )
        text = log.read_text("utf-8", errors="replace") if log.exists() else ""
    metrics = parsed(text)
    markdown = "\n\n".join(
        [
            "# Kernels under Nsight Compute",
            one_line(environment(options.commit, "cuda")),
            NOTE,
            as_markdown(metrics, launches(finished.output)),
        ]
    )
    print(markdown)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "kernel_profile.md").write_text(markdown + "\n", "utf-8")
        (options.output / "kernel_profile.csv").write_text(text, "utf-8")
    problems = finished.problems() + ([] if metrics else ["ncu measured nothing"])
    if problems:
        print(f"profile: {'; '.join(problems)}\n{finished.tail()}\n{text[-2000:]}", file=sys.stderr)
    return int(bool(problems))


def command(program: str, log: Path) -> list[str]:
    """Return how ncu is started; it writes its output, and only that, to a file."""
    from benchmarks.gpu.sanitized_cases import package_kernels

    return [
        *(program, "--csv", "--page", "raw", "--log-file", str(log)),
        *(part for section in SECTIONS for part in ("--section", section)),
        # The clocks are the machine's, and the run chooses what is profiled.
        *("--clock-control", "none", "--profile-from-start", "off"),
        *("--kernel-name", f"regex:^({'|'.join(sorted(package_kernels()))})$"),
        *(sys.executable, "-m", "benchmarks.gpu.profiled_cases"),
    ]


def parsed(text: str) -> list[dict[str, str | float]]:
    """Return a dictionary for each launch from ncu's output: times in milliseconds, rates in GB/s, the rest as it is.

    Its CSV has a line of names, one of units, and one for each launch; messages come before.
    """
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.reader(line for line in lines[first:] if line.startswith('"')))
    if len(rows) < 2:
        return []
    names, units, *launched = rows
    return [
        {name: _number(value, unit) for name, unit, value in zip(names, units, values, strict=True)}
        for values in launched
    ]


def _number(text: str, unit: str) -> str | float:
    try:
        return float(text.replace(",", "")) * UNITS.get(unit, 1.0)
    except ValueError:
        return text


def launches(output: str) -> list[Launch]:
    """Return what the profiled program says that it launched, in order."""
    found = (line.partition("\t") for line in output.splitlines() if "\t" in line)
    return [(case, kernel) for case, _, kernel in found]


def as_markdown(metrics: Sequence[Mapping[str, str | float]], launched: Sequence[Launch]) -> str:
    """Return the table of the launches; a case is named if the program launched these kernels in this order."""
    kernels = [str(row["Kernel Name"]) for row in metrics]
    cases = [case for case, _ in launched]
    if [kernel for _, kernel in launched] != kernels:
        cases = ["unknown"] * len(kernels)
    lines = [
        (
            *(case, kernel),
            _rounded(row, DURATION, ".4f"),
            _rounded(row, BANDWIDTH, ".0f"),
            _rounded(row, SHARE_OF_BANDWIDTH, ".0f", " %"),
            _rounded(row, ISSUE_SLOTS, ".0f", " %"),
            _rounded(row, ACTIVE_WARPS, ".0f", " %"),
            _rounded(row, REGISTERS, ".0f"),
            ", ".join(f"{reason} {warps:.1f}" for reason, warps in stalls(row)),
        )
        for case, kernel, row in zip(cases, kernels, metrics, strict=True)
    ]
    columns = ("case", "kernel", "ms", "GB/s", "of peak", "issue slots", "warps", "registers", "stalls")
    return table(columns, lines)


def stalls(row: Mapping[str, str | float]) -> list[tuple[str, float]]:
    """Return the most frequent reasons for which warps wait, and how many do."""
    found = [
        (match[1].replace("_", " "), value)
        for name, value in row.items()
        if (match := STALL.fullmatch(name)) and isinstance(value, float) and match[1] != "selected"
    ]
    return sorted(found, key=lambda each: -each[1])[:NUM_STALLS]


def _rounded(row: Mapping[str, str | float], names: Sequence[str], form: str, unit: str = "") -> str:
    value = next((row[name] for name in names if isinstance(row.get(name), float)), None)
    return "" if value is None else f"{value:{form}}{unit}"


if __name__ == "__main__":
    sys.exit(main())
