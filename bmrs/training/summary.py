"""The result of a run: what was measured of its networks, and the tables that it is printed as."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from bmrs.training.comparison_table import Row, Section, show_table, spread

LATENCY_BATCHES = (1, 64)
"""Numbers of images that latency is measured with."""

# What the table compares, in its order, and what "bmrs" made of it.
_COLUMNS = {"paper": ("dense", "masked", "compacted"), "bmrs": ("dense", "compacted", "scratch", "random")}
_HEADINGS = {"scratch": "its widths\nfrom scratch", "random": "random\nstructures"}
ON_THE_WAY = {"trained": "trained", "pruned": "pruned", "refitted": "refitted"}
"""Accuracies of the recipe bmrs before any weight is trained after pruning, in the order in which they come about."""


@dataclass(frozen=True)
class NetworkMeasurement:
    """One network.

    Attributes:
        accuracy: share of test images classified rightly.
        parameters: trainable values.
        flops: floating-point operations for one image.
        file_size: bytes as safetensors.
        latency: median seconds for each of `LATENCY_BATCHES`.
        nll: mean negative log-likelihood of the test images' labels, nats.
        ece: expected calibration error on the test images, in [0, 1]; see `bmrs.expected_calibration_error`.
        joules: energy of 1,000 images in batches of the largest of `LATENCY_BATCHES`, J; None if not measured.
        training_joules: energy of all the training that led to it, J; None if not measured.
    """

    accuracy: float
    parameters: int
    flops: int
    file_size: int
    latency: tuple[float, ...]
    nll: float
    ece: float
    joules: float | None = None
    training_joules: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """What a run gained.

    Attributes:
        recipe: "bmrs" or "paper".
        networks: by name. "dense": trained as long without noise. "compacted": what `bmrs.load` returns. Of the recipe
            paper, "masked": the pruned network before compaction. Of the recipe bmrs, "scratch": the compacted
            network's widths, trained from scratch; "random": as many structures of the trained network, chosen at
            random and fine-tuned; both in as many epochs.
        on_the_way: of the recipe bmrs, test accuracies of the network before pruning ("trained"), after pruning and
            folding ("pruned") and after refitting ("refitted"), no weight having been trained after pruning.
        kept: structures kept and structures in all, by noise layer.
        compression_percent: the paper's measure; see `bmrs.training.evaluation.compression`.
        reload_error: largest difference between the outputs of the reloaded network that compaction gave and the
            masked one, relative to the largest output, on the test images.
        unsettled: share of the structures on which rules that agree for converged posteriors disagree.
        settled: False if the noise was cut off before decisions stopped changing; of the recipe bmrs.
        temperature: that of the posteriors; of the recipe bmrs.
        budget: what pruning to a budget did and what evidence it gave up, as a text; empty where evidence decided.
        device: where it was measured.
        joules_by_training: energy of training each network that has a checkpoint, J; where it was measured.
        energy_by: how the energy of "training" and of "inference" was told, by a counter or estimated; see
            `bmrs.training.energy.EnergyMeter`.
        warnings: what went wrong and what to do about it, a sentence or two each: a layer that a criterion wanted
            to empty, a test accuracy near chance or far below the dense network's, nothing pruned.
    """

    recipe: str
    networks: dict[str, NetworkMeasurement]
    on_the_way: dict[str, float]
    kept: dict[str, tuple[int, int]]
    compression_percent: float
    reload_error: float
    unsettled: float
    settled: bool | None
    temperature: float | None
    device: str
    joules_by_training: dict[str, float] = field(default_factory=dict)
    energy_by: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    budget: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return {**asdict(self), "latency_batches": LATENCY_BATCHES}

    def show(self, console: Console, title: str) -> None:
        """Print the numbers as a table, with notes and warnings below it."""
        _show([self], console, title)
        for line in self.budget.splitlines():
            console.print(Text(line), soft_wrap=True)
        for line in self._notes():
            _print_line(console, line)
        for line in self.warnings:
            _print_line(console, f"Warning: {line}", style="bold yellow")

    def _notes(self) -> list[str]:
        notes = []
        if self.on_the_way:
            way = ", ".join(f"{name} {self.on_the_way[key]:.2%}" for key, name in ON_THE_WAY.items())
            notes.append(f"Test accuracy without training a weight after pruning: {way}.")
        if self.temperature is not None:
            notes.append(
                f"Posteriors at temperature {self.temperature:g}: rules that agree once they have converged disagree "
                f"on {self.unsettled:.1%} of the structures"
                + ("." if self.settled else "; they were cut off before they settled (--noise-epochs).")
            )
        notes += [f"Energy of {what}: {method}." for what, method in self.energy_by.items()]
        return [
            *notes,
            f"Compression as the paper counts it: {self.compression_percent:.1f} % of all parameters, μ and log σ too.",
            f"The reloaded network's outputs differ from the masked one's by {self.reload_error:.0e} of the largest.",
            f"Times are medians on {self.device}, with one thread if that is a CPU. A multiply-add counts as 2 FLOPs.",
        ]


def compared_networks(recipe: str, *, rivals: bool) -> tuple[str, ...]:
    """Return the networks that a recipe's table compares, in its order; rivals only if they are trained."""
    return tuple(name for name in _COLUMNS[recipe] if rivals or name not in _HEADINGS)


