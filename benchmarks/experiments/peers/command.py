"""Compare the recipe of `bmrs train` with other ways to small networks: ``python -m benchmarks peers --data-dir DIR``.

For each data set, network and seed all ways start from the same trained network and have the same number of epochs and
the same schedule. Every finished network is written down at once, and the same command, started again, goes on with
the others. The exit code is 1 if a run failed and 2 if none could be started.

With ``--untrained`` no weight is trained after pruning, and no epochs are compared: what each way leaves of LeNet-5 and
the MLP is judged as it is, and refitted to the trained network by `bmrs.compact`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import torch

from benchmarks import processes
from benchmarks.environment import environment
from benchmarks.experiments.deadline import Deadline, OutOfTimeError
from benchmarks.experiments.peers import residual, table
from benchmarks.experiments.peers.chains import ChainComparison, config_of
from benchmarks.experiments.peers.comparison import CPU, Comparison, Row, Subject
from benchmarks.experiments.peers.untrained import UntrainedComparison
from benchmarks.options import positive
from benchmarks.records import RESULTS
from bmrs.data import EMBEDDED, DataError, DataName
from bmrs.training import CollapseError, ConfigError, NonFiniteError
from bmrs.training.run import load
from bmrs.training.settings import PaperNetwork

SEEDS_OF_FULL_SETS = 3
RESIDUAL = "resnet20"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    options = _parsed(arguments)
    try:
        import torch_pruning  # noqa: F401
    except ModuleNotFoundError:
        print("peers: Torch-Pruning is missing: pip install torch-pruning==1.6.1", file=sys.stderr)
        return 2
    if options.untrained:
        options.networks = [name for name in options.networks if name != RESIDUAL]
        options.data = [name for name in options.data if name != "cifar10"]
        if not options.networks or not options.data:
            print(
                "peers: --untrained compares lenet5 and mlp, which are not trained on cifar10",
                file=sys.stderr,
            )
            return 2
    methods = table.UNTRAINED_METHODS if options.untrained else table.METHODS
    if unknown := [method for method in options.methods or () if method not in methods]:
        print(
            f"peers: there is no {', '.join(unknown)} with{'' if options.untrained else 'out'} --untrained",
            file=sys.stderr,
        )
        return 2
    if options.output is None:
        options.output = RESULTS / "peers" / (table.UNTRAINED if options.untrained else table.RUNS)
    subjects = _subjects(options.data, options.networks, options.seeds)
    idle = [n for n in (*options.networks, *options.data) if not any(n in subject for subject in subjects)]
    if idle:
        print(
            f"peers: nothing to train for {', '.join(idle)}: {RESIDUAL} is trained on cifar10 alone, and the other "
            "--networks on all --data but that",
            file=sys.stderr,
        )
    if not subjects:
        return 2
    deadline = Deadline(time.time() + 60 * options.minutes)
    train = functools.partial(_train, options=options, deadline=deadline, about=environment(options.commit))
    if options.jobs == 1:
        failures = [train(subject) for subject in subjects]
    else:
        with processes.workers(options.jobs) as pool:
            failures = list(pool.map(train, subjects))
    for failure in filter(None, failures):
        print(f"peers: {failure}", file=sys.stderr)
    rows = table.load(options.output)
    print(table.untrained(rows) if options.untrained else table.as_markdown(rows))
    return int(any(failures))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__)
    parser.add_argument(
        "--data",
        nargs="+",
        choices=get_args(DataName),
        default=[EMBEDDED, "fashion-mnist", "mnist", "cifar10"],
        help="(the embedded images and the full sets)",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=[*get_args(PaperNetwork), RESIDUAL],
        default=["lenet5", "mlp", RESIDUAL],
        help=f"{RESIDUAL} is trained on cifar10 alone, the others on all but that (all)",
    )
    parser.add_argument(
        "--seeds",
        type=positive,
        default=5,
        help=f"number of seeds, from 0; at most {SEEDS_OF_FULL_SETS} of the full sets (%(default)s)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder with a folder for each data set, of its name, with the official files",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="file that rows are added to; by default the committed one",
    )
    parser.add_argument(
        "--untrained", action="store_true", help="prune and refit, and train nothing after that; chains alone"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=dict.fromkeys([*table.METHODS, *table.UNTRAINED_METHODS]),
        help="ways to a smaller network (all)",
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="time limit (none)")
    parser.add_argument("--jobs", type=positive, default=1, help="processes of one thread (%(default)s)")
    parser.add_argument("--commit", help="what is run, where git cannot tell")
    return parser.parse_args(arguments)


def _subjects(data: Iterable[DataName], networks: Iterable[str], seeds: int) -> list[Subject]:
    """Return the subjects, seed after seed, so that the table is balanced whenever the runs are stopped."""
    return [
        Subject(name, network, seed)
        for seed in range(seeds)
        for network in networks
        for name in data
        if (name == EMBEDDED or seed < SEEDS_OF_FULL_SETS) and (name == "cifar10") == (network == RESIDUAL)
    ]


def _comparison(
    subject: Subject,
    folder: str | None,
    deadline: Deadline,
    methods: Sequence[str] | None,
    *,
    untrained: bool,
) -> Comparison:
    if subject.network == RESIDUAL:
        config = residual.config_of(subject, folder)
        data = residual.first_images(load(config, CPU))
        return residual.ResidualComparison(subject, config, data, deadline, methods)
    config = config_of(subject, folder)
    kind = UntrainedComparison if untrained else ChainComparison
    return kind(subject, config, load(config, CPU), deadline, methods)


def _train(subject: Subject, *, options: argparse.Namespace, deadline: Deadline, about: Row) -> str | None:
    """Train all that a subject lacks; returns what went wrong, None if nothing did or time was up."""
    torch.set_num_threads(1)

    done = [
        row for row in table.load(options.output) if all(row[k] == v for k, v in subject._asdict().items())
    ]
    folder = None if options.data_dir is None else str(options.data_dir / subject.data)
    try:
        deadline.check()
        comparison = _comparison(subject, folder, deadline, options.methods, untrained=options.untrained)
        for row in comparison.rows(done):
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "environment": about}, ensure_ascii=False) + "\n")
            line = f"{subject.data} {subject.network} {subject.seed} {row['size']} {row['method']}"
            reached = row["refitted_accuracy" if options.untrained else "accuracy"]
            print(f"{line}: {reached:.2%}, {row['seconds']} s", file=sys.stderr, flush=True)
    except OutOfTimeError:
        return None
    except (ConfigError, DataError, OSError, NonFiniteError, CollapseError) as error:
        return f"{' '.join(map(str, subject))}: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
