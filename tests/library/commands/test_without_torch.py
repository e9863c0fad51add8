"""What is answered without loading torch, and that the packages offer the same names nevertheless."""

import subprocess
import sys

import pytest

import bmrs
import bmrs.training
import bmrs_kernels.options
from bmrs import names
from bmrs.models import NETWORKS

ANSWERED = """
import contextlib, io, sys
import bmrs, bmrs.training
from bmrs.__main__ import main
from bmrs.cli import main

for command, code in {commands}.items():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as text:
        assert main(command.split()) == code, command
    assert len(text.getvalue().splitlines()) == (code != 0), text.getvalue()
    assert not {{"torch", "numpy", "bmrs_kernels"}} & sys.modules.keys(), command
import bmrs_kernels, torch
print(torch.ops.bmrs_kernels.noise_mean.default)
print(bmrs.criteria.Criterion.__name__, bmrs.schedules.__name__, bmrs.compact.__name__)
"""
COMMANDS = ("train", "evaluate", "export", "compare", "curve")
ERRORS = (
    "",
    "prune",
    "evaluate",
    "train --colour red",
    "train --lr fast",
    "train --epochs -1",
    "train --model resnet19",
    "train --data mnist",
    "train --criterion l2 --p1 4",
    "train --config nowhere.yaml",
    "export run --format zip",
    "curve run --points 1",
)


def test_help_versions_and_bad_options_need_no_torch(tmp_path):
    """In one process, in which `bmrs_kernels` is then asked for operators, as saved programs ask."""
    commands = dict.fromkeys(["--help", "--version", *(f"{name} --help" for name in COMMANDS)], 0)
    code = ANSWERED.format(commands=commands | dict.fromkeys(ERRORS, 2))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "bmrs_kernels.noise_mean.default\nCriterion bmrs.schedules compact\n"


@pytest.mark.parametrize("package", [bmrs, bmrs.training])
def test_public_names_are_there_though_loaded_when_asked(package):
    starred = {}
    exec(f"from {package.__name__} import *", starred)
    assert set(package.__all__) <= starred.keys()
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is getattr(package.public, name)
        # A module of this name would be returned in its place.
        assert f"{package.__name__}.{name}" not in sys.modules or name in ("compat", "models")
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018
    assert not hasattr(package, "__wrapped__")


def test_names_of_options_are_those_of_what_they_stand_for():
    assert tuple(NETWORKS) == names.NETWORK_NAMES
    assert names.Granularity == bmrs_kernels.options.Granularity
