"""Accuracy against compression of post-training pruning, structure by structure: Figure 2 of arXiv 2406.01345.

From a run's network with learned noise, structures are removed one after the other, in the order of a criterion's
scores over all layers, without any training in between. A criterion with a rule of its own stops somewhere on its way;
the others need a threshold. How good a rule is shows in how close to the knee it stops, where accuracy begins to fall.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from bmrs.compaction.costs import num_parameters
from bmrs.compaction.sizes import CompactedSizes
from bmrs.criteria import L2, PAPER_TOLERANCE, SNR, BMRSNormal, BMRSOdds, BMRSUniform, Criterion, Mean
from bmrs.data import Split, TensorSplit
from bmrs.graph.ties import producers
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers
from bmrs.runs.curve_picture import draw
from bmrs.runs.finished import FinishedRun, finished_seeds
from bmrs.runs.points import Point, knee_of
from bmrs.training.comparison_table import Row, Section, show_table, spread
from bmrs.training.evaluation import accuracy
from bmrs.training.run_folder import write_json_lines
from bmrs.training.saved_networks import load_state

CRITERIA: dict[str, Criterion] = {
    "BMRS odds": BMRSOdds(),
    "ΔF_N": BMRSNormal(),
    "ΔF_N + 0.919": BMRSNormal(tolerance=PAPER_TOLERANCE),  # as the authors' code decides
    "ΔF_U": BMRSUniform(),
    "SNR": SNR(),
    "E[θ]": Mean(),
    "L2": L2(ratio=0.0),
}
"""By the name that tables and pictures have."""


def draw_curves(
    path: Path,
    *,
    points: int = 30,
    images: int | None = None,
    data_dir: str | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> list[Point]:
    """Measure and draw the curves of a finished run, into ``curve.jsonl`` and ``curve.png`` in its folder.

    It takes about as long as evaluating ``points`` networks for each of six orders and each seed, and says how long.
    Networks that two criteria have in common are evaluated once.

    Args:
        path: the run's folder.
        points: numbers of removed structures that are looked at along each curve, at least 2; the criterion's own
            stopping point comes on top.
        images: how many validation images are looked at, the first ones; None for all.
        data_dir: where the data lie now, if not where they were.
        device: where to measure, if not on the run's device.
        console: where the result is shown.

    Returns:
        All points, by seed and criterion, along each curve.

    Raises:
        RunError: the run is not finished, or a checkpoint is broken.
        DataError, FileNotFoundError: the data cannot be read.
    """
    console = console or Console()
    seeds = finished_seeds(path, data_dir=data_dir, device=device)
    found = [point for run in seeds for point in _curves_of(run, points, images, console)]
    table, picture = path / "curve.jsonl", path / "curve.png"
    write_json_lines(table, [asdict(point) for point in found])
    config = seeds[0].config
    title = f"Post-training pruning of {config.model} on {config.data}, no weight trained on the way"
    _show(found, title, console)
    if config.recipe == "paper":
        console.print(
            "What this run pruned while it trained stays pruned: curves start from what it kept.",
            soft_wrap=True,
        )
    console.print(f"table: {table}", soft_wrap=True, markup=False)
    try:
        draw(picture, found, title)
        console.print(f"picture: {picture}", soft_wrap=True, markup=False)
    except ModuleNotFoundError:
        console.print("no picture, as matplotlib is missing: pip install matplotlib", soft_wrap=True)
    return found


def _curves_of(run: FinishedRun, points: int, images: int | None, console: Console) -> list[Point]:
    data, device = run.data()
    state = load_state(run.folder, "noisy", run.config, data, device)
    model, split = state.model.eval(), _first(data.validation, images)
    if run.config.recipe == "bmrs":
        # No weight was trained after pruning, so that all structures are as good as before.
        for layer in noise_layers(model).values():
            layer.set_kept(torch.ones_like(layer.mask))
    orders = orders_of(model)
    example = split.examples(1)
    sizes = CompactedSizes(model, example)
    start = time.perf_counter()
    accuracy(model, split), sizes.parameters()
    each = time.perf_counter() - start
    console.print(
        f"seed {run.config.seed}: {len(orders)} criteria, {points} networks each, {len(split):,} validation images; "
        f"at most about {len(orders) * points * each:.0f} s",
        soft_wrap=True,
    )
    measure = _measurement(model, sizes, split)
    found = []
    for name, (order, stop) in orders.items():
        found += _curve(run.config.seed, name, order, stop, points, measure)
    return found


def _first(split: Split, images: int | None) -> Split:
    if images is None or images >= len(split):
        return split
    batch = next(split.batches([torch.arange(images)]))
    return TensorSplit(batch.images, batch.labels)


def orders_of(model: nn.Module) -> dict[str, tuple[list[tuple[NoiseLayer, int]], int | None]]:
    """Return the structures in the order in which each criterion removes them, and at how many it stops.

    The best structure of each layer is never removed, as `bmrs.prune` keeps it too.
    """
    layers = list(noise_layers(model).values())
    found: dict[str, tuple[list[tuple[NoiseLayer, int]], int | None]] = {}
    for name, criterion in CRITERIA.items():
        producer_of = {}
        if criterion.needs_producer:
            try:
                producer_of = producers(model, type(criterion).__name__)
            except ValueError:  # norms of weights are not those of structures here
                continue
        candidates: list[tuple[NoiseLayer, int]] = []
        scores, asked = [], []
        for layer in layers:
            decision = criterion(layer, producer_of.get(layer))
            kept = layer.kept.nonzero().flatten()
            removable = kept[criterion.best_first(decision.scores[kept])[1:]]
            candidates += [(layer, structure) for structure in removable.tolist()]
            scores.append(decision.scores[removable].cpu())
            asked.append(decision.prune[removable].cpu())
        worst_first = criterion.best_first(torch.cat(scores)).flip(0).tolist()
        stop = None if criterion.needs_producer else int(torch.cat(asked).sum())
        found[name] = [candidates[place] for place in worst_first], stop
    return found


def _measurement(
    model: nn.Module, sizes: CompactedSizes, split: Split
) -> Callable[[Sequence[tuple[NoiseLayer, int]]], tuple[float, float, int]]:
    """Return a function from removed structures to compression in percent, accuracy and parameters."""
    layers = list(noise_layers(model).values())
    before = {layer: layer.mask.clone() for layer in layers}
    total = num_parameters(model)
    known: dict[bytes, tuple[float, float, int]] = {}

    def measure(removed: Sequence[tuple[NoiseLayer, int]]) -> tuple[float, float, int]:
        masks = {layer: mask.clone() for layer, mask in before.items()}
        for layer, structure in removed:
            masks[layer][structure] = False
        key = torch.cat([mask.cpu() for mask in masks.values()]).numpy().tobytes()
        if key not in known:
            for layer, mask in masks.items():
                layer.set_kept(mask)
            parameters = sizes.parameters()
            remaining = parameters + 2 * sum(int(mask.sum()) for mask in masks.values())
            known[key] = 100 * (1 - remaining / total), accuracy(model, split), parameters
        return known[key]

    return measure


def _curve(
    seed: int,
    name: str,
    order: Sequence[tuple[NoiseLayer, int]],
    stop: int | None,
    points: int,
    measure: Callable[[Sequence[tuple[NoiseLayer, int]]], tuple[float, float, int]],
) -> list[Point]:
    chosen = {round(value) for value in torch.linspace(0, len(order), points, dtype=torch.float64).tolist()}
    counts = sorted(chosen | ({stop} if stop is not None else set()))
    measured = [measure(order[:count]) for count in counts]
    knee = knee_of([m[0] for m in measured], [m[1] for m in measured])
    structures = len(order) + len({layer for layer, _ in order})
    return [
        Point(seed, name, count, structures, compression, parameters, right, count == stop, place == knee)
        for place, (count, (compression, right, parameters)) in enumerate(zip(counts, measured, strict=True))
    ]


def _show(found: Sequence[Point], title: str, console: Console) -> None:
    def cells(points: Sequence[Point]) -> list[tuple[str, ...]]:
        if not points:
            return [("–",)] * 2
        return [
            spread([point.compression_percent for point in points], "{:.1f}".format),
            spread([100 * point.accuracy for point in points], "{:.2f}".format),
        ]

    rows = []
    for name in dict.fromkeys(point.criterion for point in found):
        of_criterion = [point for point in found if point.criterion == name]
        stops = [point for point in of_criterion if point.stop]
        knees = [point for point in of_criterion if point.knee]
        rows.append(Row(name, [*cells(stops), *cells(knees)]))
    columns = [
        "stops at\ncompression, %",
        "with\naccuracy, %",
        "knee at\ncompression, %",
        "with\naccuracy, %",
    ]
    show_table(console, title, columns, [Section(rows)])
    start = [100 * point.accuracy for point in found if point.removed == 0]
    before = " ".join(spread(start, "{:.2f}".format))
    console.print(f"On validation images; before anything is removed accuracy is {before} %.", soft_wrap=True)
