"""One image file, read with Pillow."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bmrs.checks import one_line

# Formats of pixels alone. Pillow has others that start programs, such as EPS, or only stand for a plug-in.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_GREY = ("1", "L", "LA", "La")


class UnreadableImageError(ValueError):
    """A file is no image that can be read; the message says why, in one line."""


def pillow() -> ModuleType:
    """Return Pillow's module of images.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image files are read with Pillow, which is missing: pip install pillow") from error
    return Image


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the ends of the names of files that are read, in lower case and with the dot."""
    image = pillow()
    kinds = image.registered_extensions()
    return frozenset(suffix for suffix, kind in kinds.items() if kind in _FORMATS and kind in image.OPEN)


def is_grey(path: Path) -> bool | None:
    """Return whether an image file holds shades of grey alone, by its header; None where it cannot be read."""
    try:
        with _judging_warnings(), _opened(path) as image:
            return image.mode in _GREY or image.mode.startswith("I")
    except Exception:  # said by the one that reads the pixels
        return None


def read_image(path: Path, *, image_size: int, channels: int) -> tuple[np.ndarray, bool]:
    """Return an image as a square of a given size, and whether colours were made grey or grey made coloured.

    The image is turned as its EXIF data say, cut to the square in its centre and resized (bilinear, antialiased).
    Transparency is dropped, 16-bit shades are cut to 8 bits, of an animation the first picture is taken.

    Args:
        path: the file; its format is recognised by content, not by name.
        image_size: height and width of the result, in pixels.
        channels: 3 for RGB, 1 for grey.

    Returns:
        uint8 of shape (channels, image_size, image_size), and the flag.

    Raises:
        UnreadableImageError: the file is no image, cut off, broken, or of more pixels than Pillow takes for harmless.
    """
    try:
        with _judging_warnings(), _opened(path) as opened:
            opened.draft("RGB" if channels == 3 else "L", (2 * image_size, 2 * image_size))
            was_grey = opened.mode in _GREY or opened.mode.startswith("I")
            opened.load()
            image = _in_mode(_upright(opened), "RGB" if channels == 3 else "L", kind=opened.format)
            side = min(image.size)
            left, top = ((length - side) // 2 for length in image.size)
            square = image.crop((left, top, left + side, top + side))
            resized = square.resize((image_size, image_size), pillow().Resampling.BILINEAR)
            pixels = np.array(resized, dtype=np.uint8)
    except Exception as error:  # Pillow's readers raise almost anything
        reason = one_line(error) or type(error).__name__
        raise UnreadableImageError(reason.replace(f"{str(path)!r}", "the file")) from error
    pixels = pixels.reshape(image_size, image_size, channels).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels), was_grey != (channels == 1)


@contextmanager
def _judging_warnings() -> Iterator[None]:
    """Take Pillow's warning of too many pixels for an error, as a file of a few kilobytes can be an image of gigabytes.

    What else it warns about, such as EXIF data in disorder, does not concern the pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", pillow().DecompressionBombWarning)
        yield


def _opened(path: Path) -> Any:
    image = pillow()
    image.init()
    # Asked for a format that it was built without, Pillow raises whatever the file is.
    return image.open(path, formats=[kind for kind in _FORMATS if kind in image.OPEN])


def _upright(image: Any) -> Any:
    """Return an image turned as its EXIF data say; as it is if they are broken."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # their reader raises almost anything
        return image


def _in_mode(image: Any, mode: str, *, kind: str) -> Any:
    """Return an image, read from a file of some kind, in mode RGB or L."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        # 16 bits; Pillow's own conversion would clip them at 255.
        image = pillow().fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableImageError("its pixels are 32-bit numbers, of unknown range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # what Pillow asks for
    return image.convert(mode)
