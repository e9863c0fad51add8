"""The names that options take, apart from what they stand for, so that options are checked without loading torch."""

from __future__ import annotations

import re
from typing import Final, Literal, TypeAlias, get_args

from bmrs.checks import shown

EMBEDDED: Final = "fashion-mnist-subset"
"""The name of the data that come with the package."""

DataName: TypeAlias = Literal["fashion-mnist-subset", "mnist", "fashion-mnist", "cifar10"]

DATASETS: tuple[DataName, ...] = get_args(DataName)
"""The names whose images the paper trains on, and which `bmrs.data.preprocess` knows."""

MORE_DATASETS: Final = ("cifar100", "cifar100-coarse", "tiny-imagenet")
"""The other names that `bmrs.data.load_dataset` knows; "coarse" is for the 20 superclasses."""

FOLDER: Final = "folder:"
"""What stands before the path of a folder of class folders."""

NETWORK_NAMES: Final = (
    "mlp",
    "lenet5",
    "lenet5_caffe",
    "lenet_300_100",
    "resnet18",
    "resnet50",
    "resnet20",
    "resnet56",
    "vgg16_bn",
    "vit_small",
    "vit_b16",
)
"""The keys of `bmrs.models.NETWORKS`."""

# As in bmrs_kernels.options, whose package takes torch: importing it registers its operators.
Granularity: TypeAlias = Literal["element", "sample", "batch"]

ExportFormat: TypeAlias = Literal["onnx", "pt2", "torchscript"]

FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
"""What `bmrs.export` writes."""


def check_spec(spec: object, *, option: str = "name") -> None:
    """Check that a text names data, whether or not they are there.

    Args:
        spec: see `bmrs.data.load_dataset`.
        option: what the error calls it.

    Raises:
        ValueError: it does not; the message says what would.
    """
    known = (*DATASETS, *MORE_DATASETS)
    if spec in known:
        return
    if isinstance(spec, str) and (
        spec.removeprefix(FOLDER) if spec.startswith(FOLDER) else _is_factory(spec)
    ):
        return
    raise ValueError(
        f"{option} must be one of {', '.join(known)}, folder:DIR for a folder of class folders, or "
        f"package.module:factory for a function that makes data sets, got {shown(spec)}"
    )


def _is_factory(spec: str) -> bool:
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", spec) is not None
