"""Train with the project's functions and with the plain formulas: which of them meets a NaN or an infinity, and when.

Both train the same networks on the embedded data, from the same weights, on the same batches, with the same uniforms
for the noise. The exit code is 0 if every run with the project's functions stayed finite, and 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bmrs
from benchmarks import processes
from benchmarks.environment import environment
from benchmarks.granularities import GRANULARITIES
from benchmarks.markdown import table
from benchmarks.options import positive
from benchmarks.rivals import plain_layer
from benchmarks.rivals.plain_layer import KLWeight
from bmrs.data import EMBEDDED, TensorSplit, load_dataset, preprocess
from bmrs_kernels.options import Granularity

NETWORKS = ("mlp", "lenet5")
# The paper's MLP for MNIST.
MLP_BLOCKS, MLP_HIDDEN = 7, 100
# That of the paper for LeNet-5 on Fashion-MNIST; a larger batch would take longer.
BATCH_SIZE = 32
LEARNING_RATES = (1e-3, 1e-2)
# The final loss is the mean over so many steps, as that of one batch says little.
FINAL_STEPS = 50

Formulas = Literal["project", "plain"]


class FiniteRun(NamedTuple):
    """A training, by what tells it from the others."""

    model: str
    kl_weight: str
    learning_rate: float
    seed: int
    formulas: Formulas


class FiniteSettings(NamedTuple):
    """What all trainings share."""

    steps: int
    dataset_size: int  # what "elbo" divides the KL divergence by
    granularity: Granularity = "element"
    batch_size: int = BATCH_SIZE


class FiniteOutcome(NamedTuple):
    """How a training went."""

    non_finite_step: int | None  # counted from 1; None if everything stayed finite
    place: str | None
    final_loss: float | None  # mean over the last steps, in nats; None if something was not finite
    largest_excess: float  # the largest (μ - b)/σ of any structure before any step
    seconds: float

    @property
    def finite(self) -> bool:
        """Whether no NaN and no infinity was met."""
        return self.non_finite_step is None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks finite-training", description=__doc__)
    parser.add_argument("--steps", type=positive, default=300, help="steps of each run (default: 300)")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds, from 0 (default: 3)")
    parser.add_argument(
        "--models", default=",".join(NETWORKS), help="networks, separated by commas (default: all)"
    )
    parser.add_argument(
        "--kl-weights", default=",".join(get_args(KLWeight)), help="separated by commas (default: all)"
    )
    parser.add_argument(
        "--dataset-size",
        type=positive,
        metavar="N",
        help="training examples that elbo divides by (default: the 4,800 there are; all of Fashion-MNIST: 48,000)",
    )
    parser.add_argument(
        "--granularity",
        choices=GRANULARITIES,
        default="element",
        help="where noise is drawn (default: element, as in the paper's code)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for finite_training.md and finite_training.json"
    )
    parser.add_argument("--jobs", type=positive, default=2, help="processes (default: 2)")
    options = parser.parse_args(arguments)
    models, kl_weights = options.models.split(","), options.kl_weights.split(",")
    for flag, given, known in (("models", models, NETWORKS), ("kl-weights", kl_weights, get_args(KLWeight))):
        if unknown := set(given) - set(known):
            parser.error(f"--{flag} must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)

    size = options.dataset_size or len(training_split())
    settings = FiniteSettings(options.steps, size, options.granularity)
    runs = all_runs(models, kl_weights, options.seeds)
    about = conditions(settings, options.seeds)
    started = time.perf_counter()
    results = list(zip(runs, with_progress(runs, train_all(runs, settings, options.jobs)), strict=True))
    about["duration"] = f"{time.perf_counter() - started:.0f} s with {options.jobs} processes of one thread"
    markdown = as_markdown(results, about)
    print(markdown)
    if options.output is not None:
        (options.output / "finite_training.md").write_text(markdown, "utf-8")
        (options.output / "finite_training.json").write_text(as_json(results, about), "utf-8")
    return 0 if all(outcome.finite for run, outcome in results if run.formulas == "project") else 1


def all_runs(models: Iterable[str], kl_weights: Iterable[str], seeds: int) -> list[FiniteRun]:
    """Return the runs, those of one row of the table beside each other."""
    choices = itertools.product(models, kl_weights, LEARNING_RATES, range(seeds), get_args(Formulas))
    return [FiniteRun(*choice) for choice in choices]


def train_all(runs: Sequence[FiniteRun], settings: FiniteSettings, jobs: int) -> Iterator[FiniteOutcome]:
    """Train, in so many processes, and yield the outcomes in the order of the runs."""
    train_one = functools.partial(train_run, settings=settings)
    if jobs == 1:
        yield from map(train_one, runs)
        return
    with processes.workers(jobs) as pool:
        yield from pool.map(train_one, runs)


def train_run(run: FiniteRun, settings: FiniteSettings) -> FiniteOutcome:
    """Train one network on one thread; weights, batches and uniforms depend on the run's seed alone."""
    split = training_split()
    torch.manual_seed(run.seed)
    model = network(run.model, split.images.shape[1:], settings.granularity)
    kl_divergence: Callable[..., Tensor] = bmrs.kl_divergence
    if run.formulas == "plain":
        plain_layer.use_plain_formulas(model)
        kl_divergence = plain_layer.kl_divergence
    divergence = functools.partial(kl_divergence, weight=run.kl_weight, dataset_size=settings.dataset_size)
    torch.manual_seed(run.seed)
    with one_thread():
        return train(model, divergence, batches(split, settings, run.seed), run.learning_rate)


