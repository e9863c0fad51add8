"""The result of a run: every network reloaded from its file and measured."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from bmrs.checks import one_line
from bmrs.compaction.costs import flops, num_parameters
from bmrs.data import Dataset, Split
from bmrs.files import load as load_model
from bmrs.noise.lookup import noise_layers
from bmrs.pruning.posteriors import unsettled
from bmrs.training import algorithm1, recipe
from bmrs.training.checkpoint import TrainingState, load_checkpoint, on_their_own
from bmrs.training.comparison_table import Row, Section, show_table, spread
from bmrs.training.config import TrainConfig
from bmrs.training.energy import EnergyMeter, joules_of_inference
from bmrs.training.evaluation import accuracy, batch_size_for, compression, latency, quality
from bmrs.training.fit import fitting_state
from bmrs.training.networks import dense_network
from bmrs.training.run_folder import NetworkName, RunError, RunFolder
from bmrs.training.shortfalls import shortfalls

LATENCY_BATCHES = (1, 64)
"""Numbers of images that latency is measured with."""

TOLERANCE = 1e-4
"""Largest difference of the compacted network's outputs, relative to the masked network's largest output."""

COMPARED = 10_000
"""Test images, at most, on which they are compared."""

# What the table compares, in its order, and what "bmrs" made of it.
_COLUMNS = {"paper": ("dense", "masked", "compacted"), "bmrs": ("dense", "compacted", "scratch", "random")}
_HEADINGS = {"scratch": "its widths\nfrom scratch", "random": "random\nstructures"}
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
# Accuracies on the way, in the order in which they came about.
_ON_THE_WAY = {"trained": "trained", "pruned": "pruned", "refitted": "refitted"}


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
            way = ", ".join(f"{name} {self.on_the_way[key]:.2%}" for key, name in _ON_THE_WAY.items())
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
    columns = _columns(config)
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
            for name in _ON_THE_WAY
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


def _columns(config: TrainConfig) -> tuple[str, ...]:
    return tuple(name for name in _COLUMNS[config.recipe] if config.rivals or name not in _HEADINGS)


def _read(path: Path, config: TrainConfig, data: Dataset, device: torch.device) -> nn.Module:
    """Return a network from its file; as one of its own class, where it has one, as the dense network is."""
    if not config.is_sequence:
        try:
            return load_model(path, model=dense_network(config, data), device=device)
        except (TypeError, ValueError):  # it became a graph
            pass
    return load_model(path, device=device)


def load_dense(folder: RunFolder, config: TrainConfig, data: Dataset, device: torch.device) -> nn.Module:
    """Return a run's dense network.

    Raises:
        RunError: its file is broken.
    """
    dense = recipe.untrained(config, data, device)
    _load(folder.dense.name, lambda: dense.load_state_dict(load_file(folder.dense, device=str(device))))
    _check_suits(dense, data, folder.dense.name)
    return dense


def load_compacted(
    folder: RunFolder, name: str, config: TrainConfig, data: Dataset, device: torch.device
) -> nn.Module:
    """Return a network that a run saved, by the name of its file.

    Raises:
        RunError: the file is missing or broken.
    """
    path = folder.network(name)
    if not path.is_file():
        raise RunError(f"{folder.path} lacks {path.name}")
    network: nn.Module = _load(path.name, lambda: _read(path, config, data, device))
    _check_suits(network, data, path.name)
    return network


def load_state(
    folder: RunFolder, network: NetworkName, config: TrainConfig, data: Dataset, device: torch.device
) -> TrainingState:
    """Return a network with noise, or one that was trained, as its last checkpoint has it.

    Raises:
        RunError: the checkpoint is broken or of another run.
    """
    if config.recipe == "paper":
        state = algorithm1.new_state(config, data, noise=True, device=device)
    elif network == "noisy":
        state = recipe.noisy_state(recipe.untrained(config, data, device), config, data, device)
    else:
        state = fitting_state(recipe.untrained(config, data, device), config, device)
    load_checkpoint(folder.checkpoint(network), state, config)
    return state


def _check_suits(network: nn.Module, data: Dataset, name: str) -> None:
    """Raise RunError unless a network has finite parameters and takes the data's images to their classes."""
    for parameter, values in network.state_dict().items():
        if isinstance(values, Tensor) and values.is_floating_point() and not values.isfinite().all():
            raise RunError(f"{name} is broken: {parameter} holds NaN or infinity")
    images = data.test.examples(2)
    try:
        with torch.inference_mode():
            outputs = network.eval()(images)
        shape = tuple(outputs.shape)
    except Exception as error:  # it runs whatever the file describes
        raise RunError(
            f"{name} is broken or of another run: it does not take the images of {data.name}, of shape "
            f"{tuple(images.shape[1:])}: {one_line(error)}"
        ) from error
    if shape != (len(images), data.num_classes) or not outputs.isfinite().all():
        raise RunError(
            f"{name} is broken or of another run: its outputs for {len(images)} images of {data.name} have the shape "
            f"{shape}, expected {(len(images), data.num_classes)} and finite values"
        )


def _load(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise RunError(f"{name} is broken: {one_line(error)}") from error


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
