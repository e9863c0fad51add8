"""Do the rules agree once posteriors have converged? ``python -m benchmarks rules --data-dir DIR``.

LeNet-5 is trained on a full data set, its posteriors are learned at several temperatures with the weights frozen, for
a learning rate times steps of 30, and the decisions of three rules are compared, structure by structure: odds,
SNR ≤ 1 and ΔF_N ≥ -0.919. So are those of odds with the lower end of log θ at -20 and at -40. Fixed beforehand:
odds are refuted as the rule that needs no tuning if more than 5 % of the structures are judged otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import bmrs
from benchmarks.environment import environment
from benchmarks.experiments.deadline import Deadline
from benchmarks.experiments.peers.chains import ChainComparison, config_of
from benchmarks.experiments.peers.comparison import CPU, Row, Subject
from benchmarks.experiments.peers.table import NAMES, load
from benchmarks.markdown import table
from benchmarks.options import positive
from benchmarks.records import RESULTS
from bmrs.criteria import PAPER_TOLERANCE
from bmrs.noise.lookup import noise_layers
from bmrs.pruning.learner import PosteriorLearner
from bmrs.training import recipe
from bmrs.training.run import load as load_data

RUNS = "rules.jsonl"
TEMPERATURES = (1.0, 3.0, 10.0)
LOWER_ENDS = (-20.0, -40.0)
DISTANCE = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks rules", description=__doc__)
    parser.add_argument("--data", nargs="+", default=["fashion-mnist", "mnist"], help="(both full sets)")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with a folder for each data set")
    parser.add_argument("--seeds", type=positive, default=5, help="number of seeds, from 0 (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "peers" / RUNS, help="file that rows are added to"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = environment()
    for seed in range(options.seeds):
        for name in options.data:
            done = {(row["data"], row["seed"]) for row in load(options.output)}
            if (name, seed) in done:
                continue
            rows = _rows(Subject(name, "lenet5", seed), str(options.data_dir / name))
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({**row, "environment": about}) + "\n" for row in rows)
    print(as_markdown(load(options.output)))
    return 0


def _rows(subject: Subject, data_dir: str) -> list[Row]:
    config = config_of(subject, data_dir, epochs=3)
    comparison = ChainComparison(subject, config, load_data(config, CPU), Deadline())
    train = comparison.data.train
    images, labels = next(train.in_order(len(train)))
    rate = config.settings.noise_lr
    size = config.settings.batch_size
    rows = []
    for temperature in TEMPERATURES:
        decisions: dict[float, dict[str, torch.Tensor]] = {}
        for lower in LOWER_ENDS:
            model = recipe.noisy_state(comparison.trained, config, comparison.data, CPU).model
            for layer in noise_layers(model).values():
                layer.lower = lower
            torch.manual_seed(subject.seed)
            learner = PosteriorLearner(
                model, temperature=temperature, dataset_size=len(labels), learning_rate=rate
            )
            with learner:
                while learner.distance < DISTANCE:
                    for batch in torch.randperm(len(labels)).split(size):
                        if learner.distance < DISTANCE:
                            learner.step(F.cross_entropy(model(images[batch]), labels[batch]))
            decisions[lower] = _decisions(model)
            rows.append(
                {
                    **subject._asdict(),
                    "temperature": temperature,
                    "lower": lower,
                    "distance": learner.distance,
                    "structures": len(decisions[lower]["odds"]),
                    **{f"pruned by {rule}": int(prune.sum()) for rule, prune in decisions[lower].items()},
                    **{
                        f"odds and {rule} differ": _share(decisions[lower]["odds"], prune)
                        for rule, prune in decisions[lower].items()
                        if rule != "odds"
                    },
                }
            )
        rows[-1]["lower ends differ"] = _share(*(decisions[lower]["odds"] for lower in LOWER_ENDS))
    return rows


def _decisions(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    rules: Mapping[str, Any] = {
        "odds": bmrs.BMRSOdds(),
        "SNR": bmrs.SNR(),
        "ΔF_N": bmrs.BMRSNormal(tolerance=PAPER_TOLERANCE),
    }
    layers = noise_layers(model).values()
    return {name: torch.cat([rule(layer).prune for layer in layers]) for name, rule in rules.items()}


def _share(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first != second).double().mean())


def readme(results: Path) -> str:
    """Return the table of the committed rows."""
    return as_markdown(load(results / "peers" / RUNS))


def as_markdown(rows: Sequence[Row]) -> str:
    """Return means, and the largest values in brackets, over the seeds."""
    lines = []
    for name in NAMES:
        for temperature in TEMPERATURES:
            for lower in LOWER_ENDS:
                found = [
                    row
                    for row in rows
                    if (row["data"], row["temperature"], row["lower"]) == (name, temperature, lower)
                ]
                if found:
                    columns = ("odds and SNR differ", "odds and ΔF_N differ", "lower ends differ")
                    pruned = statistics.mean(row["pruned by odds"] for row in found)
                    lines.append(
                        (
                            NAMES[name],
                            f"{temperature:g}",
                            f"{lower:g}",
                            len(found),
                            f"{pruned:.0f} of {found[0]['structures']}",
                            *(
                                _mean_and_largest([row[each] for row in found if each in row])
                                for each in columns
                            ),
                        )
                    )
    return table(
        (
            *("data", "T", "lower end of log θ", "seeds", "pruned by odds"),
            *("otherwise by SNR ≤ 1", "otherwise by ΔF_N ≥ -0.919", "otherwise with the lower end at -20"),
        ),
        lines,
    )


def _mean_and_largest(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1%} ({max(values):.1%})" if values else ""


if __name__ == "__main__":
    sys.exit(main())
