"""Image files read once, and kept as one array that is mapped from the disk."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from bmrs.data.checks import DataError
from bmrs.data.image_files import UnreadableImageError, is_grey, read_image
from bmrs.data.image_folders import ImageListing, SplitName, counted
from bmrs.data.workers import read_in_order

_VERSION = 1
_PART = 32
# As many of the images, spread over all of them, say whether a set is grey or coloured.
_ASKED = 500

Progress = Callable[[int, int], None]
"""Of the number of images read and the number of all."""


@dataclass(frozen=True)
class CachedImages:
    """The images of a listing.

    Attributes:
        images: uint8 of shape (N, C, H, W), mapped from a file, read-only; the splits one after the other.
        labels: int64 of shape (N,).
        sizes: for each split, in their order, how many of the images are its.
        notes: what the user should know of how they were read, a line each.
    """

    images: np.ndarray
    labels: Tensor
    sizes: dict[SplitName, int]
    notes: tuple[str, ...]


def default_cache() -> Path:
    """Return the folder in which this user's programs keep what they can make again."""
    home = Path.home()
    if sys.platform == "win32":
        place = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        place = home / "Library" / "Caches"
    else:
        place = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return place / "bmrs"


def read_cached(
    listing: ImageListing,
    *,
    image_size: int,
    channels: int | None,
    cache: Path,
    workers: int,
    skip_unreadable: bool,
    progress: Progress | None = None,
) -> CachedImages:
    """Return the images of a listing, read anew only if one of its files has changed since the last time.

    Several processes may call this at once: one of them reads, the others wait for it. What an interruption or a full
    disk leaves is never taken for the images.

    Args:
        listing: the files.
        image_size: height and width, in pixels; see `bmrs.data.image_files.read_image`.
        channels: 1 or 3; None for what most images have.
        cache: the folder that the arrays are kept in.
        workers: processes that read; 0 for this one.
        skip_unreadable: whether images that cannot be read are left out, and said to be, instead of an error.
        progress: is told how many images have been read.

    Raises:
        DataError: images cannot be read, a class has none that can, or the cache cannot be written.
    """
    place = _place_of(listing, cache, image_size=image_size, channels=channels)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place.parent / ".lock"):
            index = _index_of(place)
            if index is None:
                for (
                    old
                ) in place.parent.iterdir():  # of files that have changed since, or left by a killed process
                    if old.is_dir():
                        shutil.rmtree(old, ignore_errors=True)
                reader = _Reader(listing, image_size, channels or _usual_channels(listing))
                index = _write(
                    place, reader, workers=workers, skip_unreadable=skip_unreadable, progress=progress
                )
            elif index["unreadable"] and not skip_unreadable:
                raise _unreadable(listing.root, index["unreadable"])
            images = np.load(place / "images.npy", mmap_mode="r")
    except OSError as error:
        raise DataError(
            f"{error.filename or place.parent}: images cannot be kept there ({error.strerror or error}); "
            "choose another folder with cache (bmrs train: XDG_CACHE_HOME)"
        ) from error
    return CachedImages(
        images, torch.tensor(index["labels"]), index["splits"], tuple(_notes(listing.root, index, images))
    )


class _Reader:
    """Reads the images of a listing, by their numbers."""

    def __init__(self, listing: ImageListing, image_size: int, channels: int) -> None:
        self.root = listing.root
        self.classes = listing.classes
        self.splits = {split: len(files) for split, files in listing.files.items()}
        self.files = [file for files in listing.files.values() for file in files]
        self.image_size = image_size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, numbers: range) -> list[tuple[np.ndarray | None, str, bool]]:
        """Return of each image its pixels, or why there are none, and whether it was made grey or coloured."""
        return [self._read(number) for number in numbers]

    def _read(self, number: int) -> tuple[np.ndarray | None, str, bool]:
        try:
            pixels, converted = read_image(
                self.root / self.files[number][0], image_size=self.image_size, channels=self.channels
            )
        except UnreadableImageError as error:
            return None, str(error), False
        return pixels, "", converted


