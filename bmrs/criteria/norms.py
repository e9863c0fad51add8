"""Criteria that rank structures by the weights that produce them and need a ratio: baselines of the paper."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bmrs.checks import check_number
from bmrs.criteria.base import Criterion, Decision
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.producers import by_output
from bmrs.noise.wrappers import whole


@dataclass(frozen=True)
class _LowestNorm(Criterion):
    """Prune a fraction of the layer's kept structures: those with the lowest norm."""

    ratio: float

    needs_producer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, minimum=0.0)
        if self.ratio >= 1:
            raise ValueError(f"ratio must be less than 1, got {self.ratio}")

    @abstractmethod
    def values(self, weight: nn.Parameter) -> Tensor:
        """Return the tensor of the weight's shape whose norm per structure is the score."""

    @torch.no_grad()
    def __call__(self, layer: NoiseLayer, producer: nn.Module | None = None) -> Decision:
        """Judge every structure of a layer.

        Args:
            layer: the noise layer.
            producer: the linear or convolution layer whose output channels are the structures.

        Raises:
            ValueError: ``producer`` is None or has another number of output channels.
        """
        if producer is None:
            raise ValueError(f"{type(self).__name__} needs the layer that produces the structures, got None")
        weight: nn.Parameter = producer.weight  # type: ignore[assignment]
        rows = by_output(producer, whole(self.values(weight)))
        if len(rows) != layer.num_structures:
            raise ValueError(
                f"{type(self).__name__} needs a producer with {layer.num_structures} output channels, "
                f"got {type(producer).__name__} with {len(rows)}"
            )
        scores = rows.flatten(1).norm(dim=1)
        kept = whole(layer.kept)
        candidates = kept & ~scores.isnan()
        count = math.floor(self.ratio * int(kept.sum()))
        lowest = self.best_first(scores.masked_fill(~candidates, math.nan)).flip(0)[:count]
        prune = torch.zeros_like(kept)
        prune[lowest] = True
        return Decision(scores, prune & candidates)


@dataclass(frozen=True)
class L2(_LowestNorm):
    """Prune the given fraction of each layer's kept structures whose weights have the lowest L2 norm.

    Args:
        ratio: fraction of each layer's still kept structures, rounded down to whole structures, in [0, 1).
    """

    score_name: ClassVar[str] = "L2 norm"

    def values(self, weight: nn.Parameter) -> Tensor:
        """Return the weight itself."""
        return weight


@dataclass(frozen=True)
class GradientNorm(_LowestNorm):
    """Prune the given fraction of each layer's kept structures whose weights have the lowest gradient norm.

    The gradient is what the caller's last ``backward`` left in ``weight.grad``.

    Args:
        ratio: fraction of each layer's still kept structures, rounded down to whole structures, in [0, 1).
    """

    score_name: ClassVar[str] = "gradient norm"

    def values(self, weight: nn.Parameter) -> Tensor:
        """Return the weight's gradient.

        Raises:
            ValueError: there is none.
        """
        if weight.grad is None:
            raise ValueError("GradientNorm needs weight.grad of every producing layer: call backward first")
        return weight.grad
