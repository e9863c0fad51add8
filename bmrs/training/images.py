"""The images that the options name, as a network takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bmrs.checks import one_line
from bmrs.data import DATASETS, Dataset, Split, TensorSplit, load_dataset, preprocess
from bmrs.data.augmentation import IMAGENET, normalization_of, resized
from bmrs.data.dataset import IMAGE_SIZE
from bmrs.models import NETWORKS
from bmrs.training.config import TrainConfig
from bmrs.training.run_folder import RunError

Progress = Callable[[int, int], None]

_LARGE = 64  # pixels
_SMALL = 2**30  # bytes of a split that is kept scaled; CIFAR-10 has 600 million


def load_images(config: TrainConfig, device: torch.device, progress: Progress | None = None) -> Dataset:
    """Read the images, and have them scaled on the device that they are used on.

    Those of small sets are scaled once and kept there, others a batch at a time.

    Args:
        config: the options.
        device: where batches go.
        progress: told how many image files have been read, of how many.

    Raises:
        DataError, FileNotFoundError: the data cannot be read.
        RunError: they do not go with the options.
    """
    size = image_size(config)
    data = load_dataset(
        config.data,
        None if config.data_dir is None else Path(config.data_dir),
        image_size=None if _is_factory(config.data) else size,
        seed=config.seed,
        workers=config.workers,
        skip_unreadable=config.skip_unreadable,
        progress=progress,
    )
    prepare = _preparation(config, data, size or data.image_size)

    def ready(split: Split) -> Split:
        scaled = 4 * len(split) * data.channels * (size or data.image_size or 0) ** 2  # bytes, float32
        if config.data in DATASETS and isinstance(split, TensorSplit) and scaled <= _SMALL:
            return TensorSplit(prepare(split.images.to(device)), split.labels.to(device))
        return split.prepared(prepare, device)

    return replace(data, train=ready(data.train), validation=ready(data.validation), test=ready(data.test))


def image_size(config: TrainConfig) -> int | None:
    """Return the height and width that images are brought to; None to leave that to the data.

    Small images stay so even for networks that are meant for larger ones, which take any size.
    """
    if config.image_size is not None:
        return config.image_size
    network = NETWORKS.get(config.model)
    if network is None or _is_factory(config.data):
        return None
    of_files = config.data.startswith("folder:")
    return network.image_size if of_files or network.image_size < _LARGE else None


def _is_factory(data: str) -> bool:
    return ":" in data and not data.startswith("folder:")


def _preparation(config: TrainConfig, data: Dataset, size: int | None) -> Callable[[Tensor], Tensor]:
    """Return what makes images that a network takes of images as they were read."""
    way = config.normalization
    if way is None:
        of_paper = config.data in DATASETS and config.weights is None
        way = "paper" if of_paper else "imagenet" if config.weights is not None else "data"
    if way == "paper":
        if config.data not in DATASETS:
            raise RunError(f"--normalization paper goes with --data {', '.join(DATASETS)} only")
        return lambda images: preprocess(images, name=config.data, image_size=size or IMAGE_SIZE)
    scale = IMAGENET if way == "imagenet" else normalization_of(data.train)
    if len(scale.mean) != data.channels:
        raise RunError(
            f"--normalization imagenet needs RGB images, but those of {one_line(config.data)} have {data.channels} "
            "channel: take --normalization data"
        )
    return lambda images: scale(images if size is None else resized(images, size))
