"""The table of the paper's experiment on its small networks, from the runs that ``python -m benchmarks paper`` kept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.experiments.published import PUBLISHED, Published, compression_as_counted
from benchmarks.granularities import equivalent
from benchmarks.markdown import table
from bmrs.training import RunError
from bmrs_kernels.options import Granularity

Row = Mapping[str, Any]

RUNS, JUDGED = "runs.jsonl", "judged.jsonl"
# In the order of the table.
NAMES = {
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "fashion-mnist-subset": "Fashion-MNIST subset",
    "mlp": "MLP",
    "lenet5": "LeNet-5",
    "element": "element",
    "sample": "sample",
    "batch": "batch",
    "none": "none, without noise",
    "l2": "L2",
    "bmrs-n": "BMRS_N",
    "bmrs-u-8": "BMRS_U-8",
    "bmrs-u-4": "BMRS_U-4",
    "snr": "SNR",
    "mean": "E[θ]",
}


class Group(NamedTuple):
    """The runs of a line of the table."""

    data: str
    network: str
    epochs: tuple[int, int]  # of training and of fine-tuning
    granularity: Granularity
    criterion: str

    @property
    def published(self) -> Published | None:
        """What the paper has."""
        usual = self.epochs == (50, 10) and "element" in equivalent(
            self.granularity, of_matrices=self.network == "mlp"
        )
        return PUBLISHED.get((self.network, self.data, self.criterion)) if usual else None


def load(path: Path) -> list[Row]:
    """Return the finished runs of a file, none if there is no file.

    Raises:
        RunError: A line is broken.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RunError(f"{path}, line {number}: not the JSON of a run; remove the line") from error
    return rows


def readme(results: Path) -> str:
    """Return the table of the committed runs under its machine and versions, an empty text without runs."""
    rows = load(results / "paper" / RUNS)
    if not rows:
        return ""
    machines = {row["environment"].get("GPU") or row["environment"]["CPU"] for row in rows}
    versions = {row["environment"]["torch"] for row in rows}
    rows = [*rows, *map(_l2_run, load(results / "paper" / JUDGED))]
    return f"{', '.join(sorted(machines))}; torch {', '.join(sorted(versions))}:\n\n{as_markdown(rows)}"


def _as_counted(row: Row) -> float:
    return compression_as_counted(row["network"], row["data"], row["settings"], list(row["kept"].values()))


def _l2_run(judged: Row) -> Row:
    """Return what pruning by L2 norms after training came to, at BMRS_N's compression, as a finished run."""
    _, compression, accuracy, *_ = judged["criteria"]["l2"]["stop"]
    return {
        **{name: judged[name] for name in ("data", "network", "granularity", "seed", "settings")},
        "criterion": "l2",
        "compression_percent": compression,
        "kept": dict(enumerate(judged["criteria"]["l2"]["widths"])),
        "test_accuracy": accuracy / 100,
        "failure": None,
        "seconds": None,
        "cuda_graph": False,
        "jobs": 1,
    }


def as_markdown(rows: Sequence[Row]) -> str:
    """Return means and standard deviations over the seeds, and the runs that failed."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        epochs = row["settings"]["epochs"], row["settings"]["fine_tune_epochs"]
        group = Group(
            row["data"], row["network"], epochs, row["granularity"] or "element", row["criterion"] or "none"
        )
        groups.setdefault(group, []).append(row)
    lines = []
    for group in sorted(groups, key=_place):
        finished = [row for row in groups[group] if not row["failure"]]
        published, dense = group.published, group.criterion == "none"
        seconds = [row["seconds"] for row in groups[group] if row["seconds"] is not None]
        lines.append(
            (
                NAMES[group.data],
                NAMES[group.network],
                ""
                if dense
                else " = ".join(equivalent(group.granularity, of_matrices=group.network == "mlp")),
                NAMES[group.criterion],
                " + ".join(map(str, group.epochs)),
                len(finished),
                "" if dense else _spread(row["compression_percent"] for row in finished),
                _spread(100 * row["test_accuracy"] for row in finished),
                "" if published is None or dense else _spread(map(_as_counted, finished)),
                "" if published is None or dense else _mean_and_deviation(*published.compression),
                "" if published is None else _mean_and_deviation(*published.accuracy),
                " ".join(f"{100 * row['test_accuracy']:.2f}" for row in finished),
                f"{statistics.mean(seconds):.1f}" if seconds else "",
                " and ".join(dict.fromkeys(_way(row) for row in groups[group])),
            )
        )
    columns = (
        *("data", "network", "granularity", "criterion", "epochs", "seeds"),
        *("compression, %", "test accuracy, %", "compression as the authors count, %"),
        *("the paper's compression, %", "its accuracy, %"),
        *("each seed", "seconds a run", "steps"),
    )
    parts = [
        table(columns, lines),
        "Means ± standard deviations over the seeds. Compression is the paper's: the share of all trainable values, "
        "μ and log σ too, that pruning makes superfluous; the authors' code takes no biases off, and no columns behind "
        "LeNet-5's flattening. Accuracy is that of the masked network with E[θ]. The "
        "paper's own are of ten runs (arXiv 2406.01345, Table 1). L2 norms prune the network that was trained without "
        "pruning, and as many structures as BMRS_N does there without the 2π.",
    ]
    failed = [
        f"- {row['data']}, {row['network']}, {row['granularity']}, {row['criterion']}, seed {row['seed']}: "
        f"{row['failure']}"
        for row in rows
        if row["failure"]
    ]
    if failed:
        parts.append("Failed runs, which the means leave out:\n\n" + "\n".join(failed))
    return "\n\n".join(parts)


def _place(group: Group) -> list[Any]:
    names = list(NAMES)
    return [names.index(part) if isinstance(part, str) else part for part in group]


def _way(row: Row) -> str:
    way = "CUDA graph" if row["cuda_graph"] else "eager"
    return way if row["jobs"] == 1 else f"{way}, {row['jobs']} runs at a time"


def _spread(values: Iterable[float]) -> str:
    found = list(values)
    if not found:
        return ""
    mean = statistics.mean(found)
    return f"{mean:.2f}" if len(found) == 1 else _mean_and_deviation(mean, statistics.stdev(found))


def _mean_and_deviation(mean: float, deviation: float) -> str:
    return f"{mean:.2f} ± {deviation:.2f}"
