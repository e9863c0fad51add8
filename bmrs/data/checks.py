"""What every reader checks, and its error."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

NUM_CLASSES = 10
"""Classes of MNIST, Fashion-MNIST and CIFAR-10."""

MOST_BYTES = 2**30
"""Bytes that a data file may hold, uncompressed: six times those of the largest one that is read here."""


class DataError(ValueError):
    """A data file is not what its format says; the message names the file, what was found and expected."""


def check_images_and_labels(
    images: Tensor, labels: Tensor, path: Path, *, num_classes: int = NUM_CLASSES
) -> None:
    """Check that there is one label in range for each image, and an image at all.

    Args:
        images: images, the first dimension counts them.
        labels: labels, integers.
        path: the labels' file, named in the error.
        num_classes: labels are from 0 to one less.

    Raises:
        DataError: a check fails.
    """
    if not len(images):
        raise DataError(f"{path}: no images")
    if len(labels) != len(images):
        raise DataError(f"{path}: {len(labels)} labels for {len(images)} images, expected one each")
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        raise DataError(f"{path}: label {int(wrong[0])}, expected labels from 0 to {num_classes - 1}")
