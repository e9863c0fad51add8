"""Folders of small image files, written without the library."""

import numpy as np
from PIL import Image


def pixels(seed, size=16, channels=3):
    shape = (size, size, 3) if channels == 3 else (size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path, seed=0, *, size=16, channels=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, size, channels)).save(path)
    return path


def write_classes(folder, classes=("ant", "bee"), *, images=6, size=16, channels=3, first=0):
    """PNG files with pixels of the seeds first, first + 1, ... in the order of classes and names."""
    for place, name in enumerate(classes):
        for number in range(images):
            seed = first + place * images + number
            write_image(folder / name / f"{number:03}.png", seed, size=size, channels=channels)
    return folder
