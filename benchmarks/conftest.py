"""Options of the function benchmarks, and where their results go.

The file lies here and not beside the benchmarks, in ``speed``, because pytest learns options only from the folder that
it is given.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.environment import environment
from benchmarks.speed.function_results import Measurements, results_table
from benchmarks.tables import records

MEASUREMENTS = pytest.StashKey[Measurements]()
# What tells cases apart: those that -k leaves out keep their earlier times.
SETTING = ("function", "shape", "dim", "dtype", "granularity")


def device_of(config: pytest.Config) -> torch.device:
    """Return where the functions run."""
    name = config.getoption("benchmark_device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("function benchmarks")
    group.addoption(
        "--device", dest="benchmark_device", help='"cpu" or "cuda"; default: the GPU if there is one'
    )
    group.addoption(
        "--large", action="store_true", help="shapes of more than 8 million elements on a CPU too"
    )
    group.addoption(
        "--turn-seconds",
        type=float,
        default=0.15,
        help="how long a competitor runs before the next one's turn; default: %(default)s",
    )
    group.addoption(
        "--record",
        nargs="?",
        type=Path,
        const=records.RESULTS,
        metavar="FOLDER",
        help="if all pass, put the times in place of this machine's earlier ones of the same cases, in "
        "benchmarks/results or FOLDER",
    )
    group.addoption("--commit", help="what is measured, where git cannot tell")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare for the measurements.

    Raises:
        pytest.UsageError: the times of a run without times are to be recorded.
    """
    if config.getoption("record") and config.getoption("benchmark_disable"):
        raise pytest.UsageError("--record needs times, and --benchmark-disable takes none: leave one out")
    config.stash[MEASUREMENTS] = Measurements()
    # One table, below, stands for the many of pytest-benchmark.
    config.option.benchmark_quiet = True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Record the results of a run without failures."""
    folder = session.config.getoption("record")
    rows = session.config.stash[MEASUREMENTS].rows()
    if folder and rows and exitstatus == pytest.ExitCode.OK:
        about = environment(session.config.getoption("commit"), device_of(session.config))
        records.save("functions", rows, about, folder, setting=SETTING)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the results."""
    rows = config.stash[MEASUREMENTS].rows()
    if rows:
        terminalreporter.section("times of the functions")
        terminalreporter.write_line(results_table(rows))
        if not any(row["large"] for row in rows):
            terminalreporter.write_line("Shapes of more than 8 million elements were left out: --large.")