def train(
    model: nn.Module,
    divergence: Callable[[nn.Module], Tensor],
    examples: Iterable[tuple[Tensor, Tensor]],
    learning_rate: float,
) -> FiniteOutcome:
    """Train with Adam to the end of the examples or to the first NaN or infinity, whichever comes first.

    Args:
        model: network from images to logits of shape (N, classes); trained in place.
        divergence: the weighted KL term of the loss, a scalar in nats.
        examples: images and labels of each step.
        learning_rate: of all parameters alike.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, foreach=True)
    started = time.perf_counter()
    place, excess, losses = None, -math.inf, list[float]()
    for images, labels in examples:
        excess = max(excess, plain_layer.largest_excess(model))
        cross_entropy = F.cross_entropy(model(images), labels)
        kl = divergence(model)
        loss = cross_entropy + kl
        place = first_non_finite(
            [("loss (cross-entropy)", cross_entropy), ("loss (KL divergence)", kl), ("loss", loss)]
        )
        if place is None:
            optimizer.zero_grad()
            loss.backward()
            place = first_non_finite(
                (f"gradient of {name}", parameter.grad)
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            )
        if place is None:
            optimizer.step()
            place = first_non_finite(
                (f"parameter {name}", parameter) for name, parameter in model.named_parameters()
            )
        if place is not None:
            break
        losses.append(loss.item())
    return FiniteOutcome(
        non_finite_step=None if place is None else len(losses) + 1,
        place=place,
        final_loss=statistics.mean(losses[-FINAL_STEPS:]) if place is None else None,
        largest_excess=excess,
        seconds=time.perf_counter() - started,
    )


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, if any."""
    tensors = dict(named)
    # All at once first, since nearly always all are finite.
    if torch.cat([values.detach().flatten() for values in tensors.values()]).isfinite().all():
        return None
    return next(name for name, values in tensors.items() if not values.isfinite().all())


@functools.lru_cache(maxsize=1)
def training_split() -> TensorSplit:
    """Return the training images of the embedded data, preprocessed to float32 (4800, 1, 32, 32), and labels."""
    split = load_dataset(EMBEDDED).train
    images, labels = next(split.in_order(len(split)))
    return TensorSplit(preprocess(images, name=EMBEDDED), labels)


