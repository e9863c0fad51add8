"""The granularities of noise, and which of them are the same thing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from bmrs_kernels.options import Granularity

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


def equivalent(granularity: Granularity, *, of_matrices: bool) -> tuple[Granularity, ...]:
    """Return all granularities that draw as this one does.

    An activation that is a matrix has the shape (examples, structures). Each of its elements belongs to another pair of
    an example and a structure, so that a draw for each element and one for each example's structure are the same.

    Args:
        granularity: the one that is asked about.
        of_matrices: whether all activations are matrices, as in an MLP.
    """
    alike: tuple[Granularity, ...] = ("element", "sample")
    return alike if of_matrices and granularity in alike else (granularity,)


def distinct(granularities: Iterable[Granularity], *, of_matrices: bool) -> tuple[Granularity, ...]:
    """Return granularities, each once; those that draw alike go by the name that is first in `equivalent`."""
    return tuple(dict.fromkeys(equivalent(each, of_matrices=of_matrices)[0] for each in granularities))
