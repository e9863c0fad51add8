"""The phases of a run, from the first epoch of training to the networks that it saves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from bmrs import processes
from bmrs.compaction.compact import compact
from bmrs.data import Dataset
from bmrs.files import save as save_model
from bmrs.noise.lookup import noise_layers
from bmrs.training import algorithm1, recipe
from bmrs.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from bmrs.training.config import TrainConfig
from bmrs.training.energy import EnergyMeter, epochs_measured
from bmrs.training.epoch import Progress
from bmrs.training.events import write_epoch
from bmrs.training.fit import fit, fitting_state
from bmrs.training.progress import TrainingProgress
from bmrs.training.run_folder import (
    NetworkName,
    RunFolder,
    write_json_lines,
)
from bmrs.training.sharing import check_same_state, share_random_state, share_state

_COMPILING = "compiling what draws the noise; up to a minute, the first time on this machine"


@dataclass(frozen=True)
class Trainer:
    """Trains the networks of a run, each from its checkpoint if there is one.

    Args:
        folder: of the run.
        config: its options.
        console: where progress is shown.
        meter: of energy, if that is measured.
    """

    folder: RunFolder
    config: TrainConfig
    console: Console
    meter: EnergyMeter | None

    def __call__(
        self,
        network: NetworkName,
        title: str,
        state: TrainingState,
        epochs: int,
        train: Callable[[Callable[[TrainingState], None], Progress], None],
    ) -> TrainingState:
        """Train a fresh state, or go on from its checkpoint, by calling ``train(save, progress)``."""

        def save(state: TrainingState) -> None:
            self.save(network, state)

        if processes.is_first() and self.folder.checkpoint(network).exists():
            load_checkpoint(self.folder.checkpoint(network), state, self.config)
        share_state(state)
        save(state)
        with (
            epochs_measured(self.meter, save) as save_epoch,
            TrainingProgress(
                self.console,
                title,
                epochs=epochs,
                done=len(state.history),
                before_the_first_step=_COMPILING if network == "noisy" else "",
            ) as progress,
        ):
            train(save_epoch, progress)
        return state

    def save(self, network: NetworkName, state: TrainingState) -> None:
        """Write a state of training, the same one on all processes, and its metrics."""
        check_same_state(state, network)
        if processes.is_first():
            save_checkpoint(self.folder.checkpoint(network), state, self.config)
            write_json_lines(self.folder.metrics(network), state.history)
            if self.config.tensorboard and state.history:
                write_epoch(self.folder.tensorboard(network), state)
        share_random_state(state.device)

    def fit(
        self,
        network: NetworkName,
        title: str,
        model: nn.Module,
        data: Dataset,
        epochs: int,
        teacher: nn.Module | None = None,
        config: TrainConfig | None = None,
    ) -> TrainingState:
        """Train a network's weights, by other options than the run's if they are given."""
        config = config or self.config
        state = fitting_state(model, config, data.train.device)
        return self(
            network,
            title,
            state,
            epochs,
            lambda save, progress: fit(
                state,
                data,
                config,
                epochs=epochs,
                phase=title,
                save=save,
                progress=progress,
                teacher=teacher,
            ),
        )


def by_algorithm1(
    trainer: Trainer, config: TrainConfig, data: Dataset, device: torch.device
) -> dict[NetworkName, TrainingState]:
    """Train by the paper's Algorithm 1, with noise and, beside it, without."""
    epochs = config.settings.epochs + config.settings.fine_tune_epochs

    def network(name: NetworkName, title: str) -> TrainingState:
        state = algorithm1.new_state(config, data, noise=name == "noisy", device=device)
        if config.weights is not None:
            initial = recipe.initial(config, data, device)
            state.model.load_state_dict(initial.state_dict(), strict=False)
        return trainer(
            name,
            title,
            state,
            epochs,
            lambda save, progress: algorithm1.train(state, data, config, save=save, progress=progress),
        )

    states: dict[NetworkName, TrainingState] = {
        "noisy": network("noisy", "with noise"),
        "dense": network("dense", "dense"),
    }
    compacted = compact(states["noisy"].model, data.validation.examples(8))
    if processes.is_first():
        save_model(trainer.folder.network("compacted"), compacted)
    return states


def by_recipe(
    trainer: Trainer, config: TrainConfig, data: Dataset, device: torch.device
) -> dict[NetworkName, TrainingState]:
    """Train, learn the noise, prune, compact and fine-tune; and what one would do instead."""
    folder, settings = trainer.folder, config.settings
    epochs = recipe.total_epochs(config, data)

    trained = trainer.fit("trained", "training", recipe.initial(config, data, device), data, settings.epochs)
    noisy = recipe.noisy_state(trained.model, config, data, device)
    trainer(
        "noisy",
        "noise",
        noisy,
        recipe.noise_epochs(config, data),
        lambda save, progress: recipe.learn_noise(noisy, data, config, save=save, progress=progress),
    )
    if "pruning" not in noisy.history[-1]:  # not yet, in a run that was interrupted
        noisy.history[-1]["pruning"] = recipe.decide(noisy.model, config, data)
        noisy.history[-1]["kept"] = {
            name: int(layer.mask.sum()) for name, layer in noise_layers(noisy.model).items()
        }
        trainer.save("noisy", noisy)

    few = data.train.examples(recipe.FEW_EXAMPLES)
    pruned = compact(noisy.model, few)
    refitted = pruned
    # Weights that went on training with the noise are not those of the trained network, nor of θ = 1.
    if not config.weight_lr:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            refitted = compact(noisy.model, recipe.refitting_examples(data), refit_to=trained.model)
        for text in dict.fromkeys(str(warning.message) for warning in caught):
            trainer.console.print(f"note: {text}", soft_wrap=True, markup=False)
    tuning_epochs = recipe.fine_tuning_epochs(config, data, noisy)
    start: nn.Module = refitted
    if tuning_epochs:
        start = recipe.start_of_fine_tuning(noisy.model, trained.model, config, data)
    fine_tuned = trainer.fit(
        "fine-tuned",
        "fine-tuning",
        copy.deepcopy(start),
        data,
        tuning_epochs,
        teacher=trained.model if config.distillation else None,
    )
    states: dict[NetworkName, TrainingState] = {"trained": trained, "noisy": noisy, "fine-tuned": fine_tuned}
    networks = {"pruned": pruned, "refitted": refitted, "compacted": fine_tuned.model}
    if config.rivals:
        states["dense"] = trainer.fit("dense", "dense", recipe.initial(config, data, device), data, epochs)
        chosen = recipe.random_structures(trained.model, noisy.model, config, data)
        states["random"] = trainer.fit("random", "random structures", chosen, data, epochs - settings.epochs)
        same_widths = recipe.untrained_copy(fine_tuned.model, config)
        states["scratch"] = trainer.fit(
            "scratch", "from scratch", same_widths, data, epochs, config=recipe.from_scratch(config)
        )
        networks |= {"random": states["random"].model, "scratch": states["scratch"].model}
    else:
        states["dense"] = trained
    for name, model in networks.items():
        if processes.is_first():
            save_model(folder.network(name), model)
    return states
