"""Posteriors of a trained network's structures, learned while its weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

from torch import Tensor, nn

from bmrs.checks import check_number, shown
from bmrs.criteria import PosteriorCriterion
from bmrs.pruning.learner import LEARNING_RATE, PosteriorLearner
from bmrs.pruning.losses import Loss
from bmrs.pruning.settling import PosteriorReport

MOST_DISTANCE = 60.0
_CHECK_EVERY = 2.5  # in learning rate times steps


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
    # A loader that is given batches of indices has a sampler of its own too, which nobody uses.
    sampler = getattr(getattr(batches, "batch_sampler", None), "sampler", getattr(batches, "sampler", None))
    sampled = len(sampler) if isinstance(sampler, Sized) else size
    if sampled != size:
        raise ValueError(
            f"dataset_size is missing: the sampler of batches draws {sampled} of the {size} examples of its dataset; "
            "give the number of training examples, of all processes together"
        )
    return size
