"""The tables of post-training pruning, from the rows of ``python -m benchmarks small-networks``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bmrs_kernels
from benchmarks.experiments import paper_table
from benchmarks.experiments.paper_table import JUDGED
from benchmarks.experiments.small_networks import scores
from benchmarks.markdown import table
from bmrs_kernels.constants import LOWER, UPPER

Row = Any

FORMULAS, BY_SNR, DRAWN = "formulas.jsonl", "by_snr.jsonl", "drawn.jsonl"
CRITERIA = {
    "bmrs-n": "BMRS_N, exact",
    "bmrs-n-authors": "BMRS_N, without the 2π",
    "bmrs-u-8": "BMRS_U-8",
    "bmrs-u-4": "BMRS_U-4",
    "snr": "SNR ≤ 1",
    "mean": "E[θ] < 0.1",
    "odds": "odds (not the paper's)",
    "l2": "L2 norm *",
    "gradient": "gradient norm *",
    "random": "at random *",
}


class Group(NamedTuple):
    """Networks that differ in their seed alone."""

    network: str
    data: str
    granularity: str
    epochs: tuple[int, int]

    def __str__(self) -> str:
        names = f"{paper_table.NAMES[self.network]}, {paper_table.NAMES[self.data]}"
        usual = self.granularity == "element" and self.epochs == (50, 10)
        return names if usual else f"{names}, {self.granularity}, {self.epochs[0]} epochs"


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Return rows by what they have in common but the seed, in the order of the tables."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        epochs = row["settings"]["epochs"], row["settings"]["fine_tune_epochs"]
        group = Group(row["network"], row["data"], row["granularity"], epochs)
        found.setdefault(group, []).append(row)
    names = list(paper_table.NAMES)
    order = sorted(
        found, key=lambda group: (group.epochs, names.index(group.network), names.index(group.data))
    )
    return {group: sorted(found[group], key=lambda row: row["seed"]) for group in order}


def judged(results: Path) -> dict[Group, list[Row]]:
    """Return the committed rows of judged networks."""
    return grouped(paper_table.load(results / "paper" / JUDGED))


# A point of a curve: structures that are gone, compression in %, test accuracy in %, test loss and training loss.


def curve_of(row: Row, criterion: str) -> list[list[float]]:
    """Return a criterion's curve; the two variants of BMRS_N have the same order."""
    points: list[list[float]] = row["criteria"]["bmrs-n-authors" if criterion == "bmrs-n" else criterion][
        "curve"
    ]
    return points


def knee(points: Sequence[Sequence[float]]) -> float:
    """Return the compression at a curve's knee, in %.

    That is where the curve is farthest from the straight line between its ends, with both axes scaled to [0, 1]
    (Satopää et al. 2011, "Kneedle").
    """
    accuracies = [point[2] for point in points]
    lowest, span = min(accuracies), max(accuracies) - min(accuracies) or 1.0
    compressions = [point[1] for point in points]
    distances = [
        c / compressions[-1] + (a - lowest) / span for c, a in zip(compressions, accuracies, strict=True)
    ]
    return compressions[max(range(len(points)), key=distances.__getitem__)]


def readme(results: Path) -> str:
    """Return what each criterion comes to where it stops, with the pictures."""
    groups = judged(results)
    if not groups:
        return ""
    lines: list[tuple[Any, ...]] = []
    for group, rows in groups.items():
        for criterion, name in CRITERIA.items():
            own = [row["criteria"][criterion] for row in rows]
            lines.append(
                (
                    str(group),
                    len(rows),
                    name,
                    spread([each["stop"][1] for each in own], 1),
                    spread([each["stop"][2] for each in own]),
                    spread([each["tuned_accuracy"] for each in own]),
                    spread(
                        [
                            each["stop"][1] - knee(curve_of(row, criterion))
                            for each, row in zip(own, rows, strict=True)
                        ],
                        1,
                    ),
                )
            )
        lines.append(
            (
                str(group),
                len(rows),
                "nothing pruned",
                0,
                spread([row["full"][2] for row in rows]),
                spread([row["full_tuned_accuracy"] for row in rows]),
                "",
            )
        )
    tune = sorted({row["tune_epochs"] for rows in groups.values() for row in rows})
    columns = (
        *("network", "seeds", "criterion", "compression, %", "test accuracy, %"),
        *(f"after {' or '.join(map(str, tune))} epochs of fine-tuning", "stops beyond its knee by, points"),
    )
    return "\n\n".join([_about(groups), table(columns, lines), _PICTURES])


_PICTURES = "\n\n".join(
    f"![{text}](benchmarks/results/paper/{name}.png)"
    for name, text in {
        "noise": "Figure 1: E[θ] of every structure before and after training, with original and reduced priors",
        "curves": "Figure 2: accuracy against compression, structure by structure, and where criteria stop",
        "agreement": "Figure 3: rank correlation between criteria",
        "bits": "Figure 4: compression and accuracy of BMRS_U against p1",
        "rankings": "Figure 5: the same curves for rankings without a stopping point",
    }.items()
)


