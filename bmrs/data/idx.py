"""Reader of the IDX format, in which MNIST and Fashion-MNIST are distributed."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from bmrs.data.checks import MOST_BYTES, DataError, check_images_and_labels

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"
_PART = 2**20


def read_idx(path: Path, *, dims: int) -> Tensor:
    """Read one IDX file of unsigned bytes, gzip-compressed or not.

    The format is two zero bytes, the type (8: unsigned byte), the number of dimensions, the sizes as
    big-endian 32-bit integers, then the values in row-major order.

    Args:
        path: the file; compression is recognised by content, not by name.
        dims: number of dimensions expected: 1 for labels, 3 for images.

    Returns:
        A uint8 tensor of the shape that the file states.

    Raises:
        DataError: the file is truncated, too long, no IDX file or of other dimensions.
    """
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        if not compressed:
            return _read(file, path, dims)
        try:
            with gzip.GzipFile(fileobj=file) as content:
                return _read(content, path, dims)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: broken or truncated gzip file ({error})") from error


def _read(file: IO[bytes] | gzip.GzipFile, path: Path, dims: int) -> Tensor:
    expected_magic = bytes([0, 0, _UNSIGNED_BYTE, dims])
    header_length = 4 + 4 * dims
    header = _at_most(header_length, file)
    if header[:4] != expected_magic:
        raise DataError(
            f"{path}: magic number {header[:4].hex() or 'missing'}, expected {expected_magic.hex()} "
            f"(IDX, unsigned bytes, {dims} dimension{'s' if dims > 1 else ''})"
        )
    if len(header) < header_length:
        raise DataError(f"{path}: truncated header of {len(header)} bytes, expected {header_length}")
    shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, header_length, 4))
    expected = math.prod(shape)
    if expected > MOST_BYTES:
        raise DataError(f"{path}: {expected} bytes of data for shape {shape}, expected at most {MOST_BYTES}")
    # Not the whole file, as a few bytes of gzip can stand for more than memory holds.
    content = _at_most(expected + 1, file)
    if len(content) != expected:
        found = f"truncated: {len(content)}" if len(content) < expected else f"too long: more than {expected}"
        raise DataError(f"{path}: {found} bytes of data, expected {expected} for shape {shape}")
    return (
        torch.frombuffer(content, dtype=torch.uint8).reshape(shape)
        if content
        else torch.empty(shape, dtype=torch.uint8)
    )


def _at_most(size: int, file: IO[bytes] | gzip.GzipFile) -> bytearray:
    """Read a number of bytes, or what there is, and take no more memory than that."""
    content = bytearray()
    while len(content) < size and (part := file.read(min(size - len(content), _PART))):
        content += part
    return content


def write_idx(path: Path, values: Tensor) -> None:
    """Write a uint8 tensor as a gzip-compressed IDX file, with equal bytes for equal values."""
    header = bytes([0, 0, _UNSIGNED_BYTE, values.dim()])
    header += b"".join(size.to_bytes(4, "big") for size in values.shape)
    # GzipFile without a name and with a fixed time: gzip.compress writes the platform into the header.
    with path.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as compressed:
        compressed.write(header + values.contiguous().numpy().tobytes())


def read_idx_images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the images and labels of one split from a folder with the official file names.

    Args:
        folder: folder with `<split>-images-idx3-ubyte` and `<split>-labels-idx1-ubyte`; `.gz` after the name
            and a dot before `idx` are accepted.
        split: `"train"` or `"t10k"`.

    Returns:
        Images, uint8 of shape (N, 1, 28, 28), and labels, int64 of shape (N,).

    Raises:
        FileNotFoundError: a file is missing.
        DataError: a file is broken, images have another size, counts differ or a label is out of range.
    """
    images_path = _find(folder, f"{split}-images", "idx3-ubyte")
    labels_path = _find(folder, f"{split}-labels", "idx1-ubyte")
    images = read_idx(images_path, dims=3)
    labels = read_idx(labels_path, dims=1)
    if tuple(images.shape[1:]) != (28, 28):
        raise DataError(
            f"{images_path}: images of {images.shape[1]}×{images.shape[2]} pixels, expected 28×28"
        )
    check_images_and_labels(images, labels, labels_path)
    return images.unsqueeze(1), labels.long()


def _find(folder: Path, stem: str, kind: str) -> Path:
    candidates = [f"{stem}{separator}{kind}{end}" for separator in "-." for end in ("", ".gz")]
    for name in candidates:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: no file named {', '.join(candidates[:-1])} or {candidates[-1]}")
