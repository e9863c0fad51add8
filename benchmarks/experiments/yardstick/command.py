"""Measure the recipe where others have been measured: ``python -m benchmarks yardstick --data-dir DIR --output DIR``.

LeNet-5 of Caffe (20-50-800-500) and LeNet-300-100 on MNIST: trained, then at each temperature posteriors learned,
pruned, compacted and fine-tuned. Each finished network is written down at once, and the same command, started again,
goes on with the others. The exit code is 2 if nothing could be started.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

import bmrs
from benchmarks.environment import environment
from benchmarks.experiments import paper_table
from benchmarks.experiments.deadline import Deadline, OutOfTimeError
from benchmarks.experiments.yardstick import networks
from benchmarks.experiments.yardstick.networks import Name
from benchmarks.experiments.yardstick.table import DEFAULTS, RUNS
from benchmarks.options import positive
from bmrs.data import Batch, DataError, Dataset, Split, TensorSplit, load_dataset
from bmrs.data.augmentation import augment
from bmrs.files.atomic import write_atomically
from bmrs.training import ConfigError, RunError, TrainConfig
from bmrs.training.evaluation import accuracy
from bmrs.training.fit import fit, fitting_state

CPU = torch.device("cpu")

BATCH, RATE, PRICE_EXPONENT = 128, DEFAULTS["fine_tune_lr"], 0.5
VALIDATION = 1 / 12
"""Share of the training images that is left out of training, for choosing settings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    options = _parsed(arguments)
    torch.set_num_threads(1)
    about = environment(options.commit)
    deadline = Deadline(time.time() + 60 * options.minutes)
    path = options.output / RUNS
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for seed, name in itertools.product(options.seeds, options.networks):
            runs = Runs(name, seed, options, deadline)
            for setting in itertools.product(
                options.temperatures, options.noise_lrs, options.weight_lrs, options.distillations
            ):
                if runs.key(*setting) in map(_key, paper_table.load(path)):
                    continue
                row = {**runs.row(*setting), "environment": about}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                print(_outcome(row), file=sys.stderr, flush=True)
    except OutOfTimeError:
        print("time is up; the same command goes on", file=sys.stderr)
    except (ConfigError, DataError, RunError, OSError) as error:
        print(f"yardstick: {error}", file=sys.stderr)
        return 2
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks yardstick", description=__doc__)
    names = get_args(Name)
    parser.add_argument("--networks", nargs="+", choices=names, default=list(names), help="(both)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="(0)")
    parser.add_argument(
        "--temperatures", nargs="+", type=float, default=[10.0, 30.0, 100.0, 300.0], help="(10 30 100 300)"
    )
    parser.add_argument(
        "--noise-lrs",
        nargs="+",
        type=float,
        default=[0.05],
        help="learning rates of the noise; a smaller one takes as many more steps, which weights can use (0.05)",
    )
    parser.add_argument(
        "--weight-lrs",
        nargs="+",
        type=float,
        default=[0.0],
        help="learning rates of the weights while the noise learns; 0 freezes them (0)",
    )
    parser.add_argument(
        "--distillations",
        nargs="+",
        type=float,
        default=[0.0],
        help="weights, from 0 to 1, of the trained network's softened answers in fine-tuning (0)",
    )
    parser.add_argument(
        "--fine-tune-lr", type=float, default=RATE, help="learning rate of fine-tuning (%(default)s)"
    )
    parser.add_argument(
        "--moves",
        type=int,
        choices=range(5),
        default=0,
        help="pixels that images of fine-tuning are moved by at most, each at random (%(default)s)",
    )
    parser.add_argument("--epochs", type=positive, default=10, help="of training (%(default)s)")
    parser.add_argument("--fine-tune-epochs", type=positive, default=20, help="(%(default)s)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with a folder mnist, official files",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help=f"folder for {RUNS} and networks"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit (none)")
    parser.add_argument("--commit", help="what is run, where git cannot tell")
    return parser.parse_args(arguments)


class Runs:
    """All runs of one network and seed, which start from the same trained network."""

    def __init__(self, name: Name, seed: int, options: argparse.Namespace, deadline: Deadline) -> None:
        self.name, self.seed, self.options, self.deadline = name, seed, options, deadline

    @functools.cached_property
    def data(self) -> Dataset:
        """MNIST at its own size, with the mean and standard deviation of its pixels taken out."""
        folder = self.options.data_dir / "mnist"
        data = load_dataset("mnist", folder, validation_fraction=VALIDATION, seed=self.seed)
        train, validation, test = (_whole(split) for split in (data.train, data.validation, data.test))
        return Dataset(data.name, data.num_classes, train, validation, test, image_size=28)

    def config(self, **options: Any) -> TrainConfig:
        """Return what `bmrs train` would be told, for learning rate, batches and seed, and for other options."""
        return TrainConfig(
            data="mnist",
            data_dir=str(self.options.data_dir / "mnist"),
            seed=self.seed,
            device="cpu",
            batch_size=BATCH,
            **{"lr": RATE, **options},
        ).resolved()

    @functools.cached_property
    def trained(self) -> nn.Sequential:
        """The dense network, trained once and kept."""
        path = self.options.output / f"{self.name}-{self.seed}-{self.options.epochs}.safetensors"
        torch.manual_seed(self.seed)
        network = networks.build(self.name)
        if path.exists():
            network.load_state_dict(load_file(path))
            return network
        network = self._fitted(network, self.options.epochs, self.config())
        write_atomically(path, serialize(network.state_dict()))
        return network

    def settings(
        self, temperature: float, noise_lr: float, weight_lr: float, distillation: float
    ) -> dict[str, Any]:
        """Return what tells a run from the others."""
        return {
            "network": self.name,
            "seed": self.seed,
            "temperature": temperature,
            "noise_lr": noise_lr,
            "weight_lr": weight_lr,
            "distillation": distillation,
            "epochs": self.options.epochs,
            "fine_tune_epochs": self.options.fine_tune_epochs,
            "fine_tune_lr": self.options.fine_tune_lr,
            "moves": self.options.moves,
        }

    def key(self, temperature: float, noise_lr: float, weight_lr: float, distillation: float) -> str:
        """Return the same as a text."""
        return _key(self.settings(temperature, noise_lr, weight_lr, distillation))

    def row(
        self, temperature: float, noise_lr: float, weight_lr: float, distillation: float
    ) -> dict[str, Any]:
        """Prune at a temperature and fine-tune; nothing is chosen by the result."""
        started = time.perf_counter()
        config = self.config(lr=self.options.fine_tune_lr, distillation=distillation)
        noisy = networks.with_noise(self.trained)
        prices = networks.prices(self.name, self.trained, noisy, exponent=PRICE_EXPONENT)
        torch.manual_seed(self.seed)
        report = bmrs.learn_posteriors(
            noisy,
            Shuffled(self.data.train, self.deadline),
            _loss,
            temperature=temperature,
            dataset_size=len(self.data.train),
            learning_rate=noise_lr,
            prices=prices,
            weight_lr=weight_lr or None,
        )
        row = {
            **self.settings(temperature, noise_lr, weight_lr, distillation),
            "trained_error": self._error(self.trained),
            "noise_steps": report.steps,
            "settled": report.settled,
            "emptied": len(report.emptied),
        }
        if report.emptied:
            return row
        bmrs.prune(noisy, bmrs.BMRSOdds())
        small = bmrs.compact(noisy, self.data.train.examples(2), expected_noise=False)
        assert isinstance(small, nn.Sequential), "a chain stays one"
        small = networks.without_unread_features(small)
        pruned_error = self._error(small)
        teacher = copy.deepcopy(self.trained).eval() if distillation else None
        small = self._fitted(
            small, self.options.fine_tune_epochs, config, moves=self.options.moves, teacher=teacher
        )
        widths = networks.architecture(small)
        return {
            **row,
            "widths": widths,
            **networks.takes(self.name, widths)._asdict(),
            "pruned_error": pruned_error,
            "error": self._error(small),
            "validation_error": round(100 * (1 - accuracy(small, self.data.validation)), 3),
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _fitted(
        self,
        network: nn.Sequential,
        epochs: int,
        config: TrainConfig,
        *,
        moves: int = 0,
        teacher: nn.Module | None = None,
    ) -> nn.Sequential:
        data = (
            replace(self.data, train=_moved(self.data.train, moves, seed=self.seed)) if moves else self.data
        )
        fit(
            fitting_state(network, config, CPU),
            data,
            config,
            epochs=epochs,
            phase="fit",
            save=lambda state: None,
            progress=self.deadline,
            teacher=teacher,
        )
        return network.eval()

    def _error(self, network: nn.Module) -> float:
        return round(100 * (1 - accuracy(network, self.data.test)), 3)


def _whole(split: Split) -> TensorSplit:
    images, labels = next(split.in_order(len(split)))
    return TensorSplit((images / 255 - 0.1307) / 0.3081, labels)


def _moved(split: Split, most: int, *, seed: int) -> TensorSplit:
    """Return images that are elsewhere each time they are looked at, by so many pixels at most."""
    assert isinstance(split, TensorSplit), "MNIST is held in memory"
    black = split.images.min()
    generator = torch.Generator().manual_seed(seed)

    def move(images: Tensor) -> Tensor:
        return augment(images - black, padding=most, flip=False, generator=generator) + black

    return TensorSplit(split.images, split.labels, move)


class Shuffled:
    """The training images in batches, in a new order each time they are gone through."""

    def __init__(self, split: Split, deadline: Deadline) -> None:
        self.split, self.deadline = split, deadline

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.split.batches(torch.randperm(len(self.split)).split(BATCH)):
            self.deadline.check()
            yield batch


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.images), batch.labels)


def _key(row: paper_table.Row) -> str:
    row = {**DEFAULTS, **row}
    names = (
        "network",
        "seed",
        "temperature",
        "noise_lr",
        "weight_lr",
        "distillation",
        "epochs",
        "fine_tune_epochs",
        *DEFAULTS,
    )
    return json.dumps([row[name] for name in names])


def _outcome(row: dict[str, Any]) -> str:
    what = f"{row['network']} seed {row['seed']}, T = {row['temperature']:g}, weights {row['weight_lr']:g}"
    what += f" and noise {row['noise_lr']:g}, teacher {row['distillation']:g}"
    if row["emptied"]:
        return f"{what}: nothing left of {row['emptied']} layers"
    widths = "-".join(map(str, row["widths"]))
    return f"{what}: {widths}, {row['parameters']:,}, error {row['error']:.2f}% ({row['trained_error']:.2f}%)"


if __name__ == "__main__":
    sys.exit(main())
