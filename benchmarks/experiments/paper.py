"""Repeat the paper's experiment on its small networks: ``python -m benchmarks paper --data-dir DIR --output DIR``.

Each run trains one network with noise, prunes it by one criterion after every epoch and fine-tunes it with noise, with
the paper's settings; one run without noise goes with each seed. Every finished run is written down at once, and the
same command, started again, goes on with the others. On a GPU steps are replayed as CUDA graphs. The exit code is 1 if
a run met a NaN or an infinity, and 2 if none could be started.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import torch

from benchmarks import processes
from benchmarks.environment import environment, one_line
from benchmarks.experiments import paper_table
from benchmarks.experiments.deadline import Deadline, OutOfTimeError
from benchmarks.granularities import GRANULARITIES, distinct
from benchmarks.options import positive
from benchmarks.records import machine_of
from bmrs.data import EMBEDDED, DataError, DataName, Dataset
from bmrs.training import ConfigError, NonFiniteError, RunError, TrainConfig, algorithm1
from bmrs.training.checkpoint import TrainingState
from bmrs.training.devices import device_of
from bmrs.training.evaluation import accuracy
from bmrs.training.run import load
from bmrs.training.settings import PaperNetwork, RecipeSettings
from bmrs_kernels.options import Granularity

# Options of `bmrs train` for each criterion that the paper compares in this experiment.
CRITERIA: dict[str, dict[str, Any]] = {
    "bmrs-n": {"criterion": "bmrs-normal"},
    "bmrs-u-8": {"criterion": "bmrs-uniform", "p1": 8},
    "bmrs-u-4": {"criterion": "bmrs-uniform", "p1": 4},
    "snr": {"criterion": "snr"},
    "mean": {"criterion": "mean"},
}

Row = Mapping[str, Any]
RunT = TypeVar("RunT")
ResultT = TypeVar("ResultT")


class PaperRun(NamedTuple):
    """A training, by what tells it from the others; one without granularity and criterion is without noise."""

    seed: int
    data: DataName
    network: PaperNetwork
    granularity: Granularity | None = None
    criterion: str | None = None


@dataclass(frozen=True)
class Conditions:
    """What all trainings share.

    Attributes:
        data_dir: Folder with a folder of official files for each data set, of its name.
        device: "cpu" or "cuda".
        cuda_graph: Whether steps are replayed as CUDA graphs.
        epochs: Of training; None for the paper's.
        fine_tune_epochs: Likewise, of fine-tuning.
        deadline: In seconds since the epoch; a run that is not done by then is given up.
    """

    data_dir: Path | None
    device: str
    cuda_graph: bool
    epochs: int | None = None
    fine_tune_epochs: int | None = None
    deadline: float = math.inf


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    options = parsed(arguments)
    conditions = Conditions(
        options.data_dir,
        options.device,
        cuda_graph=options.device == "cuda" and not options.eager,
        epochs=options.epochs,
        fine_tune_epochs=options.fine_tune_epochs,
        deadline=time.time() + 60 * options.minutes,
    )
    path = options.output / paper_table.RUNS
    try:
        runs = all_runs(
            options.seeds, options.data, options.networks, options.granularities, options.criteria
        )
        wanted = {identity(run, config_of(run, conditions)): run for run in runs}
        device_of(config_of(runs[0], conditions))  # says what is wrong with it
        about = environment(options.commit, conditions.device)
        rows = paper_table.load(path)
        missing = [wanted[each] for each in left_of(wanted, rows)]
        options.output.mkdir(parents=True, exist_ok=True)
        finished = train_missing(missing, rows, conditions, about, options.jobs)
        with path.open("a", encoding="utf-8") as file:
            for number, row in enumerate(finished, start=1):
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                file.flush()
                rows.append(row)
                print(f"[{number}/{len(missing)}] {outcome(row)}", file=sys.stderr, flush=True)
    except (ConfigError, DataError, RunError, OSError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    left = len(left_of(wanted, rows))
    markdown = f"{one_line(about)}\n\n{paper_table.as_markdown(rows)}\n"
    (options.output / "paper.md").write_text(markdown, "utf-8")
    print(markdown)
    if left:
        print(f"{left} of {len(runs)} runs are left; the same command goes on with them.")
    return int(any(row["failure"] for row in rows))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks paper", description=__doc__)
    add = functools.partial(parser.add_argument, nargs="+")
    add("--data", choices=get_args(DataName), default=["mnist", "fashion-mnist"], help="(both MNISTs)")
    add("--networks", choices=get_args(PaperNetwork), default=["mlp", "lenet5"], help="(both)")
    add(
        "--granularities",
        choices=GRANULARITIES,
        default=["element", "sample"],
        help="(element sample; in an MLP these are one)",
    )
    add("--criteria", choices=CRITERIA, default=list(CRITERIA), help="(all)")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds, from 0 (%(default)s)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with a folder for each data set, of its name, with the official files",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"folder for {paper_table.RUNS} and paper.md; finished runs in it are not repeated; the README's table is "
        "made from benchmarks/results/paper",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="time limit; a run is not started if one of its kind took longer than what is left, and one that is "
        "not done in time is given up; 0 only writes the table (no limit)",
    )
    parser.add_argument("--jobs", type=positive, default=1, help="processes (%(default)s)")
    parser.add_argument("--epochs", type=positive, help="epochs of training (the paper's 50)")
    parser.add_argument("--fine-tune-epochs", type=positive, help="epochs of fine-tuning (the paper's 10)")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best, help="%(default)s")
    parser.add_argument("--commit", help="what is run, where git cannot tell")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs on a GPU")
    return parser.parse_args(arguments)


def all_runs(
    seeds: int,
    data: Iterable[DataName],
    networks: Iterable[PaperNetwork],
    granularities: Iterable[Granularity],
    criteria: Iterable[str],
) -> list[PaperRun]:
    """Return the runs, seed after seed, so that the table is balanced whenever they are stopped."""
    runs = []
    for seed, name, network in itertools.product(range(seeds), data, networks):
        runs.append(PaperRun(seed, name, network))
        chosen = distinct(granularities, of_matrices=network == "mlp")
        runs += [PaperRun(seed, name, network, *each) for each in itertools.product(chosen, criteria)]
    return list(dict.fromkeys(runs))


def config_of(run: PaperRun, conditions: Conditions, **criterion: Any) -> TrainConfig:
    """Return what `bmrs train` would be told for the run.

    Args:
        run: the training.
        conditions: what all trainings share.
        criterion: options of the criterion, in place of those that the run's name stands for.

    Raises:
        ConfigError: A folder of the data is needed.
    """
    folder = None if conditions.data_dir is None or run.data == EMBEDDED else conditions.data_dir / run.data
    return TrainConfig(
        recipe="paper",
        data=run.data,
        data_dir=None if folder is None else str(folder),
        model=run.network,
        granularity=run.granularity,
        epochs=conditions.epochs,
        fine_tune_epochs=conditions.fine_tune_epochs,
        fine_tune_noise=True,
        seed=run.seed,
        device=conditions.device,
        cuda_graph=conditions.cuda_graph,
        **(criterion or CRITERIA.get(run.criterion or "", {})),
    ).resolved()


def identity(run: PaperRun, config: TrainConfig) -> str:
    """Return a text that is the same for the same training, on whatever machine it runs."""
    return json.dumps([*run, config.settings._asdict()])


def left_of(identities: Iterable[str], rows: Iterable[Row]) -> list[str]:
    """Return the identities that no finished run has."""
    done = {
        json.dumps([*(row[name] for name in PaperRun._fields), with_defaults(row["settings"])])
        for row in rows
    }
    return [each for each in identities if each not in done]


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's settings with the defaults of those that there were not yet when it was made."""
    return RecipeSettings(**settings)._asdict()


