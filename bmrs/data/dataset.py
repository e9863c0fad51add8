"""Image classification data as tensors: reading by name, splitting and preprocessing."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bmrs.data.checks import NUM_CLASSES, DataError
from bmrs.data.cifar10 import read_cifar10
from bmrs.data.idx import read_idx_images
from bmrs.data.split import Split, TensorSplit

EMBEDDED: Final = "fashion-mnist-subset"
"""The name of the data that come with the package."""

DataName: TypeAlias = Literal["fashion-mnist-subset", "mnist", "fashion-mnist", "cifar10"]

DATASETS: tuple[DataName, ...] = get_args(DataName)
"""The names that `load_dataset` knows."""

IMAGE_SIZE = 32
"""Height and width of a network's input."""


@dataclass(frozen=True)
class Dataset:
    """A named data set in its three splits."""

    name: str
    num_classes: int
    train: Split
    validation: Split
    test: Split

    @property
    def channels(self) -> int:
        """Number of colour channels of every image."""
        return self.train.image_shape[0]


def load_dataset(
    name: str, folder: str | Path | None = None, *, validation_fraction: float = 0.2, seed: int = 0
) -> Dataset:
    """Read a data set in its official file format and split off validation images.

    Args:
        name: one of `DATASETS`. `"fashion-mnist-subset"` comes with the package: 6,000 training and 2,000
            test images of Fashion-MNIST.
        folder: where the official files lie; none for the embedded data.
        validation_fraction: share of the training images, in (0, 1), that goes to validation.
        seed: seed of the random choice of validation images.

    Returns:
        The splits as uint8 images and int64 labels; see `preprocess` for what a network takes.

    Raises:
        ValueError: `name` is unknown, `folder` missing or superfluous, or the fraction out of range.
        FileNotFoundError: the folder or a file is missing.
        DataError: a file is not what its format says.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if (folder is None) != (name == EMBEDDED):
        raise ValueError(
            f"folder is {str(folder)!r}, but {name} comes with the package"
            if name == EMBEDDED
            else f"folder is missing: {name} is read from the folder of its official files"
        )

    if folder is None:
        with importlib.resources.as_file(importlib.resources.files("bmrs.data")) as package:
            train, test = _read("fashion-mnist", package / "fashion_mnist_subset")
    else:
        train, test = _read(name, Path(folder))
    train, validation = _split(train, validation_fraction, seed)
    return Dataset(name=name, num_classes=NUM_CLASSES, train=train, validation=validation, test=test)


def preprocess(images: Tensor, *, name: str) -> Tensor:
    """Return images as the paper feeds them to a network (appendix C).

    They are resized to 32×32 (bilinear, antialiased), then scaled: (x − 127)/255 for MNIST and Fashion-MNIST,
    (x/255 − 0.5)/0.5 for CIFAR-10.

    Args:
        images: uint8 of shape (N, C, H, W).
        name: the data set's name, one of `DATASETS`.

    Returns:
        float32 of shape (N, C, 32, 32), on the device of `images`.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    pixels = images.float()
    if tuple(pixels.shape[-2:]) != (IMAGE_SIZE, IMAGE_SIZE):
        pixels = F.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
    return (pixels / 255 - 0.5) / 0.5 if name == "cifar10" else (pixels - 127) / 255


def _read(name: str, folder: Path) -> tuple[TensorSplit, TensorSplit]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the official files of {name}")
    if name == "cifar10":
        train, test = read_cifar10(folder)
    else:
        train, test = read_idx_images(folder, "train"), read_idx_images(folder, "t10k")
    return TensorSplit(*train), TensorSplit(*test)


def _split(train: TensorSplit, validation_fraction: float, seed: int) -> tuple[TensorSplit, TensorSplit]:
    num_validation = round(len(train) * validation_fraction)
    if not 0 < num_validation < len(train):
        raise DataError(
            f"{len(train)} training images, {num_validation} of them for validation: "
            "expected at least one in each part"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    validation, rest = order[:num_validation], order[num_validation:]
    return TensorSplit(train.images[rest], train.labels[rest]), TensorSplit(
        train.images[validation], train.labels[validation]
    )
