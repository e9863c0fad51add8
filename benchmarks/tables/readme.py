"""Write the READMEs' tables and the plots from the committed results: ``python -m benchmarks readme``.

A table goes wherever a README has its marker, from ``<!-- results: NAME -->`` to ``<!-- end -->``. With --check nothing
is written, and the exit code is 1 if a README or a plot says something else than the results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.experiments import compaction_memory, paper_table
from benchmarks.experiments.peers import picture, rules
from benchmarks.experiments.peers import table as peers_table
from benchmarks.experiments.small_networks import pictures as small_pictures
from benchmarks.experiments.small_networks import table as small_table
from benchmarks.experiments.yardstick import table as yardstick_table
from benchmarks.markdown import table
from benchmarks.processes import ROOT
from benchmarks.tables import examples, plots, speed_tables

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.S)
LINK = re.compile(r"(?<=\]\()(benchmarks/[^)]+)")

Record = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    stale = {path: text for path in readmes() if (text := _renewed(path)) != path.read_text("utf-8")}
    if options.check:
        wrong = [_name(path) for path in stale] + [str(path) for path in plots.stale_files(RESULTS)]
        wrong += [str(picture.path_of(RESULTS))] if picture.is_stale(RESULTS) else []
        wrong += [str(path) for each in _WITH_FILES for path in each.stale_files(RESULTS)]
        if wrong:
            names = ", ".join(wrong)
            print(f"{names}: not from these results: run python -m benchmarks readme", file=sys.stderr)
        return int(bool(wrong))
    for path, text in stale.items():
        path.write_text(text, "utf-8")
    plots.write(RESULTS)
    picture.write(RESULTS)
    for each in _WITH_FILES:
        each.write(RESULTS)
    return 0


def readmes() -> list[Path]:
    """Return the README of the project and those of its packages, also of packages inside these."""
    root = README.parent
    found = [*root.glob("*/README.md"), *root.glob("*/*/README.md")]
    beside = sorted(path for path in found if (path.parent / "__init__.py").exists())
    return [README, *beside]


def with_results(text: str, results: Path, *, folder: str = ".") -> str:
    """Return a text with its marked blocks made from the results in a folder.

    Args:
        text: the text.
        results: the folder of the results.
        folder: where the text lies, from the project's root; links of the blocks are relative to it.

    Raises:
        KeyError: a block has an unknown name.
    """

    def block(found: re.Match[str]) -> str:
        content = LINK.sub(lambda link: _from(folder, link[1]), BLOCKS[found["name"]](results))
        return f"{found[1]}\n{content}\n\n{found[3]}"

    return BLOCK.sub(block, text)


def _renewed(path: Path) -> str:
    return with_results(path.read_text("utf-8"), RESULTS, folder=str(path.parent.relative_to(README.parent)))


def _from(folder: str, link: str) -> str:
    return os.path.relpath(link, folder).replace(os.sep, "/")


def _name(path: Path) -> str:
    return path.relative_to(README.parent).as_posix()


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


def contract(results: Path) -> str:
    """Return what every function is held to and what each backend reached, values and gradients."""
    found = {
        setting: json.loads((results / "accuracy" / f"{setting}.json").read_text("utf-8"))["measured"]
        for dtype in ("float32", "float64")
        for setting in (f"torch-{dtype}", f"numba-{dtype}", f"triton-interpreted-{dtype}")
    }
    narrow, wide = ([name for name in found if name.endswith(dtype)] for dtype in ("float32", "float64"))
    rows = []
    for quantity in dict.fromkeys(record["quantity"] for record in found["torch-float32"]):
        of = {name: [r for r in records_ if r["quantity"] == quantity] for name, records_ in found.items()}
        bounds = [_number(bound) for bound in dict.fromkeys(r["bound"] for r in of["torch-float32"])]
        errors = [_value_and_gradients(of[name]) for name in narrow]
        largest = max(r["project"]["largest"] for name in wide for r in of[name])
        rows.append((f"`{quantity}`", ", ".join(bounds), *errors, _number(largest)))
    columns = (
        *("function", "float32: bound, of gradients", "torch", "numba", "Triton, interpreted"),
        "float64, all three",
    )
    return table(columns, rows)


def _value_and_gradients(found: Sequence[Record]) -> str:
    value, *gradients = [record["project"]["largest"] for record in found]
    return ", ".join(_number(error) for error in (value, *([max(gradients)] if gradients else [])))


def compaction(results: Path) -> str:
    """Return the sum of the table of compacted architectures."""
    text = (results / "compaction" / "rows.jsonl").read_text("utf-8")
    entries: list[Record] = [json.loads(line) for line in text.splitlines()]
    rows = []
    for place in dict.fromkeys(entry["noise"] for entry in entries):
        own = [entry for entry in entries if entry["noise"] == place]
        done = [entry for entry in own if entry["form"] != "refused"]
        rivals = [entry["torch_pruning"] == "runs" for entry in own if "torch_pruning" in entry]
        rows.append(
            (
                f"noise on {place}",
                len(own),
                len(own) - len(done),
                f"{sum(entry['removed'] for entry in done):,} of {sum(entry['pruned'] for entry in done):,}",
                f"{sum(entry['form'] == 'module' for entry in done)} of {len(done)}",
                _number(max(entry["error"] for entry in done)),
                f"{sum(rivals)} of {len(rivals)}" if rivals else "",
            )
        )
    columns = (
        *("", "networks", "refused", "pruned structures that left", "stayed of their own classes"),
        *("outputs differ at most by", "Torch-Pruning gives one that runs"),
    )
    return table(columns, rows)


def memory(results: Path) -> str:
    """Return the memory that compaction took beside each model."""
    text = (results / "compaction" / "memory.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    about = rows[0]["environment"]
    return f"{about['CPU']}, one thread; torch {about['torch']}:\n\n{compaction_memory.as_table(rows)}"


# A few rows that tell the most: where noise costs most, where it costs little, and where the project loses. Networks by
# the beginnings of their names.
_TELLING_STEPS = (("MLP", "element"), ("LeNet-5, batch 32", "element"), ("ResNet-50", "element"))
_TELLING_FUNCTIONS = (
    *(("multiply_noise", [64, 18, 28, 28], "element"), ("multiply_noise", [32, 197, 768], "sample")),
    *(("kl_divergence", [26560], None), ("noise_snr", [26560], None)),
)


def speed(results: Path) -> str:
    """Return a few times of training steps and functions beside those of the plain formulas, losses too."""
    functions = records.load("functions", results)
    parts = []
    for machine, rows in records.load("step", results).items():
        about = rows[0]["environment"]
        where = about["GPU"] if "GPU" in about else f"{about['CPU']}, {about['threads']} threads"
        lines = [*_step_lines(rows), *_function_lines(functions.get(machine, []))]
        columns = ("what", "without noise, ms", "with it", "by the plain formulas", "over theirs")
        parts.append(f"{where}; torch {about['torch']}; float32:\n\n{table(columns, lines)}")
    return "\n\n".join(parts)


def _step_lines(rows: Sequence[Record]) -> list[tuple[str, ...]]:
    eager = [row for row in rows if row["mode"] == "eager" and row["dtype"] == "float32"]
    bare = {row["network"]: _median(row) for row in eager if row["way"] == "no noise"}
    plain = {(row["network"], row["granularity"]): _median(row) for row in eager if row["way"] == "plain"}
    lines = []
    for row in eager:
        network, granularity = row["network"], row["granularity"]
        telling = any(network.startswith(name) and granularity == of for name, of in _TELLING_STEPS)
        if telling and row["way"] == "project":
            stand_in = " (stand-in)" if row["stand_in"] else ""
            what = f"training step of {network}{stand_in}, granularity {granularity}"
            theirs = plain.get((network, granularity))
            lines.append(_speed_line(what, bare.get(network), _median(row), theirs))
    return lines


def _function_lines(rows: Sequence[Record]) -> list[tuple[str, ...]]:
    lines = []
    for function, shape, granularity in _TELLING_FUNCTIONS:
        of = [
            row
            for row in rows
            if (row["function"], row["shape"], row["granularity"]) == (function, shape, granularity)
            and row["dtype"] == "float32"
        ]
        whole = "both" if any(row["direction"] == "both" for row in of) else "forward"
        time = {row["competitor"]: _median(row) for row in of if row["direction"] == whole}
        ours = next((time[name] for name in speed_tables.OURS if name in time), None)
        if ours is not None:
            size = "×".join(f"{length:,}" for length in shape)
            what = f"`{function}`, {size}" + (f", {granularity}" if granularity else " structures")
            lines.append(_speed_line(what, None, ours, time.get("plain")))
    return lines


def _speed_line(what: str, bare: float | None, ours: float, plain: float | None) -> tuple[str, ...]:
    over = "" if plain is None else f"{ours / plain:.2g}"
    return (what, *("" if t is None else f"{float(f'{t:.3g}'):g}" for t in (bare, ours, plain)), over)


def _median(row: Record) -> float:
    median: float = row["milliseconds"]["median"]
    return median


def _number(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


# Modules that write files beside the READMEs: `stale_files(results)` and `write(results)`.
_WITH_FILES = (peers_table, small_table, small_pictures, yardstick_table)

BLOCKS: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "contract": contract,
    "compaction": compaction,
    "compaction-memory": memory,
    "speed": speed,
    "finite-training": finite_training,
    "functions": speed_tables.functions,
    "step": speed_tables.step,
    "pruning": speed_tables.pruning,
    "scaling": speed_tables.scaling,
    "paper": paper_table.readme,
    "post-training": small_table.readme,
    "formulas": small_table.formulas,
    "by-snr": small_table.by_snr,
    "drawn": small_table.drawn,
    "knowledge": small_table.knowledge,
    "yardstick": yardstick_table.readme,
    "peers": peers_table.readme,
    "untrained": peers_table.untrained_readme,
    "rules": rules.readme,
    "minilm": examples.minilm,
    "efficientnet-lite0": examples.efficientnet_lite0,
}
