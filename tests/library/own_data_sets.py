"""Data sets as users write them, and functions that make them."""

import os
import random
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset


class Numbered(Dataset):
    """The image of each number is full of it; ``as_kind`` makes it what the test wants."""

    def __init__(self, length=12, as_kind=lambda image: image, labels=lambda number: number % 3):
        self.length, self.as_kind, self.labels = length, as_kind, labels

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        return self.as_kind(torch.full((3, 4, 5), number, dtype=torch.uint8)), self.labels(number)


class Drawn(Numbered):
    """Draws each image from all the generators that people use, and says which process did."""

    def __getitem__(self, number):
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
        return torch.tensor([number, *drawn, os.getpid()], dtype=torch.float64).view(1, 1, 5), number % 2


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])

    def __len__(self):
        return 3


class Failing(Numbered):
    def __getitem__(self, number):
        if number == 5:
            raise RuntimeError("no such file\nas this")
        return super().__getitem__(number)


class Dying(Numbered):
    def __getitem__(self, number):
        if number == 5:
            os._exit(3)
        return super().__getitem__(number)


def good():
    return {"train": Numbered(12), "test": Numbered(6), "num_classes": 3}


def as_object():
    return SimpleNamespace(train=Numbered(12), validation=Numbered(4), test=Numbered(6), num_classes=7)


def uncounted():
    return {"train": Numbered(12), "test": Numbered(6)}


def named_classes():
    train = Numbered(12)
    train.classes = ["a", "b", "c", "d"]
    return {"train": train, "test": Numbered(6)}


def drawn():
    torch.rand(3)
    return {"train": Drawn(12), "test": Drawn(4), "num_classes": 2}


def split_at_random():
    order = torch.randperm(20).tolist()
    whole = Numbered(20)
    parts = [torch.utils.data.Subset(whole, part) for part in (order[:15], order[15:])]
    return {"train": parts[0], "test": parts[1], "num_classes": 3}


def failing():
    return {"train": Failing(12), "test": Numbered(6), "num_classes": 3}


def dying():
    return {"train": Dying(12), "test": Numbered(6), "num_classes": 3}


def late_label():
    return {
        "train": Numbered(12, labels=lambda number: 9 if number == 5 else 0),
        "test": Numbered(6),
        "num_classes": 3,
    }


def late_shape():
    def grown(image):
        return image.repeat(1, 2, 1) if image.max() == 5 else image

    return {"train": Numbered(12, grown), "test": Numbered(6), "num_classes": 3}


def raising():
    raise RuntimeError("no disk\nat all")


def with_argument(folder):
    return folder


def nothing():
    return None


def without_test():
    return {"train": Numbered(12)}


def iterable():
    return {"train": Endless(), "test": Numbered(6), "num_classes": 3}


def a_list_of_batches():
    return {"train": 5, "test": Numbered(6), "num_classes": 3}


def empty():
    return {"train": Numbered(12), "test": Numbered(0), "num_classes": 3}


def one_class():
    return {"train": Numbered(12), "test": Numbered(6), "num_classes": 1}


def only_zeros():
    return {"train": Numbered(12, labels=lambda number: 0), "test": Numbered(6)}


def other_test():
    return {"train": Numbered(12), "test": Numbered(6, lambda image: image.float()), "num_classes": 3}


number = 3

KINDS = {
    "a tensor": lambda image: image,
    "an array": lambda image: image.numpy(),
    "a picture": lambda image: Image.fromarray(image.permute(1, 2, 0).numpy()),
    "floats": lambda image: image.double() / 255,
    "an array of floats": lambda image: image.numpy().astype(np.float16),
}

WRONG_KINDS = {
    "text": lambda image: "image",
    "integers": lambda image: image.long(),
    "an array of integers": lambda image: image.long().numpy(),
    "no channels": lambda image: image[0],
    "channels last": lambda image: image.repeat(1, 4, 1).permute(1, 2, 0),
    "nothing": lambda image: image[:0],
    "NaN": lambda image: image.float() / 0,
}
