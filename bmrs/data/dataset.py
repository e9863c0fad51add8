"""Image classification data: reading by name, from folders or from the user's code, splitting and preprocessing."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bmrs.checks import check_choice, check_integer
from bmrs.data.checks import NUM_CLASSES, DataError
from bmrs.data.cifar import read_cifar10, read_cifar100
from bmrs.data.idx import read_idx_images
from bmrs.data.image_cache import Progress, default_cache, read_cached
from bmrs.data.image_folders import ImageListing, SplitName, list_class_folders, list_tiny_imagenet
from bmrs.data.mapped_split import MappedSplit
from bmrs.data.own_data import read_own
from bmrs.data.split import Split, TensorSplit
from bmrs.data.workers import num_workers
from bmrs.names import DATASETS, EMBEDDED, FOLDER, MORE_DATASETS, check_spec

IMAGE_SIZE = 32
"""Height and width of a network's input."""

_CLASSES: dict[str, int] = {**dict.fromkeys(DATASETS, NUM_CLASSES), "cifar100": 100, "cifar100-coarse": 20}
_SIZE_OF_FILES = 64
# Of all seeds, so that runs with several of them are measured with the same images.
_SEED_OF_TEST = 0


@dataclass(frozen=True)
class Dataset:
    """Images of classes in three splits.

    Attributes:
        name: what was asked for.
        num_classes: number of classes.
        train: images to learn from.
        validation: images to choose by.
        test: images to measure with.
        image_size: height and width, in pixels, that a network is to be given; None for images of the user's own data
            sets, which stay as they are.
        classes: names of the classes, where they are known.
        notes: what the user should know of how the data were read, a line each.
    """

    name: str
    num_classes: int
    train: Split
    validation: Split
    test: Split
    image_size: int | None = IMAGE_SIZE
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Number of colour channels of every image."""
        return self.train.image_shape[0]


def load_dataset(
    name: str,
    folder: str | Path | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    validation_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    workers: int | None = None,
    cache: str | Path | None = None,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Read a data set, and split off what it lacks.

    Args:
        name: one of

            - `DATASETS` and `MORE_DATASETS`, in their official file formats. `"fashion-mnist-subset"` comes with the
              package: 6,000 training and 2,000 test images of Fashion-MNIST.
            - `"folder:DIR"`: image files in a folder for each class, which lie in DIR or in its train, val and test.
            - `"package.module:factory"`: a function without arguments that returns a dict or an object with the
              map-style data sets `train`, `test` and, if there is one, `validation`; and `num_classes`, if not
              `train.classes` has them. See `StreamedSplit` for what they give.
        folder: where the official files lie; none otherwise.
        image_size: height and width of the images for a network, in pixels. Image files are read at that size, 64 if
            it is not given; of other names it is noted in the result, 32 if it is not given. None for a factory.
        channels: 1 for grey or 3 for RGB image files; None for what most of them are.
        validation_fraction: share of the training images, in (0, 1), that goes to validation, where there are no
            validation images.
        test_fraction: likewise for test images, of folders. They are the same for all seeds.
        seed: seed of the random choice of validation images, and of what data sets of the user's own draw.
        workers: processes that read image files, or the user's own data; None for one a core, 0 for this one.
        cache: folder in which image files are kept as one array, for the next time; None for that of the user.
        skip_unreadable: whether image files that cannot be read are left out, with a note, instead of an error.
        progress: is told how many image files have been read, and of how many, where they are not in the cache.

    Returns:
        The splits as uint8 images (a factory's may be float32) and int64 labels, on the CPU; see `preprocess` and
        `bmrs.data.augmentation` for what a network takes.

    Raises:
        ValueError: `name` is unknown, `folder` missing or superfluous, or a number out of range.
        ImportError: there are image files to be read, and Pillow is not installed.
        FileNotFoundError: the folder or a file is missing.
        DataError: a file or a factory is not what it has to be.
    """
    check_spec(name)
    for option, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise ValueError(f"{option} must be between 0 and 1, got {fraction}")
    if image_size is not None:
        check_integer("image_size", image_size, minimum=1)
    check_choice("channels", channels, (None, 1, 3))
    readers = num_workers(workers)
    official = name in DATASETS or name in MORE_DATASETS
    if (folder is None) != (name == EMBEDDED or not official):
        raise ValueError(
            f"folder is {str(folder)!r}, but {name} {'comes with the package' if official else 'says where it is'}"
            if folder is not None
            else f"folder is missing: {name} is read from the folder of its official files"
        )

    if name.startswith(FOLDER) or name == "tiny-imagenet":
        if name == "tiny-imagenet":
            assert folder is not None, "checked above"
            listing = list_tiny_imagenet(Path(folder))
        else:
            # No shell replaces a ~ that stands behind "folder:".
            listing = list_class_folders(Path(name.removeprefix(FOLDER)).expanduser())
        return _of_files(
            name,
            listing,
            image_size=_SIZE_OF_FILES if image_size is None else image_size,
            channels=channels,
            fractions={"test": test_fraction, "validation": validation_fraction},
            seed=seed,
            workers=readers,
            cache=default_cache() if cache is None else Path(cache),
            skip_unreadable=skip_unreadable,
            progress=progress,
        )
    if not official:
        if image_size is not None or channels is not None:
            raise ValueError(f"image_size and channels must be None for {name}, which decides them itself")
        own = read_own(name, workers=readers, seed=seed)
        whole: Split = own.splits["train"]
        train, validation = (
            (whole, own.splits["validation"])
            if "validation" in own.splits
            else _split(whole, validation_fraction, seed)
        )
        return Dataset(
            name,
            own.num_classes,
            _mixed(train, seed),
            validation,
            own.splits["test"],
            image_size=None,
            notes=own.notes,
        )

    if folder is None:
        with importlib.resources.as_file(importlib.resources.files("bmrs.data")) as package:
            all_train, test = _read("fashion-mnist", package / "fashion_mnist_subset")
    else:
        all_train, test = _read(name, Path(folder))
    train, validation = _split(all_train, validation_fraction, seed)
    return Dataset(
        name, _CLASSES[name], train, validation, test, IMAGE_SIZE if image_size is None else image_size
    )


