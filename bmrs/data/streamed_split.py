"""A split that a data set of the user's own gives, one example at a time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmrs.checks import one_line, shown
from bmrs.data.checks import DataError
from bmrs.data.split import Batch, Split
from bmrs.data.workers import read_in_order

# Few examples are read before a process has started.
_FEW = 64


@dataclass(frozen=True)
class StreamedSplit(Split):
    """Examples of a map-style data set, read in worker processes.

    What a data set draws at random, by `random`, NumPy's global generator or torch's, depends on the seed, on the
    batch's indices and on the place in the batch alone: it is the same with any number of processes, and after a run
    has been resumed; in another order of the images it is another.

    Attributes:
        name: what errors call it.
        dataset: gives `(image, label)` for an index; the image is a tensor or a NumPy array of shape (C, H, W), uint8
            or floating, or a PIL image; the label an integer in [0, num_classes).
        rows: int64 of shape (N,): which examples of the data set are this split's.
        shape: channels, height and width of every image as the data set gives it.
        dtype: `torch.uint8` or `torch.float32`: what images are, or are made of floating ones.
        num_classes: number of classes.
        workers: processes that read; 0 for the one that trains.
        seed: of what the data set draws.
        target: the device that batches go to.
        prepare: makes float images of a batch of them, on that device; None leaves them as they are.
    """

    name: str
    dataset: Any
    rows: Tensor
    shape: tuple[int, int, int]
    dtype: torch.dtype
    num_classes: int
    workers: int = 0
    seed: int = 0
    target: torch.device = field(default_factory=lambda: torch.device("cpu"))
    prepare: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        if self.prepare is None:
            return self.shape
        channels, height, width = self.examples(1).shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.target

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """Iterate over the batches of the images with these indices, in their order.

        Raises:
            DataError: the data set fails, or gives other examples than at the start.
        """
        source = _Source(self.name, self.dataset, self.seed, self.shape, self.dtype, self.num_classes)
        keys = (self.rows[chosen.cpu()].tolist() for chosen in indices)
        for answer in read_in_order(source, keys, workers=self.workers, where=self.name):
            if isinstance(answer, str):
                raise DataError(answer)
            images, labels = (values.to(self.target) for values in answer)
            yield Batch(images if self.prepare is None else self.prepare(images), labels)

    def examples(self, count: int) -> Tensor:
        """Return the first images, or all if there are fewer, of shape (count, C, H, W)."""
        here = replace(self, workers=0) if count <= _FEW else self
        return Split.examples(here, count)

    def fingerprint(self) -> list[Tensor]:
        """Return the number of images and the labels of some of them."""
        some = torch.linspace(0, len(self) - 1, min(len(self), 16)).long()
        (batch,) = replace(self, workers=0, prepare=None).batches([some])
        return [torch.tensor(len(self), device=self.target), batch.labels]

    def prepared(self, prepare: Callable[[Tensor], Tensor] | None, device: torch.device) -> StreamedSplit:
        """Return the same images, made float on a device by a function of a batch."""
        return replace(self, target=device, prepare=prepare)

    def part(self, indices: Tensor) -> StreamedSplit:
        """Return the examples with these indices, int64 of shape (N,), without reading them."""
        return replace(self, rows=self.rows[indices])


@dataclass(frozen=True)
class _Source:
    """Gives the batch of a list of indices, or what is wrong with it; it runs in the worker processes."""

    name: str
    dataset: Any
    seed: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    num_classes: int

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | str:
        images = torch.empty((len(indices), *self.shape), dtype=self.dtype)
        labels = torch.empty(len(indices), dtype=torch.int64)
        try:
            with own_random_numbers():
                for place, index in enumerate(indices):
                    seed_all(f"{self.seed} {place} {indices}")
                    images[place], labels[place] = self._example(index, expected=images[0])
        except DataError as error:
            return str(error)
        return images, labels

    def _example(self, index: int, *, expected: Tensor) -> tuple[Tensor, int]:
        image, label = example(self.dataset, index, where=self.name)
        check_label(label, self.num_classes, f"{self.name}[{index}]")
        if image.shape != expected.shape or image.dtype != expected.dtype:
            raise DataError(
                f"{self.name}[{index}]: an image {kind_of(image)}, expected one {kind_of(expected)} as in the first"
            )
        return image, label


def example(dataset: Any, index: int, *, where: str) -> tuple[Tensor, int]:
    """Return an example of a data set: its image, uint8 or float32 of shape (C, H, W), and its label.

    Raises:
        DataError: the data set fails, or gives something else; the message names `where` and the index.
    """
    name = f"{where}[{index}]"
    try:
        pair = dataset[index]
    except Exception as error:  # it is the user's code
        raise DataError(f"{name}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"{name}: {shown(type(pair).__name__)}, expected a pair (image, label)")
    return _image(pair[0], name), _label(pair[1], name)


def check_label(label: int, num_classes: int, name: str) -> None:
    """Raise DataError unless a label is in [0, num_classes)."""
    if not 0 <= label < num_classes:
        raise DataError(f"{name}: label {shown(label)}, expected labels from 0 to {num_classes - 1}")


def _image(value: Any, name: str) -> Tensor:
    expected = "expected a tensor or an array of shape (C, H, W), uint8 or floating, or a PIL image"
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 and not np.issubdtype(value.dtype, np.floating):
            raise DataError(f"{name}: an image of {value.dtype}, {expected}")
        image = torch.from_numpy(np.array(value))
    elif isinstance(value, Tensor):
        image = value.detach().cpu()
    elif hasattr(value, "getbands") and hasattr(value, "convert"):  # Pillow's, which need not be installed
        mode = "L" if value.mode in ("1", "L", "LA") else "RGB"
        pixels = np.array(value.convert(mode))
        image = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
    else:
        raise DataError(f"{name}: an image of type {type(value).__name__}, {expected}")
    if (
        image.dim() != 3
        or not image.numel()
        or (image.dtype != torch.uint8 and not image.is_floating_point())
    ):
        raise DataError(f"{name}: an image {kind_of(image)}, {expected}")
    if image.shape[0] > 4 >= image.shape[2]:
        raise DataError(f"{name}: an image {kind_of(image)}, whose channels seem to be last; {expected}")
    if image.dtype == torch.uint8:
        return image
    image = image.float()
    if not image.isfinite().all():
        raise DataError(f"{name}: an image with NaN or infinity")
    return image


def _label(value: Any, name: str) -> int:
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, (int, np.integer)):
        raise DataError(f"{name}: label {shown(value)}, expected an integer")
    return int(value)


def kind_of(image: Tensor) -> str:
    """Return the shape and dtype of an image, for a message."""
    return f"of shape {tuple(image.shape)} and {str(image.dtype).removeprefix('torch.')}"


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Have Python's, NumPy's and torch's random numbers go on afterwards as if none had been drawn meanwhile."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what data sets draw from)
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def seed_all(key: str) -> None:
    """Have Python's, NumPy's and torch's random numbers on CPUs begin where a text says."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed reaches for GPUs as well
