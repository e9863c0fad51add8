"""The `bmrs` command: `bmrs train`, `bmrs evaluate RUN`, the commands of `bmrs.runs`, and `bmrs --version`.

What needs torch is imported once the options are known to be right.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console

from bmrs.checks import one_line, shown
from bmrs.runs import COMMANDS
from bmrs.terminal import Output, any_encoding
from bmrs.training.config import TrainConfig
from bmrs.training.interruption import InterruptedRunError
from bmrs.training.options import ConfigError, check_text, flag, in_words, words_of
from bmrs.training.options_file import check_yaml
from bmrs.training.torchrun import Team, joined, other_launcher

_NEGATIVE_NUMBER = re.compile(r"-(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?|-\.?inf", re.IGNORECASE)

_LONGEST_LINE = 1000
_HINTS = get_type_hints(TrainConfig)
_OPTIONS = tuple(_HINTS)
_EXAMPLES = """\
examples:
  bmrs train                                              the whole of it on images that come with bmrs, a minute or two
  bmrs train --temperature 30                             more goes
  bmrs train --data mnist --data-dir ~/mnist --seeds 5    the official files, means of five seeds
  bmrs train --data folder:photos --model resnet18 --weights resnet18.safetensors --new-classifier true
                                                          your own images and weights
  bmrs train --data cifar10 --data-dir ~/cifar10 --model resnet20 --target-flops 0.5
                                                          half of the FLOPs, whatever the evidence says
  bmrs train --model mlp --print-config                   all options with their values, for --config
  bmrs train --resume runs/lenet5-fashion-mnist-subset-1  go on with what was interrupted
"""
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
    with any_encoding(), joined() as team:
        code, line = _outcome(argv, team)
        if line:
            code, says_why = team.failure(code)
            if says_why:
                print(line, file=sys.stderr)
    return code


def _outcome(argv: list[str] | None, team: Team) -> tuple[int, str]:
    """Run the command line, and return the exit code and in one line what went wrong, if anything."""
    console = Output(highlight=False)
    try:
        # Without defaults, so that what was given can be compared with a run to resume.
        arguments = _parser().parse_args(
            _with_numbers_joined(sys.argv[1:] if argv is None else argv), defaults=False
        )
        if arguments.subcommand == "train":
            _train(arguments.train, console)
            return 0, ""
        if arguments.subcommand in COMMANDS:
            act = COMMANDS[arguments.subcommand].action(arguments[arguments.subcommand])
        else:
            act = _evaluation(arguments.evaluate)
        from bmrs import processes

        processes.of_first(lambda: act(console))
    except _Answered:
        return 0, ""
    except _UsageError as error:
        return _failure(error.args[0], code=2)
    except SystemExit as exit:
        return _failure(f"code of a network or of data has ended the program: {exit!r}", code=2)
    except InterruptedRunError as interruption:
        return _failure(interruption, code=130)
    except KeyboardInterrupt:
        return _failure("interrupted", code=130)
    except Exception as error:
        if team.interrupted:
            return _failure("interrupted", code=130)
        outcome = _outcome_of(error)
        if outcome is None:
            raise
        return outcome
    return 0, ""


def _outcome_of(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and the line for an error; None for one that nobody expects."""
    if isinstance(error, ConfigError | OSError | ImportError):
        return _failure(error, code=2)
    import torch

    from bmrs import processes, training
    from bmrs.data import DataError

    if isinstance(error, DataError | training.RunError):
        return _failure(error, code=2)
    if isinstance(error, training.NonFiniteError):
        advice = "start a new run with a lower --lr, or --noise-lr if the noise was learning"
        return _failure(f"{error}. The checkpoint of the last good epoch is kept; {advice}", code=1)
    if isinstance(error, training.CollapseError | processes.LostProcessError):
        return _failure(error, code=1)
    # On a CPU torch has no type of its own for it.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return _failure(f"out of memory; a smaller --batch-size or --hidden may fit: {error}", code=2)
    return None


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
    output, run = options.get("output"), options.get("resume")
    note = other_launcher()
    if note is not None:
        console.print(note, soft_wrap=True)
    for name in ("output", "resume"):
        if options.get(name) is not None:
            check_text(flag(name), options[name])
    if run is None:
        config = TrainConfig(**given)
    else:
        if output is not None:
            raise ConfigError("--output does not go with --resume, which continues in the run's folder")
        from bmrs import processes
        from bmrs.training.run_folder import RunFolder

        _, config = processes.of_first(lambda: RunFolder.open(Path(run)))
        for name, saved in config.to_dict().items():
            if name != "data_dir" and given.get(name, saved) != saved:
                raise ConfigError(
                    f"{flag(name)} is {shown(given[name])}, but the run to resume has {shown(saved)}"
                )
    if options.get("print_config"):
        print(yaml.safe_dump(config.resolved().to_dict(), sort_keys=False, allow_unicode=True), end="")
        return
    from bmrs import training

    if run is None:
        training.train(config, output=None if output is None else Path(output).expanduser(), console=console)
    else:
        training.resume(Path(run), data_dir=given.get("data_dir"), console=console)


