"""Readers of MNIST, Fashion-MNIST and CIFAR-10 in their official formats, and a small embedded data set."""

from bmrs.data.checks import DataError
from bmrs.data.dataset import DATASETS, EMBEDDED, DataName, Dataset, Split, load_dataset, preprocess

__all__ = ["DATASETS", "EMBEDDED", "DataError", "DataName", "Dataset", "Split", "load_dataset", "preprocess"]
