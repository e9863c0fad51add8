"""The tables of the recipe beside other ways to small networks, from the rows of ``python -m benchmarks peers``."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

RUNS = "runs.jsonl"
UNTRAINED = "untrained.jsonl"
NAMES = {
    "fashion-mnist-subset": "embedded images",
    "fashion-mnist": "Fashion-MNIST",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "lenet5": "LeNet-5",
    "mlp": "MLP",
    "resnet20": "ResNet-20",
}
# In the order of the tables.
NETWORKS = ("lenet5", "mlp", "resnet20")
SIZES = ("dense", "own", "50 %", "40 %", "25 %", "20 %", "8 %")
METHODS = {
    "dense": "dense, all epochs",
    "trained": "dense, where pruning starts",
    "bmrs": "**this recipe**",
    "bmrs, uniform": "this recipe, uniform widths",
    "weights trained slowly, uniform": "this recipe, weights trained with the noise, a tenth of the rate",
    "weights trained, uniform": "this recipe, weights trained with the noise",
    "scratch": "this recipe's widths from scratch",
    "random, uniform": "Torch-Pruning, random, uniform",
    "L2, uniform": "Torch-Pruning, L2, uniform",
    "Taylor, uniform": "Torch-Pruning, Taylor, uniform",
    "L2, global": "Torch-Pruning, L2, global scores",
    "Taylor, global": "Torch-Pruning, Taylor, global scores",
    "L2, in rounds": "Torch-Pruning, L2, uniform, in three rounds",
    "Taylor, in rounds": "Torch-Pruning, Taylor, uniform, in three rounds",
    "paper's training, uniform": "Algorithm 1's training (own rates), ranked by ΔF_N, uniform",
}

_RIVALS = ("random, uniform", "L2, uniform", "Taylor, uniform", "L2, global", "Taylor, global")

UNTRAINED_METHODS = ("bmrs", *_RIVALS, "bmrs, uniform", "random, this recipe's widths")

Row = dict[str, Any]


def load(path: Path) -> list[Row]:
    """Return the rows of a file, none if there is no file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def readme(results: Path) -> str:
    """Return the committed rows in short, with the picture and a link to the full tables."""
    rows = load(results / "peers" / RUNS)
    if not rows:
        return ""
    return (
        f"{_about(rows)}\n\n{_short(rows)}\n\n"
        "Means over the seeds that all these ways have. [All ways with standard deviations, differences and every seed]"
        "(benchmarks/results/peers/tables.md).\n\n![Accuracy against size](benchmarks/results/peers/accuracy.png)"
    )


def tables(results: Path) -> str:
    """Return the full tables of the committed rows, as a file beside them."""
    rows = load(results / "peers" / RUNS)
    return (
        "# What one would do instead\n\nMade by `python -m benchmarks readme` from the rows beside it; the project's "
        f"README says what they mean.\n\n{_about(rows)}\n\n{as_markdown(rows)}\n"
    )


def write(results: Path) -> None:
    """Write the file of the full tables, if it says something else than the rows."""
    for path in stale_files(results):
        path.write_text(tables(results), "utf-8")


def stale_files(results: Path) -> list[Path]:
    """Return the file of the full tables if there are rows that it does not show."""
    path = results / "peers" / "tables.md"
    wanted = load(results / "peers" / RUNS)
    fresh = not wanted or (path.exists() and path.read_text("utf-8") == tables(results))
    return [] if fresh else [path]


def _about(rows: Sequence[Row]) -> str:
    machines = sorted({row["environment"]["CPU"] for row in rows})
    versions = sorted({row["environment"]["torch"] for row in rows})
    return f"{', '.join(machines)}; torch {', '.join(versions)}; float32, one thread a run."


def _short(rows: Sequence[Row]) -> str:
    lines = []
    rivals = ("scratch", "random, uniform", "L2, uniform", "Taylor, uniform")
    for data in NAMES:
        for network in NETWORKS:
            own = [row for row in rows if (row["data"], row["network"]) == (data, network)]
            for size in SIZES[1:]:
                ways = {
                    method: [row for row in own if (row["size"], row["method"]) == (size, method)]
                    for method in METHODS
                }
                # The same seeds in all columns.
                seeds = set.intersection(*({row["seed"] for row in ways[m]} for m in ("bmrs", *rivals)))
                dense = [row for row in own if row["method"] == "trained" and row["seed"] in seeds]
                if not seeds:
                    continue

                def mean(method: str, name: str, seeds: set[int] = seeds, ways: Any = ways) -> str:
                    values = [row[name] for row in ways[method] if row["seed"] in seeds]
                    return f"{100 * statistics.mean(values):.2f}"

                ours = [row for row in ways["bmrs"] if row["seed"] in seeds]
                lines.append(
                    (
                        f"{NAMES[network]}, {NAMES[data]}",
                        size,
                        len(seeds),
                        f"{statistics.mean(row['parameters'] for row in ours):,.0f}",
                        f"{statistics.mean(row['flops'] for row in ours):,.0f}",
                        f"{100 * statistics.mean(row['accuracy'] for row in dense):.2f}" if dense else "",
                        f"**{mean('bmrs', 'accuracy')}**",
                        *(mean(method, "accuracy") for method in rivals),
                    )
                )
    return table(
        (
            *("network, data", "size", "seeds", "parameters", "FLOPs", "before pruning"),
            *("this recipe", "its widths from scratch", "random", "L2", "Taylor"),
        ),
        lines,
    )


