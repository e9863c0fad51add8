"""Learning the posteriors of a model's noise layers, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bmrs import processes
from bmrs.checks import check_number
from bmrs.criteria import BMRSOdds, PosteriorCriterion
from bmrs.noise.divergence import kl_divergence
from bmrs.noise.layer import INITIAL_LOG_SIGMA, NoiseLayer
from bmrs.noise.lookup import settled_noise_layers
from bmrs.noise.wrappers import data_parallel_part, is_sharded, whole
from bmrs.pruning.losses import backward, checked_summands
from bmrs.pruning.settling import LAX, LEAST_DISTANCE, SETTLED, PosteriorReport, unsettled
from bmrs_kernels.constants import LN2

LEARNING_RATE = 5e-2


class PosteriorLearner:
    """Learns the posteriors of a model's noise layers step by step; `learn_posteriors` is the loop around it.

    Within a ``with`` block the model is ready for it: only the noise layers are in training mode and require gradients
    (with ``weight_lr`` the whole model). Afterwards modes and ``requires_grad`` flags are what they were.

    Args:
        model: see `learn_posteriors`, as for all further arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        dataset_size: int,
        learning_rate: float = LEARNING_RATE,
        prices: Mapping[str, float] | None = None,
        weight_lr: float | None = None,
        criterion: PosteriorCriterion | None = None,
        across_processes: bool | None = None,
    ) -> None:
        self._averages = _chosen(across_processes)
        _check_wrapper(model, averages=self._averages, trains_weights=weight_lr is not None)
        check_number("temperature", temperature, above=0.0)
        check_number("dataset_size", dataset_size, above=0.0)
        check_number("learning_rate", learning_rate, above=0.0)
        if weight_lr is not None:
            check_number("weight_lr", weight_lr, above=0.0)
        self.model = model
        self.temperature = float(temperature)
        self.learning_rate = float(learning_rate)
        self._layers = settled_noise_layers(model)
        weight = self.temperature / dataset_size
        self._kl_weight: float | dict[str, float] = weight
        if prices is not None:
            _check_prices(prices, self._layers)
            self._kl_weight = {name: weight * float(price) for name, price in prices.items()}
        self._trains_weights = weight_lr is not None
        if self._averages and self._trains_weights:
            processes.check_statistics(model)
        self._of_noise = [p for layer in self._layers.values() for p in (layer.mu, layer.log_sigma)]
        groups: list[dict[str, Any]] = [{"params": self._of_noise, "lr": self.learning_rate}]
        if weight_lr is not None:
            ids = {id(p) for p in self._of_noise}
            weights = [p for p in model.parameters() if id(p) not in ids and p.requires_grad]
            groups.append({"params": weights, "lr": weight_lr})
        self.optimizer = torch.optim.Adam(groups, lr=self.learning_rate)
        self.steps = 0
        self._criterion = criterion
        # Sharper posteriors than those that `NoiseLayer` starts from have farther to go.
        start = min(float(whole(layer.log_sigma.detach()).min()) for layer in self._layers.values())
        self._least_distance = LEAST_DISTANCE + max(0.0, INITIAL_LOG_SIGMA - start)
        self._decided = self._decisions()

    def __enter__(self) -> PosteriorLearner:
        self._modes = {module: module.training for module in self.model.modules()}
        self._flags = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        self.model.train(self._trains_weights)
        for parameter in self.model.parameters():
            parameter.requires_grad_(self._trains_weights and self._flags[parameter])
        for layer in self._layers.values():
            layer.train()
            layer.mu.requires_grad_(True)
            layer.log_sigma.requires_grad_(True)
        self._learning_modes = {module: module.training for module in self._modes}
        return self

    def __exit__(self, *error: object) -> None:
        for module, mode in self._modes.items():
            module.training = mode
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)

    def step(self, loss: Tensor | Iterable[Tensor]) -> Tensor:
        """Add the KL term to a batch's mean loss, go one step down, and return the KL term, detached.

        Across processes each passes the mean loss of its own batch, and the step is that of their average. Where the
        batches are not equally large, multiply each loss by the number of its examples over the average number.

        Args:
            loss: the loss, in nats; or its summands, where each is computed once the one before has gone backward, so
                that memory has to hold one alone.
        """
        divergence = kl_divergence(self.model, weight=self._kl_weight)
        self.optimizer.zero_grad()
        backward(self._checked(loss) if self.steps == 0 else loss, divergence)
        if self.steps == 0:
            self._check_modes()
            self._check_gradients_stay()
        if self._averages:
            processes.average_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        self.optimizer.step()
        self.steps += 1
        return divergence.detach()

    def _check_modes(self) -> None:
        """Raise ValueError if the loss put parts of the model into another mode than they are to learn in."""
        # Parts beside the noise have their modes set by models themselves, as teachers and frozen batch norms.
        with_noise = {"", *self._layers}
        for name in self._layers:
            while name:
                name = name.rpartition(".")[0]
                with_noise.add(name)
        for name, module in self.model.named_modules():
            if name in with_noise and module.training != self._learning_modes.get(module, module.training):
                mode, call = ("training", "train()") if module.training else ("evaluation", "eval()")
                place = f"layer {name!r}" if name else "the model"
                raise ValueError(
                    f"loss put {place} into {mode} mode, as by {call}, and posteriors are learned with the noise in "
                    "training mode and, without weight_lr, the rest in evaluation mode: leave modes as they are in loss"
                )

    def _check_gradients_stay(self) -> None:
        """Raise ValueError if something takes gradients away before there is a step."""
        for name, layer in self._layers.items():
            if layer.mu.grad is None and layer.log_sigma.grad is None and not is_sharded(layer.mu):
                raise ValueError(
                    f"noise layer {name!r} has no gradient after backward, as where hooks on parameters step an "
                    "optimizer and clear gradients: remove these hooks before posteriors are learned"
                )

    @property
    def distance(self) -> float:
        """Learning rate times steps so far."""
        return self.learning_rate * self.steps

    def check(self) -> PosteriorReport:
        """Compare the decisions with those at the last check."""
        decided = self._decisions()
        structures = max(sum(int(whole(layer.kept).sum()) for layer in self._layers.values()), 1)
        changed = sum(int((decided[name] != self._decided[name]).sum()) for name in decided) / structures
        self._decided = decided
        share = unsettled(self.model)
        settled = self.distance >= self._least_distance and max(share, changed) <= SETTLED
        kept = {name: int(on.sum()) for name, on in decided.items()}
        return PosteriorReport(self.temperature, self.steps, self.distance, share, changed, settled, kept)

    def check_finite(self, loss: Tensor) -> None:
        """Check the loss of the last step and the posteriors that it left, of all processes that learn together.

        Raises:
            FloatingPointError: one of them is NaN or infinite.
        """
        infinite = ~loss.detach().isfinite().all()
        if bool(processes.any_of(infinite) if self._averages else infinite):
            raise FloatingPointError(
                f"the loss is {loss.detach().tolist()} at step {self.steps} of learning posteriors"
                + (f", on process {processes.rank()} of {processes.count()}" if self._averages else "")
            )
        for name, layer in self._layers.items():
            if not bool(whole(layer.mu.isfinite() & layer.log_sigma.isfinite()).all()):
                raise FloatingPointError(
                    f"mu or log_sigma of noise layer {name!r} is not finite at step {self.steps} of learning posteriors"
                )

    def check_same(self) -> None:
        """Check that processes that learn together have come to the same parameters and masks.

        Raises:
            ValueError: they have not, because they did not start from the same model.
        """
        learned = [layer.mask for layer in self._layers.values()]
        learned += [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self._averages and not processes.same_on_all(learned):
            raise ValueError(
                f"after {self.steps} steps the {processes.count()} processes hold different parameters or masks: give "
                "each the same model, with the same weights, masks and noise, before it learns with "
                "across_processes=True"
            )

    def _checked(self, loss: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        # What a sharded parameter is at backward, another tensor, is not known here.
        sharded = any(map(is_sharded, self._of_noise))
        can_be_seen = not sharded and data_parallel_part(self.model) != "FullyShardedDataParallel"
        return checked_summands(loss, self._of_noise, can_be_seen=can_be_seen)

    def _decisions(self) -> dict[str, Tensor]:
        return {
            name: whole(layer.kept) & ~(self._criterion or _rule(layer))(layer).prune
            for name, layer in self._layers.items()
        }


def _chosen(across_processes: bool | None) -> bool:
    """Return whether gradients are to be averaged, which nobody but the user can know."""
    several = processes.count() > 1
    if several and across_processes is None:
        raise ValueError(
            f"across_processes is missing: torch.distributed has {processes.count()} processes; give True if all of "
            "them learn these posteriors together, each from its own batches, or False if this one learns alone"
        )
    return several and bool(across_processes)


def _check_prices(prices: Mapping[str, float], layers: Mapping[str, NoiseLayer]) -> None:
    if prices.keys() != layers.keys():
        raise ValueError(f"prices must name the model's noise layers {sorted(layers)}, got {sorted(prices)}")
    for name, price in prices.items():
        check_number(f"prices[{name!r}]", price, minimum=0.0)


def _check_wrapper(model: nn.Module, *, averages: bool, trains_weights: bool) -> None:
    if data_parallel_part(model) == "DistributedDataParallel" and not trains_weights:
        raise ValueError(
            "learn_posteriors freezes the weights, for whose gradients DistributedDataParallel would wait: give it the "
            "module inside, with across_processes=True where all processes learn together, or give weight_lr"
        )
    if averages and any(map(is_sharded, model.parameters())):
        raise ValueError(
            "across_processes=True averages gradients between copies of a model, and the parameters of this one are "
            "sharded, so that torch does what there is to average: give across_processes=False in all processes"
        )


def _rule(layer: NoiseLayer) -> PosteriorCriterion:
    """Return the odds or, where the interval lies on one side of their border, the signal-to-noise ratio."""
    odds = BMRSOdds()
    return odds if layer.lower < -odds.p1 * LN2 < layer.upper else LAX