def _evaluation(options: Namespace) -> Callable[[Console], None]:
    for name, value in options.items():
        if isinstance(value, str):
            check_text("RUN" if name == "run" else flag(name), value)

    def evaluate(console: Console) -> None:
        from bmrs import training

        training.evaluate(
            Path(options.run),
            data_dir=options.get("data_dir"),
            device=options.get("device"),
            energy=bool(options.get("energy")),
            console=console,
        )

    return evaluate


class _UsageError(SystemExit):
    """An argument is bad; what the parser raises must not pass for one of its own errors."""


class _Answered(SystemExit):
    """The parser has written what was asked for, such as help."""


class _Parser(ArgumentParser):
    """A parser that reports an error in one line."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _Answered(status, message)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(message.split())
        named = re.match(r'Parser key "(\w+)": (.*)$', line)
        kind = named and (_HINTS.get(named[1]) or _number_in(named[2]))
        if named and kind:
            name, reason = named.groups()
            bad_value = re.match(r".*(?:Given|Got) value: ?(.*)$", reason)
            got = f", got {shown(bad_value[1])}" if bad_value else f": {one_line(reason)}"
            line = f"{flag(name)} must be {in_words(kind)}{got}"
        if re.fullmatch(r"the following arguments are required: \w+\.runs?", line):
            line = "RUN is missing: give the folder of a run"
        lacking = re.fullmatch(r"argument --([\w-]+): expected one argument", line)
        if lacking and (name := lacking[1].replace("-", "_")) in _OPTIONS:
            line = f"{flag(name)} must be {in_words(_HINTS[name])}, got nothing"
        unknown = re.match(r"[Uu]nrecognized arguments: (--[\w-]+)", line)
        if unknown and (near := get_close_matches(unknown[1], map(flag, _OPTIONS), n=1)):
            line += f"; did you mean {near[0]}?"
        raise _UsageError(line)


def _number_in(reason: str) -> type | None:
    """Return the type of number that the parser's words say was expected, None if they speak of another one."""
    return next((kind for kind in (int, float) if f"Expected a {kind}" in reason), None)


class _Help(DefaultHelpFormatter):
    """Help texts as they are written: they state defaults where these do not depend on other options."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help or ""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


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
        sys.stdout.write(f"{_versions()}\n")  # at once, as whoever reads a pipe may take one line
        parser.exit()


def _versions() -> str:
    """Return the versions of bmrs and of what its results depend on, read from what is installed."""
    bmrs, *others = map(_version, ("bmrs-kernels", "torch", "numba", "triton"))
    return "\n".join([bmrs.replace("bmrs-kernels", "bmrs"), f"Python {platform.python_version()}", *others])


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return f"{distribution} is not installed"


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="bmrs",
        description="Threshold-free Bayesian structured pruning.",
        formatter_class=_Help,  # of the commands' parsers too
    )
    parser.add_argument(
        "--version",
        action=_ShowVersions,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the versions of bmrs, Python and the libraries",
    )
    commands = parser.add_subcommands(metavar=f"{{{','.join(('train', 'evaluate', *COMMANDS))}}}")

    training = _Parser(description=_TRAIN_HELP, epilog=_EXAMPLES, print_config=None)
    training.add_argument(
        "--config",
        action=_OptionsFile,
        metavar="FILE",
        help="YAML or JSON file with options, as in a run's folder",
    )
    training.add_argument(
        "--print-config", action="store_true", help="print all options with their values as YAML, and end"
    )
    training.add_argument(
        "--output",
        type=str,
        metavar="DIR",
        help="run folder, empty or not there yet; default: a fresh numbered one in runs/",
    )
    training.add_argument(
        "--resume",
        type=str,
        metavar="RUN",
        help="folder of an interrupted run to continue, with its options; --data-dir may say where its data are now",
    )
    groups: dict[str, Any] = {}
    for option in fields(TrainConfig):
        group = option.metadata["group"]
        if group not in groups:
            groups[group] = training.add_argument_group(group)
        words = words_of(_HINTS[option.name])
        choices = f"{{{','.join(words)}}}" if words else None
        groups[group].add_argument(
            flag(option.name),
            type=_HINTS[option.name],
            default=option.default,
            metavar=option.metadata["metavar"] or choices,
            help=option.metadata["help"],
        )
    commands.add_subcommand("train", training, help="train, prune, compact and measure a network")

    evaluation = _Parser(description="Reload a finished run's networks and measure them again.")
    evaluation.add_argument("run", type=str, metavar="RUN", help="the run's folder")
    evaluation.add_argument(
        "--data-dir", type=str, metavar="DIR", help="folder of the data, if they have moved"
    )
    evaluation.add_argument(
        "--device", type=str, metavar="DEVICE", help="where to measure; default: the run's --device"
    )
    evaluation.add_argument(
        "--energy",
        action="store_true",
        help="measure the energy of 1,000 images too, and keep it in summary.json; needs codecarbon",
    )
    commands.add_subcommand("evaluate", evaluation, help="reload a run's networks and measure them again")
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, command.parser(_Parser), help=command.HELP)
    return parser


def _failure(message: object, *, code: int) -> tuple[int, str]:
    line = one_line(message, limit=_LONGEST_LINE)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    line = line.encode(encoding, "backslashreplace").decode(encoding)  # whatever a terminal can show
    return code, f"bmrs: {line}" if code == 130 else f"bmrs: error: {line}"
