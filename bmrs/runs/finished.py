"""Finished runs, read from their folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmrs.checks import one_line
from bmrs.data import Dataset
from bmrs.training.config import TrainConfig
from bmrs.training.devices import device_of
from bmrs.training.options_file import read_json
from bmrs.training.run import load, moved
from bmrs.training.run_folder import RunError, RunFolder
from bmrs.training.saved_networks import load_compacted, load_dense


@dataclass(frozen=True)
class FinishedRun:
    """One seed of a finished run.

    Attributes:
        folder: its files.
        config: its options.
    """

    folder: RunFolder
    config: TrainConfig

    def data(self) -> tuple[Dataset, torch.device]:
        """Read its data and return them, with the device that they are on."""
        device = device_of(self.config)
        return load(self.config, device), device

    def network(self, name: str, data: Dataset, device: torch.device) -> nn.Module:
        """Return one of its networks: "dense", or one of those without noise that it saved.

        Raises:
            RunError: there is none of this name, or its file is broken.
        """
        if name == "dense":
            return load_dense(self.folder, self.config, data, device)
        return load_compacted(self.folder, name, self.config, data, device)


def finished_seeds(
    path: Path, *, data_dir: str | None = None, device: str | None = None
) -> list[FinishedRun]:
    """Return the seeds of a finished run.

    Args:
        path: the run's folder.
        data_dir: where the data lie now, if not where they were.
        device: where to compute, if not on the run's device.

    Raises:
        RunError: it is no run, or has not come to its end.
    """
    folder, config = RunFolder.open(path)
    config = replace(moved(config, data_dir), device=device or config.device, cuda_graph=False)
    seeds = [FinishedRun(own, replace(config, seed=seed, seeds=1)) for seed, own in folder.of_seeds(config)]
    for seed in seeds:
        if not seed.folder.summary.is_file():
            raise RunError(
                f"{seed.folder.path} lacks {seed.folder.summary.name}: not a finished run; continue it with bmrs train "
                f"--resume {folder.path}"
            )
    return seeds


def summary_of(run: FinishedRun) -> Mapping[str, Any]:
    """Return what a seed's summary.json holds.

    Raises:
        RunError: it is broken.
    """
    path = run.folder.summary
    try:
        summary = read_json(path)
        for network in summary["networks"].values():
            if not all(isinstance(network[key], int | float) for key in ("accuracy", "parameters", "flops")):
                raise ValueError("a network of it lacks numbers")
            if not all(isinstance(time, float) for time in network["latency"]):
                raise ValueError("a latency in it is no number")
        missing = {"dense", "compacted"} - summary["networks"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is broken ({type(error).__name__}: {one_line(error)}): bmrs train --resume {run.folder.path} "
            "writes it anew"
        ) from error
    if missing:
        raise RunError(f"{path} lacks the networks {', '.join(sorted(missing))}")
    assert isinstance(summary, dict)
    return summary
