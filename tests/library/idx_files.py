"""Small data sets in the official IDX format, written without the library."""

import gzip
import struct

import numpy as np


def idx_bytes(values):
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def random_images(count, *, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write_idx_folder(folder, *, train=20, test=10, end="", separator="-"):
    folder.mkdir(exist_ok=True)
    for split, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images = idx_bytes(random_images(count, seed=seed))
        labels = idx_bytes((np.arange(count) % 10).astype(np.uint8))
        for stem, kind, content in (("images", "idx3", images), ("labels", "idx1", labels)):
            packed = gzip.compress(content) if end == ".gz" else content
            (folder / f"{split}-{stem}{separator}{kind}-ubyte{end}").write_bytes(packed)
    return folder
