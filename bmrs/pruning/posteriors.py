"""Posteriors of a trained network's structures, learned while its weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from bmrs import processes
from bmrs.checks import check_number, shown
from bmrs.criteria import SNR, BMRSNormal, BMRSOdds, PosteriorCriterion
from bmrs.criteria.evidence import PAPER_TOLERANCE
from bmrs.noise.divergence import kl_divergence
from bmrs.noise.layer import INITIAL_LOG_SIGMA, NoiseLayer
from bmrs.noise.lookup import required_noise_layers, settled_noise_layers
from bmrs.noise.wrappers import data_parallel_part, is_sharded, whole
from bmrs_kernels.constants import LN2

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]

LEARNING_RATE = 5e-2
LEAST_DISTANCE = 10.0
"""Learning rate times steps before which nothing counts as settled.

The KL term alone, with Adam, drives a structure that the data say nothing about past SNR = 1 after 6.4 and past
ΔF_N = -0.919 after 8.5. Before that all structures are kept by every rule, because none has had the time to leave.
"""
MOST_DISTANCE = 60.0
SETTLED = 0.02
"""Share of the structures that may still be undecided when the posteriors count as settled."""

# Of the structures that the KL term drives to the prior, the lax rule prunes early on the way and the strict one late.
_LAX, _STRICT = SNR(threshold=1.0), BMRSNormal(tolerance=PAPER_TOLERANCE)
_CHECK_EVERY = 2.5  # in learning rate times steps


@dataclass(frozen=True)
class PosteriorReport:
    """How learning the posteriors went; ``str()`` says it in a sentence.

    Attributes:
        temperature: T of the likelihood.
        steps: batches that were trained on.
        distance: learning rate times steps, which is about how far a parameter can have moved.
        unsettled: share of the kept structures on which rules that agree for converged posteriors still disagree.
        changed: share of the kept structures that are judged otherwise than at the check before.
        settled: False if learning was cut off before decisions stopped changing.
        kept: structures of each noise layer that the criterion would keep: by default those more likely on (θ > 2⁻⁸)
            than off, or, where the layer's interval lies on one side of 2⁻⁸, with an SNR above 1.
    """

    temperature: float
    steps: int
    distance: float
    unsettled: float
    changed: float
    settled: bool
    kept: dict[str, int]

    @property
    def emptied(self) -> tuple[str, ...]:
        """Names of noise layers of which the criterion would keep no structure."""
        return tuple(name for name, kept in self.kept.items() if not kept)

    def __str__(self) -> str:
        way = f"{self.steps} steps at temperature {self.temperature:g}"
        text = (
            f"posteriors settled after {way}"
            if self.settled
            else f"posteriors still move after {way}: rules disagree on {self.unsettled:.1%} of the structures and "
            f"{self.changed:.1%} changed since the last check; train them longer before you prune"
        )
        if self.emptied:
            text += (
                f"; at this temperature nothing is left of {', '.join(map(repr, self.emptied))}: the evidence is for "
                "no network at all, so lower it"
            )
        return text


def unsettled(model: nn.Module) -> float:
    """Return how far the posteriors are from converged: 0 where the decisions no longer depend on the rule.

    A structure that the data say nothing about travels from its start towards the prior, and each rule is a line
    across its way: SNR ≤ 1 is crossed early, ΔF_N ≥ -0.919 late. The share of kept structures between the two lines is
    what a decision taken now would owe to the rule and the clock. At the very start it is 0 as well, because nothing
    has left yet.

    Returns:
        A share of the kept structures, in [0, 1].

    Raises:
        ValueError: the model has no noise layer.
    """
    between, kept = 0, 0
    for layer in required_noise_layers(model).values():
        disagree = _LAX(layer).prune != _STRICT(layer).prune
        its_kept = whole(layer.kept)
        between += int((disagree & its_kept).sum())
        kept += int(its_kept.sum())
    return between / max(kept, 1)


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
            self._kl_weight = {name: weight * price for name, price in prices.items()}
        kl_divergence(model, weight=self._kl_weight)  # says what is wrong with the prices
        self._trains_weights = weight_lr is not None
        if self._averages and self._trains_weights:
            processes.check_statistics(model)
        of_noise = [p for layer in self._layers.values() for p in (layer.mu, layer.log_sigma)]
        groups: list[dict[str, Any]] = [{"params": of_noise, "lr": self.learning_rate}]
        if weight_lr is not None:
            ids = {id(p) for p in of_noise}
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
        if self._averages:
            processes.average_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        self.optimizer.step()
        self.steps += 1
        return divergence.detach()

    def _checked(self, loss: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """Return the summands of a loss, one of which at least has to depend on the noise.

        Raises:
            TypeError: it is neither a tensor nor several.
            ValueError: one is not a single number, or nothing leads from any of them to the noise.
        """
        if not isinstance(loss, Tensor | Iterable):
            raise TypeError(f"loss must be a tensor that the model's outputs lead to, got {shown(loss)}")
        parameters = [p for layer in self._layers.values() for p in (layer.mu, layer.log_sigma)]
        # What a sharded parameter is at backward, another tensor, is not known here.
        sharded = (
            any(map(is_sharded, parameters)) or data_parallel_part(self.model) == "FullyShardedDataParallel"
        )
        depends = False
        for part in [loss] if isinstance(loss, Tensor) else loss:
            if not isinstance(part, Tensor):
                raise TypeError(f"loss must be a tensor that the model's outputs lead to, got {shown(part)}")
            if part.numel() != 1:
                raise ValueError(
                    f"loss must be one number, the mean over the batch, got shape {tuple(part.shape)}"
                )
            depends = depends or (part.requires_grad and (sharded or leads_to(part, parameters)))
            if depends or not isinstance(loss, Tensor):  # several can be told after the last one alone
                yield part
        if not depends:
            raise ValueError(
                "loss does not depend on the noise that is to be learned, so that the KL term alone would decide: "
                "compute it from the model that it is called with, without detach, item or torch.no_grad"
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

    def _decisions(self) -> dict[str, Tensor]:
        return {
            name: whole(layer.kept) & ~(self._criterion or _rule(layer))(layer).prune
            for name, layer in self._layers.items()
        }


def leads_to(value: Tensor, parameters: Collection[Tensor]) -> bool:
    """Return whether autograd goes from a value to one of some parameters, as far as can be seen.

    Functions written in Python may have graphs of their own in them, as those of activation checkpointing have.
    """
    wanted = {id(parameter) for parameter in parameters}
    nodes: list[Any] = [value.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and not _is_our_own(node):
            return True
        if id(getattr(node, "variable", None)) in wanted:
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def _is_our_own(node: BackwardCFunction) -> bool:
    module: str = type(node)._forward_cls.__module__  # type: ignore[attr-defined]
    return module.startswith("bmrs_kernels.")


def backward(loss: Tensor | Iterable[Tensor], term: Tensor) -> None:
    """Compute the gradients of a loss, or one after another of its summands, plus a term."""
    for number, part in enumerate([loss] if isinstance(loss, Tensor) else loss):
        # In one pass with the first, as DistributedDataParallel expects one for each forward pass.
        (part if number else part + term).backward()


def _chosen(across_processes: bool | None) -> bool:
    """Return whether gradients are to be averaged, which nobody but the user can know."""
    several = processes.count() > 1
    if several and across_processes is None:
        raise ValueError(
            f"across_processes is missing: torch.distributed has {processes.count()} processes; give True if all of "
            "them learn these posteriors together, each from its own batches, or False if this one learns alone"
        )
    return several and bool(across_processes)


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
    return odds if layer.lower < -odds.p1 * LN2 < layer.upper else _LAX


def learn_posteriors(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    temperature: float = 1.0,
    dataset_size: int | None = None,
    learning_rate: float = LEARNING_RATE,
    prices: Mapping[str, float] | None = None,
    max_distance: float = MOST_DISTANCE,
    weight_lr: float | None = None,
    criterion: PosteriorCriterion | None = None,
    across_processes: bool | None = None,
    on_check: Callable[[PosteriorReport], None] | None = None,
) -> PosteriorReport:
    """Learn which structures a trained network needs: its weights stay, its noise learns, until decisions settle.

    The posterior of each structure's θ is fitted to the likelihood to the power 1/T, by Adam on the mean loss of a
    batch plus T/N times the KL divergence (Eq. 3 of arXiv 2406.01345 for T = 1). With the weights frozen these are few
    numbers, and a few passes over the data do. Dropout and batch norms are in evaluation mode meanwhile, so that it is
    the deployed network whose structures are judged. Then `bmrs.prune` decides, and `bmrs.compact` removes.

    Args:
        model: a trained network with noise layers, changed in place.
        batches: a `torch.utils.data.DataLoader` or any other iterable that can be gone through again and again.
        loss: called with the model and one of ``batches``; calls the model and returns the mean loss in nats of an
            example, such as the cross entropy.
        temperature: T > 0. 1 is the evidence bound. The larger, the less the data count, and the more goes. LeNet-5
            begins to lose accuracy where N/T is about 500 images.
        dataset_size: N, the number of training examples; taken from ``batches.dataset`` if there is one.
        learning_rate: Adam's, of μ and log σ; far larger than one for weights, because they have nats to travel.
        prices: factors on the temperature, by qualified name of each noise layer, such as `bmrs.structure_prices`
            makes from what a structure takes; all 1 if None.
        max_distance: learning rate times steps at which learning is cut off, settled or not.
        weight_lr: if given, the weights are trained as well, by the same optimizer at this learning rate, and the
            network is in training mode.
        criterion: whose decisions have to settle and are reported; `BMRSOdds` if None.
        across_processes: where torch.distributed has several processes, it has to be said which of them learn. True:
            all of them call this with the same model, each with its own batches; every step is that of the average of
            their mean losses, so that the posteriors and the report are the same on all. False: this process learns
            alone, whatever the others do; or the model is sharded and torch averages, and all processes call this.
            Without several processes it makes no difference.
        on_check: called with the state of things at every check, some 50 steps apart.

    Returns:
        How it went; ``settled`` is False if it was cut off.

    Raises:
        TypeError: ``loss`` returns no tensor, or an argument is none of what is asked for.
        ValueError: what ``loss`` returns does not depend on the noise, or is not one number; the model has no noise
            layer, ``dataset_size`` is neither given nor to be found, ``batches`` is empty or can be gone through only
            once, or a number is out of range; with several processes, ``across_processes`` is missing or does not suit
            a sharded model, the models differ, or a batch norm is trained that is none of all processes;
            DistributedDataParallel wraps weights that are to be frozen.
        FloatingPointError: the loss or a posterior became NaN or infinite, on any of the processes that learn together.
    """
    learner = PosteriorLearner(
        model,
        temperature=temperature,
        dataset_size=_dataset_size(batches, dataset_size),
        learning_rate=learning_rate,
        prices=prices,
        weight_lr=weight_lr,
        criterion=criterion,
        across_processes=across_processes,
    )
    check_number("max_distance", max_distance, above=0.0)
    if not callable(loss):
        raise TypeError(f"loss must be a function of (model, batch), got {shown(loss)}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, such as a DataLoader, got {shown(batches)}")
    every = max(1, round(_CHECK_EVERY / learning_rate))
    with learner:
        while True:
            before = learner.steps
            for batch in batches:
                value = loss(model, batch)
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"loss must return a tensor that the model's outputs lead to, got {shown(value)}"
                    )
                learner.step(value)
                if learner.steps % every and learner.distance < max_distance:
                    continue
                learner.check_finite(value)
                learner.check_same()
                report = learner.check()
                if on_check is not None:
                    on_check(report)
                if report.settled or learner.distance >= max_distance:
                    return report
            if learner.steps == before:
                raise ValueError(
                    "batches gave nothing"
                    + (" when gone through again: pass a DataLoader or a list" if before else "")
                )


def _dataset_size(batches: Iterable[Any], given: int | None) -> int:
    if given is not None:
        return given
    try:
        size = len(batches.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        raise ValueError(
            f"dataset_size is missing: {type(batches).__name__} has no dataset with a length; give the number of "
            "training examples"
        ) from None
    sampled = len(batches.sampler) if hasattr(batches, "sampler") else size
    if sampled != size:
        raise ValueError(
            f"dataset_size is missing: the sampler of batches draws {sampled} of the {size} examples of its dataset; "
            "give the number of training examples, of all processes together"
        )
    return size