def train_missing(
    runs: Iterable[PaperRun], rows: Iterable[Row], conditions: Conditions, about: Mapping[str, Any], jobs: int
) -> Iterator[Row]:
    """Train in so many processes, and yield the finished runs' rows as they come.

    Args:
        runs: What is to be run.
        rows: Finished runs; those of the same kind of machine tell how long one takes.
        conditions: What all runs share.
        about: What ``environment.environment`` returned.
        jobs: Number of processes; 1 for this one.
    """
    longest: dict[tuple[Any, ...], float] = {}

    def note(row: Row) -> None:
        longest[kind_of(row)] = max(row["seconds"], longest.get(kind_of(row), 0.0))

    for row in rows:
        if machine_of(row["environment"]) == machine_of(about):
            note(row)

    def fitting() -> Iterator[PaperRun]:
        for run in runs:
            config = config_of(run, conditions)
            settings = config.settings._asdict()
            way = {"cuda_graph": config.cuda_graph, "jobs": jobs}
            kind = kind_of({**run._asdict(), "settings": settings, **way})
            if time.time() + longest.get(kind, 0.0) < conditions.deadline:
                yield run

    for found in in_processes(functools.partial(train_run, conditions=conditions), fitting(), jobs):
        if found is not None:
            finished = {**found, "jobs": jobs, "environment": about}
            note(finished)
            yield finished


