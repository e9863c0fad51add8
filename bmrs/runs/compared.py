"""Finished runs as they are compared: their names, and what their summaries say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmrs.runs.finished import finished_seeds, summary_of
from bmrs.training.run_folder import RunError

NETWORKS = ("dense", "compacted")


@dataclass(frozen=True)
class Quantity:
    """What runs are compared by.

    Attributes:
        label: its name and unit.
        value: of a network in a summary; KeyError where that lacks it.
        form: the text of a value.
    """

    label: str
    value: Callable[[Mapping[str, Any]], float]
    form: Callable[[float], str]


QUALITIES = (
    Quantity("test accuracy, %", lambda network: 100 * network["accuracy"], "{:.2f}".format),
    Quantity("NLL, nats", lambda network: network["nll"], "{:.3f}".format),
    Quantity("ECE, %", lambda network: 100 * network["ece"], "{:.2f}".format),
)


@dataclass(frozen=True)
class ComparedRun:
    """A finished run and what its seeds measured.

    Attributes:
        name: what tables call it.
        data: the name of its data set.
        devices: where it was measured.
        summaries: of each of its seeds.
    """

    name: str
    data: str
    devices: tuple[str, ...]
    summaries: tuple[Mapping[str, Any], ...]

    def values(self, network: str, quantity: Quantity) -> list[float]:
        """Return a network's quantity of each seed; none if a summary is from before it was measured."""
        try:
            return [quantity.value(summary["networks"][network]) for summary in self.summaries]
        except KeyError:
            return []

    @property
    def latency_batches(self) -> tuple[int, ...]:
        """Numbers of images that latency was measured with."""
        return tuple(self.summaries[0]["latency_batches"])


def costs(batches: Sequence[int]) -> list[Quantity]:
    """Return what networks take, with latencies for these numbers of images."""
    found = [
        Quantity("parameters", lambda network: network["parameters"], "{:,.0f}".format),
        Quantity("FLOPs per image", lambda network: network["flops"], "{:,.0f}".format),
    ]
    for place, size in enumerate(batches):
        found.append(
            Quantity(
                f"ms for {size} image{'s' * (size > 1)}",
                lambda network, place=place: 1e3 * network["latency"][place],  # type: ignore[misc]
                "{:.3f}".format,
            )
        )
    return found


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Return finished runs with names that tell them apart.

    Raises:
        RunError: see `compare_runs`.
    """
    resolved = [path.resolve() for path in paths]
    if twice := [path for place, path in enumerate(paths) if resolved[place] in resolved[:place]]:
        raise RunError(f"{twice[0]} is given twice: give every run once")
    names = _names(resolved)
    runs = []
    for path, name in zip(paths, names, strict=True):
        seeds = finished_seeds(path)
        summaries = tuple(summary_of(seed) for seed in seeds)
        runs.append(
            ComparedRun(
                name=name,
                data=seeds[0].config.data,
                devices=tuple(sorted({str(summary.get("device")) for summary in summaries})),
                summaries=summaries,
            )
        )
    return runs


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of different paths, as many as tell them apart."""
    for parts in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
