"""Options of the function benchmarks, and where their results go.

The file lies here and not beside the benchmarks, in ``speed``, because pytest learns options only from the folder that
it is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.logger import PytestBenchmarkWarning

from benchmarks import records
from benchmarks.environment import environment
from benchmarks.speed.function_device import device_of
from benchmarks.speed.function_results import join_turns, rates_table, rows_of

ROWS = pytest.StashKey[list[dict[str, Any]]]()
# Values that tell cases apart; the cases that -k leaves out keep their recorded times.
SETTING = ("function", "shape", "dim", "dtype", "granularity")
# pytest-benchmark has more, and --benchmark-columns chooses others.
COLUMNS = ["median", "iqr", "min", "max", "rounds"]


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
    # The project's tests make errors of warnings. Here they say that there is nothing to compare with, or only times of
    # another machine. The filter of this moment is set first, then that of the tests.
    warnings.filterwarnings("default", category=PytestBenchmarkWarning)
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")
    config.stash[ROWS] = []
    config.option.benchmark_columns = config.option.benchmark_columns or COLUMNS


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None, None, None]:
    """Put turns together before pytest-benchmark saves and compares them; record a run in which nothing failed."""
    config = session.config
    benchmarks = config._benchmarksession.benchmarks  # type: ignore[attr-defined]
    join_turns(benchmarks)
    rows = config.stash[ROWS] = rows_of(benchmarks)
    folder = config.getoption("record")
    if folder and rows and exitstatus == pytest.ExitCode.OK:
        about = environment(config.getoption("commit"), device_of(config))
        records.save("functions", rows, about, folder, setting=SETTING)
    yield


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what pytest-benchmark's tables do not say."""
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("rates of the functions")
        terminalreporter.write_line(rates_table(rows))
        if not any(row["large"] for row in rows):
            terminalreporter.write_line("Shapes of more than 8 million elements were left out: --large.")
