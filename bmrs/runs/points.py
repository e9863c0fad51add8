"""Points of curves of accuracy against compression, and where such a curve bends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Point:
    """A network on the way of one criterion.

    Attributes:
        seed: of the run.
        criterion: a name of `bmrs.runs.curve.CRITERIA`.
        removed: structures that are gone.
        structures: structures that the network had at the start of the way.
        compression_percent: the paper's measure; see `bmrs.training.evaluation.compression`.
        parameters: trainable values of the compacted network.
        accuracy: share of validation images classified rightly, with E[θ] for what is kept.
        stop: whether the criterion itself stops here.
        knee: whether this is the curve's knee, see `knee_of`.
    """

    seed: int
    criterion: str
    removed: int
    structures: int
    compression_percent: float
    parameters: int
    accuracy: float
    stop: bool
    knee: bool


def knee_of(x: Sequence[float], y: Sequence[float]) -> int | None:
    """Return the place of a curve's knee: the point that lies farthest above its chord.

    The chord runs from the first point to the last one; both axes are scaled to what the curve spans, so that the
    distance does not depend on units (as in Satopää et al. 2011, "Finding a 'Kneedle' in a Haystack").

    Args:
        x: increasing.
        y: as many values.

    Returns:
        None where no point lies above the chord, as on a straight line.
    """
    across, along = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    width, height = across[-1] - across[0], along.max() - along.min()
    if len(x) < 3 or width <= 0 or height <= 0:
        return None
    chord = along[0] + (along[-1] - along[0]) * (across - across[0]) / width
    above: Tensor = (along - chord) / height
    return int(above.argmax()) if float(above.max()) > 1e-9 else None
