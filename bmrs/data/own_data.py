"""Data sets of the user's own, made by a function that is named as ``package.module:factory``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset

from bmrs.checks import one_line, shown
from bmrs.data.checks import DataError
from bmrs.data.image_folders import SplitName
from bmrs.data.streamed_split import (
    StreamedSplit,
    check_label,
    example,
    kind_of,
    own_random_numbers,
    seed_all,
)
from bmrs.data.workers import read_in_order

_PART = 64
_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class OwnData:
    """What a factory gave.

    Attributes:
        num_classes: number of classes.
        splits: those that it gave; "train" and "test" are there.
        notes: what the user should know, a line each.
    """

    num_classes: int
    splits: dict[SplitName, StreamedSplit]
    notes: tuple[str, ...]


def read_own(spec: str, *, workers: int, seed: int) -> OwnData:
    """Call a factory and check what it gives, on a few examples of each split.

    The factory takes no arguments and returns a dict or an object with `train`, `test` and, if it likes, `validation`
    and `num_classes`. The first three are map-style data sets; see `StreamedSplit`.

    Args:
        spec: `package.module:factory`.
        workers: processes that read examples.
        seed: of what factory and data sets draw at random.

    Raises:
        DataError: the factory cannot be imported or called, or gives something else.
    """
    with own_random_numbers():
        seed_all(f"{seed} {spec}")
        return _checked(spec, _made(spec), workers=workers, seed=seed)


def _checked(spec: str, made: Any, *, workers: int, seed: int) -> OwnData:
    get = made.get if isinstance(made, Mapping) else lambda name: getattr(made, name, None)
    data_sets: dict[SplitName, Any] = {split: get(split) for split in _SPLITS if get(split) is not None}
    missing = [split for split in ("train", "test") if split not in data_sets]
    if missing:
        raise DataError(
            f"{spec}: gave {shown(made)} without {' and '.join(missing)}; expected a dict or an object with train, "
            "test and, if there is one, validation"
        )
    for split, data_set in data_sets.items():
        _check_map_style(data_set, f"{spec}, {split}")

    notes: list[str] = []
    num_classes = _num_classes(get("num_classes"), data_sets["train"], spec, workers, notes)
    shape, dtype = _looked_at(spec, data_sets, num_classes)
    splits = {
        split: StreamedSplit(
            name=f"{spec}, {split}",
            dataset=data_set,
            rows=torch.arange(len(data_set)),
            shape=shape,
            dtype=dtype,
            num_classes=num_classes,
            workers=workers,
            seed=seed,
        )
        for split, data_set in data_sets.items()
    }
    return OwnData(num_classes, splits, tuple(notes))


def _made(spec: str) -> Any:
    module_name, _, factory_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it is the user's code
        hint = (
            "; it has to be installed, or in a folder of PYTHONPATH"
            if isinstance(error, ModuleNotFoundError)
            else ""
        )
        raise DataError(
            f"{spec}: {module_name} cannot be imported ({type(error).__name__}: {one_line(error)}){hint}"
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        found = "has no such name" if factory is None else f"holds {shown(factory)} there"
        raise DataError(f"{spec}: {module_name} {found}; expected a function without arguments")
    try:
        return factory()
    except Exception as error:
        raise DataError(f"{spec}: raised {type(error).__name__}: {one_line(error)}") from error


def _check_map_style(data_set: Any, name: str) -> None:
    try:
        length = len(data_set)
    except Exception as error:
        raise DataError(
            f"{name}: {type(data_set).__name__} has no length; expected a map-style data set"
        ) from error
    if isinstance(data_set, IterableDataset) or not hasattr(data_set, "__getitem__"):
        raise DataError(
            f"{name}: {type(data_set).__name__} gives nothing for an index; expected a map-style data set"
        )
    if not length:
        raise DataError(f"{name}: no examples")


def _num_classes(stated: Any, train: Any, spec: str, workers: int, notes: list[str]) -> int:
    """Return the number of classes: as stated, by the names that data sets of torchvision have, or by all labels."""
    if stated is None and isinstance(getattr(train, "classes", None), (list, tuple)):
        stated = len(train.classes)
    if stated is not None:
        if type(stated) is not int or stated < 2:
            raise DataError(f"{spec}: num_classes is {shown(stated)}, expected an integer from 2 on")
        return stated
    keys = torch.arange(len(train)).split(_PART)
    source = _Labels(train, f"{spec}, train")
    labels: set[int] = set()
    for answer in read_in_order(
        source,
        [key.tolist() for key in keys],
        workers=workers if len(keys) > workers else 0,
        where=source.name,
    ):
        if isinstance(answer, str):
            raise DataError(answer)
        labels |= answer
    if min(labels) < 0 or max(labels) < 1:
        raise DataError(f"{spec}: labels from {min(labels)} to {max(labels)}, expected 0, 1 and so on")
    notes.append(
        f"{spec}: {max(labels) + 1} classes, found by reading {len(train):,} examples; num_classes beside train "
        "saves that"
    )
    return max(labels) + 1


@dataclass(frozen=True)
class _Labels:
    data_set: Any
    name: str

    def __getitem__(self, indices: list[int]) -> set[int] | str:
        try:
            return {example(self.data_set, index, where=self.name)[1] for index in indices}
        except DataError as error:
            return str(error)


def _looked_at(
    spec: str, data_sets: Mapping[SplitName, Any], num_classes: int
) -> tuple[tuple[int, int, int], torch.dtype]:
    """Return the shape and dtype of all images, by the first, the middle and the last one of each split."""
    first = None
    for split, data_set in data_sets.items():
        name = f"{spec}, {split}"
        for index in sorted({0, len(data_set) // 2, len(data_set) - 1}):
            image, label = example(data_set, index, where=name)
            check_label(label, num_classes, f"{name}[{index}]")
            first = image if first is None else first
            if image.shape != first.shape or image.dtype != first.dtype:
                raise DataError(
                    f"{name}[{index}]: an image {kind_of(image)}, expected one {kind_of(first)} as {spec}, train[0]: "
                    "all images need one shape and dtype"
                )
    assert first is not None, "no split is empty"
    channels, height, width = first.shape
    return (channels, height, width), first.dtype
