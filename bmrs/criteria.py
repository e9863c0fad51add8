"""Pruning criteria: from a noise layer to one score per structure and a decision.

A criterion is called with a noise layer and, if ``needs_producer`` says so, with the linear or convolution
layer that produces its structures. `bmrs.prune` applies one to a whole model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import bmrs_kernels
from bmrs.noise_layer import Backend, NoiseLayer

LN2 = math.log(2.0)


class Decision(NamedTuple):
    """What a criterion says about the structures of a layer, both of shape (num_structures,).

    Attributes:
        scores: the criterion's own quantity; NaN where it is undefined.
        prune: bool, True where the score asks for removal; never True for a NaN score.
    """

    scores: Tensor
    prune: Tensor


class Criterion(ABC):
    """Base of all criteria.

    Attributes:
        score_name: what the scores are, for reports.
        prunes_high_scores: True if the structures with the highest scores go first.
        needs_producer: True if the criterion looks at the weights that produce the structures.
    """

    score_name: ClassVar[str]
    prunes_high_scores: ClassVar[bool] = False
    needs_producer: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, layer: NoiseLayer, producer: nn.Module | None = None) -> Decision:
        """Judge every structure of a layer; structures pruned before are scored, but never counted."""

    def decide_tied(self, decisions: Sequence[Decision], kept: Tensor) -> Decision:
        """The one decision on structures of several layers that are parts of one channel.

        The channel goes if each of them should; its score is that of the one most worth keeping.

        Args:
            decisions: on each layer.
            kept: bool of shape (layers, num_structures), False for structures pruned before, which do not count.
        """
        scores = torch.stack([decision.scores for decision in decisions])
        worst = math.inf if self.prunes_high_scores else -math.inf
        scores = scores.masked_fill(~kept, worst)
        joint = scores.amin(dim=0) if self.prunes_high_scores else scores.amax(dim=0)
        asked = torch.stack([decision.prune for decision in decisions])
        return Decision(joint, (asked | ~kept).all(dim=0))

    def best_first(self, scores: Tensor) -> Tensor:
        """Indices of the scores, most worth keeping first; a NaN score counts as the best."""
        best = -math.inf if self.prunes_high_scores else math.inf
        scores = scores.masked_fill(scores.isnan(), best)
        return scores.argsort(descending=not self.prunes_high_scores, stable=True)


class PosteriorCriterion(Criterion):
    """A criterion that looks at each structure's posterior alone, so that layers can be judged together."""

    @abstractmethod
    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """Scores of posteriors of any number of layers with equal bounds, of the shape of ``mu``."""

    @abstractmethod
    def decide(self, scores: Tensor) -> Tensor:
        """True where a score asks for removal; False for NaN."""

    @torch.no_grad()
    def __call__(self, layer: NoiseLayer, producer: nn.Module | None = None) -> Decision:
        """Judge every structure of a layer."""
        scores = self.scores(
            layer.mu, layer.log_sigma, lower=layer.lower, upper=layer.upper, backend=layer.backend
        )
        return Decision(scores, self.decide(scores))


class _EvidenceCriterion(PosteriorCriterion):
    """Prune where the log evidence does not fall when the prior shrinks θ to 0; scores are ΔF in nats."""

    score_name: ClassVar[str] = "ΔF"
    prunes_high_scores: ClassVar[bool] = True
    tolerance: float

    def decide(self, scores: Tensor) -> Tensor:
        """True where ΔF ≥ -tolerance."""
        return scores >= -self.tolerance

    def decide_tied(self, decisions: Sequence[Decision], kept: Tensor) -> Decision:
        """The channel goes if the sum of ΔF + tolerance over its structures is ≥ 0; its score is the sum of ΔF.

        Prior and posterior are products over structures. With all of a channel's θ shrunk to 0 at once, the model
        evidence is then multiplied by the product of the single ratios, and ΔF is their sum. The sum is ≥ 0 wherever
        all of its terms are, and also where one structure's evidence outweighs another's.
        """
        scores = torch.stack([decision.scores for decision in decisions])
        allowed = (scores + self.tolerance).masked_fill(~kept, 0.0).sum(dim=0)
        return Decision(scores.masked_fill(~kept, 0.0).sum(dim=0), allowed >= 0)


@dataclass(frozen=True)
class BMRSNormal(_EvidenceCriterion):
    """Prune where ΔF ≥ 0 under a truncated log-normal reduced prior: BMRS_N (Eq. 8 of arXiv 2406.01345).

    Scores are ΔF in nats. A structure that the data say nothing about has its posterior near the prior, and its ΔF
    near 0: from below while ``mu`` lies in the upper half of [lower, upper], where training starts. A tolerance
    prunes such structures too. The authors' code, which leaves out the 2π of Eq. 8, acts as BMRS_N with
    tolerance ½ log 2π ≈ 0.919.

    Args:
        prior_mean: location of the reduced prior on log θ; None for the layer's lower bound.
        prior_std: its standard deviation before truncation, greater than 0.
        tolerance: log evidence in nats that a structure may be worth and still be pruned, at least 0.
    """

    prior_mean: float | None = None
    prior_std: float = 1e-6
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        _check_number("tolerance", self.tolerance, minimum=0.0)
        if self.prior_mean is not None:
            _check_number("prior_mean", self.prior_mean)
        _check_number("prior_std", self.prior_std)
        if self.prior_std <= 0:
            raise ValueError(f"prior_std must be greater than 0, was {self.prior_std}")

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """ΔF in nats.

        Raises:
            ValueError: ``prior_mean`` lies outside [lower, upper].
        """
        if self.prior_mean is not None and not lower <= self.prior_mean <= upper:
            raise ValueError(
                f"prior_mean must lie in the noise layer's interval [{lower}, {upper}], was {self.prior_mean}"
            )
        return bmrs_kernels.delta_f_lognormal(
            mu,
            log_sigma,
            prior_mean=self.prior_mean,
            prior_std=self.prior_std,
            lower=lower,
            upper=upper,
            backend=backend,
        )


