"""What callbacks for other people's trainers have in common: the KL term's gradient, pruning, numbers to log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bmrs.criteria import BMRSOdds, Criterion
from bmrs.criteria.base import check_criterion
from bmrs.noise.divergence import KLWeight, kl_divergence
from bmrs.noise.lookup import required_noise_layers
from bmrs.pruning.prune import prune
from bmrs.pruning.report import PruneReport
from bmrs.schedules import PruningSchedule, WarmUp
from bmrs.tensorboard import structures_left


class TrainedNoise:
    """Noise that a trainer trains along with a model; arguments are those of the callbacks."""

    def __init__(
        self,
        *,
        criterion: Criterion | None,
        kl_weight: KLWeight,
        schedule: PruningSchedule | None,
        warm_up: WarmUp | None,
        example_inputs: Any,
    ) -> None:
        self.criterion = criterion or BMRSOdds()
        check_criterion(self.criterion)
        self.kl_weight = kl_weight
        self.schedule = schedule or PruningSchedule()
        self.warm_up = warm_up or WarmUp()
        self.example_inputs = example_inputs
        self.reports: list[PruneReport] = []
        self._dataset_size: int | None = None

    def begin(self, training_data: Any) -> None:
        """Take note of how many training examples there are.

        Args:
            training_data: the trainer's loader.

        Raises:
            ValueError: ``kl_weight`` needs to know, and they have no length.
        """
        if self.kl_weight != "elbo":
            return
        try:
            self._dataset_size = len(training_data.dataset)
        except (AttributeError, TypeError):
            raise ValueError(
                'kl_weight="elbo" needs the number of training examples, and the training data have no length: give '
                "kl_weight a number, such as 1 / examples"
            ) from None

    @torch.enable_grad()
    def add_gradient(
        self, model: nn.Module, *, epochs_over: float, scaled: Callable[[Tensor], Tensor] = lambda kl: kl
    ) -> Tensor:
        """Add the gradient of the KL term to that of the loss, and return the term, detached.

        Args:
            model: a model with noise layers after a backward pass.
            epochs_over: how many epochs of training are over, with the part of this one.
            scaled: what the trainer did to the loss before its backward pass.
        """
        layers = required_noise_layers(model).values()
        divergence = kl_divergence(model, weight=self.kl_weight, dataset_size=self._dataset_size)
        divergence = divergence * self.warm_up(epochs_over)
        parameters = [p for layer in layers for p in (layer.mu, layer.log_sigma) if p.requires_grad]
        if parameters:
            # Not by backward, whose hooks data parallelism takes for a second backward pass.
            gradients = torch.autograd.grad(scaled(divergence), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return divergence.detach()

    def examples_for(self, model: nn.Module, otherwise: Any = None) -> Any:
        """Return the example inputs, or others in their place, where the model is by now."""
        given = otherwise if self.example_inputs is None else self.example_inputs
        device = next(model.parameters()).device
        return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, given)

    def end_epoch(self, model: nn.Module, epoch: int, *, examples: Any) -> dict[str, float]:
        """Prune if it is due after an epoch, counted from 1, and return what is left, to be logged."""
        if self.schedule.is_due(epoch):
            self.reports.append(prune(model, self.criterion, example_inputs=examples))
        return structures_left(model)
