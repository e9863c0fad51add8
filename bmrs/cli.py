"""The `bmrs` command: `bmrs train`, `bmrs evaluate RUN` and `bmrs --version`."""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from rich.console import Console

import bmrs_kernels
from bmrs import processes
from bmrs.checks import one_line, shown
from bmrs.data import DataError
from bmrs.training import (
    CollapseError,
    ConfigError,
    InterruptedRunError,
    NonFiniteError,
    RunError,
    TrainConfig,
    evaluate,
    resume,
    train,
)
from bmrs.training.config import check_text, expected_value, flag
from bmrs.training.options_file import check_yaml
from bmrs.training.run_folder import RunFolder
from bmrs.training.torchrun import joined, other_launcher

_NEGATIVE_NUMBER = re.compile(r"-(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?|-\.?inf", re.IGNORECASE)

_LONGEST_LINE = 1000
_OPTIONS = tuple(field.name for field in fields(TrainConfig))
_TRAIN_HELP = """\
Train a network, learn which of its structures it needs, prune, compact and fine-tune it, save, reload and check it, and
measure what was gained; beside it, in as many epochs, what one would do instead: the dense network, the same widths
from scratch, structures chosen at random. Without options: LeNet-5 on a subset of Fashion-MNIST that comes with bmrs.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code. 0: done. 1: training met a NaN, an infinity or a collapse. 2: an option, the data or the run
        folder is bad, or memory does not suffice. 130: interrupted. Where torchrun started several processes they all
        have the code of the first one that failed, which alone says why.
    """
    with joined() as team:
        code, line = _outcome(argv)
        if line:
            code, says_why = team.failure(code)
            if says_why:
                print(line, file=sys.stderr)
    return code


def _outcome(argv: list[str] | None) -> tuple[int, str]:
    """Run the command line, and return the exit code and in one line what went wrong, if anything."""
    console = Console()
    try:
        # Without defaults, so that what was given can be compared with a run to resume.
        arguments = _parser().parse_args(_with_numbers_joined(sys.argv[1:] if argv is None else argv), defaults=False)
        if arguments.subcommand == "train":
            _train(arguments.train, console)
        else:
            processes.of_first(lambda: _evaluate(arguments.evaluate, console))
    except _UsageError as error:
        return _failure(error.args[0], code=2)
    except SystemExit as exit:  # the parser has written its help
        return exit.code if isinstance(exit.code, int) else 0, ""
    except (ConfigError, DataError, RunError, OSError) as error:
        return _failure(error, code=2)
    except NonFiniteError as error:
        advice = "The checkpoint of the last good epoch is kept; a lower --lr may help"
        return _failure(f"{error}. {advice}", code=1)
    except (CollapseError, processes.LostProcessError) as error:
        return _failure(error, code=1)
    except InterruptedRunError as interruption:
        return _failure(interruption, code=130)
    except KeyboardInterrupt:
        return _failure("interrupted", code=130)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _failure(f"out of memory; a smaller --batch-size or --hidden may fit: {error}", code=2)
    return 0, ""


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch has no type of its own for it.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _with_numbers_joined(argv: Sequence[str]) -> list[str]:
    """Return arguments with negative numbers joined to their options, as argparse takes -1e-3 for an option."""
    joined: list[str] = []
    for argument in argv:
        option = joined[-1] if joined else ""
        if _NEGATIVE_NUMBER.fullmatch(argument) and option.startswith("--") and "=" not in option:
            joined[-1] = f"{option}={argument}"
        else:
            joined.append(argument)
    return joined


