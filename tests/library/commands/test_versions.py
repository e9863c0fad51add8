"""Versions: of the packages, and as the command prints them."""

import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import bmrs
import bmrs_kernels
from bmrs.cli import main
from bmrs_kernels.version import UNKNOWN, installed_version

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.fixture
def nothing_installed(monkeypatch):
    """Make it look as if no distribution were installed."""

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    installed_version.cache_clear()
    monkeypatch.setattr(metadata, "version", missing)
    yield
    installed_version.cache_clear()


def test_both_packages_have_the_version_of_the_distribution():
    stated = re.search(r'^version = "(.*)"$', PYPROJECT.read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert bmrs.__version__ == bmrs_kernels.__version__
    assert bmrs.__version__ in (stated, UNKNOWN)


@pytest.mark.usefixtures("nothing_installed")
def test_a_source_tree_has_an_unknown_version():
    assert bmrs.__version__ == bmrs_kernels.__version__ == "0+unknown"


@pytest.mark.parametrize("package", [bmrs, bmrs_kernels])
def test_other_names_are_missing_as_ever(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_the_command_prints_what_results_depend_on(capsys):
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"bmrs {bmrs.__version__}",
        f"Python {platform.python_version()}",
        f"torch {metadata.version('torch')}",
    ]
    assert [line.split()[0] for line in lines[3:]] == ["numba", "triton"]


@pytest.mark.usefixtures("nothing_installed")
def test_the_command_says_what_is_not_installed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == ["numba is not installed", "triton is not installed"]


def test_the_package_runs_as_the_command():
    command = [sys.executable, "-m", "bmrs", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"bmrs {bmrs.__version__}\n")
    # torch 2.11 says on a machine with CUDA's compiler and no GPU that it found none.
    assert not [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
