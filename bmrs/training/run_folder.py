"""The files of a training run: their names, and what is written as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from filelock import FileLock, Timeout

from bmrs.checks import one_line
from bmrs.data import FOLDER
from bmrs.files.atomic import write_atomically
from bmrs.training.config import TrainConfig
from bmrs.training.options_file import read_json

NetworkName: TypeAlias = Literal["trained", "noisy", "fine-tuned", "dense", "random", "scratch"]
"""What a checkpoint is of; a run of the recipe paper has "noisy" and "dense" alone."""


class RunError(Exception):
    """A run cannot be started, continued or evaluated; the message says why and what to do."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of everything that a run leaves behind."""

    path: Path
    root: Path | None = None

    @property
    def to_resume(self) -> Path:
        """The folder that `--resume` takes: of a run of several seeds, the one that holds theirs."""
        return self.root or self.path

    @property
    def config(self) -> Path:
        """The run's options, as JSON; `bmrs train --config` reads it."""
        return self.path / "config.json"

    def checkpoint(self, network: NetworkName) -> Path:
        """Return the path of one network's state of training after its last finished epoch."""
        return self.path / f"{_prefix(network)}checkpoint.safetensors"

    def metrics(self, network: NetworkName) -> Path:
        """Return the path of one network's metrics, one JSON object a line and epoch."""
        return self.path / f"{_prefix(network)}metrics.jsonl"

    def tensorboard(self, network: NetworkName) -> Path:
        """Return the folder of what TensorBoard shows of one network's training."""
        return self.path / "tensorboard" / network

    @property
    def dense(self) -> Path:
        """Weights of the trained dense network."""
        return self.path / "dense.safetensors"

    def network(self, name: str) -> Path:
        """Return the path of a model that `bmrs.load` reads: "compacted", or what recipe bmrs compares it with."""
        return self.path / f"{name}.safetensors"

    @property
    def environment(self) -> Path:
        """What the run was begun with, beside its options."""
        return self.path / "environment.json"

    @property
    def summary(self) -> Path:
        """The numbers of the final table, as JSON."""
        return self.path / "summary.json"

    @property
    def picture(self) -> Path:
        """The picture of the run."""
        return self.path / "picture.png"

    def of_seeds(self, config: TrainConfig) -> Iterator[tuple[int, RunFolder]]:
        """Iterate over the seeds of a run and their folders: this one if there is one seed."""
        for seed in range(config.seed, config.seed + config.seeds):
            yield seed, self if config.seeds == 1 else RunFolder(self.path / f"seed-{seed}", self.path)

    @classmethod
    def create(cls, config: TrainConfig, output: Path | None) -> RunFolder:
        """Make the folder of a new run and write its config.

        Args:
            config: the run's options.
            output: the folder, which must be empty or not exist; None for a fresh numbered one in `runs`.

        Raises:
            RunError: `output` holds something already.
        """
        if output is None:
            name = f"{config.model}-{config.data.removeprefix(FOLDER).rstrip('/').rpartition('/')[2]}"
            path = _fresh_folder(Path("runs"), re.sub(r"[^\w.-]+", "-", name))
        elif output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise RunError(
                f"{output} is not empty: give another --output, or continue its run with --resume {output}"
            )
        else:
            output.mkdir(parents=True, exist_ok=True)
            path = output
        folder = cls(path)
        write_json(folder.config, config.to_dict())
        return folder

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, TrainConfig]:
        """Return the folder of an existing run and its options.

        Raises:
            RunError: there is no run, or its config is broken.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise RunError(f"{path} is no run folder: {folder.config.name} is missing")
        try:
            # Before there were recipes, all runs were of what is now called "paper".
            return folder, TrainConfig(**{"recipe": "paper", **read_json(folder.config)})
        except (ValueError, TypeError) as error:
            raise RunError(f"{folder.config} is broken: {one_line(error)}") from error

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Keep other processes from working in the folder meanwhile.

        Raises:
            RunError: another one is at work there.
        """
        lock, note = FileLock(self.path / ".lock"), self.path / ".process.json"
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise RunError(
                f"{self.path} is in use by {_named(note)}: wait until it has ended, or stop it"
            ) from None
        except NotImplementedError:  # a file system without locks
            yield
            return
        try:
            write_json(note, {"pid": os.getpid(), "host": platform.node()})
            yield
        finally:
            note.unlink(missing_ok=True)
            lock.release()


def _named(note: Path) -> str:
    """Return which process occupies a folder, as far as its note says."""
    try:
        who = read_json(note)
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _prefix(network: NetworkName) -> str:
    return "" if network == "noisy" else f"{network}."


def _fresh_folder(parent: Path, stem: str) -> Path:
    parent.mkdir(exist_ok=True)
    number = 1
    while True:
        path = parent / f"{stem}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
