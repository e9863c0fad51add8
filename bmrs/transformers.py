"""Pruning in transformers' Trainer: a callback."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bmrs.compaction import compact
from bmrs.criteria import BMRSOdds, Criterion
from bmrs.criteria.base import check_criterion
from bmrs.noise.divergence import KLWeight, kl_divergence
from bmrs.noise.lookup import required_noise_layers
from bmrs.pruning.prune import PruneReport, prune
from bmrs.schedules import PruningSchedule, WarmUp


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

    Attributes:
        reports: what pruning did, one entry for each time; the trainer's ``state.log_history`` has the numbers.
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
    ) -> None:
        self.criterion = criterion or BMRSOdds()
        check_criterion(self.criterion)
        self.kl_weight = kl_weight
        self.schedule = schedule or PruningSchedule()
        self.warm_up = warm_up or WarmUp()
        self.example_inputs = example_inputs
        self.reports: list[PruneReport] = []
        self.compacted: nn.Module | None = None
        self._dataset_size: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Check that there is noise, that it is trained, and that no weight decay reaches it."""
        if args.fp16:
            raise ValueError(
                "the KL term cannot be scaled as fp16 scales losses: train with bf16=True, or in float32"
            )
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
        if self.kl_weight == "elbo":
            self._dataset_size = _dataset_size(given.get("train_dataloader"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Add the gradient of the KL term to that of the loss."""
        model = given["model"]
        layers = required_noise_layers(model).values()
        parameters = [p for layer in layers for p in (layer.mu, layer.log_sigma) if p.requires_grad]
        if not parameters:
            return
        divergence = kl_divergence(model, weight=self.kl_weight, dataset_size=self._dataset_size)
        share = divergence * self.warm_up(state.epoch or 0.0)
        for parameter, gradient in zip(parameters, torch.autograd.grad(share, parameters), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Prune, if the schedule says so, and log what is left."""
        model = given["model"]
        if self.schedule.is_due(round(state.epoch or 0.0)):
            self.reports.append(prune(model, self.criterion, example_inputs=self.example_inputs))
        kept = {name: int(layer.kept.sum()) for name, layer in required_noise_layers(model).items()}
        numbers = {"bmrs/kept": sum(kept.values()), **{f"bmrs/kept/{name}": n for name, n in kept.items()}}
        state.log_history.append({**numbers, "epoch": state.epoch, "step": state.global_step})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Compact the network."""
        if self.example_inputs is not None:
            self.compacted = compact(given["model"], self.example_inputs)


def _dataset_size(loader: Any) -> int:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        raise ValueError(
            'kl_weight="elbo" needs the number of training examples, and the training data have no length: give '
            "kl_weight a number, such as 1 / examples"
        ) from None