def untrained_readme(results: Path) -> str:
    """Return what pruning and refitting leave, without training, of the committed rows."""
    rows = load(results / "peers" / UNTRAINED)
    return f"{_about(rows)}\n\n{untrained(rows)}" if rows else ""


def untrained(rows: Sequence[Row]) -> str:
    """Return a table of networks that were pruned and refitted, all by one function, and of which none was trained."""
    lines = []
    for data, network, size in itertools.product(NAMES, NETWORKS, SIZES):
        found = [r for r in rows if (r["data"], r["network"], r["size"]) == (data, network, size)]
        methods = [method for method in UNTRAINED_METHODS if any(row["method"] == method for row in found)]
        # The same seeds in all columns.
        of_all = [{row["seed"] for row in found if row["method"] == method} for method in methods]
        seeds = set.intersection(*of_all) if "bmrs" in methods else set()
        if not seeds:
            continue

        def mean(
            name: str, method: str = "bmrs", found: Sequence[Row] = found, seeds: set[int] = seeds
        ) -> float:
            return statistics.mean(
                row[name] for row in found if row["method"] == method and row["seed"] in seeds
            )

        def best(name: str, methods: Sequence[str] = methods, mean: Callable[..., float] = mean) -> str:
            reached = {method: mean(name, method) for method in methods if method in _RIVALS}
            method = max(reached, key=reached.__getitem__)
            return f"{100 * reached[method]:.2f} ({method.replace(', uniform', '')})"

        lines.append(
            (
                f"{NAMES[network]}, {NAMES[data]}",
                size,
                len(seeds),
                f"{mean('parameters'):,.0f}",
                f"{100 * mean('trained_accuracy'):.2f}",
                f"{100 * mean('pruned_accuracy'):.2f}",
                best("pruned_accuracy"),
                f"**{100 * mean('refitted_accuracy'):.2f}**",
                best("refitted_accuracy"),
                *(
                    f"{100 * mean('refitted_accuracy', method):.2f}" if method in methods else ""
                    for method in UNTRAINED_METHODS
                    if method not in ("bmrs", *_RIVALS)
                ),
            )
        )
    return table(
        (
            *("network, data", "size", "seeds", "parameters", "before pruning"),
            *("pruned: this recipe", "best rival", "refitted: this recipe", "best rival"),
            *("this recipe, uniform widths", "this recipe's widths, random structures"),
        ),
        lines,
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """Return a table for each data set and network."""
    parts = []
    for data in NAMES:
        for network in NETWORKS:
            own = [row for row in rows if (row["data"], row["network"]) == (data, network)]
            if own:
                parts.append(f"**{NAMES[network]}, {NAMES[data]}**\n\n{_table(own)}")
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for size in SIZES:
        ours = {row["seed"]: row for row in rows if (row["size"], row["method"]) == (size, "bmrs")}
        for method, name in METHODS.items():
            found = sorted(
                (row for row in rows if (row["size"], row["method"]) == (size, method)),
                key=lambda row: row["seed"],
            )
            if not found:
                continue
            pairs = [
                100 * (row["accuracy"] - ours[row["seed"]]["accuracy"])
                for row in found
                if row["seed"] in ours and method != "bmrs"
            ]
            lines.append(
                (
                    "" if size == "dense" else size,
                    name,
                    f"{statistics.mean(row['parameters'] for row in found):,.0f}",
                    f"{statistics.mean(row['flops'] for row in found):,.0f}",
                    _spread(row["pruned_accuracy"] for row in found if "pruned_accuracy" in row),
                    _spread(row["refitted_accuracy"] for row in found if "refitted_accuracy" in row),
                    _spread(row["accuracy"] for row in found),
                    _difference(pairs),
                    " ".join(f"{100 * row['accuracy']:.2f}" for row in found),
                )
            )
    return table(
        (
            *("size", "way", "parameters", "FLOPs", "pruned, %", "refitted, %"),
            *("fine-tuned, %", "against this recipe", "each seed"),
        ),
        lines,
    )


def _spread(values: Iterable[float]) -> str:
    found = [100 * value for value in values]
    if not found:
        return ""
    mean = f"{statistics.mean(found):.2f}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found):.2f}"


def _difference(pairs: Sequence[float]) -> str:
    """Return the mean difference on the same seeds, with its standard error."""
    if not pairs:
        return ""
    mean = f"{statistics.mean(pairs):+.2f}"
    if len(pairs) == 1:
        return mean
    return f"{mean} (± {statistics.stdev(pairs) / len(pairs) ** 0.5:.2f})"