def show_seeds(summaries: Sequence[RunSummary], console: Console, title: str) -> None:
    """Print means and standard deviations of several seeds' results; nothing for one."""
    if len(summaries) > 1:
        _show(summaries, console, title)
        _print_line(console, f"Means ± standard deviations of {len(summaries)} seeds.")
        if warned := sum(bool(summary.warnings) for summary in summaries):
            line = f"Warning: {warned} of {len(summaries)} seeds have warnings, which stand below their own tables."
            _print_line(console, line, style="bold yellow")


def _print_line(console: Console, line: str, style: str = "") -> None:
    # A terminal's lines break between words; a file or pipe gets whole ones.
    console.print(Text(line, style=style), soft_wrap=not console.is_terminal)


def _show(summaries: Sequence[RunSummary], console: Console, title: str) -> None:
    names = [name for name in _COLUMNS[summaries[0].recipe] if name in summaries[0].networks]

    def values(name: str, value: Callable[[NetworkMeasurement], float]) -> list[float]:
        return [value(summary.networks[name]) for summary in summaries]

    def row(label: str, value: Callable[[NetworkMeasurement], float], form: Callable[[float], str]) -> Row:
        ratio = statistics.mean(values("dense", value)) / statistics.mean(values("compacted", value))
        return Row(label, [*(spread(values(name, value), form) for name in names), (f"{ratio:.2f}×",)])

    def time_row(position: int, size: int) -> Row:
        label = f"ms for {size} image{'s' * (size > 1)}"
        return row(label, lambda network: 1e3 * network.latency[position], "{:.3f}".format)

    def quality_row(label: str, value: Callable[[NetworkMeasurement], float], form: str) -> Row:
        return Row(label, [*(spread(values(name, value), form.format) for name in names), ()])

    def energy_rows(label: str, value: Callable[[NetworkMeasurement], float | None]) -> list[Row]:
        cells = [value(summary.networks[name]) for summary in summaries for name in names]
        return [] if None in cells else [row(label, lambda network: value(network) or 0.0, _three_digits)]

    measured = [
        quality_row("test accuracy, %", lambda network: 100 * network.accuracy, "{:.2f}"),
        quality_row("NLL, nats", lambda network: network.nll, "{:.3f}"),
        quality_row("ECE, %", lambda network: 100 * network.ece, "{:.2f}"),
        row("parameters", lambda network: network.parameters, "{:,.0f}".format),
        row("FLOPs per image", lambda network: network.flops, "{:,.0f}".format),
        row("bytes on disk", lambda network: network.file_size, "{:,.0f}".format),
        *(time_row(position, size) for position, size in enumerate(LATENCY_BATCHES)),
        *energy_rows("J for 1,000 images", lambda network: network.joules),
        *energy_rows(
            "kJ of training",
            lambda network: None if network.training_joules is None else network.training_joules / 1000,
        ),
    ]
    layers = []
    for name, (_, structures) in summaries[0].kept.items():
        kept = [float(summary.kept[name][0]) for summary in summaries]
        counts = [(str(structures),)] + [spread(kept, "{:.0f}".format)] * (len(names) - 1)
        layers.append(Row(name, [*counts, (f"{structures / statistics.mean(kept):.2f}×",)]))
    columns = [*(_HEADINGS.get(name, name) for name in names), "dense /\ncompacted"]
    show_table(console, title, columns, [Section(measured), Section(layers, title="structures of")])


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
