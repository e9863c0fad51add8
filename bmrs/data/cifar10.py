"""Reader of CIFAR-10's binary and python versions."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmrs.checks import one_line, shown
from bmrs.data.checks import MOST_BYTES, NUM_CLASSES, DataError, check_images_and_labels

_TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST_BATCH = "test_batch"
_IMAGE_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_RECORD = 1 + _PIXELS
_Reader = Callable[[Path], tuple[Tensor, Tensor]]


def read_cifar10(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read CIFAR-10 from the folder of its official archive.

    Args:
        folder: `cifar-10-batches-bin` or `cifar-10-batches-py`, or the folder that holds one of them; with
            both, the binary version is read.

    Returns:
        `(train_images, train_labels), (test_images, test_labels)`; images are uint8 of shape (N, 3, 32, 32),
        labels int64 of shape (N,).

    Raises:
        FileNotFoundError: the folder or one of the six batches is missing.
        DataError: a batch is truncated, not of its version, of another length than the first, or has a
            label out of range.
    """
    place, suffix, read = _find_version(folder)
    batches: list[tuple[Tensor, Tensor]] = []
    for name in (*_TRAIN_BATCHES, _TEST_BATCH):
        path = place / f"{name}{suffix}"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing; CIFAR-10 has {', '.join(_TRAIN_BATCHES)} and {_TEST_BATCH}"
            )
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
        images, labels = read(path)
        check_images_and_labels(images, labels, path)
        # The official batches hold 10,000 images each; unequal lengths show a file cut between two records.
        if batches and len(images) != len(batches[0][0]):
            raise DataError(
                f"{path}: {len(images)} images, expected {len(batches[0][0])} as in the first batch"
            )
        batches.append((images, labels))
    train_images, train_labels = zip(*batches[:-1], strict=True)
    return (torch.cat(train_images), torch.cat(train_labels)), batches[-1]


def _find_version(folder: Path) -> tuple[Path, str, _Reader]:
    """Return the folder of the batches, the end of their names and the function that reads one."""
    for place, suffix, read in (
        (folder / "cifar-10-batches-bin", ".bin", _read_binary),
        (folder, ".bin", _read_binary),
        (folder / "cifar-10-batches-py", "", _read_python),
        (folder, "", _read_python),
    ):
        if (place / f"{_TRAIN_BATCHES[0]}{suffix}").is_file():
            return place, suffix, read
    raise FileNotFoundError(
        f"{folder}: no CIFAR-10 here; expected data_batch_1.bin (binary version) or data_batch_1 "
        "(python version), in this folder or in its cifar-10-batches-bin or cifar-10-batches-py"
    )


def _read_binary(path: Path) -> tuple[Tensor, Tensor]:
    content = np.fromfile(path, dtype=np.uint8)
    if not len(content) or len(content) % _RECORD:
        raise DataError(
            f"{path}: truncated or no CIFAR-10 batch: {len(content)} bytes, expected a multiple of {_RECORD} "
            "(one label byte and 3072 pixel bytes an image)"
        )
    records = torch.from_numpy(content).view(-1, _RECORD)
    return records[:, 1:].reshape(-1, *_IMAGE_SHAPE), records[:, 0].long()


def _read_python(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # a broken pickle can raise almost anything
        raise DataError(
            f"{path}: broken or truncated pickle ({type(error).__name__}: {one_line(error)})"
        ) from error

    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise DataError(f"{path}: expected a dictionary with the keys b'data' and b'labels'")
    data, labels = batch[b"data"], batch[b"labels"]
    if not isinstance(data, _Array):
        raise DataError(f"{path}: b'data' is {type(data).__name__}, expected uint8 of shape (N, {_PIXELS})")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: b'labels' is no list of integers")
    wrong = [label for label in labels if not 0 <= label < NUM_CLASSES]
    if wrong:
        raise DataError(f"{path}: label {shown(wrong[0])}, expected labels from 0 to {NUM_CLASSES - 1}")
    try:
        pixels = data.pixels()
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return pixels.view(-1, *_IMAGE_SHAPE), torch.tensor(labels, dtype=torch.int64)


class _DType:
    """Stands for numpy.dtype: its state, which NumPy would believe, is looked at and not used."""

    kind: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.kind = arguments[0] if arguments else None

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return _as_text(self.kind)


class _Array:
    """Stands for an array: shape, dtype and bytes as a pickle states them, put together once they have been checked."""

    _state: Any = None

    def __init__(self, *arguments: Any) -> None:
        if not arguments or arguments[0] is not _Array:
            raise DataError("pickle holds an array of another type than numpy.ndarray")

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def pixels(self) -> Tensor:
        """Return the values, uint8 of shape (N, 3072).

        Raises:
            DataError: they are others.
        """
        state = self._state
        if not isinstance(state, tuple) or len(state) != 5:
            raise DataError("b'data' is an array without shape, dtype and bytes")
        _, shape, dtype, is_fortran, content = state
        whole = isinstance(shape, tuple) and all(type(size) is int for size in shape)
        if not whole or not isinstance(dtype, _DType) or _as_text(dtype.kind) not in ("u1", "|u1", "uint8"):
            raise DataError(
                f"b'data' is {shown(dtype)} of shape {shown(shape)}, expected uint8 of shape (N, {_PIXELS})"
            )
        if len(shape) != 2 or shape[1] != _PIXELS or shape[0] < 0:
            raise DataError(
                f"b'data' is uint8 of shape {shown(shape)}, expected uint8 of shape (N, {_PIXELS})"
            )
        if not isinstance(content, bytes) or len(content) != shape[0] * _PIXELS:
            raise DataError(
                f"b'data' has not the {shown(shape[0] * _PIXELS)} bytes of its shape {shown(shape)}"
            )
        values = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if is_fortran else "C")
        return torch.from_numpy(values.copy(order="C"))


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that knows arrays and plain containers, and calls nothing else.

    The official files name `numpy.core.multiarray._reconstruct`, `numpy.ndarray` and `numpy.dtype`. What stands in for
    them is never NumPy's own: it takes the state of a dtype and of an array on trust, with which a file could have it
    read and write any memory.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray")):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _DType
        raise DataError(
            f"pickle refers to {one_line(module)}.{one_line(name)}, which CIFAR-10's official files do not"
        )


def _as_text(value: Any) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
