"""Table 1 of arXiv 2406.01345, which the runs of the paper's experiment stand beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple


class Published(NamedTuple):
    """A cell of the table: means and standard deviations of ten runs, by continuous pruning but for "l2".

    Attributes:
        compression: in percent.
        accuracy: on the test images, in percent.
    """

    compression: tuple[float, float]
    accuracy: tuple[float, float]


CRITERIA = ("none", "l2", "mean", "snr", "bmrs-n", "bmrs-u-8", "bmrs-u-4")
_TABLE_1 = {
    ("mlp", "mnist"): (
        ((0.00, 0.00), (97.43, 0.14)),
        ((43.11, 2.06), (10.39, 0.32)),
        ((52.08, 1.71), (96.88, 0.15)),
        ((58.57, 2.01), (96.92, 0.08)),
        ((48.86, 1.32), (96.95, 0.19)),
        ((48.73, 1.90), (96.93, 0.16)),
        ((54.47, 1.74), (96.99, 0.13)),
    ),
    ("mlp", "fashion-mnist"): (
        ((0.00, 0.00), (88.17, 0.20)),
        ((87.86, 2.27), (18.23, 10.22)),
        ((91.76, 0.81), (85.59, 0.26)),
        ((99.83, 0.00), (10.00, 0.00)),
        ((93.20, 0.66), (84.99, 0.35)),
        ((93.02, 0.81), (85.01, 0.32)),
        ((91.57, 0.71), (85.79, 0.34)),
    ),
    ("mlp", "cifar10"): (
        ((0.00, 0.00), (44.94, 0.40)),
        ((42.89, 2.64), (10.00, 0.00)),
        ((77.99, 1.54), (43.39, 0.46)),
        ((75.93, 1.26), (43.97, 0.46)),
        ((76.36, 1.08), (43.59, 0.29)),
        ((77.17, 0.98), (43.45, 0.42)),
        ((76.63, 0.94), (44.06, 0.40)),
    ),
    ("lenet5", "mnist"): (
        ((0.00, 0.00), (99.07, 0.09)),
        ((83.42, 1.92), (11.35, 0.00)),
        ((88.29, 1.00), (51.30, 41.12)),
        ((92.66, 5.77), (62.70, 41.93)),
        ((86.90, 1.15), (95.59, 0.94)),
        ((86.11, 1.37), (95.27, 1.02)),
        ((87.58, 1.01), (96.66, 0.59)),
    ),
    ("lenet5", "fashion-mnist"): (
        ((0.00, 0.00), (89.16, 0.27)),
        ((83.62, 1.69), (10.00, 0.00)),
        ((89.71, 0.56), (50.93, 33.45)),
        ((98.47, 3.45), (17.01, 21.03)),
        ((88.02, 1.00), (77.90, 2.44)),
        ((87.61, 0.72), (77.23, 3.49)),
        ((88.72, 0.73), (81.10, 1.50)),
    ),
    ("lenet5", "cifar10"): (
        ((0.00, 0.00), (67.62, 0.77)),
        ((52.29, 2.18), (10.00, 0.00)),
        ((66.19, 1.36), (65.83, 0.90)),
        ((70.29, 2.02), (67.68, 0.52)),
        ((62.87, 1.64), (66.14, 0.70)),
        ((62.54, 1.49), (66.28, 1.07)),
        ((68.07, 1.95), (67.66, 0.59)),
    ),
}
PUBLISHED = {
    (network, data, criterion): Published(*cell)
    for (network, data), cells in _TABLE_1.items()
    for criterion, cell in zip(CRITERIA, cells, strict=True)
}
"""By network, data set and criterion."""


def compression_as_counted(
    network: str, data: str, settings: Mapping[str, Any], kept: Sequence[int]
) -> float:
    """Return the compression, in percent, by the count of the authors' code.

    That takes no bias off, and of a linear layer behind a flattening no column: it does not match channels to features.

    Args:
        network: "mlp" or "lenet5".
        data: name of the data set.
        settings: those of the run, for the widths of the MLP.
        kept: structures that each noise layer keeps.
    """
    channels = 3 if data == "cifar10" else 1
    of_mlp = network == "mlp"
    full = [settings["hidden"]] * (settings["num_blocks"] + 1) if of_mlp else [6, 16, 120, 84]

    def weights(widths: Sequence[int]) -> int:
        if of_mlp:
            return sum(inputs * outputs for inputs, outputs in pairwise([1024 * channels, *widths, 10]))
        first, second, third, fourth = widths
        return 25 * first * (channels + second) + 400 * third + fourth * (third + 10)

    biases = sum(full) + 10
    total, left = (weights(widths) + biases + 2 * sum(widths) for widths in (full, kept))
    return 100 * (1 - left / total)
