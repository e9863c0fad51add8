"""Recipe "bmrs": train, learn the noise of the trained network, prune, compact, fine-tune what is left.

Each phase has a fresh optimizer and a learning rate of its own, and trains the network that it is about: fine-tuning
the compacted one, without noise. Beside it stands what people would do instead, with the same number of epochs: the
dense network, a network of the compacted one's widths from scratch, and one whose structures were chosen at random.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bmrs import processes
from bmrs.budget import prune_to
from bmrs.budget.prune_to import check_latency
from bmrs.checks import one_line
from bmrs.compaction.compact import compact
from bmrs.compaction.costs import structure_prices
from bmrs.criteria import PosteriorCriterion
from bmrs.data import Dataset
from bmrs.data.dataset import IMAGE_SIZE
from bmrs.graph.masked_graph import graph_for_pruning
from bmrs.noise.lookup import noise_layers
from bmrs.pruning.learner import PosteriorLearner
from bmrs.pruning.prune import prune
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.epoch import Progress, train_epoch
from bmrs.training.evaluation import accuracy
from bmrs.training.finite import FiniteWatch
from bmrs.training.networks import dense_network, example_of_ties, noisy_network, with_weights
from bmrs.training.options import flag
from bmrs.training.run_folder import RunError
from bmrs.training.settings import IMAGES_A_DEGREE, NOISE_DISTANCE, default_settings
from bmrs.training.training_step import cross_entropy, new_step

Save = Callable[[TrainingState], None]

EXAMPLES = 2000
"""Training images of 32 × 32 pixels that the compacted network is refitted on; of larger ones there are fewer."""

_RIDGE_OF_START = 0.3

FEW_EXAMPLES = 8
"""Training images that compaction is tried on."""


class CollapseError(Exception):
    """The posteriors leave nothing of a layer at any temperature that was tried; the message says what to do."""


def start_of_fine_tuning(
    noisy: nn.Module, trained: nn.Module, config: TrainConfig, data: Dataset
) -> nn.Module:
    """Return the compacted network with the weights that fine-tuning starts from.

    Args:
        noisy: the pruned network with its noise.
        trained: the network before there was noise.
        config: the options.
        data: the images.
    """
    if config.settings.fine_tune_from == "refitted":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told already, of the network that is not fine-tuned
            # Weights that were there count for more than where nothing is trained afterwards.
            examples = refitting_examples(data)
            return compact(noisy, examples, refit_to=trained, refit_ridge=_RIDGE_OF_START)
    few = data.train.examples(FEW_EXAMPLES)
    return compact(noisy, few, expected_noise=bool(config.weight_lr))


def refitting_examples(data: Dataset) -> Tensor:
    """Return the training images that the compacted network is refitted on."""
    size = math.prod(data.train.image_shape) / IMAGE_SIZE**2
    return data.train.examples(max(2 * FEW_EXAMPLES, int(EXAMPLES / size)))


def untrained(config: TrainConfig, data: Dataset, device: torch.device) -> nn.Module:
    """Return the dense network with initial weights."""
    torch.manual_seed(config.seed)
    return dense_network(config, data).to(device)


def initial(config: TrainConfig, data: Dataset, device: torch.device) -> nn.Module:
    """Return the dense network that training starts from: with the weights that the options name, if any."""
    return with_weights(untrained(config, data, device), config)


def noisy_state(
    trained: nn.Module, config: TrainConfig, data: Dataset, device: torch.device
) -> TrainingState:
    """Return a trained network with noise near θ = 1, for `learn_noise`."""
    torch.manual_seed(config.seed)
    model = noisy_network(config, data).to(device)
    model.load_state_dict(trained.state_dict(), strict=False)
    learner = _learner(model, config, data, _first_temperature(config, data))
    return TrainingState(model, learner.optimizer, order=torch.Generator().manual_seed(config.seed))


def learn_noise(
    state: TrainingState, data: Dataset, config: TrainConfig, *, save: Save, progress: Progress
) -> None:
    """Learn the posteriors, the weights frozen by default, until decisions have settled or the epochs are used up.

    Where the posteriors leave nothing of a layer, the temperature is too high for this network. They then start afresh
    at half of it, so that a collapse is never delivered; the epochs that it took count.

    Args:
        state: what `noisy_state` returned, or its state after some epochs. Weights that `config.weight_lr` trains go
            on from a collapse as they are.
        data: preprocessed images on the model's device.
        config: the options.
        save: called with the state after each epoch.
        progress: told about steps and epochs.

    Raises:
        NonFiniteError: a NaN or an infinity turned up; its epoch is not saved.
        CollapseError: the last epoch ended in a collapse.
    """
    learner = None
    epochs = noise_epochs(config, data)
    watch = FiniteWatch(state.model, outputs=not config.compile)
    while len(state.history) < epochs and not (state.history and state.history[-1]["settled"]):
        temperature, collapsed = _next_temperature(state, config, data)
        if learner is None or collapsed:
            learner = _started(state, config, data, temperature, afresh=collapsed or not state.history)
            # Not as a CUDA graph, in whose replays the learner would not count its steps.
            eager = replace(config, cuda_graph=False)
            # Smoothed labels have no likelihood, which is what posteriors are of.
            plain = cross_entropy(replace(config, label_smoothing=0.0))
            step = new_step(state.model, eager, watch, data_loss=plain, update=learner.step)
        epoch = len(state.history) + 1
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch, "phase": "noise"}
        with learner, watch:
            row |= train_epoch(step, state, data.train, config, watch, progress)
        report = learner.check()
        row |= {
            **{name: getattr(report, name) for name in ("temperature", "steps", "unsettled", "changed")},
            "settled": report.settled and not report.emptied,
            "emptied": list(report.emptied),
            "kept": report.kept,
            "validation_accuracy": accuracy(state.model, data.validation),
            "seconds": time.perf_counter() - start,
        }
        # The first process's numbers decide on all of them about the temperature and the end.
        state.history.append(processes.of_first(row.copy))
        save(state)
        progress.epoch(row)
    if state.history[-1]["emptied"]:
        raise CollapseError(
            f"the noise epochs are used up, and at temperature {state.history[-1]['temperature']:g} the posteriors "
            f"leave nothing of {', '.join(state.history[-1]['emptied'])}; nothing was pruned. Start again with a "
            "--temperature well below that"
        )


def _next_temperature(state: TrainingState, config: TrainConfig, data: Dataset) -> tuple[float, bool]:
    """Return the temperature of the next epoch, and whether the one before ended in a collapse."""
    if not state.history:
        return _first_temperature(config, data), False
    last = state.history[-1]
    return (last["temperature"] / 2, True) if last["emptied"] else (last["temperature"], False)


def _first_temperature(config: TrainConfig, data: Dataset) -> float:
    temperature = config.settings.temperature
    return max(1.0, len(data.train) / IMAGES_A_DEGREE) if temperature is None else temperature


def _started(
    state: TrainingState, config: TrainConfig, data: Dataset, temperature: float, *, afresh: bool
) -> PosteriorLearner:
    """Return a learner of the state's posteriors, which goes on where the last epoch ended, or from the start."""
    if afresh:
        for layer in noise_layers(state.model).values():
            layer.reset_parameters()
    learner = _learner(state.model, config, data, temperature)
    if not afresh:
        learner.optimizer.load_state_dict(state.optimizer.state_dict())
        learner.steps = state.history[-1]["steps"]
    state.optimizer = learner.optimizer
    return learner