def kind_of(row: Row) -> tuple[Any, ...]:
    """Return what decides how long a run takes on one machine."""
    settings = row["settings"]
    epochs = settings["epochs"], settings["fine_tune_epochs"]
    with_noise = row["criterion"] is not None
    return (
        *(row[name] for name in ("data", "network", "granularity", "cuda_graph", "jobs")),
        with_noise,
        epochs,
    )


def in_processes(train: Callable[[RunT], ResultT], runs: Iterator[RunT], jobs: int) -> Iterator[ResultT]:
    """Yield what the runs return, in the order in which they end; a run is taken when a process is free for it."""
    if jobs == 1:
        yield from map(train, runs)
        return
    with processes.workers(jobs) as pool:
        running = {pool.submit(train, run) for run in itertools.islice(runs, jobs)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
            running |= {pool.submit(train, run) for run in itertools.islice(runs, len(done))}


def train_run(run: PaperRun, conditions: Conditions) -> Row | None:
    """Train one network and return its row, None if the deadline came before its end."""
    config = config_of(run, conditions)
    data = load_once(config.data, config.data_dir, config.seed, config.device)
    device = device_of(config)
    started = time.perf_counter()
    state = algorithm1.new_state(config, data, noise=run.criterion is not None, device=device)
    failure = None
    try:
        algorithm1.train(state, data, config, save=lambda state: None, progress=Deadline(conditions.deadline))
    except OutOfTimeError:
        return None
    except NonFiniteError as error:
        failure = str(error)
    seconds = time.perf_counter() - started
    return row_of(run, config, state, data, failure=failure, seconds=seconds)


def row_of(
    run: PaperRun,
    config: TrainConfig,
    state: TrainingState,
    data: Dataset,
    *,
    failure: str | None,
    seconds: float,
) -> dict[str, Any]:
    """Return the row of a training that ended, with the accuracy of the network as it is now."""
    last: Row = state.history[-1] if state.history else {}
    return {
        **run._asdict(),
        "settings": config.settings._asdict(),
        "failure": failure,
        "test_accuracy": None if failure else accuracy(state.model, data.test),
        "compression_percent": last.get("compression_percent"),
        "kept": last.get("kept"),
        "epochs": {
            name: [round(row[name], 5) for row in state.history]
            for name in ("loss", "kl", "validation_accuracy", "compression_percent")
            if name in last
        },
        "cuda_graph": config.cuda_graph,
        "seconds": round(seconds, 2),
    }


@functools.lru_cache(maxsize=1)
def load_once(name: DataName, folder: str | None, seed: int, device: str) -> Dataset:
    """Return the preprocessed images on the device; the runs that follow each other mostly have the same."""
    config = TrainConfig(data=name, data_dir=folder, seed=seed, device=device)
    return load(config, device_of(config))


def outcome(row: Row) -> str:
    """Return a line that says how a run ended."""
    what = [row[name] for name in ("data", "network", "granularity", "criterion") if row[name] is not None]
    result = row["failure"] or f"accuracy {row['test_accuracy']:.2%}"
    if row["compression_percent"] is not None:
        result += f", compression {row['compression_percent']:.1f}%"
    return f"{' '.join(what)} seed {row['seed']}: {result}, {row['seconds']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
