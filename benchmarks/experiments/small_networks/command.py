"""Train the paper's small networks: ``python -m benchmarks small-networks --data-dir DIR --output DIR``.

Each network is trained with noise once. The finished one is judged by all criteria (post-training pruning), and each
criterion's run with pruning after every epoch (continuous pruning) goes on from where it parts. All of it is kept in
the output folder: the same command, started again, goes on from the last epoch, with "dense" and "snr" from the first.
The exit code is 1 if a run met a NaN or an infinity, and 2 if none could be started.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.environment import environment
from benchmarks.experiments import paper, paper_table
from benchmarks.experiments.deadline import OutOfTimeError
from benchmarks.experiments.paper import Conditions, PaperRun
from benchmarks.experiments.small_networks.drawing import drawn
from benchmarks.experiments.small_networks.formulas import as_printed, pruned_by_snr
from benchmarks.experiments.small_networks.judging import judge
from benchmarks.experiments.small_networks.table import BY_SNR, DRAWN, FORMULAS, JUDGED
from benchmarks.experiments.small_networks.trunk import Subject, Trunk
from benchmarks.granularities import GRANULARITIES
from benchmarks.options import positive
from bmrs.data import DataError, DataName
from bmrs.training import ConfigError, NonFiniteError, RunError
from bmrs.training.settings import PaperNetwork

STAGES = ("dense", "train", "judge", "formulas", "drawn", "continuous", "snr")
NETWORKS = "networks.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    options = _parsed(arguments)
    torch.set_num_threads(1)
    conditions = Conditions(
        options.data_dir,
        "cpu",
        cuda_graph=False,
        epochs=options.epochs,
        fine_tune_epochs=options.fine_tune_epochs,
        deadline=time.time() + 60 * options.minutes,
    )
    about = environment(options.commit)
    failed = False
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for seed, stage, network, data in itertools.product(
            options.seeds, options.stages, options.networks, options.data
        ):
            trunk = Trunk(Subject(data, network, options.granularity, seed), conditions, options.output)
            for name, row in _rows(stage, trunk, options):
                row = {**row, "jobs": 1, "environment": about}
                with (options.output / name).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                failed |= bool(row.get("failure"))
    except OutOfTimeError:
        print("time is up; the same command goes on", file=sys.stderr)
    except (ConfigError, DataError, RunError, OSError) as error:
        print(f"small-networks: {error}", file=sys.stderr)
        return 2
    return int(failed)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks small-networks", description=__doc__)
    add = functools.partial(parser.add_argument, nargs="+")
    add("--data", choices=get_args(DataName), default=["mnist", "fashion-mnist"], help="(both MNISTs)")
    add("--networks", choices=get_args(PaperNetwork), default=["mlp", "lenet5"], help="(both)")
    add(
        "--criteria", choices=paper.CRITERIA, default=list(paper.CRITERIA), help="of continuous pruning (all)"
    )
    add("--stages", choices=STAGES, default=list(STAGES), help="(all)")
    add("--seeds", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--granularity", choices=GRANULARITIES, default="element", help="(%(default)s)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with a folder for each data set")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for checkpoints, networks and rows"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit (none)")
    parser.add_argument("--epochs", type=positive, help="epochs of training (the paper's 50)")
    parser.add_argument("--fine-tune-epochs", type=positive, help="epochs of fine-tuning (the paper's 10)")
    parser.add_argument(
        "--tune-epochs", type=positive, default=2, help="of judged networks, after compaction (%(default)s)"
    )
    parser.add_argument("--commit", help="what is run, where git cannot tell")
    return parser.parse_args(arguments)


def _rows(stage: str, trunk: Trunk, options: argparse.Namespace) -> Any:
    """Do what is left of a stage, and yield the name of the file and the row of each thing done."""
    folder, subject, settings = options.output, trunk.subject, trunk.config.settings._asdict()
    of_runs = paper_table.load(folder / paper_table.RUNS)
    load = functools.partial(
        paper.load_once, subject.data, trunk.config.data_dir, subject.seed, trunk.config.device
    )
    if stage == "dense":
        run = PaperRun(subject.seed, subject.data, subject.network)
        if _is_left(run, trunk.conditions, of_runs):
            row = paper.train_run(run, trunk.conditions)
            if row is None:
                raise OutOfTimeError
            print(paper.outcome(row), file=sys.stderr, flush=True)
            yield paper_table.RUNS, row
    elif stage == "train":
        if not trunk.network.exists():
            yield NETWORKS, _told(subject, lambda: trunk.train(load()))
    elif stage in (files := {"judge": JUDGED, "formulas": FORMULAS, "drawn": DRAWN}):
        done = [_key(row) for row in paper_table.load(folder / files[stage])]
        if not trunk.network.exists() or _key({**subject._asdict(), "settings": settings}) in done:
            return
        if stage == "formulas":
            yield FORMULAS, as_printed(trunk, load())
        elif stage == "drawn":
            row = drawn(trunk, load())
            print(f"drawn {' '.join(map(str, subject))}: {row['accuracy']}", file=sys.stderr, flush=True)
            yield DRAWN, row
        else:
            row = judge(trunk, load(), tune_epochs=options.tune_epochs)
            print(f"judged {' '.join(map(str, subject))}: {row['seconds']} s", file=sys.stderr, flush=True)
            yield JUDGED, row
    elif stage == "snr":
        by_snr = [(_key(row), row["as_computed"]) for row in paper_table.load(folder / BY_SNR)]
        for as_computed in (True, False):
            if (_key({**subject._asdict(), "settings": settings}), as_computed) not in by_snr:
                row = pruned_by_snr(trunk, load(), as_computed=as_computed)
                what = f"{' '.join(map(str, subject))} by SNR, {'as computed' if as_computed else 'right'}"
                print(f"{what}: {row['kept'][-1]}, {row['test_accuracy']}%", file=sys.stderr, flush=True)
                yield BY_SNR, row
    elif stage == "continuous" and trunk.network.exists():
        for criterion in options.criteria:
            run = PaperRun(subject.seed, subject.data, subject.network, subject.granularity, criterion)
            if _is_left(run, trunk.conditions, of_runs):
                row = trunk.continue_with(criterion, load())
                print(paper.outcome(row), file=sys.stderr, flush=True)
                yield paper_table.RUNS, row


def _is_left(run: PaperRun, conditions: Conditions, rows: Sequence[paper.Row]) -> bool:
    return bool(paper.left_of([paper.identity(run, paper.config_of(run, conditions))], rows))


def _key(row: paper.Row) -> str:
    return json.dumps([*(row[name] for name in Subject._fields), paper.with_defaults(row["settings"])])


def _told(subject: Subject, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a training's row, or that of its failure, and say how it ended."""
    try:
        row = {"failure": None, **work()}
        result = f"{row['test_accuracy']:.2%}, {row['seconds']} s"
    except NonFiniteError as error:
        row = {**subject._asdict(), "failure": str(error)}
        result = str(error)
    print(f"{' '.join(map(str, subject))}: {result}", file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
