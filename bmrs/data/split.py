"""The splits of a data set: what training asks of them, and those whose images are one tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images and their labels.

    Attributes:
        images: float, shape (N, C, H, W), as a network takes them.
        labels: int64 of shape (N,), each in [0, number of classes).
    """

    images: Tensor
    labels: Tensor


class Split(ABC):
    """Images that are trained on, or chosen by, or measured with: read a batch at a time, wherever they lie."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where batches are."""

    @abstractmethod
    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """Iterate over the batches of the images with these indices, in their order.

        Args:
            indices: int64 of shape (N,) for each batch, N > 0, in [0, number of images).
        """

    @abstractmethod
    def fingerprint(self) -> list[Tensor]:
        """Return tensors that tell these images from others, without reading all of them."""

    @abstractmethod
    def prepared(self, prepare: Callable[[Tensor], Tensor] | None, device: torch.device) -> Split:
        """Return the same images as this split's, made float on a device by a function of a batch.

        The function replaces the one that the split has, and must give the same for the same images.
        """

    @abstractmethod
    def part(self, indices: Tensor) -> Split:
        """Return the images with these indices, int64 of shape (N,), in their order."""

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Iterate over all images in their order."""
        return self.batches(torch.arange(len(self)).split(batch_size))

    def examples(self, count: int) -> Tensor:
        """Return the first images, or all if there are fewer, of shape (count, C, H, W)."""
        return next(self.batches([torch.arange(min(count, len(self)))])).images


@dataclass(frozen=True)
class TensorSplit(Split):
    """Images in one tensor, in memory or mapped from a file.

    Attributes:
        images: shape (N, C, H, W); uint8 as read, float32 once preprocessed. They may lie elsewhere than the labels.
        labels: int64 of shape (N,), on the device that batches go to.
        prepare: makes float images of a batch of them, on that device; None if they are what a network takes.
    """

    images: Tensor
    labels: Tensor
    prepare: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        shape = self.images.shape if self.prepare is None else self.examples(1).shape
        channels, height, width = shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.labels.device

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """Iterate over the batches of the images with these indices, in their order."""
        for chosen in indices:
            images = self.images[chosen.to(self.images.device)].to(self.device)
            images = images if self.prepare is None else self.prepare(images)
            yield Batch(images, self.labels[chosen.to(self.device)])

    def fingerprint(self) -> list[Tensor]:
        """Return the labels; images are preprocessed, which may round otherwise on another device."""
        return [self.labels]

    def prepared(self, prepare: Callable[[Tensor], Tensor] | None, device: torch.device) -> TensorSplit:
        """Return the same images, made float on a device by a function of a batch."""
        return TensorSplit(self.images, self.labels.to(device), prepare)

    def part(self, indices: Tensor) -> TensorSplit:
        """Return a copy of the images with these indices."""
        return TensorSplit(
            self.images[indices.to(self.images.device)], self.labels[indices.to(self.device)], self.prepare
        )
