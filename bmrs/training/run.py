"""A whole run: the data, the folder, each seed's training, and what has come of it, measured and drawn."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save as serialize
from torch import nn

from bmrs import processes
from bmrs.checks import one_line
from bmrs.compaction.outlook import noise_outlook
from bmrs.data import FOLDER, Dataset
from bmrs.files.atomic import write_atomically
from bmrs.noise.lookup import noise_layers
from bmrs.training import recipe
from bmrs.training.checkpoint import TrainingState, on_their_own
from bmrs.training.config import TrainConfig
from bmrs.training.devices import device_of
from bmrs.training.energy import EnergyMeter
from bmrs.training.environment import environment, what_differs
from bmrs.training.events import check_tensorboard
from bmrs.training.images import load_images
from bmrs.training.interruption import InterruptedRunError, command_to_resume
from bmrs.training.memory import check_memory
from bmrs.training.networks import check_training, dense_network, noisy_network, with_weights
from bmrs.training.options_file import read_json
from bmrs.training.phases import Trainer, by_algorithm1, by_recipe
from bmrs.training.picture import draw
from bmrs.training.progress import ReadingProgress
from bmrs.training.run_folder import (
    NetworkName,
    RunError,
    RunFolder,
    write_json,
)
from bmrs.training.sharing import check_same_data
from bmrs.training.summarise import summarise
from bmrs.training.summary import RunSummary, show_seeds


def train(
    config: TrainConfig, *, output: Path | None = None, console: Console | None = None
) -> list[RunSummary]:
    """Start a run and bring it to its end.

    Where torch.distributed has several processes, all of them call this and train together; the first one writes and
    shows everything.

    Args:
        config: the options.
        output: the run's folder, empty or not there yet; None for a fresh numbered one in `runs`.
        console: where progress and result are shown.

    Returns:
        The result of each of its seeds.

    Raises:
        RunError: the folder or the device cannot be used, or the processes differ.
        ImportError: a library that an option needs is missing.
        DataError, FileNotFoundError: the data cannot be read.
        LostProcessError: another process is gone.
        NonFiniteError: a NaN or an infinity turned up.
        CollapseError: at this temperature nothing would be left.
        InterruptedRunError: the user pressed Ctrl-C; the run can be resumed.
    """
    config = config.resolved()
    config = _with_whole_paths(config)
    device = device_of(config)
    console = console or Console()
    if config.tensorboard:
        check_tensorboard()
    meter = _meter_of(config, device)
    # Says what is wrong with data, network and noise before there is a folder.
    data = load(config, device, console)
    noisy = noisy_network(config, data)
    if config.noise_on == "suggest":  # which takes a while, and is meant to stay as it was found
        found = [name.removesuffix(".noise") for name in noise_layers(noisy)]
        config = replace(config, noise_on=",".join(found))
    check_training(with_weights(dense_network(config, data), config), config, data)
    if not config.is_sequence:
        _say_what_stays(noisy, data, console)
    if config.target is not None:
        recipe.check_target(noisy.to(device), config, data)
    del noisy  # which would lie in the memory of the device for as long as it trains
    folder = processes.of_first(lambda: RunFolder.create(config, output))
    return _finish(folder, config, device, console, meter)


def _say_what_stays(noisy: nn.Module, data: Dataset, console: Console) -> None:
    """Say of which noise layers compaction could remove nothing, before anything is trained.

    Raises:
        RunError: the network cannot be compacted at all.
    """
    try:
        outlook = noise_outlook(noisy, data.train.examples(2).cpu())
    except (TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"compaction could not take this network: {one_line(error)}") from error
    if len(outlook.held) == len(outlook.layers):
        reasons = "; ".join(
            dict.fromkeys(reason for layer in outlook.layers for reason in layer.held_because)
        )
        raise RunError(f"nothing could be removed from this network where --noise-on has noise: {reasons}")
    for layer in outlook.layers:
        if layer.name in outlook.held:
            reason = "; ".join(layer.held_because)
            line = f"note: nothing can be removed from {layer.name}, which only costs time: {reason}"
            console.print(line, soft_wrap=True, markup=False)


def _with_whole_paths(config: TrainConfig) -> TrainConfig:
    """Return options with which a run can be resumed from any folder."""

    def whole(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    paths: dict[str, Any] = {
        name: whole(path) for name in ("data_dir", "weights") if (path := getattr(config, name)) is not None
    }
    if config.data.startswith(FOLDER):
        paths["data"] = FOLDER + whole(config.data.removeprefix(FOLDER))
    return replace(config, **paths)


def moved(config: TrainConfig, data_dir: str | None) -> TrainConfig:
    """Return options with another place of the data, if there is one: the official files', or the class folders'."""
    if data_dir is None:
        return config
    if config.data.startswith(FOLDER):
        return _with_whole_paths(replace(config, data=FOLDER + data_dir))
    return _with_whole_paths(replace(config, data_dir=data_dir))


def resume(path: Path, *, data_dir: str | None = None, console: Console | None = None) -> list[RunSummary]:
    """Bring an interrupted run to its end; on the CPU with bitwise the result that it would have had.

    That takes as many processes and threads as before; with another number the run goes on from the same state.

    Args:
        path: the run's folder.
        data_dir: where the data lie now, if not where they were.
        console: where progress and result are shown.

    Raises:
        RunError: there is no run in the folder, or another process is at work there.
        Exception: what `train` raises.
    """
    folder, config = processes.of_first(lambda: RunFolder.open(path))
    config = moved(config, data_dir)
    device = device_of(config)
    return _finish(folder, config, device, console or Console(), _meter_of(config, device))


def evaluate(
    path: Path,
    *,
    data_dir: str | None = None,
    device: str | None = None,
    energy: bool = False,
    console: Console | None = None,
) -> list[RunSummary]:
    """Measure a finished run's networks again.

    Args:
        path: the run's folder.
        data_dir: where the data lie now, if not where they were.
        device: where to measure, if not on the run's device.
        energy: whether to measure the energy of inference too, and keep it in the run's summary.
        console: where the result is shown.

    Raises:
        ImportError: energy is to be measured, and codecarbon is missing.
        RunError: files of the run are missing or broken, or the device cannot be used.
        DataError, FileNotFoundError: the data cannot be read.
    """
    console = console or Console()
    folder, config = RunFolder.open(path)
    config = replace(moved(config, data_dir), device=device or config.device, cuda_graph=False)
    chosen = device_of(config)
    meter = EnergyMeter(chosen) if energy else None
    summaries = []
    for seed, seed_folder in folder.of_seeds(config):
        own = replace(config, seed=seed, seeds=1)
        summaries.append(summarise(seed_folder, own, load(own, chosen), chosen, meter))
        summaries[-1].show(console, _title(own))
        if energy:
            write_json(seed_folder.summary, summaries[-1].to_dict())
    if energy and len(summaries) > 1:
        write_json(folder.summary, {"seeds": [summary.to_dict() for summary in summaries]})
    show_seeds(summaries, console, _title(config))
    return summaries


def _meter_of(config: TrainConfig, device: torch.device) -> EnergyMeter | None:
    if not config.energy:
        return None
    if processes.count() > 1:
        raise RunError(
            f"--energy true goes with one process only, not with the {processes.count()} processes of this run"
        )
    return EnergyMeter(device)


def _finish(
    folder: RunFolder, config: TrainConfig, device: torch.device, console: Console, meter: EnergyMeter | None
) -> list[RunSummary]:
    if not processes.is_first():
        console = Console(quiet=True)
    console.print(f"run folder: {folder.path}", soft_wrap=True, markup=False)
    with folder.occupied() if processes.is_first() else nullcontext():
        processes.of_first(lambda: _note_environment(folder, device, console))
        return _all_seeds(folder, config, device, console, meter)


def _note_environment(folder: RunFolder, device: torch.device, console: Console) -> None:
    now = environment(device)
    if not folder.environment.exists():
        write_json(folder.environment, now)
    elif note := what_differs(read_json(folder.environment), now):
        console.print(note, soft_wrap=True, markup=False)


def _all_seeds(
    folder: RunFolder, config: TrainConfig, device: torch.device, console: Console, meter: EnergyMeter | None
) -> list[RunSummary]:
    summaries = []
    try:
        for seed, seed_folder in folder.of_seeds(config):
            own = replace(config, seed=seed, seeds=1)
            if processes.is_first():
                seed_folder.path.mkdir(exist_ok=True)
            if config.seeds > 1:
                console.print(f"seed {seed}: {seed_folder.path}", soft_wrap=True, markup=False)
                if processes.is_first():
                    write_json(seed_folder.config, own.to_dict())
            data = load(own, device)
            check_same_data(data)
            summaries.append(_finish_seed(seed_folder, own, data, device, console, meter))
    except KeyboardInterrupt:
        raise InterruptedRunError(folder.path) from None
    except OSError as error:  # a disk that is full, data that have moved
        where = ", where --data-dir tells where data are now" * isinstance(error, FileNotFoundError)
        raise RunError(
            f"{one_line(error)}; that mended, continue with: {command_to_resume(folder.path)}{where}"
        ) from error
    if len(summaries) > 1 and processes.is_first():
        write_json(folder.summary, {"seeds": [summary.to_dict() for summary in summaries]})
    show_seeds(summaries, console, _title(config))
    return summaries


def _finish_seed(
    folder: RunFolder,
    config: TrainConfig,
    data: Dataset,
    device: torch.device,
    console: Console,
    meter: EnergyMeter | None,
) -> RunSummary:
    trainer = Trainer(folder, config, console, meter)
    run = by_algorithm1 if config.recipe == "paper" else by_recipe
    states = run(trainer, config, data, device)
    return processes.of_first(lambda: _result(folder, config, data, device, console, states, meter))


def _result(
    folder: RunFolder,
    config: TrainConfig,
    data: Dataset,
    device: torch.device,
    console: Console,
    states: dict[NetworkName, TrainingState],
    meter: EnergyMeter | None,
) -> RunSummary:
    """Measure, write and show what a run has come to."""
    console.print("measuring the networks; ten seconds and more, the larger they are", soft_wrap=True)
    write_atomically(folder.dense, serialize(on_their_own(states["dense"].model.state_dict())))
    summary = summarise(folder, config, data, device, meter)
    write_json(folder.summary, summary.to_dict())
    try:
        draw(folder.picture, states, summary, config)
        picture = f"picture: {folder.picture}"
    except ModuleNotFoundError:
        picture = "no picture, as matplotlib is missing: pip install matplotlib"
    summary.show(console, _title(config))
    console.print(picture, soft_wrap=True, markup=False)
    return summary


def load(config: TrainConfig, device: torch.device, console: Console | None = None) -> Dataset:
    """Read the images, with a bar for files that are read for the first time, and check that the network fits.

    Raises:
        DataError, FileNotFoundError: the data cannot be read.
        RunError: they do not go with the options, or the network for them does not fit into memory.
    """
    with ReadingProgress(console) as progress:
        data = load_images(config, device, progress)
    for note in data.notes:
        if console is not None:
            console.print(f"note: {note}", soft_wrap=True, markup=False)
    check_memory(config, data, device)
    return data


def _title(config: TrainConfig) -> str:
    seeds = f", {config.seeds} seeds" if config.seeds > 1 else ""
    return f"{config.model} on {config.data}, recipe {config.recipe}, pruned by {config.criterion}{seeds}"