def batches(split: TensorSplit, settings: FiniteSettings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and labels of every step: epochs in random order, each without its incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(split) // settings.batch_size
    for step in range(settings.steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(split), generator=generator).split(settings.batch_size)
        chosen = order[step % per_epoch]
        yield split.images[chosen], split.labels[chosen]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that processes do not get into each other's way and sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def network(name: str, shape: Sequence[int], granularity: Granularity) -> nn.Module:
    """Return an untrained network with noise for images of a shape (C, 32, 32)."""
    if name == "lenet5":
        return bmrs.models.LeNet5(in_channels=shape[0], granularity=granularity)
    return bmrs.models.MLP(
        in_features=math.prod(shape), num_blocks=MLP_BLOCKS, hidden=MLP_HIDDEN, granularity=granularity
    )


def with_progress(runs: Sequence[FiniteRun], outcomes: Iterable[FiniteOutcome]) -> Iterator[FiniteOutcome]:
    """Pass outcomes on as they come, with a bar on a terminal that has rich, with a line each elsewhere."""
    console: Any = None
    with contextlib.suppress(ImportError):
        from rich.console import Console

        console = Console(stderr=True)
    if console is not None and console.is_terminal:
        from rich.progress import track

        yield from track(outcomes, "training", total=len(runs), console=console)
        return
    for number, (run, outcome) in enumerate(zip(runs, outcomes, strict=True), start=1):
        ending = "finite" if outcome.finite else f"step {outcome.non_finite_step}: {outcome.place} not finite"
        print(
            f"[{number}/{len(runs)}] {run.model} {run.kl_weight} {run.learning_rate:g} seed {run.seed} "
            f"{run.formulas}: {ending}, {outcome.seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
        yield outcome


def conditions(settings: FiniteSettings, seeds: int) -> dict[str, Any]:
    """Return the settings of the runs, the machine and the versions."""
    return {
        "data": f"{EMBEDDED}, {len(training_split()):,} training images",
        "networks": f"mlp: {MLP_BLOCKS + 1} hidden layers of {MLP_HIDDEN}; lenet5",
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "steps": settings.steps,
        "seeds": seeds,
        "batch size": settings.batch_size,
        "elbo divides by": settings.dataset_size,
        "granularity": settings.granularity,
        # The threads are those of the command, not of the runs.
        **{name: value for name, value in environment().items() if name != "threads"},
    }


NOTE = f"""\
Each run starts from the same weights for the same seed and sees the same batches and the same uniforms, whichever the
functions; Adam trains all parameters at the one learning rate. Loss, gradients and parameters are checked at every
step, and a run ends at its first NaN or infinity. *Loss* is the mean over the last {FINAL_STEPS} steps in nats, KL
term included, of the runs that stayed finite; rounding alone makes trajectories part, so that the losses do not say
which functions train better. *(μ - b)/σ* is the largest of any structure up to a run's end: by how many σ a mode passed
the upper end of log θ. Ranges are over the seeds."""


def as_markdown(results: Sequence[tuple[FiniteRun, FiniteOutcome]], about: dict[str, Any]) -> str:
    """Return the table under its conditions."""
    rows: dict[tuple[str, str, float], dict[Formulas, list[FiniteOutcome]]] = {}
    for run, outcome in results:
        row = rows.setdefault((run.model, run.kl_weight, run.learning_rate), {"project": [], "plain": []})
        row[run.formulas].append(outcome)
    columns = (
        *("network", "KL weight", "learning rate"),
        *("project: finite", "loss", "(μ - b)/σ"),
        *("plain: finite", "loss", "(μ - b)/σ", "first NaN or infinity at step", "in"),
    )
    lines = [
        (
            model,
            kl_weight,
            f"{learning_rate:g}",
            *_summary(outcomes["project"]),
            *_summary(outcomes["plain"]),
            _range([each.non_finite_step for each in outcomes["plain"]], ".0f"),
            _places(outcomes["plain"]),
        )
        for (model, kl_weight, learning_rate), outcomes in rows.items()
    ]
    parts = [
        "# Training with the project's functions and with the plain formulas",
        table(("", ""), list(about.items())),
        NOTE,
        table(columns, lines),
    ]
    failed = [
        f"- {run.model}, {run.kl_weight}, {run.learning_rate:g}, seed {run.seed}: step {outcome.non_finite_step}, "
        f"{outcome.place}"
        for run, outcome in results
        if run.formulas == "project" and not outcome.finite
    ]
    if failed:
        parts += ["## Runs of the project that were not finite", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _summary(outcomes: Sequence[FiniteOutcome]) -> tuple[str, str, str]:
    return (
        f"{sum(each.finite for each in outcomes)} of {len(outcomes)}",
        _range([each.final_loss for each in outcomes], ".2f"),
        _range([each.largest_excess for each in outcomes], ".1f"),
    )


def _range(values: Iterable[float | None], digits: str) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return "–"
    ends = dict.fromkeys((format(min(present), digits), format(max(present), digits)))
    return " to ".join(ends)


def _places(outcomes: Sequence[FiniteOutcome]) -> str:
    counts = Counter(each.place for each in outcomes if each.place is not None)
    return ", ".join(place if count == 1 else f"{place} ×{count}" for place, count in counts.items()) or "–"


def as_json(results: Sequence[tuple[FiniteRun, FiniteOutcome]], about: dict[str, Any]) -> str:
    """Return each run's record as JSON."""
    records = [
        run._asdict()
        | {"finite": outcome.finite}
        | outcome._asdict()
        | {"seconds": round(outcome.seconds, 2)}
        for run, outcome in results
    ]
    return json.dumps({"conditions": about, "runs": records}, indent=1, allow_nan=False) + "\n"
