"""What a network costs and how good it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from bmrs.calibration import Answers, answers, calibration_error
from bmrs.compaction.compact import compact
from bmrs.compaction.costs import num_parameters
from bmrs.data import Split
from bmrs.data.dataset import IMAGE_SIZE
from bmrs.noise.lookup import noise_layers

_BATCH = 500  # images of 32 × 32 pixels


def batch_size_for(split: Split) -> int:
    """Return how many images are evaluated at a time: the fewer, the larger they are."""
    return max(1, min(_BATCH, _BATCH * 3 * IMAGE_SIZE**2 // math.prod(split.image_shape)))


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of images, in [0, 1], that a model in evaluation mode classifies rightly."""
    model.eval()
    right = [
        (model(batch.images).argmax(dim=1) == batch.labels).sum()
        for batch in split.in_order(batch_size_for(split))
    ]
    return torch.stack(right).sum().item() / len(split)


class Quality(NamedTuple):
    """How good a classifier is.

    Attributes:
        accuracy: share of images classified rightly, in [0, 1].
        nll: mean negative log-likelihood of the labels, nats.
        ece: expected calibration error in 15 bins, in [0, 1]; see `bmrs.expected_calibration_error`.
    """

    accuracy: float
    nll: float
    ece: float


@torch.inference_mode()
def quality(model: nn.Module, split: Split) -> Quality:
    """Return how good a model in evaluation mode is on a split.

    Raises:
        ValueError: an output is not finite.
    """
    model.eval()
    parts = [answers(model(batch.images), batch.labels) for batch in split.in_order(batch_size_for(split))]
    given = Answers(*map(torch.cat, zip(*parts, strict=True)))
    right = given.right.sum().item() / len(split)
    return Quality(right, given.nll.mean().item(), calibration_error(given))


def compression(model: nn.Module, example: Tensor) -> float:
    """Return the paper's compression of a masked model, in percent.

    That is the share of all trainable values, μ and log σ included, that pruning makes superfluous: the weights and
    biases that compaction removes, and the μ and log σ of pruned structures.

    Args:
        model: a model with noise layers.
        example: one input, of shape (1, ...).
    """
    kept = sum(int(layer.mask.sum()) for layer in noise_layers(model).values())
    remaining = num_parameters(compact(model, example)) + 2 * kept
    return 100 * (1 - remaining / num_parameters(model))


def latency(
    models: Sequence[nn.Module],
    images: Tensor,
    *,
    rounds: int = 25,
    min_seconds: float = 0.005,
    max_seconds: float = 10.0,
) -> list[float]:
    """Return the median time in seconds that each model takes for the images.

    They run on one CPU thread or on their GPU, and take turns, so that a slow moment of the machine meets them all.

    Args:
        models: models, timed in evaluation mode.
        images: one batch of inputs.
        rounds: how often each model has its turn.
        min_seconds: least time of a turn, over as many forward passes as it needs.
        max_seconds: about how long all of it may take; the rounds become fewer then, but not less than three.
    """
    timers = [
        Timer(
            "model(images)",
            globals={"model": model.eval(), "images": images},
        )
        for model in models
    ]
    with torch.inference_mode():
        firsts = [timer.timeit(1).mean for timer in timers]
        if sum(firsts) < 1:
            firsts = [timer.timeit(5).mean for timer in timers]
        repeats = [max(1, round(min_seconds / first)) for first in firsts]
        a_round = sum(first * number for first, number in zip(firsts, repeats, strict=True))
        rounds = max(3, min(rounds, int(max_seconds / a_round)))
        turns = [
            [timer.timeit(number).mean for timer, number in zip(timers, repeats, strict=True)]
            for _ in range(rounds)
        ]
    return [median(times) for times in zip(*turns, strict=True)]