@dataclass(frozen=True)
class BMRSUniform(_EvidenceCriterion):
    """Prune where ΔF ≥ 0 under a log-uniform reduced prior: BMRS_U (arXiv 2406.01345).

    The reduced prior on log θ is uniform on [reduced_lower, -p1·ln 2], where p1-bit arithmetic rounds θ to 0.
    Scores are ΔF in nats.

    Args:
        p1: bits; the paper uses 4 and 8.
        reduced_lower: lower end of the reduced prior. With the paper's default, structures whose θ is smaller
            still are kept; None, for the layer's lower bound, prunes them too.
        tolerance: log evidence in nats that a structure may be worth and still be pruned, at least 0.
    """

    p1: float = 8
    reduced_lower: float | None = -23 * LN2
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        _check_number("tolerance", self.tolerance, minimum=0.0)
        _check_number("p1", self.p1)
        if self.reduced_lower is not None:
            _check_number("reduced_lower", self.reduced_lower)
            if self.reduced_lower >= -self.p1 * LN2:
                raise ValueError(
                    "reduced_lower must be less than -p1·ln 2, "
                    f"were {self.reduced_lower:.4g} and {-self.p1 * LN2:.4g}"
                )

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """ΔF in nats.

        Raises:
            ValueError: the reduced interval is empty or not within [lower, upper].
        """
        reduced_lower = lower if self.reduced_lower is None else self.reduced_lower
        reduced_upper = -self.p1 * LN2
        if not lower <= reduced_lower < reduced_upper <= upper:
            raise ValueError(
                f"the reduced interval [{reduced_lower:.4g}, {reduced_upper:.4g}] of BMRSUniform must not be "
                f"empty and must lie within the noise layer's interval [{lower}, {upper}]"
            )
        return bmrs_kernels.delta_f_loguniform(
            mu,
            log_sigma,
            reduced_lower=reduced_lower,
            reduced_upper=reduced_upper,
            lower=lower,
            upper=upper,
            backend=backend,
        )


@dataclass(frozen=True)
class SNR(PosteriorCriterion):
    """Prune where the signal-to-noise ratio E[θ]/sd(θ) is at most a threshold (arXiv 1705.07283).

    Args:
        threshold: greater than or equal to 0.
    """

    threshold: float = 1.0

    score_name: ClassVar[str] = "SNR"

    def __post_init__(self) -> None:
        _check_number("threshold", self.threshold, minimum=0.0)

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """E[θ]/sd(θ), without unit."""
        return bmrs_kernels.noise_snr(mu, log_sigma, lower=lower, upper=upper, backend=backend)

    def decide(self, scores: Tensor) -> Tensor:
        """True where the ratio is at most the threshold."""
        return scores <= self.threshold


@dataclass(frozen=True)
class Mean(PosteriorCriterion):
    """Prune where E[θ] is less than a threshold.

    Args:
        threshold: greater than or equal to 0.
    """

    threshold: float = 0.1

    score_name: ClassVar[str] = "E[θ]"

    def __post_init__(self) -> None:
        _check_number("threshold", self.threshold, minimum=0.0)

    def scores(
        self, mu: Tensor, log_sigma: Tensor, *, lower: float, upper: float, backend: Backend
    ) -> Tensor:
        """E[θ], in [e^lower, e^upper]."""
        return bmrs_kernels.noise_mean(mu, log_sigma, lower=lower, upper=upper, backend=backend)

    def decide(self, scores: Tensor) -> Tensor:
        """True where E[θ] is less than the threshold."""
        return scores < self.threshold


@dataclass(frozen=True)
class _LowestNorm(Criterion):
    """Prune a fraction of the layer's kept structures: those with the lowest norm."""

    ratio: float

    needs_producer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_number("ratio", self.ratio, minimum=0.0)
        if self.ratio >= 1:
            raise ValueError(f"ratio must be less than 1, was {self.ratio}")

    @abstractmethod
    def values(self, weight: nn.Parameter) -> Tensor:
        """The tensor of the weight's shape whose norm per structure is the score."""

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
        if weight.shape[0] != layer.num_structures:
            raise ValueError(
                f"{type(self).__name__} needs a producer with {layer.num_structures} output channels, "
                f"got {type(producer).__name__} with {weight.shape[0]}"
            )
        scores = self.values(weight).flatten(1).norm(dim=1)
        candidates = layer.mask & ~scores.isnan()
        count = math.floor(self.ratio * int(layer.mask.sum()))
        lowest = self.best_first(scores.masked_fill(~candidates, math.nan)).flip(0)[:count]
        prune = torch.zeros_like(layer.mask)
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
        """The weight itself."""
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
        """The weight's gradient.

        Raises:
            ValueError: there is none.
        """
        if weight.grad is None:
            raise ValueError("GradientNorm needs weight.grad of every producing layer: call backward first")
        return weight.grad


def _check_number(name: str, value: float, minimum: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, was {value!r}")
    if not math.isfinite(value) or value < minimum:
        bound = "" if minimum == -math.inf else f" and at least {minimum:g}"
        raise ValueError(f"{name} must be finite{bound}, was {value}")
