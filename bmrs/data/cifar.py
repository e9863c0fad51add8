"""Reader of the binary and python versions of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bmrs.checks import one_line, shown
from bmrs.data.checks import MOST_BYTES, DataError, check_images_and_labels

_IMAGE_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_Images = tuple[Tensor, Tensor]


class _Format(NamedTuple):
    """What tells the official files of one data set from those of another."""

    title: str
    binary_folder: str
    python_folder: str
    train: tuple[str, ...]
    test: str
    test_share: float
    """Images of the test file for one of each training file."""
    label_bytes: int
    """Label bytes in front of the pixels of a record of the binary version."""
    label_byte: int
    labels_key: bytes
    num_classes: int


_CIFAR10 = _Format(
    title="CIFAR-10",
    binary_folder="cifar-10-batches-bin",
    python_folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    test_share=1,
    label_bytes=1,
    label_byte=0,
    labels_key=b"labels",
    num_classes=10,
)
_CIFAR100_COARSE = _Format(
    title="CIFAR-100",
    binary_folder="cifar-100-binary",
    python_folder="cifar-100-python",
    train=("train",),
    test="test",
    test_share=0.2,
    label_bytes=2,
    label_byte=0,
    labels_key=b"coarse_labels",
    num_classes=20,
)
_CIFAR100_FINE = _CIFAR100_COARSE._replace(label_byte=1, labels_key=b"fine_labels", num_classes=100)


def read_cifar10(folder: Path) -> tuple[_Images, _Images]:
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
    return _read(folder, _CIFAR10)


def read_cifar100(folder: Path, *, coarse: bool = False) -> tuple[_Images, _Images]:
    """Read CIFAR-100 from the folder of its official archive.

    Args:
        folder: `cifar-100-binary` or `cifar-100-python`, or the folder that holds one of them; with both, the
            binary version is read.
        coarse: the labels are the 20 superclasses instead of the 100 classes.

    Returns:
        As `read_cifar10`.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        DataError: a file is truncated, not of its version, has a label out of range, or there is not one test image
            for five training images.
    """
    return _read(folder, _CIFAR100_COARSE if coarse else _CIFAR100_FINE)


def _read(folder: Path, form: _Format) -> tuple[_Images, _Images]:
    place, binary = _find_version(folder, form)
    parts: list[_Images] = []
    for name in (*form.train, form.test):
        path = place / (f"{name}.bin" if binary else name)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing; {form.title} has {', '.join(form.train)} and {form.test}"
            )
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
        images, labels = _read_binary(path, form) if binary else _read_python(path, form)
        check_images_and_labels(images, labels, path, num_classes=form.num_classes)
        # The official files have fixed shares of the images; other ones show a file cut between two records.
        share = form.test_share if name == form.test else 1
        if parts and len(images) != share * len(parts[0][0]):
            raise DataError(
                f"{path}: {len(images)} images, expected {share * len(parts[0][0]):g} "
                f"{'as in the first batch' if share == 1 else f'for the {len(parts[0][0])} training images'}"
            )
        parts.append((images, labels))
    train_images, train_labels = zip(*parts[:-1], strict=True)
    return (torch.cat(train_images), torch.cat(train_labels)), parts[-1]


def _find_version(folder: Path, form: _Format) -> tuple[Path, bool]:
    """Return the folder of the files, and whether they are of the binary version."""
    first = form.train[0]
    for place, binary in (
        (folder / form.binary_folder, True),
        (folder, True),
        (folder / form.python_folder, False),
        (folder, False),
    ):
        if (place / (f"{first}.bin" if binary else first)).is_file():
            return place, binary
    raise FileNotFoundError(
        f"{folder}: no {form.title} here; expected {first}.bin (binary version) or {first} "
        f"(python version), in this folder or in its {form.binary_folder} or {form.python_folder}"
    )


def _read_binary(path: Path, form: _Format) -> _Images:
    content = np.fromfile(path, dtype=np.uint8)
    record = form.label_bytes + _PIXELS
    if not len(content) or len(content) % record:
        label = "one label byte" if form.label_bytes == 1 else f"{form.label_bytes} label bytes"
        raise DataError(
            f"{path}: truncated or no {form.title} batch: {len(content)} bytes, expected a multiple of {record} "
            f"({label} and {_PIXELS} pixel bytes an image)"
        )
    records = torch.from_numpy(content).view(-1, record)
    return records[:, form.label_bytes :].reshape(-1, *_IMAGE_SHAPE), records[:, form.label_byte].long()


def _read_python(path: Path, form: _Format) -> _Images:
    key = form.labels_key
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # a broken pickle can raise almost anything
        raise DataError(
            f"{path}: broken or truncated pickle ({type(error).__name__}: {one_line(error)})"
        ) from error

    if not isinstance(batch, dict) or not {b"data", key} <= batch.keys():
        raise DataError(f"{path}: expected a dictionary with the keys b'data' and {key!r}")
    data, labels = batch[b"data"], batch[key]
    if not isinstance(data, _Array):
        raise DataError(f"{path}: b'data' is {type(data).__name__}, expected uint8 of shape (N, {_PIXELS})")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: {key!r} is no list of integers")
    wrong = [label for label in labels if not 0 <= label < form.num_classes]
    if wrong:
        raise DataError(f"{path}: label {shown(wrong[0])}, expected labels from 0 to {form.num_classes - 1}")
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
            f"pickle refers to {one_line(module)}.{one_line(name)}, which CIFAR's official files do not"
        )


def _as_text(value: Any) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
