"""The result of a run: every network reloaded from its file and measured."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

import bmrs
from bmrs.data import Dataset, Split
from bmrs.noise_layer import noise_layers
from bmrs.training.checkpoint import load_checkpoint
from bmrs.training.config import TrainConfig
from bmrs.training.loop import new_state
from bmrs.training.measure import accuracy, compression, flops, in_batches, latency, num_parameters
from bmrs.training.run_folder import RunError, RunFolder

LATENCY_BATCHES = (1, 64)
"""Numbers of images that latency is measured with."""

TOLERANCE = 1e-4
"""Largest difference of the compacted network's outputs, relative to the masked network's largest output."""


@dataclass(frozen=True)
class Measurement:
    """One network.

    Attributes:
        accuracy: Share of test images classified rightly.
        parameters: Trainable values.
        flops: Floating-point operations for one image.
        file_size: Bytes as safetensors.
        latency: Median seconds for each of `LATENCY_BATCHES`.
    """

    accuracy: float
    parameters: int
    flops: int
    file_size: int
    latency: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """What a run gained.

    Attributes:
        dense: The network trained the same way without noise.
        masked: The pruned network before compaction.
        compacted: The network that `bmrs.load` returns.
        kept: Structures kept and structures in all, by noise layer.
        compression_percent: The paper's measure; see `measure.compression`.
        reload_error: Largest difference between the outputs of the reloaded compacted network and the masked one,
            relative to the largest output, on the test images.
        device: Where it was measured.
    """

    dense: Measurement
    masked: Measurement
    compacted: Measurement
    kept: dict[str, tuple[int, int]]
    compression_percent: float
    reload_error: float
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return {**asdict(self), "latency_batches": LATENCY_BATCHES}

    def show(self, console: Console, title: str) -> None:
        """Print the numbers as a table."""
        networks = (self.dense, self.masked, self.compacted)
        table = Table(title=title, title_justify="left")
        for column in ("", "dense", "masked", "compacted", "dense / compacted"):
            table.add_column(column, justify="right" if column else "left", overflow="fold")
        table.add_row("test accuracy", *(f"{each.accuracy:.2%}" for each in networks))
        for name, values in (
            ("parameters", [each.parameters for each in networks]),
            ("FLOPs per image", [each.flops for each in networks]),
            ("bytes on disk", [each.file_size for each in networks]),
        ):
            table.add_row(name, *(f"{value:,}" for value in values), _ratio(values))
        for position, size in enumerate(LATENCY_BATCHES):
            times = [each.latency[position] for each in networks]
            texts = (f"{1e3 * time:.3f}" for time in times)
            table.add_row(f"ms for {size} image{'s' * (size > 1)}", *texts, _ratio(times))
        table.add_section()
        for name, (kept, structures) in self.kept.items():
            counts = (structures, kept, kept)
            table.add_row(f"structures, {name}", *map(str, counts), _ratio(counts))
        console.print(table)
        for line in (
            f"Compression as the paper counts it: {self.compression_percent:.1f} % of all parameters, μ and log σ too.",
            f"The reloaded network's outputs differ from the masked one's by {self.reload_error:.0e} of the largest.",
            f"Times are medians on {self.device}, with one thread if that is a CPU. A multiply-add counts as 2 FLOPs.",
        ):
            console.print(line, soft_wrap=True, highlight=False)


def summarise(folder: RunFolder, config: TrainConfig, data: Dataset, device: torch.device) -> Summary:
    """Load a finished run's networks from their files, compare and measure them.

    Raises:
        RunError: A file is missing or broken, or the compacted network's outputs are not the masked network's.
    """
    missing = folder.missing()
    if missing:
        raise RunError(
            f"{folder.path} lacks {', '.join(missing)}: not a finished run; continue it with --resume {folder.path}"
        )
    noisy = new_state(config, data, noise=True, device=device)
    load_checkpoint(folder.checkpoint("noisy"), noisy)
    dense = new_state(config, data, noise=False, device=device).model
    try:
        dense.load_state_dict(load_file(folder.dense, device=str(device)))
        compacted = bmrs.load(folder.compacted, device=device)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise RunError(f"{folder.dense.name} or {folder.compacted.name} is broken: {error}") from error

    # In float64, since TF32 and the like would differ by more than the tolerance.
    images = data.test.images.double()
    expected, found = (
        in_batches(copy.deepcopy(model).double(), images) for model in (noisy.model, compacted)
    )
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise RunError(
            f"{folder.compacted}: its outputs differ from the masked network's by {difference:.1e} of the "
            f"largest, expected at most {TOLERANCE}"
        )

    file_sizes = [
        folder.dense.stat().st_size,
        len(serialize(noisy.model.state_dict())),
        folder.compacted.stat().st_size,
    ]
    measured = _measure([dense, noisy.model, compacted], file_sizes, data.test)
    return Summary(
        dense=measured[0],
        masked=measured[1],
        compacted=measured[2],
        kept={
            name: (int(layer.mask.sum()), layer.num_structures)
            for name, layer in noise_layers(noisy.model).items()
        },
        compression_percent=compression(noisy.model, data.test.images[:1]),
        reload_error=difference,
        device=str(device),
    )


def _measure(models: Sequence[nn.Module], file_sizes: Sequence[int], test: Split) -> list[Measurement]:
    # Each batch size gives one time for each model; the table wants it the other way round.
    latencies = zip(*(latency(models, test.images[:size]) for size in LATENCY_BATCHES), strict=True)
    return [
        Measurement(accuracy(model, test), num_parameters(model), flops(model, test.images[:1]), size, times)
        for model, size, times in zip(models, file_sizes, latencies, strict=True)
    ]


def _ratio(values: Sequence[float]) -> str:
    return f"{values[0] / values[-1]:.2f}×"
