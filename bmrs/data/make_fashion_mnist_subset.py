"""Make the embedded subset of Fashion-MNIST from the official files.

    python -m bmrs.data.make_fashion_mnist_subset SOURCE_FOLDER [DESTINATION]

Takes 600 training and 200 test images of each class, by a fixed seed and in their original order, and writes
them as official IDX files with the same bytes at every run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bmrs.data.checks import NUM_CLASSES, DataError
from bmrs.data.idx import read_idx_images, write_idx

_SEED = 0
_IMAGES_PER_CLASS = {"train": 600, "t10k": 200}


def make_subset(source: Path, destination: Path) -> None:
    """Read the official files in `source` and write the subset's four files into `destination`.

    Raises:
        FileNotFoundError: an official file is missing.
        DataError: an official file is broken or has too few images of a class.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for split, count in _IMAGES_PER_CLASS.items():
        images, labels = read_idx_images(source, split)
        chosen = _choose(labels, count, source)
        write_idx(destination / f"{split}-images-idx3-ubyte.gz", images[chosen].squeeze(1))
        write_idx(destination / f"{split}-labels-idx1-ubyte.gz", labels[chosen].to(torch.uint8))


def _choose(labels: Tensor, count: int, source: Path) -> Tensor:
    """Return the sorted indices of `count` images of each class."""
    # NumPy promises a bit generator's raw stream for good, but not what its shuffles make of it.
    keys = torch.from_numpy(np.random.PCG64(_SEED).random_raw(len(labels)).view(np.int64))
    chosen = []
    for label in range(NUM_CLASSES):
        members = (labels == label).nonzero().squeeze(1)
        if len(members) < count:
            raise DataError(f"{source}: {len(members)} images of class {label}, expected at least {count}")
        chosen.append(members[keys[members].argsort()[:count]])
    return torch.cat(chosen).sort().values


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Make the embedded subset of Fashion-MNIST.")
    parser.add_argument("source", type=Path, help="folder with the four official files of Fashion-MNIST")
    parser.add_argument(
        "destination", type=Path, nargs="?", default=Path(__file__).parent / "fashion_mnist_subset"
    )
    arguments = parser.parse_args(argv)
    make_subset(arguments.source, arguments.destination)


if __name__ == "__main__":
    main()
