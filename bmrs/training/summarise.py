"""How a run's summary is made: every network reloaded from its file, compared and measured."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import get_args

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from bmrs.checks import one_line
from bmrs.compaction.costs import flops, num_parameters
from bmrs.data import Dataset, Split
from bmrs.noise.lookup import noise_layers
from bmrs.pruning.settling import unsettled
from bmrs.training.checkpoint import on_their_own
from bmrs.training.config import TrainConfig
from bmrs.training.energy import EnergyMeter, joules_of_inference
from bmrs.training.evaluation import accuracy, batch_size_for, compression, latency, quality
from bmrs.training.run_folder import NetworkName, RunError, RunFolder
from bmrs.training.saved_networks import load_compacted, load_dense, load_state
from bmrs.training.shortfalls import shortfalls
from bmrs.training.summary import (
    LATENCY_BATCHES,
    ON_THE_WAY,
    NetworkMeasurement,
    RunSummary,
    compared_networks,
)

TOLERANCE = 1e-4
"""Largest difference of the compacted network's outputs, relative to the masked network's largest output."""

COMPARED = 10_000
"""Test images, at most, on which they are compared."""

# Whose training each network took.
_TRAININGS: dict[str, dict[str, tuple[NetworkName, ...]]] = {
    "paper": {"dense": ("dense",), "masked": ("noisy",), "compacted": ("noisy",)},
    "bmrs": {
        "dense": ("dense",),
        "compacted": ("trained", "noisy", "fine-tuned"),
        "scratch": ("scratch",),
        "random": ("trained", "random"),
    },
}


def summarise(
    folder: RunFolder,
    config: TrainConfig,
    data: Dataset,
    device: torch.device,
    meter: EnergyMeter | None = None,
) -> RunSummary:
    """Load a finished run's networks from their files, compare and measure them; their energy too if there is a meter.

    Raises:
        RunError: a file is missing or broken, or the compacted network's outputs are not the masked network's.
    """
    columns = compared_networks(config.recipe, rivals=config.rivals)
    names = [name for name in columns if name not in ("dense", "masked")]
    if config.recipe == "bmrs":
        names += ["pruned", "refitted"]
    needed = [folder.config, folder.checkpoint("noisy"), folder.dense, *map(folder.network, names)]
    if config.recipe == "bmrs":
        needed.append(folder.checkpoint("trained"))
    missing = [path.name for path in needed if not path.is_file()]
    if missing:
        raise RunError(
            f"{folder.path} lacks {', '.join(missing)}: not a finished run; "
            f"continue it with --resume {folder.to_resume}"
        )
    noisy = load_state(folder, "noisy", config, data, device)
    networks = {"dense": load_dense(folder, config, data, device)}
    networks |= {name: load_compacted(folder, name, config, data, device) for name in names}

    compaction = "compacted" if config.recipe == "paper" else "pruned"
    error = _difference(noisy.model, networks[compaction], data.test, folder.network(compaction).name)
    sizes = {name: folder.network(name).stat().st_size for name in networks}
    if config.recipe == "paper":
        networks["masked"] = noisy.model
        sizes["masked"] = len(serialize(on_their_own(noisy.model.state_dict())))
    compared = {name: networks[name] for name in columns}
    try:
        measured = _measure(compared, sizes, data.test)
    except ValueError as failure:
        raise RunError(f"the networks of {folder.path} cannot be measured: {one_line(failure)}") from failure
    trainings, energy_by = _energy_of_training(folder, config)
    inference = {}
    if meter is not None:
        inference = joules_of_inference(compared, data.test.examples(max(LATENCY_BATCHES)), meter)
        energy_by["inference"] = meter.method
    measured = {
        name: replace(
            network,
            joules=inference.get(name),
            training_joules=_joules_of(name, trainings, config),
        )
        for name, network in measured.items()
    }
    kept = {
        name: (int(layer.mask.sum()), layer.num_structures)
        for name, layer in noise_layers(noisy.model).items()
    }
    last = noisy.history[-1] if noisy.history else {}
    on_the_way = {}
    if config.recipe == "bmrs":
        trained = load_state(folder, "trained", config, data, device)
        on_the_way = {
            name: accuracy(trained.model if name == "trained" else networks[name], data.test)
            for name in ON_THE_WAY
        }
    return RunSummary(
        recipe=config.recipe,
        networks=measured,
        on_the_way=on_the_way,
        kept=kept,
        compression_percent=compression(noisy.model, data.test.examples(1)),
        reload_error=error,
        unsettled=last.get("unsettled", unsettled(noisy.model)),
        settled=last.get("settled"),
        temperature=last.get("temperature"),
        device=str(device),
        budget=str(last.get("pruning", {}).get("text", "")),
        joules_by_training=trainings,
        energy_by=energy_by,
        warnings=shortfalls(
            config,
            noisy.history,
            kept=kept,
            dense=measured["dense"].accuracy,
            compacted=measured["compacted"].accuracy,
            num_classes=data.num_classes,
        ),
    )


def _energy_of_training(folder: RunFolder, config: TrainConfig) -> tuple[dict[str, float], dict[str, str]]:
    """Return the joules of each network's training, and how they were told, as far as its metrics say."""
    joules, methods = {}, set()
    for name in get_args(NetworkName):
        path = folder.metrics(name)
        if not config.energy or not path.is_file():
            continue
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            epochs = [row["joules"] for row in rows]
            methods |= {str(row["energy_by"]) for row in rows}
            if None not in epochs:
                joules[name] = float(sum(epochs))
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{path.name} is broken: {type(error).__name__}: {one_line(error)}") from error
    return joules, {"training": "; ".join(sorted(methods))} if methods else {}