def preprocess(images: Tensor, *, name: str, image_size: int = IMAGE_SIZE) -> Tensor:
    """Return images as the paper feeds them to a network (appendix C).

    They are resized (bilinear, antialiased; to 32×32 in the paper), then scaled: (x − 127)/255 for MNIST and
    Fashion-MNIST, (x/255 − 0.5)/0.5 for CIFAR-10.

    Args:
        images: uint8 of shape (N, C, H, W).
        name: the data set's name, one of `DATASETS`.
        image_size: height and width of the result.

    Returns:
        float32 of shape (N, C, image_size, image_size), on the device of `images`.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    pixels = images.float()
    if tuple(pixels.shape[-2:]) != (image_size, image_size):
        pixels = F.interpolate(pixels, size=(image_size, image_size), mode="bilinear", antialias=True)
    return (pixels / 255 - 0.5) / 0.5 if name == "cifar10" else (pixels - 127) / 255


def _read(name: str, folder: Path) -> tuple[TensorSplit, TensorSplit]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the official files of {name}")
    if name == "cifar10":
        train, test = read_cifar10(folder)
    elif name.startswith("cifar100"):
        train, test = read_cifar100(folder, coarse=name == "cifar100-coarse")
    else:
        train, test = read_idx_images(folder, "train"), read_idx_images(folder, "t10k")
    return TensorSplit(*train), TensorSplit(*test)


def _of_files(
    name: str,
    listing: ImageListing,
    *,
    image_size: int,
    channels: int | None,
    fractions: dict[SplitName, float],
    seed: int,
    workers: int,
    cache: Path,
    skip_unreadable: bool,
    progress: Progress | None,
) -> Dataset:
    """Return the images of a listing; what splits it lacks are cut off the training images, class by class."""
    read = read_cached(
        listing,
        image_size=image_size,
        channels=channels,
        cache=cache,
        workers=workers,
        skip_unreadable=skip_unreadable,
        progress=progress,
    )
    everything = MappedSplit(read.images, torch.arange(len(read.labels)), read.labels)
    parts = torch.arange(len(read.labels)).split(list(read.sizes.values()))
    splits = {split: everything.part(rows) for split, rows in zip(read.sizes, parts, strict=True)}
    for split, fraction in fractions.items():
        if split not in splits:
            cut = _cut_by_class(
                splits["train"].labels,
                fraction,
                _SEED_OF_TEST if split == "test" else seed,
                what=f"{listing.root}, {split}",
                classes=listing.classes,
            )
            splits[split], splits["train"] = (splits["train"].part(rows) for rows in cut)
    return Dataset(
        name,
        len(listing.classes),
        _mixed(splits["train"], seed),
        splits["validation"],
        splits["test"],
        image_size,
        listing.classes,
        (*listing.notes(), *read.notes),
    )


def _cut_by_class(
    labels: Tensor, fraction: float, seed: int, *, what: str, classes: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Return the sorted indices of a share of each class, chosen at random, and those of the rest."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, title in enumerate(classes):
        members = (labels == label).nonzero().squeeze(1)
        number = max(1, round(len(members) * fraction))
        if number >= len(members):
            raise DataError(
                f"{what}: is cut off the training images, and class {title!r} has {len(members)} of them; expected 2 "
                "or more for each split"
            )
        chosen[members[torch.randperm(len(members), generator=generator)[:number]]] = True
    return chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1)


def _split(train: Split, validation_fraction: float, seed: int) -> tuple[Split, Split]:
    num_validation = round(len(train) * validation_fraction)
    if not 0 < num_validation < len(train):
        raise DataError(
            f"{len(train)} training images, {num_validation} of them for validation: "
            "expected at least one in each part"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train.part(order[num_validation:]), train.part(order[:num_validation])


def _mixed(split: Split, seed: int) -> Split:
    """Return the same images in random order, as files lie class by class and the first ones are taken as examples."""
    return split.part(torch.randperm(len(split), generator=torch.Generator().manual_seed(seed)))
