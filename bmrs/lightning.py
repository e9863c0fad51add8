"""Pruning in PyTorch Lightning: a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from bmrs.compaction import compact
from bmrs.criteria import BMRSOdds, Criterion
from bmrs.criteria.base import check_criterion
from bmrs.files import save
from bmrs.noise.divergence import KLWeight, kl_divergence
from bmrs.noise.lookup import required_noise_layers
from bmrs.pruning.prune import PruneReport, prune
from bmrs.schedules import PruningSchedule, WarmUp


class Pruning(pl.Callback):
    """Trains the noise of a model, prunes between epochs, and compacts at the end.

    The model has noise layers when training begins, as from `bmrs.add_noise` in its constructor, and its optimizer is
    built from `bmrs.parameter_groups`. The callback adds the gradient of the KL term after each backward pass: to the
    loss that the model returns and logs nothing is added. With accumulated gradients it counts once for each step of
    the optimizer, with gradient scaling and with data parallelism it counts as it should. Its state is part of
    Lightning's checkpoints, with torch's random numbers: a resumed run ends on a CPU with bitwise the same weights.

    Logged are ``bmrs/kl`` (nats, as weighted), ``bmrs/kept`` and ``bmrs/kept/<layer>`` (structures), and at the end
    ``bmrs/parameters``.

    Args:
        criterion: what decides which structures go; `BMRSOdds` if None.
        kl_weight: as ``weight`` of `bmrs.kl_divergence`; ``"elbo"`` takes the length of the training data set.
        schedule: after which epochs structures go.
        warm_up: how the KL term sets in.
        example_inputs: what `bmrs.compact` is given at the end; the model's ``example_input_array`` if None. Without
            either, nothing is compacted. Layers that are added decide together where there are some.
        output: file for the compacted network, see `bmrs.save`; none is written if None.

    Attributes:
        reports: what pruning did, one entry for each time.
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
        self.criterion = criterion or BMRSOdds()
        check_criterion(self.criterion)
        self.kl_weight = kl_weight
        self.schedule = schedule or PruningSchedule()
        self.warm_up = warm_up or WarmUp()
        self.example_inputs = example_inputs
        self.output = output
        self.reports: list[PruneReport] = []
        self.compacted: nn.Module | None = None
        self._dataset_size: int | None = None
        self._random_state: Tensor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the random numbers of the run that is resumed, before the first batch is chosen."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is noise to train, and that it is trained."""
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
        if self.kl_weight == "elbo":
            self._dataset_size = _dataset_size(trainer)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the gradient of the KL term to that of the loss."""
        layers = required_noise_layers(pl_module).values()
        parameters = [p for layer in layers for p in (layer.mu, layer.log_sigma) if p.requires_grad]
        if not parameters:
            return
        with torch.enable_grad():
            divergence = kl_divergence(pl_module, weight=self.kl_weight, dataset_size=self._dataset_size)
            divergence = divergence * self.warm_up(_epochs_over(trainer))
            # As Lightning does with the loss: each batch adds its share, and a scaler scales all gradients.
            share = divergence / trainer.accumulate_grad_batches
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            # Not by backward, whose hooks data parallelism takes for a second backward pass.
            gradients = torch.autograd.grad(share if scaler is None else scaler.scale(share), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        pl_module.log("bmrs/kl", divergence.detach())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, if the schedule says so, and log what is left."""
        if self.schedule.is_due(trainer.current_epoch + 1):
            self.reports.append(prune(pl_module, self.criterion, example_inputs=self._examples(pl_module)))
        layers = required_noise_layers(pl_module)
        kept = {name: float(layer.kept.sum()) for name, layer in layers.items()}
        pl_module.log("bmrs/kept", sum(kept.values()))
        pl_module.log_dict({f"bmrs/kept/{name}": count for name, count in kept.items()})

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
        return pl_module.example_input_array if self.example_inputs is None else self.example_inputs


def _epochs_over(trainer: pl.Trainer) -> float:
    return trainer.current_epoch + trainer.fit_loop.batch_idx / max(trainer.num_training_batches, 1)


def _dataset_size(trainer: pl.Trainer) -> int:
    try:
        return len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        raise ValueError(
            'kl_weight="elbo" needs the number of training examples, and the training data have no length: give '
            "kl_weight a number, such as 1 / examples"
        ) from None
