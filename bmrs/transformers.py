"""Pruning in transformers' Trainer: a callback."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bmrs.compaction import compact
from bmrs.criteria import Criterion
from bmrs.noise.divergence import KLWeight
from bmrs.noise.lookup import required_noise_layers
from bmrs.pruning.report import PruneReport
from bmrs.schedules import PruningSchedule, WarmUp
from bmrs.tensorboard import Writer, write_noise
from bmrs.trainers import TrainedNoise


class PruningCallback(TrainerCallback):
    """Trains the noise of a model, prunes between epochs, and compacts at the end.

    The model has noise layers when the trainer gets it, and the trainer an optimizer built from
    `bmrs.parameter_groups`, as ``optimizers=(optimizer, None)``: the one that it builds itself would apply weight decay
    to the noise. The callback adds the gradient of the KL term right before each step of the optimizer: once, however
    many batches gradients are accumulated over, and after gradients were clipped. The loss that the trainer logs is
    that of the model alone.

    Args:
        criterion: what decides which structures go; `BMRSOdds` if None.
        kl_weight: as ``weight`` of `bmrs.kl_divergence`; ``"elbo"`` takes the length of the training data set.
        schedule: after which epochs structures go.
        warm_up: how the KL term sets in.
        example_inputs: what `bmrs.compact` is given at the end, as a dict of keyword arguments for a model of
            transformers; nothing is compacted if None. Layers that are added decide together where there are some.
        tensorboard: a ``SummaryWriter`` that gets what `bmrs.tensorboard.write_noise` writes after each epoch; give
            transformers' own ``TensorBoardCallback`` the same one, as that cannot be asked for its writer.

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
        tensorboard: Writer | None = None,
    ) -> None:
        self._noise = TrainedNoise(
            criterion=criterion,
            kl_weight=kl_weight,
            schedule=schedule,
            warm_up=warm_up,
            example_inputs=example_inputs,
        )
        self.tensorboard = tensorboard
        self.compacted: nn.Module | None = None
        self._kl: Tensor | None = None

    @property
    def reports(self) -> list[PruneReport]:
        """What pruning did, one entry for each time; the trainer's ``state.log_history`` has the numbers."""
        return self._noise.reports

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Check that there is noise, that it is trained, and that no weight decay reaches it."""
        if args.fp16:
            raise ValueError(
                "the KL term cannot be scaled as fp16 scales losses: train with bf16=True, or in float32"
            )
        if args.deepspeed:
            raise ValueError("DeepSpeed takes no gradient beside its own backward pass: train without it")
        layers = required_noise_layers(given["model"])
        decays = {
            id(parameter): group.get("weight_decay", 0.0)
            for group in given["optimizer"].param_groups
            for parameter in group["params"]
        }
        for name, layer in layers.items():
            decay = decays.get(id(layer.mu))
            if decay is None or decay > 0:
                fault = "is in no optimizer" if decay is None else f"has weight decay {decay:g}"
                raise ValueError(
                    f"the noise of {name!r} {fault}: add noise before the Trainer is made, and give that "
                    "optimizers=(torch.optim.AdamW(bmrs.parameter_groups(model, lr=..., weight_decay=...)), None)"
                )
        self._noise.begin(given.get("train_dataloader"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Add the gradient of the KL term to that of the loss."""
        self._kl = self._noise.add_gradient(given["model"], epochs_over=state.epoch or 0.0)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Prune, if the schedule says so, and log what is left."""
        examples = self._noise.examples_for(given["model"])
        left = self._noise.end_epoch(given["model"], round(state.epoch or 0.0), examples=examples)
        state.log_history.append({**left, "epoch": state.epoch, "step": state.global_step})
        if self.tensorboard is not None:
            writer = self.tensorboard if state.is_world_process_zero else None
            kl = None if self._kl is None else self._kl.item()
            write_noise(writer, given["model"], step=state.global_step, kl=kl)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Compact the network."""
        examples = self._noise.examples_for(given["model"])
        if examples is not None:
            self.compacted = compact(given["model"], examples)
