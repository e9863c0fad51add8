"""Training with noise that nothing prunes, and the continuous runs that branch off it.

Until a criterion prunes its first structure, a run that prunes by it is the training without pruning, step for step:
same weights, same batches, same noise. It is trained once, and each criterion's run goes on from where it parts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

from benchmarks.experiments import paper
from benchmarks.experiments.deadline import Deadline
from benchmarks.experiments.paper import Conditions, PaperRun
from bmrs.data import DataName, Dataset
from bmrs.files.atomic import write_atomically
from bmrs.noise.lookup import noise_layers
from bmrs.pruning.prune import prune
from bmrs.pruning.settling import unsettled
from bmrs.training import NonFiniteError, TrainConfig, algorithm1
from bmrs.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from bmrs.training.evaluation import accuracy, compression
from bmrs.training.networks import noisy_network
from bmrs.training.settings import PaperNetwork
from bmrs_kernels.options import Granularity

Row = dict[str, Any]
CPU = torch.device("cpu")


class Subject(NamedTuple):
    """A network that is trained with noise."""

    data: DataName
    network: PaperNetwork
    granularity: Granularity
    seed: int


@dataclass(frozen=True)
class Trunk:
    """The training of a subject without pruning, in a folder of its own.

    Attributes:
        subject: What is trained.
        conditions: What all trainings share.
        output: Folder of all subjects' folders.
    """

    subject: Subject
    conditions: Conditions
    output: Path

    @property
    def config(self) -> TrainConfig:
        """Options of the training: E[θ] is never below 0, so that nothing is pruned."""
        return paper.config_of(self._run(None), self.conditions, criterion="mean", threshold=0.0)

    @property
    def folder(self) -> Path:
        """Where checkpoints and the finished network are."""
        settings = self.config.settings
        epochs = f"{settings.epochs}+{settings.fine_tune_epochs}"
        return self.output / "-".join([*map(str, self.subject), epochs])

    @property
    def network(self) -> Path:
        """The file of the finished network: weights, μ and log σ."""
        return self.folder / "network.safetensors"

    def train(self, data: Dataset) -> Row:
        """Train from the last checkpoint, keep a checkpoint where each criterion's run parts, and return a row.

        Raises:
            NonFiniteError: A NaN or an infinity turned up.
            OutOfTimeError: Time was up; the finished epochs are kept.
        """
        config, path = self.config, self.folder / "trunk.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        state = algorithm1.new_state(config, data, noise=True, device=CPU)
        if path.exists():
            load_checkpoint(path, state, config)

        def save(state: TrainingState) -> None:
            for criterion in paper.CRITERIA:
                self._branch_off(criterion, state, data)
            save_checkpoint(path, state, config)

        trunk_alone = replace(config, fine_tune_epochs=0)
        algorithm1.train(state, data, trunk_alone, save=save, progress=Deadline(self.conditions.deadline))
        write_atomically(self.network, serialize(state.model.state_dict()))
        return {
            **self.subject._asdict(),
            "settings": config.settings._asdict(),
            "test_accuracy": accuracy(state.model, data.test),
            "epochs": {
                name: [round(row[name], 5) for row in state.history]
                for name in ("loss", "kl", "validation_accuracy", "unsettled")
            },
            "seconds": round(sum(row["seconds"] for row in state.history), 1),
        }

    def load(self, data: Dataset) -> nn.Sequential:
        """Return the finished network, in evaluation mode.

        Raises:
            FileNotFoundError: It has not been trained.
        """
        model = noisy_network(self.config, data)
        model.load_state_dict(load_file(self.network))
        assert isinstance(model, nn.Sequential), "the paper's small networks are chains"
        return model.eval()

    def continue_with(self, criterion: str, data: Dataset) -> Row:
        """Go on with a criterion's run from where it parts, and return the row that `benchmarks paper` would write."""
        run = self._run(criterion)
        config = paper.config_of(run, self.conditions)
        state = algorithm1.new_state(config, data, noise=True, device=CPU)
        own = self.folder / f"{criterion}.safetensors"
        load_checkpoint(own if own.exists() else self._branch(criterion), state, config)
        failure = None
        try:
            algorithm1.train(
                state,
                data,
                config,
                save=lambda state: save_checkpoint(own, state, config),
                progress=Deadline(self.conditions.deadline),
            )
        except NonFiniteError as error:
            failure = str(error)
        seconds = sum(row["seconds"] for row in state.history)
        return paper.row_of(run, config, state, data, failure=failure, seconds=seconds)

    def _run(self, criterion: str | None) -> PaperRun:
        subject = self.subject
        return PaperRun(subject.seed, subject.data, subject.network, subject.granularity, criterion)

    def _branch(self, criterion: str) -> Path:
        return self.folder / f"{criterion}-branch.safetensors"

    def _branch_off(self, criterion: str, state: TrainingState, data: Dataset) -> None:
        """Keep the state as the criterion's run has it, once it prunes something and at the end at the latest."""
        path = self._branch(criterion)
        if path.exists():
            return
        config = paper.config_of(self._run(criterion), self.conditions)
        model = copy.deepcopy(state.model)
        report = prune(model, config.build_criterion())
        if report.after == report.before and len(state.history) < config.settings.epochs:
            return
        started = time.perf_counter()
        last: Mapping[str, Any] = {
            "pruning": report.to_dict(),
            "kept": {name: int(layer.mask.sum()) for name, layer in noise_layers(model).items()},
            "unsettled": unsettled(model),
            "compression_percent": compression(model, data.validation.examples(1)),
            "validation_accuracy": accuracy(model, data.validation),
        }
        history = [*state.history[:-1], {**state.history[-1], **last}]
        history[-1]["seconds"] += time.perf_counter() - started
        save_checkpoint(path, TrainingState(model, state.optimizer, state.order, history), config)
