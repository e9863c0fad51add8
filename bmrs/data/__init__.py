"""Readers of MNIST, Fashion-MNIST and CIFAR-10 in their official formats, and a small embedded data set."""

from bmrs.data.checks import DataError
from bmrs.data.dataset import DATASETS, EMBEDDED, DataName, Dataset, load_dataset, preprocess
from bmrs.data.split import Batch, Split, TensorSplit

__all__ = [
    "DATASETS",
    "EMBEDDED",
    "Batch",
    "DataError",
    "DataName",
    "Dataset",
    "Split",
    "TensorSplit",
    "load_dataset",
    "preprocess",
]
