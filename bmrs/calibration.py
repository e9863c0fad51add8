"""How far the probabilities of a classifier can be believed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bmrs.checks import check_choice, check_integer

BINS = 15
"""Bins of the calibration error, as in arXiv 1706.04599."""

# Of the sum of probabilities from 1, which float16 rounds no worse.
_TOLERANCE = 1e-2


class Answers(NamedTuple):
    """What a classifier said of examples, all of shape (N,).

    Attributes:
        nll: -log p(label), nats, float64.
        confidence: the largest probability, float64.
        right: whether that was the label's.
    """

    nll: Tensor
    confidence: Tensor
    right: Tensor


def answers(outputs: Tensor, labels: Tensor, *, probabilities: bool = False) -> Answers:
    """Return what a classifier said of each example; see `negative_log_likelihood` for the arguments."""
    logs = _log_probabilities(outputs, labels, probabilities)
    largest, said = logs.max(dim=1)
    return Answers(-logs.gather(1, labels[:, None]).squeeze(1), largest.exp(), said == labels)


def calibration_error(given: Answers, *, bins: int = BINS, adaptive: bool = False) -> float:
    """Return the expected calibration error of answers; see `expected_calibration_error`."""
    gap = given.right.double() - given.confidence
    if adaptive:
        parts = gap[given.confidence.argsort(stable=True)].tensor_split(bins)
        return sum(part.sum().abs().item() for part in parts) / len(gap)
    number = (given.confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    return gap.new_zeros(bins).index_add(0, number, gap).abs().sum().item() / len(gap)


def negative_log_likelihood(outputs: Tensor, labels: Tensor, *, probabilities: bool = False) -> float:
    """Return the mean of -log p(label) over examples, in nats, at least 0.

    Args:
        outputs: logits of shape (N, classes), N at least 1.
        labels: int64 of shape (N,), each in [0, classes).
        probabilities: whether ``outputs`` are probabilities instead, such as the mean that `bmrs.predict` returns.
            Where that of a label is 0, the result is infinity.

    Raises:
        TypeError, ValueError: an argument is not as it should be; it is named.
    """
    return answers(outputs, labels, probabilities=probabilities).nll.mean().item()


def expected_calibration_error(
    outputs: Tensor,
    labels: Tensor,
    *,
    bins: int = BINS,
    adaptive: bool = False,
    probabilities: bool = False,
) -> float:
    """Return the expected calibration error of a classifier, in [0, 1].

    An example's confidence is its largest probability. With M bins of equal width, the m-th one B of which has the
    examples with confidences in ((m - 1)/M, m/M], it is Σ |B|/N · |accuracy(B) - mean confidence(B)| (Naeini et al.
    2015; Guo et al. 2017, arXiv 1706.04599, Eq. 3).

    Args:
        outputs: see `negative_log_likelihood`.
        labels: see `negative_log_likelihood`.
        bins: M, at least 1.
        adaptive: True divides the examples, in the order of their confidences, into bins of equally many instead.
        probabilities: see `negative_log_likelihood`.

    Raises:
        TypeError, ValueError: an argument is not as it should be; it is named.
    """
    check_integer("bins", bins, minimum=1)
    check_choice("adaptive", adaptive, (False, True))
    return calibration_error(
        answers(outputs, labels, probabilities=probabilities), bins=bins, adaptive=adaptive
    )


def _log_probabilities(outputs: Tensor, labels: Tensor, probabilities: bool) -> Tensor:
    """Return checked outputs as logs of probabilities, float64."""
    check_choice("probabilities", probabilities, (False, True))
    for name, value in (("outputs", outputs), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if outputs.dim() != 2 or not outputs.is_floating_point() or outputs.numel() == 0:
        raise ValueError(
            f"outputs must be floating, of shape (N, classes) and not empty, got {outputs.dtype} of shape "
            f"{tuple(outputs.shape)}"
        )
    number, classes = outputs.shape
    if labels.dtype != torch.int64 or labels.shape != (number,):
        raise ValueError(
            f"labels must be int64 of shape ({number},), as outputs have {number} examples, got {labels.dtype} of "
            f"shape {tuple(labels.shape)}"
        )
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"labels must lie in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")
    if not bool(outputs.isfinite().all()):
        raise ValueError("outputs must be finite, and some are NaN or infinite")
    values = outputs.detach().double()
    if not probabilities:
        return values.log_softmax(dim=1)
    if bool((values < 0).any()) or bool(((values.sum(dim=1) - 1).abs() > _TOLERANCE).any()):
        raise ValueError(
            "outputs must be probabilities, at least 0 and with the sum 1 for each example, as probabilities=True says"
        )
    return values.log()
