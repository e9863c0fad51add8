"""Images of classes: official data sets, folders of image files and data sets of the user's own, in three splits."""

from bmrs.data.augmentation import IMAGENET, Normalization, augment, normalization_of, resized
from bmrs.data.checks import DataError
from bmrs.data.dataset import Dataset, load_dataset, preprocess
from bmrs.data.mapped_split import MappedSplit
from bmrs.data.split import Batch, Split, TensorSplit
from bmrs.data.streamed_split import StreamedSplit
from bmrs.names import DATASETS, EMBEDDED, FOLDER, MORE_DATASETS, DataName, check_spec

__all__ = [
    "DATASETS",
    "EMBEDDED",
    "FOLDER",
    "IMAGENET",
    "MORE_DATASETS",
    "Batch",
    "DataError",
    "DataName",
    "Dataset",
    "MappedSplit",
    "Normalization",
    "Split",
    "StreamedSplit",
    "TensorSplit",
    "augment",
    "check_spec",
    "load_dataset",
    "normalization_of",
    "preprocess",
    "resized",
]
