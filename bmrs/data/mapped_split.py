"""A split whose images are mapped from a file, and never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bmrs.data.split import Batch, Split


@dataclass(frozen=True)
class MappedSplit(Split):
    """Rows of an array on disk, read a batch at a time.

    Attributes:
        array: uint8 of shape (M, C, H, W), as `numpy.load(..., mmap_mode="r")` maps it.
        rows: int64 of shape (N,): which images of the array are this split's.
        labels: int64 of shape (N,), on the device that batches go to.
        prepare: makes float images of a batch of them, on that device; None leaves them as they are.
    """

    array: np.ndarray
    rows: Tensor
    labels: Tensor
    prepare: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        shape = self.array.shape if self.prepare is None else self.examples(1).shape
        channels, height, width = shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.labels.device

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """Iterate over the batches of the images with these indices, in their order."""
        for chosen in indices:
            # By NumPy, which copies these rows alone; a tensor of read-only memory could be written to, and crash.
            images = torch.from_numpy(self.array[self.rows[chosen.cpu()].numpy()]).to(self.device)
            images = images if self.prepare is None else self.prepare(images)
            yield Batch(images, self.labels[chosen.to(self.device)])

    def fingerprint(self) -> list[Tensor]:
        """Return the labels."""
        return [self.labels]

    def prepared(self, prepare: Callable[[Tensor], Tensor] | None, device: torch.device) -> MappedSplit:
        """Return the same images, made float on a device by a function of a batch."""
        return replace(self, labels=self.labels.to(device), prepare=prepare)

    def part(self, indices: Tensor) -> MappedSplit:
        """Return the images with these indices, int64 of shape (N,), without reading them."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices.to(self.device)])
