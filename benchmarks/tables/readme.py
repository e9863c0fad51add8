"""Write the README's tables and the plots from the committed results: ``python -m benchmarks readme``.

With --check nothing is written, and the exit code is 1 if the README or a plot says something else than the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments import paper_table
from benchmarks.experiments.peers import picture, rules
from benchmarks.experiments.peers import table as peers_table
from benchmarks.processes import ROOT
from benchmarks.tables import plots, speed_tables
from benchmarks.tables.markdown import table

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    before = README.read_text("utf-8")
    after = with_results(before, RESULTS)
    if options.check:
        wrong = [*(["README.md"] if before != after else []), *map(str, plots.stale_files(RESULTS))]
        wrong += [str(picture.path_of(RESULTS))] if picture.is_stale(RESULTS) else []
        wrong += [str(path) for path in peers_table.stale_files(RESULTS)]
        if wrong:
            names = ", ".join(wrong)
            print(f"{names}: not from these results: run python -m benchmarks readme", file=sys.stderr)
        return int(bool(wrong))
    README.write_text(after, "utf-8")
    plots.write(RESULTS)
    picture.write(RESULTS)
    peers_table.write(RESULTS)
    return 0


def with_results(text: str, results: Path) -> str:
    """Return a text with its marked blocks made from the results in a folder.

    Raises:
        KeyError: a block has an unknown name.
    """
    return BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found['name']](results)}\n\n{found[3]}", text)


def accuracy(results: Path) -> str:
    """Return the table of errors in float32."""
    data = json.loads((results / "accuracy" / "torch-float32.json").read_text("utf-8"))
    records: dict[str, list[Mapping[str, Any]]] = {}
    for record in data["measured"]:
        records.setdefault(record["quantity"], []).append(record)
    rows = []
    for quantity, (value, *gradients) in records.items():
        plain = [record["plain"] for record in (value, *gradients)]
        not_finite = max(summary["non_finite_share"] for summary in plain)
        wrong = value["plain"]["wrong_share"]
        rows.append(
            (
                f"`{quantity}`",
                _number(value["project"]["largest"]),
                _number(max(record["project"]["largest"] for record in gradients)) if gradients else "",
                f"{not_finite:.0%}",
                "" if wrong is None else f"{wrong:.0%}",
            )
        )
    return table(
        (
            *("function", "largest error", "of its gradients"),
            *("plain formulas: NaN or infinite", "prune decisions wrong or NaN"),
        ),
        rows,
    )


def finite_training(results: Path) -> str:
    """Return how many trainings stayed finite, on the embedded data and with the KL weight of the whole data set."""
    rows = []
    for folder in (results / "finite_training", results / "finite_training" / "dataset_size_48000"):
        data = json.loads((folder / "finite_training.json").read_text("utf-8"))
        examples = data["conditions"]["elbo divides by"]
        groups: dict[tuple[str, str, float], dict[str, list[Mapping[str, Any]]]] = {}
        for run in data["runs"]:
            group = groups.setdefault((run["model"], run["kl_weight"], run["learning_rate"]), {})
            group.setdefault(run["formulas"], []).append(run)
        for (model, weight, rate), ways in groups.items():
            steps = [run["non_finite_step"] for run in ways["plain"] if not run["finite"]]
            rows.append(
                (
                    {"mlp": "MLP", "lenet5": "LeNet-5"}[model],
                    f"1/{examples:,}" if weight == "elbo" else weight,
                    f"{rate:g}",
                    *(f"{sum(run['finite'] for run in runs)} of {len(runs)}" for runs in ways.values()),
                    " to ".join(str(step) for step in sorted({min(steps), max(steps)})) if steps else "",
                )
            )
    return table(
        ("network", "KL weight", "learning rate", "project: finite", "plain: finite", "NaN at step"), rows
    )


def _number(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


BLOCKS: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "finite-training": finite_training,
    "functions": speed_tables.functions,
    "step": speed_tables.step,
    "pruning": speed_tables.pruning,
    "scaling": speed_tables.scaling,
    "paper": paper_table.readme,
    "peers": peers_table.readme,
    "rules": rules.readme,
}