def _learner(model: nn.Module, config: TrainConfig, data: Dataset, temperature: float) -> PosteriorLearner:
    assert config.price_exponent is not None, "filled in for this recipe"
    criterion = config.build_criterion()
    return PosteriorLearner(
        model,
        temperature=temperature,
        dataset_size=len(data.train),
        learning_rate=config.settings.noise_lr,
        prices=structure_prices(model, data.train.examples(1), exponent=config.price_exponent),
        weight_lr=config.weight_lr or None,
        criterion=criterion if isinstance(criterion, PosteriorCriterion) else None,
        across_processes=True,
    )


def decide(noisy: nn.Module, config: TrainConfig, data: Dataset) -> dict[str, Any]:
    """Prune a network whose posteriors have been learned, in place, and return what happened as JSON values.

    Several processes take what the first one decides: each would time the network otherwise.

    Raises:
        RunError: no network is as small as the options want it.
    """
    report = processes.of_first(lambda: _decided(noisy, config, data, refitting_examples(data)))
    layers = noise_layers(noisy)
    masks = processes.of_first(lambda: {name: layer.mask.cpu() for name, layer in layers.items()})
    for name, layer in layers.items():
        layer.set_kept(masks[name])
    return report


def check_target(noisy: nn.Module, config: TrainConfig, data: Dataset) -> None:
    """Refuse, before anything is trained, a size or a latency that the network could not have, whatever is learned.

    Args:
        noisy: the network with noise, on the device of the images; it may be pruned afterwards.
        config: the options.
        data: the images.

    Raises:
        RunError: the smallest possible network is larger or slower.
    """
    if config.target_latency is not None:
        example, latency = data.train.examples(1), config.target_latency
        with _told_by_option(config):
            processes.of_first(
                lambda: check_latency(
                    noisy, config.build_criterion(), example_inputs=example, latency=latency
                )
            )
    elif config.target is not None:
        processes.of_first(lambda: _decided(noisy, config, data, None))


