"""Pruning in PyTorch Lightning: a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from bmrs.compaction import compact
from bmrs.criteria import Criterion
from bmrs.files import save
from bmrs.noise.divergence import KLWeight
from bmrs.noise.lookup import required_noise_layers
from bmrs.pruning.report import PruneReport
from bmrs.schedules import PruningSchedule, WarmUp
from bmrs.tensorboard import write_histograms
from bmrs.trainers import TrainedNoise


class Pruning(pl.Callback):
    """Trains the noise of a model, prunes between epochs, and compacts at the end.

    The model has noise layers when training begins, as from `bmrs.add_noise` in its constructor, and its optimizer is
    built from `bmrs.parameter_groups`. The callback adds the gradient of the KL term after each backward pass: to the
    loss that the model returns and logs nothing is added. With accumulated gradients it counts once for each step of
    the optimizer, with gradient scaling and with data parallelism it counts as it should. Its state is part of
    Lightning's checkpoints, with torch's random numbers: a resumed run ends on a CPU with bitwise the same weights.

    Logged are ``bmrs/kl`` (nats, as weighted), ``bmrs/kept`` and ``bmrs/kept/<layer>`` (structures),
    ``bmrs/compression`` (pruned structures in percent), and at the end ``bmrs/parameters``. A TensorBoardLogger gets
    the histograms of `bmrs.tensorboard.write_noise` too, after each epoch.

    Args:
        criterion: what decides which structures go; `BMRSOdds` if None.
        kl_weight: as ``weight`` of `bmrs.kl_divergence`; ``"elbo"`` takes the length of the training data set.
        schedule: after which epochs structures go.
        warm_up: how the KL term sets in.
        example_inputs: what `bmrs.compact` is given at the end; the model's ``example_input_array`` if None. Without
            either, nothing is compacted. Layers that are added decide together where there are some.
        output: file for the compacted network, see `bmrs.save`; none is written if None.

    Attributes:
        compacted: the compacted network after training; None before.
    """

    def __init__(
        self,
        *,
        criterion: Criterion | None = None,
        kl_weight: KLWeight = "elbo",
        schedule: PruningSchedule | None = None,
        warm_up: WarmUp | None = None,
        example_inputs: Any = None,
        output: str | Path | None = None,
    ) -> None:
        super().__init__()
        self._noise = TrainedNoise(
            criterion=criterion,
            kl_weight=kl_weight,
            schedule=schedule,
            warm_up=warm_up,
            example_inputs=example_inputs,
        )
        self.output = output
        self.compacted: nn.Module | None = None
        self._random_state: Tensor | None = None

    @property
    def reports(self) -> list[PruneReport]:
        """What pruning did, one entry for each time."""
        return self._noise.reports

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the random numbers of the run that is resumed, before the first batch is chosen."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is noise to train, and that it is trained."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "the KL term would count once for each manual_backward: leave automatic_optimization at True, or add "
                "bmrs.kl_divergence(self, ...) to one of the losses and prune in the model"
            )
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise ValueError(
                "DeepSpeed takes no gradient beside its own backward pass: choose another strategy"
            )
        layers = required_noise_layers(pl_module)
        optimized = {
            id(p)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        lost = [name for name, layer in layers.items() if id(layer.mu) not in optimized]
        if lost:
            raise ValueError(
                f"the noise of {lost[0]!r} is in no optimizer: call add_noise before configure_optimizers, and build "
                "the optimizer from bmrs.parameter_groups(self, lr=...)"
            )
        self._noise.begin(trainer.train_dataloader)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the gradient of the KL term to that of the loss."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)

        def scaled(divergence: Tensor) -> Tensor:
            # As Lightning does with the loss: each batch adds its share, and a scaler scales all gradients.
            share = divergence / trainer.accumulate_grad_batches
            return share if scaler is None else scaler.scale(share)

        over = trainer.current_epoch + trainer.fit_loop.batch_idx / max(trainer.num_training_batches, 1)
        pl_module.log("bmrs/kl", self._noise.add_gradient(pl_module, epochs_over=over, scaled=scaled))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, if the schedule says so, and log what is left."""
        left = self._noise.end_epoch(pl_module, trainer.current_epoch + 1, examples=self._examples(pl_module))
        pl_module.log_dict({name: float(number) for name, number in left.items()})
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                write_histograms(logger.experiment, pl_module, step=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compact the network, and write it."""
        examples = self._examples(pl_module)
        if examples is None:
            return
        self.compacted = compact(pl_module, examples)
        if trainer.is_global_zero:
            if self.output is not None:
                save(self.output, self.compacted)
            for logger in trainer.loggers:
                parameters = sum(parameter.numel() for parameter in self.compacted.parameters())
                logger.log_metrics({"bmrs/parameters": float(parameters)}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's checkpoints keep of it."""
        return {"random": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self._random_state = state_dict["random"]

    def _examples(self, pl_module: pl.LightningModule) -> Any:
        examples = self._noise.examples_for(pl_module, otherwise=pl_module.example_input_array)
        return pl_module.trainer.precision_plugin.convert_input(examples)
