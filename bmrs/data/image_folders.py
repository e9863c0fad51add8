"""Folders of images: which files belong to which class and split, without opening any of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from bmrs.data.checks import DataError
from bmrs.data.image_files import image_suffixes

SplitName: TypeAlias = Literal["train", "validation", "test"]

# In any case of letters, lest "Train" and "Test" be taken for two classes.
_SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
_LISTED = 5


@dataclass
class ImageListing:
    """The image files of a data set.

    Attributes:
        root: the folder.
        classes: names of the classes; a label is a place in them.
        files: for each split that the folder has, the paths within `root` and the labels, in the order of the names.
        ignored: paths within `root` of files that are hidden or of no image type.
        stray: paths within `root` of images that lie where there is no class.
    """

    root: Path
    classes: tuple[str, ...]
    files: dict[SplitName, list[tuple[str, int]]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Return what the user should know of files that are left out, a line each."""
        notes = []
        if self.ignored:
            notes.append(f"{self.root}: left out {counted(self.ignored, 'file')}, hidden or of no image type")
        if self.stray:
            notes.append(
                f"{self.root}: left out {counted(self.stray, 'image')}, which lie in no class folder"
            )
        return notes


def list_class_folders(root: Path) -> ImageListing:
    """Return the images of a folder of class folders.

    The class folders lie in `root`, or in its `train`, `test` and `val` (also `valid` or `validation`), of which only
    `train` has to be there. Images may lie in folders within a class folder; symbolic links are followed.

    Raises:
        FileNotFoundError: there is no such folder.
        DataError: it has no images, no classes or one alone, a class without images, splits with different classes, or
            links in a circle.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such folder; expected one with a folder of images for each class"
        )
    if (root / "wnids.txt").is_file() and (root / "val").is_dir():
        raise DataError(f"{root}: this is TinyImageNet as it is distributed: read it as tiny-imagenet")
    folders = _folders(root)
    if not folders:
        listing = ImageListing(root, ())
        _take_loose(listing, root)
        found = f"{counted(listing.stray, 'image')} without classes" if listing.stray else "no images"
        raise DataError(f"{root}: {found}; expected a folder of images for each class")
    splits = _split_folders(root, folders)
    classes = tuple(_folders(splits["train"]))
    listing = ImageListing(root, classes)
    if splits["train"] != root:
        _take_loose(listing, root)
        unknown = [name for name in folders if name.lower() not in _SPLIT_NAMES]
        if unknown:
            raise DataError(
                f"{root}: {counted(unknown, 'folder')} beside train: expected train, val and test, "
                "or the classes' folders alone"
            )
    for split, folder in splits.items():
        found_classes = _folders(folder)
        if not found_classes:
            raise DataError(f"{folder}: no class folders; expected {split}/<class>/<image>")
        if split != "train":
            _check_same_classes(folder, classes, found_classes)
        _take_loose(listing, folder)
        listing.files[split] = []
        for label, name in enumerate(found_classes):
            files = [entry for entry in _walk(folder / name) if _takes(listing, entry)]
            if not files:
                raise DataError(f"{folder / name}: no images of this class; expected some, or no such folder")
            listing.files[split] += [(_within(root, entry), label) for entry in files]
    if len(classes) < 2:
        raise DataError(
            f"{splits['train']}: only the class {classes[0]!r}; expected a folder for each of 2 or more classes"
        )
    return listing


def list_tiny_imagenet(root: Path) -> ImageListing:
    """Return the images of TinyImageNet as it is distributed.

    That is `wnids.txt` with the classes, `train/<class>/images/` with training images, and `val/images/` with images
    whose classes are in `val/val_annotations.txt`. Those are the test images here, as the official ones have no labels.

    Args:
        root: `tiny-imagenet-200`, or the folder that holds it.

    Raises:
        FileNotFoundError: the folder or a part of it is missing.
        DataError: a list is broken, names an unknown class or a missing image, or a class has no images.
    """
    inner = root / "tiny-imagenet-200"
    root = inner if inner.is_dir() else root
    listed, annotated = root / "wnids.txt", root / "val" / "val_annotations.txt"
    for path in (listed, annotated, root / "train", root / "val" / "images"):
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: missing; TinyImageNet has wnids.txt, train, val/images and val/val_annotations.txt"
            )
    classes = tuple(sorted({line.strip() for line in _lines(listed) if line.strip()}))
    if len(classes) < 2:
        raise DataError(f"{listed}: {len(classes)} classes, expected 2 or more, one a line")
    label_of = {name: label for label, name in enumerate(classes)}
    _check_same_classes(root / "train", classes, _folders(root / "train"))
    listing = ImageListing(root, classes, {"train": [], "test": []})
    for name, label in label_of.items():
        files = [entry for entry in _walk(root / "train" / name) if _takes(listing, entry)]
        if not files:
            raise DataError(f"{root / 'train' / name}: no images of this class")
        listing.files["train"] += [(_within(root, entry), label) for entry in files]
    for number, line in enumerate(_lines(annotated), start=1):
        parts = line.split("\t")
        if not line.strip():
            continue
        if len(parts) < 2 or parts[1] not in label_of or Path(parts[0]).name != parts[0]:
            raise DataError(
                f"{annotated}, line {number}: expected a file name, a tab and a class of wnids.txt, got {line[:80]!r}"
            )
        listing.files["test"].append((f"val/images/{parts[0]}", label_of[parts[1]]))
    if not listing.files["test"]:
        raise DataError(f"{annotated}: no images, expected one a line")
    # Boxes and lists are part of the distribution; nobody has to be told of them.
    listing.ignored = [path for path in listing.ignored if not path.endswith(".txt")]
    return listing


def _takes(listing: ImageListing, entry: os.DirEntry[str]) -> bool:
    """Return whether a file is an image by its name, and take note of it where it is not."""
    suffix = os.path.splitext(entry.name)[1].lower()
    # A link to nowhere is an image that cannot be read; a pipe would be waited for without end.
    is_file = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    if not entry.name.startswith(".") and suffix in image_suffixes() and is_file:
        return True
    listing.ignored.append(_within(listing.root, entry))
    return False


def _split_folders(root: Path, folders: Sequence[str]) -> dict[SplitName, Path]:
    """Return where the class folders of each split lie: in `root`, if there are no folders of splits."""
    splits: dict[SplitName, Path] = {}
    classes = [name for name in folders if name.lower() not in _SPLIT_NAMES]
    for name in folders:
        split = _SPLIT_NAMES.get(name.lower())
        # A class may be called "train", and then has pictures of trains.
        if split is None or (classes and not _folders(root / name)):
            continue
        if split in splits:
            raise DataError(
                f"{root}: {splits[split].name} and {name} both are {split} images; expected one of them"
            )
        splits[split] = root / name
    if splits and "train" not in splits:
        names = [folder.name for folder in splits.values()]
        raise DataError(f"{root}: {counted(names, 'folder')}, but no train; expected train, val and test")
    ordered: tuple[SplitName, ...] = ("train", "validation", "test")
    return {split: splits[split] for split in ordered if split in splits} or {"train": root}


def _check_same_classes(folder: Path, expected: Sequence[str], found: Sequence[str]) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        parts = [f"lacks {counted(missing, 'class')}"] if missing else []
        parts += [f"has {counted(unknown, 'class')} that the training images lack"] if unknown else []
        raise DataError(f"{folder}: {' and '.join(parts)}; expected the same classes in all splits")


def _take_loose(listing: ImageListing, folder: Path) -> None:
    """Take note of the files that lie beside the class folders."""
    for entry in _entries(folder):
        if not entry.is_dir() and _takes(listing, entry):
            listing.stray.append(_within(listing.root, entry))


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith(".")]


def _walk(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[os.DirEntry[str]]:
    """Iterate over the files of a folder and of those within it, in the order of their names."""
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"{folder}: a symbolic link to a folder that it lies in; remove it")
    for entry in _entries(folder):
        if not entry.is_dir():
            yield entry
        elif not entry.name.startswith("."):
            yield from _walk(entry.path, (*above, real))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            entry.is_dir()  # which a link in a circle is not able to say
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
    return found


def _within(root: Path, entry: os.DirEntry[str]) -> str:
    return os.path.relpath(entry.path, root).replace(os.sep, "/")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no text, expected one entry a line") from error


def counted(names: Sequence[str], kind: str) -> str:
    """Return a number of things with the names of the first of them."""
    plural = kind if len(names) == 1 else f"{kind}es" if kind.endswith("s") else f"{kind}s"
    more = ", …" if len(names) > _LISTED else ""
    # Names of files may be bytes that are no text.
    shown = ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in names[:_LISTED])
    return f"{len(names):,} {plural} ({shown}{more})"