def _decided(noisy: nn.Module, config: TrainConfig, data: Dataset, examples: Tensor | None) -> dict[str, Any]:
    criterion = config.build_criterion()
    if config.target is None:
        return prune(noisy, criterion, example_inputs=example_of_ties(config, data)).to_dict()
    target = {config.target.removeprefix("target_"): getattr(config, config.target)}
    with _told_by_option(config):
        report = prune_to(
            noisy,
            criterion,
            example_inputs=data.train.examples(1),
            examples=examples,
            **target,
        )
    return {"budget": report.to_dict(), "text": str(report)}


@contextmanager
def _told_by_option(config: TrainConfig) -> Iterator[None]:
    """Name the option of the target in what is wrong with it."""
    assert config.target is not None, "asked only where there is one"
    try:
        yield
    except ValueError as error:
        raise RunError(f"{flag(config.target)}: {one_line(error)}") from error


def noise_epochs(config: TrainConfig, data: Dataset) -> int:
    """Return the epochs, at most, in which the noise learns."""
    if config.settings.noise_epochs is not None:
        return config.settings.noise_epochs
    steps_an_epoch = math.ceil(len(data.train) / config.settings.batch_size)
    return max(2, math.ceil(NOISE_DISTANCE / (config.settings.noise_lr * steps_an_epoch)))


def fine_tuning_epochs(config: TrainConfig, data: Dataset, noisy: TrainingState) -> int:
    """Return the epochs of fine-tuning: those of the options, and those that learning the noise left over."""
    return config.settings.fine_tune_epochs + noise_epochs(config, data) - len(noisy.history)


def total_epochs(config: TrainConfig, data: Dataset) -> int:
    """Return the epochs of the whole recipe, which all that it is compared with has too."""
    settings = config.settings
    return settings.epochs + noise_epochs(config, data) + settings.fine_tune_epochs


def random_structures(trained: nn.Module, noisy: nn.Module, config: TrainConfig, data: Dataset) -> nn.Module:
    """Return a trained network with as many structures as another has kept, but chosen at random."""
    device = next(trained.parameters()).device
    model = noisy_network(config, data).to(device)
    model.load_state_dict(trained.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(config.seed)
    layers, pruned = noise_layers(model), noise_layers(noisy)
    example = example_of_ties(config, data)
    tied = [] if example is None else graph_for_pruning(model, example).tied
    first_of = {name: group[0] for group in tied for name in group}
    orders: dict[str, Tensor] = {}
    for name, layer in layers.items():
        first = first_of.get(name, name)
        if first not in orders:
            orders[first] = torch.randperm(layer.num_structures, generator=generator)
        chosen = orders[first][: int(pruned[name].mask.sum())]
        layer.set_kept(torch.zeros(layer.num_structures, dtype=torch.bool).index_fill_(0, chosen, True))
    return compact(model, data.train.examples(FEW_EXAMPLES), expected_noise=False)


def from_scratch(config: TrainConfig) -> TrainConfig:
    """Return the options of training that starts from no weights: with the learning rate that is usual then."""
    usual = default_settings("bmrs", config.model, config.data).lr
    of_weights = default_settings("bmrs", config.model, config.data, weights=True).lr
    starts_lower = config.weights is not None and config.settings.lr == of_weights
    return replace(config, lr=usual) if starts_lower else config


def untrained_copy(network: nn.Module, config: TrainConfig) -> nn.Module:
    """Return a network of the same widths with initial weights.

    What layers do not reset, such as the positions that a transformer learns, is drawn as its own scale is.
    """
    torch.manual_seed(config.seed)
    copied = copy.deepcopy(network)
    for parameter in copied.parameters():  # a frozen one could never learn
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    for layer in copied.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            for parameter in layer.parameters(recurse=False):
                _draw_afresh(parameter)
    return copied


@torch.no_grad()
def _draw_afresh(parameter: nn.Parameter) -> None:
    mean = parameter.mean().item()
    if parameter.ndim > 1 and parameter.numel() > 1:
        parameter.normal_(mean, parameter.std().item())
    else:
        parameter.fill_(mean)
