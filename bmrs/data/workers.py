"""Reading in processes of their own, by torch's DataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from bmrs.checks import check_integer, one_line
from bmrs.data.checks import DataError


def num_workers(asked: int | None) -> int:
    """Return how many processes read: as many as were asked for, or one a core, and never more than cores.

    Raises:
        TypeError, ValueError: that is no number of processes.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        cores = os.cpu_count() or 1
    if asked is None:
        return cores if cores > 1 else 0
    check_integer("workers", asked, minimum=0)
    return min(asked, cores)


def read_in_order(dataset: Any, keys: Iterable[Any], *, workers: int, where: str) -> Iterator[Any]:
    """Iterate over what a data set gives for each key, in the order of the keys.

    Torch's random numbers are left as they are.

    Args:
        dataset: what it gives for a key is passed on as it is.
        keys: read a few ahead of what is asked for.
        workers: processes that read; 0 for this one.
        where: what is read, for the error.

    Raises:
        DataError: a process has died.
    """
    # Without a generator of its own a loader draws from torch's, for worker processes that may not even be.
    loader: DataLoader[Any] = DataLoader(
        dataset,
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except RuntimeError as error:
        if not workers or "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"{where}: a process that reads images has died ({one_line(error)}); with workers=0 it shows at which image"
        ) from error


def _unchanged(value: Any) -> Any:
    return value