def _joules_of(name: str, trainings: Mapping[str, float], config: TrainConfig) -> float | None:
    needed = _TRAININGS[config.recipe][name]
    if name == "dense" and not config.rivals:
        needed = ("trained",)
    return sum(trainings[each] for each in needed) if trainings.keys() >= set(needed) else None


@torch.inference_mode()
def _difference(masked: nn.Module, compacted: nn.Module, split: Split, name: str) -> float:
    """Return the largest difference of the outputs, relative to the largest output."""
    models = [copy.deepcopy(model).eval() for model in (masked, compacted)]
    some = torch.arange(min(len(split), COMPARED)).split(batch_size_for(split))
    try:
        # In float64, since TF32 and the like would differ by more than the tolerance.
        models = [model.double() for model in models]
        difference = _largest_difference(models, (batch.images.double() for batch in split.batches(some)))
    except (
        RuntimeError
    ):  # a network may make float32 of its inputs itself; a CPU has that in full, and is slow
        models = [model.float().cpu() for model in models]
        difference = _largest_difference(models, (batch.images.cpu() for batch in split.batches(some[:1])))
    if not difference <= TOLERANCE:
        raise RunError(
            f"{name}: its outputs differ from the masked network's by {difference:.1e} of the "
            f"largest, expected at most {TOLERANCE}"
        )
    return difference


def _largest_difference(models: Sequence[nn.Module], batches: Iterable[Tensor]) -> float:
    largest = farthest = torch.zeros(())
    for images in batches:
        expected, found = (model(images) for model in models)
        largest = torch.maximum(largest.to(expected), expected.abs().max())
        farthest = torch.maximum(farthest.to(expected), (found - expected).abs().max())
    return (farthest / largest).item()


def _measure(
    models: Mapping[str, nn.Module], file_sizes: Mapping[str, int], test: Split
) -> dict[str, NetworkMeasurement]:
    # Each batch size gives one time for each model; the table wants it the other way round.
    turns = [latency(list(models.values()), test.examples(size)) for size in LATENCY_BATCHES]
    measured = {}
    for (name, model), times in zip(models.items(), zip(*turns, strict=True), strict=True):
        found = quality(model, test)
        measured[name] = NetworkMeasurement(
            accuracy=found.accuracy,
            parameters=num_parameters(model),
            flops=flops(model, test.examples(1)),
            file_size=file_sizes[name],
            latency=times,
            nll=found.nll,
            ece=found.ece,
        )
    return measured