def every_seed(results: Path) -> str:
    """Return each seed's stopping points, as a file beside the rows."""
    parts = [
        "# Post-training pruning, seed by seed\n\nMade by `python -m benchmarks readme` from the rows beside it; the "
        "project's README says what they mean."
    ]
    for group, rows in judged(results).items():
        lines = []
        for row in rows:
            for criterion, name in CRITERIA.items():
                own = row["criteria"][criterion]
                gone, compression, accuracy, loss, train_loss = own["stop"]
                lines.append(
                    (
                        row["seed"],
                        name,
                        f"{gone} of {sum(map(len, row['structures']['mu']))}",
                        "-".join(map(str, own["widths"])),
                        f"{compression:.2f}",
                        f"{knee(curve_of(row, criterion)):.2f}",
                        f"{accuracy:.2f}",
                        f"{own['tuned_accuracy']:.2f}",
                        f"{loss:.4f}",
                        f"{train_loss - row['full'][4]:+.4f}",
                    )
                )
        columns = (
            *(
                "seed",
                "criterion",
                "pruned",
                "kept",
                "compression, %",
                "knee at, %",
                "accuracy, %",
                "fine-tuned, %",
            ),
            *("test loss", "rise of the training loss"),
        )
        parts.append(f"## {group}\n\n{table(columns, lines)}")
    return "\n\n".join(parts) + "\n"


def formulas(results: Path) -> str:
    """Return what the authors' formulas decide on the same posteriors."""
    lines = []
    for group, rows in grouped(paper_table.load(results / "paper" / FORMULAS)).items():
        for epoch in dict.fromkeys(point["epoch"] for row in rows for point in row["epochs"]):
            points = [point for row in rows for point in row["epochs"] if point["epoch"] == epoch]
            # A percentile of values of which one is NaN is NaN, and nothing is above it.
            gone = [each["structures"] if each["snr_nan"] else each["bmrs_n_pruned"] for each in points]

            def counts(name: str, points: Sequence[Row] = points) -> str:
                return spread([point[name] for point in points], 0)

            lines.append(
                (
                    str(group),
                    len(points),
                    epoch,
                    points[0]["structures"],
                    *map(counts, ("snr_nan", "snr_pruned_rightly", "snr_pruned")),
                    spread(gone, 0),
                    *map(counts, ("bmrs_n_pruned_rightly", "bmrs_n_pruned")),
                )
            )
    columns = (
        *("network", "seeds", "epoch", "structures", "their SNR is NaN", "SNR ≤ 1 prunes", "theirs"),
        *("theirs, threshold at BMRS_N's share", "BMRS_N without the 2π prunes", "theirs"),
    )
    return table(columns, lines) if lines else ""


def drawn(results: Path) -> str:
    """Return the accuracy of trained networks with E[θ], and with θ drawn."""
    lines = []
    for group, rows in grouped(paper_table.load(results / "paper" / DRAWN)).items():
        names = ("mean", "one_draw", "draws", "draws_over_feature_maps", "draws_elsewhere")
        lines.append(
            (str(group), len(rows), *(spread([row["accuracy"][n] for row in rows], 2) for n in names))
        )
    columns = (
        *("network", "seeds", "test accuracy with E[θ], %", "with one draw", "with the mean of 20 draws"),
        *("drawn over feature maps alone", "drawn elsewhere alone"),
    )
    return table(columns, lines) if lines else ""


def by_snr(results: Path) -> str:
    """Return what is left of networks that were pruned by SNR after every epoch, down to the last structure."""
    lines = []
    for group, rows in grouped(paper_table.load(results / "paper" / BY_SNR)).items():
        for row in sorted(rows, key=lambda row: (row["seed"], row["as_computed"])):
            empty = [epoch for epoch, kept in enumerate(row["kept"], start=1) if 0 in kept]
            lines.append(
                (
                    str(group),
                    row["seed"],
                    "as the authors compute it" if row["as_computed"] else "right",
                    row["pruned_wrongly"],
                    empty[0] if empty else "never",
                    "-".join(map(str, row["kept"][-1])),
                    f"{row['test_accuracy']:.2f}",
                )
            )
    columns = (
        *("network", "seed", "the ratio is", "pruned though it is above 1", "a layer is empty from epoch"),
        *("left in the end", "test accuracy, %"),
    )
    return table(columns, lines) if lines else ""


class Structures(NamedTuple):
    """What is known of every structure of a network, all layers behind each other.

    Attributes:
        mu: of the posterior.
        log_sigma: of the posterior.
        others: worth by the rankings that do not look at the posterior.
        loss: rise of the mean training loss when the structure alone is masked, in nats an example.
        tempered: the same in nats of the likelihood that the KL weight makes.
    """

    mu: Tensor
    log_sigma: Tensor
    others: dict[str, Tensor]
    loss: Tensor
    tempered: Tensor

    def worth(self, criterion: str) -> Tensor:
        """Return the worth to a criterion."""
        if criterion in self.others:
            return self.others[criterion]
        return scores.posterior_worth(criterion, self.mu, self.log_sigma, lower=LOWER, upper=UPPER)

    @property
    def evidence(self) -> Tensor:
        """What the evidence loses when the structure is shrunk to 0, measured: what −ΔF estimates.

        That is the likelihood that is lost less the KL divergence that is saved, with the others at E[θ].
        """
        return self.tempered - bmrs_kernels.kl_divergence(self.mu, self.log_sigma)