def _train(options: Namespace, console: Console) -> None:
    given = {field.name: options[field.name] for field in fields(TrainConfig) if field.name in options}
    output = options.get("output")
    note = other_launcher()
    if note is not None:
        console.print(note, soft_wrap=True)
    for name in ("output", "resume"):
        if options.get(name) is not None:
            check_text(flag(name), options[name])
    if "resume" not in options:
        train(TrainConfig(**given), output=None if output is None else Path(output), console=console)
        return
    if output is not None:
        raise ConfigError("--output does not go with --resume, which continues in the run's folder")
    _, config = processes.of_first(lambda: RunFolder.open(Path(options.resume)))
    for name, saved in config.to_dict().items():
        if given.get(name, saved) != saved:
            raise ConfigError(f"{flag(name)} is {given[name]}, but the run to resume has {saved}")
    resume(Path(options.resume), console=console)


def _evaluate(options: Namespace, console: Console) -> None:
    for name, value in options.items():
        check_text("RUN" if name == "run" else flag(name), value)
    evaluate(
        Path(options.run),
        data_dir=options.get("data_dir"),
        device=options.get("device"),
        console=console,
    )


class _UsageError(SystemExit):
    """An argument is bad; what the parser raises must not pass for one of its own errors."""


class _Parser(ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(message.split())
        named = re.match(r'Parser key "(\w+)": (.*)$', line)
        if named and named[1] in _OPTIONS:
            name, reason = named.groups()
            bad_value = re.match(r".*(?:Given|Got) value: ?(.*)$", reason)
            got = f", got {shown(bad_value[1])}" if bad_value else f": {one_line(reason)}"
            line = f"{flag(name)} must be {expected_value(name)}{got}"
        raise _UsageError(line)


class _OptionsFile(ActionConfigFile):
    """The option that names a file with options, which is checked before it is parsed."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = Path(values)
        check_text("--config", values)
        if not path.is_file():
            raise ConfigError(f"--config {one_line(values)}: no such file")
        check_yaml(path, (*_OPTIONS, "output"))
        super().__call__(parser, cfg, values, option_string)


class _ShowVersions(argparse.Action):
    """The option that prints versions and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(_versions())
        parser.exit()


def _versions() -> str:
    """Return the versions of bmrs and of what its results depend on, read from what is installed."""
    lines = [f"bmrs {bmrs_kernels.__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "numba", "triton"):
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)


def _parser() -> ArgumentParser:
    parser = _Parser(prog="bmrs", description="Threshold-free Bayesian structured pruning.")
    parser.add_argument(
        "--version",
        action=_ShowVersions,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the versions of bmrs, Python and the libraries",
    )
    commands = parser.add_subcommands(metavar="{train,evaluate}")

    training = _Parser(description=_TRAIN_HELP)
    training.add_argument(
        "--config", action=_OptionsFile, help="YAML or JSON file with options, as in a run's folder"
    )
    hints = get_type_hints(TrainConfig)
    for option in fields(TrainConfig):
        training.add_argument(
            flag(option.name),
            type=hints[option.name],
            default=option.default,
            help=option.metadata["help"],
        )
    training.add_argument(
        "--output",
        type=str,
        help="run folder, empty or not there yet; default: a fresh numbered one in runs/",
    )
    training.add_argument(
        "--resume", type=str, help="folder of an interrupted run to continue, with its options"
    )
    commands.add_subcommand("train", training, help="train, prune, compact and measure a network")

    evaluation = _Parser(description="Reload a finished run's networks and measure them again.")
    evaluation.add_argument("run", type=str, help="the run's folder")
    evaluation.add_argument("--data-dir", type=str, help="folder of the data, if they have moved")
    evaluation.add_argument("--device", type=str, help="where to measure; default: the run's --device")
    commands.add_subcommand("evaluate", evaluation, help="reload a run's networks and measure them again")
    return parser


def _failure(message: object, *, code: int) -> tuple[int, str]:
    line = one_line(message, limit=_LONGEST_LINE)
    encoding = sys.stderr.encoding or "utf-8"
    line = line.encode(encoding, "backslashreplace").decode(encoding)  # whatever a terminal can show
    return code, f"bmrs: {line}" if code == 130 else f"bmrs: error: {line}"
