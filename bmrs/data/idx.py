"""Reader of the IDX format, in which MNIST and Fashion-MNIST are distributed."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bmrs.data.checks import DataError, check_images_and_labels

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


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
    content = path.read_bytes()
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: broken or truncated gzip file ({error})") from error

    expected_magic = bytes([0, 0, _UNSIGNED_BYTE, dims])
    if content[:4] != expected_magic:
        raise DataError(
            f"{path}: magic number {content[:4].hex() or 'missing'}, expected {expected_magic.hex()} "
            f"(IDX, unsigned bytes, {dims} dimension{'s' if dims > 1 else ''})"
        )
    header_length = 4 + 4 * dims
    if len(content) < header_length:
        raise DataError(f"{path}: truncated header of {len(content)} bytes, expected {header_length}")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header_length, 4))
    found, expected = len(content) - header_length, math.prod(shape)
    if found != expected:
        raise DataError(
            f"{path}: {'truncated' if found < expected else 'too long'}: {found} bytes of data, "
            f"expected {expected} for shape {shape}"
        )
    values = np.frombuffer(content, dtype=np.uint8, offset=header_length)
    return torch.from_numpy(values.reshape(shape).copy())


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