def structures_of(row: Row) -> Structures:
    """Return what a judged network's row knows of its structures."""
    values = {name: [_tensor(layer) for layer in layers] for name, layers in row["structures"].items()}
    joined = {name: torch.cat(layers) for name, layers in values.items()}
    layers = values["mu"]
    # The KL weight `mean` is 1 / (layers · structures of the layer) for each structure.
    divided = torch.cat([torch.full((len(layer),), float(len(layers) * len(layer))) for layer in layers])
    others = {name: joined[name] for name in ("l2", "gradient")}
    loss = joined["loss_alone"]
    return Structures(joined["mu"], joined["log_sigma"], others, loss, loss * divided)


def knowledge(results: Path) -> str:
    """Return how well each score foretells what masking does, with the picture."""
    groups = judged(results)
    if not groups:
        return ""
    lines = []
    for group, rows in groups.items():
        of_rows = [structures_of(row) for row in rows]
        kept = [each.worth("bmrs-n-authors") > 0.919 for each in of_rows]
        for criterion, name in CRITERIA.items():
            if criterion in ("bmrs-n", "random"):
                continue
            rises = [
                (
                    row["criteria"][criterion]["stop"][4] - row["full"][4],
                    row["criteria"][criterion]["stop"][1],
                )
                for row in rows
            ]
            lines.append(
                (
                    str(group),
                    name.removesuffix(" *"),
                    spread([scores.spearman(each.worth(criterion), each.loss) for each in of_rows]),
                    spread(
                        [
                            scores.spearman(each.worth(criterion)[own], each.loss[own])
                            for each, own in zip(of_rows, kept, strict=True)
                        ]
                    ),
                    spread([_caught(each, criterion) for each in of_rows], 0),
                    spread([rise for rise, _ in rises], 3),
                )
            )
    columns = (
        *(
            "network",
            "criterion",
            "rank correlation with the rise: all structures",
            "those that BMRS_N keeps",
        ),
        *("of the tenth that matters most, found, %", "training loss at its stop, nats"),
    )
    return "\n\n".join(
        [
            table(columns, lines),
            table(*_calibration(groups)),
            "![What masking a structure costs, against what the scores say](benchmarks/results/paper/knowledge.png)",
        ]
    )


def _caught(structures: Structures, criterion: str) -> float:
    """Return the share, in %, of the tenth whose masking costs most that is in a criterion's dearest tenth."""
    count = max(1, len(structures.loss) // 10)
    dearest = set(structures.worth(criterion).topk(count).indices.tolist())
    return 100 * len(dearest & set(structures.loss.topk(count).indices.tolist())) / count


def _calibration(groups: dict[Group, list[Row]]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Return columns and lines of how many nats the scores say and how many were measured."""
    estimates: dict[str, Callable[[Structures], tuple[Tensor, Tensor]]] = {
        "−ΔF of BMRS_N": lambda each: (each.worth("bmrs-n"), each.evidence),
        "½ SNR²": lambda each: (0.5 * each.worth("snr") ** 2, each.tempered),
    }
    lines = []
    for group, rows in groups.items():
        of_rows = [structures_of(row) for row in rows]
        for name, estimate in estimates.items():
            cells = []
            for pruned in (True, False):
                said, measured = [], []
                for each in of_rows:
                    own = (each.worth("bmrs-n-authors") <= 0.919) == pruned
                    pair = estimate(each)
                    said.append(float(pair[0][own].median()))
                    measured.append(float(pair[1][own].median()))
                cells += [spread(said), spread(measured)]
            lines.append((str(group), name, *cells))
    columns = (
        *("network", "estimate", "structures that BMRS_N prunes: said, nats", "measured"),
        *("that it keeps: said, nats", "measured"),
    )
    return columns, lines


def stale_files(results: Path) -> list[Path]:
    """Return the file of every seed if there are rows that it does not show."""
    path = results / "paper" / "every_seed.md"
    if not judged(results):
        return []
    return [] if path.exists() and path.read_text("utf-8") == every_seed(results) else [path]


def write(results: Path) -> None:
    """Write the file of every seed, if it says something else than the rows."""
    for path in stale_files(results):
        path.write_text(every_seed(results), "utf-8")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean, with the standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _about(groups: dict[Group, list[Row]]) -> str:
    rows = [row for own in groups.values() for row in own]
    machines = sorted({row["environment"]["CPU"] for row in rows})
    versions = sorted({row["environment"]["torch"] for row in rows})
    return f"{', '.join(machines)}; torch {', '.join(versions)}; float32, one thread a run."


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