def _write(
    place: Path, reader: _Reader, *, workers: int, skip_unreadable: bool, progress: Progress | None
) -> dict[str, Any]:
    """Read all images, write their array and its index in a folder that gets its name once whole; return the index."""
    image_shape = (reader.channels, reader.image_size, reader.image_size)
    total = len(reader)
    needed, free = total * math.prod(image_shape), shutil.disk_usage(place.parent).free
    if needed > free:
        raise DataError(
            f"{place.parent}: {total:,} images of {image_shape[1]}×{image_shape[2]} pixels take {needed / 1e9:,.1f} GB "
            f"there, and {free / 1e9:,.1f} GB are free; choose another folder with cache (bmrs train: "
            "XDG_CACHE_HOME) or smaller images"
        )
    kept: list[int] = []
    unreadable: list[tuple[str, str]] = []
    converted = 0
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
    try:
        with (temporary / "images.npy").open("wb") as file:
            header = _header((total, *image_shape))
            file.write(header)
            for index, (pixels, reason, was_converted) in enumerate(_all(reader, workers)):
                if pixels is None:
                    unreadable.append((reader.files[index][0], reason))
                else:
                    kept.append(index)
                    converted += was_converted
                    file.write(pixels.tobytes())
                if progress is not None:
                    progress(index + 1, total)
            if unreadable and not skip_unreadable:
                raise _unreadable(reader.root, unreadable)
            file.seek(0)
            file.write(_header((len(kept), *image_shape)))
            assert file.tell() == len(header), "NumPy pads headers to 128 bytes whatever the number of images"
            file.flush()
            os.fsync(file.fileno())
        index_of_kept = {
            "version": _VERSION,
            "classes": reader.classes,
            "splits": _sizes(reader, kept),
            "names": [reader.files[index][0] for index in kept],
            "labels": [reader.files[index][1] for index in kept],
            "unreadable": unreadable,
            "converted": converted,
        }
        (temporary / "index.json").write_text(json.dumps(index_of_kept), "utf-8")
        temporary.replace(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index_of_kept


def _all(reader: _Reader, workers: int) -> Iterator[tuple[np.ndarray | None, str, bool]]:
    """Iterate over what a reader gives, in order."""
    total = len(reader)
    parts = [range(start, min(start + _PART, total)) for start in range(0, total, _PART)]
    # Few images are read before a process has started.
    workers = min(workers, total // _PART)
    for part in read_in_order(reader, parts, workers=workers, where=str(reader.root)):
        yield from part


def _sizes(reader: _Reader, kept: Sequence[int]) -> dict[SplitName, int]:
    """Return how many images of each split could be read.

    Raises:
        DataError: a class has none in one of them.
    """
    sizes: dict[SplitName, int] = {}
    start = 0
    for split, count in reader.splits.items():
        labels = [reader.files[index][1] for index in kept if start <= index < start + count]
        lost = sorted({label for _, label in reader.files[start : start + count]} - set(labels))
        if lost:
            names = [reader.classes[label] for label in lost]
            raise DataError(f"{reader.root}: no image of {counted(names, 'class')} can be read in {split}")
        sizes[split] = len(labels)
        start += count
    return sizes


def _unreadable(root: Path, images: Sequence[Sequence[str]]) -> DataError:
    found = counted([f"{name}: {reason}" for name, reason in images], "image")
    return DataError(
        f"{root}: cannot read {found}; repair or remove them, or leave them out with skip_unreadable "
        "(bmrs train: --skip-unreadable true)"
    )


def _notes(root: Path, index: dict[str, Any], images: np.ndarray) -> Iterator[str]:
    if index["unreadable"]:
        names = [name for name, _ in index["unreadable"]]
        yield f"{root}: left out {counted(names, 'image')} that cannot be read"
    if index["converted"]:
        change = "grey and made RGB" if images.shape[1] == 3 else "coloured and made grey"
        yield f"{root}: {index['converted']:,} of {len(images):,} images were {change}"


def _usual_channels(listing: ImageListing) -> int:
    """Return 1 if most images are grey, else 3."""
    files = [file for files in listing.files.values() for file in files]
    asked = files[:: max(1, len(files) // _ASKED)]
    answers = [is_grey(listing.root / name) for name, _ in asked]
    return 1 if answers.count(True) > answers.count(False) else 3


def _place_of(listing: ImageListing, cache: Path, *, image_size: int, channels: int | None) -> Path:
    """Return the folder of an array: its parent is that of the listing's folder, its name changes with the files."""
    root = os.path.realpath(listing.root)
    kind = hashlib.blake2b(digest_size=8)
    kind.update(f"{_VERSION} {image_size} {channels} ".encode() + os.fsencode(root))
    files = hashlib.blake2b(digest_size=16)
    files.update(
        repr((listing.classes, {split: len(files) for split, files in listing.files.items()})).encode()
    )
    for images in listing.files.values():
        for name, label in images:
            try:
                state = os.stat(os.path.join(root, name))
                files.update(os.fsencode(name) + f"\0{label} {state.st_size} {state.st_mtime_ns}\n".encode())
            except OSError:  # said by the one that reads it
                files.update(os.fsencode(name) + b"\n")
    return cache / "images" / f"{os.path.basename(root)[:40]}-{kind.hexdigest()}" / files.hexdigest()


def _index_of(place: Path) -> dict[str, Any] | None:
    """Return the index of an array, None if there is none or one of them is damaged."""
    try:
        index = json.loads((place / "index.json").read_text("utf-8"))
        images = np.load(place / "images.npy", mmap_mode="r")
        counts = {len(images), len(index["labels"]), sum(index["splits"].values())}
        whole = index["version"] == _VERSION and images.ndim == 4 and len(counts) == 1
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index if whole else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()
