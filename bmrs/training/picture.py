"""The picture of a run: accuracy and structures over the epochs, E[θ] and scores of the structures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bmrs.criteria import BMRSNormal, BMRSOdds, BMRSUniform, Mean
from bmrs.files.atomic import write_atomically
from bmrs.noise.lookup import noise_layers
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig
from bmrs.training.run_folder import NetworkName

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT, _PRUNED, _DENSE = "#0072B2", "#D55E00", "#666666"


def draw(path: Path, states: Mapping[NetworkName, TrainingState], config: TrainConfig) -> None:
    """Draw a finished run into a PNG file.

    Args:
        path: the file.
        states: the run's networks with their histories; "noisy" has the noise layers.
        config: the run's options.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    noisy = states["noisy"]
    figure = Figure(figsize=(12, 8), dpi=120, layout="constrained")
    figure.suptitle(
        f"{config.model} on {config.data}: recipe {config.recipe}, pruned by {config.criterion}", fontsize=14
    )
    axes = figure.subplots(2, 2)
    _draw_accuracy(axes[0, 0], states, config)
    _draw_kept(axes[0, 1], noisy)
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    axes[0, 0].set_xlabel("epoch")
    axes[0, 1].set_xlabel("epoch" if config.recipe == "paper" else "epoch of learning the noise")
    _draw_expected_noise(axes[1, 0], noisy)
    _draw_scores(axes[1, 1], noisy, config)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def _draw_accuracy(axis: Axes, states: Mapping[NetworkName, TrainingState], config: TrainConfig) -> None:
    if config.recipe == "paper":
        curves = {"dense, without noise": states["dense"].history, "masked": states["noisy"].history}
        phases = {"fine-tuning": config.settings.epochs}
    else:
        before = states["trained"].history
        ours = [*before, *states["noisy"].history, *states["fine-tuned"].history]
        curves = {
            "dense": states["dense"].history,
            "random structures": [*before, *states["random"].history],
            "the widths from scratch": states["scratch"].history,
            "this recipe": ours,
        }
        phases = {"noise": len(before), "fine-tuning": len(before) + len(states["noisy"].history)}
    colours = (_DENSE, "#CC79A7", _PRUNED, _KEPT)[-len(curves) :] if len(curves) > 2 else (_DENSE, _KEPT)
    for (label, history), colour in zip(curves.items(), colours, strict=True):
        values = [100 * row["validation_accuracy"] for row in history]
        axis.plot(range(1, len(values) + 1), values, ".-", color=colour, label=label)
    for name, start in phases.items():
        axis.axvline(start + 0.5, color="0.6", linestyle=":")
        axis.text(start + 0.6, 0.02, name, transform=axis.get_xaxis_transform(), fontsize=8, color="0.4")
    axis.set_title("Accuracy")
    axis.set_ylabel("validation accuracy (%)")


def _draw_kept(axis: Axes, noisy: TrainingState) -> None:
    for name, layer in noise_layers(noisy.model).items():
        values = [100 * row["kept"][name] / layer.num_structures for row in noisy.history]
        epochs = [row["epoch"] for row in noisy.history]
        axis.plot(epochs, values, ".-", label=f"{name} ({int(layer.mask.sum())} of {layer.num_structures})")
    axis.set_title("Structures kept")
    axis.set_ylabel("structures kept (%)")
    axis.set_ylim(0, 105)


def _draw_expected_noise(axis: Axes, noisy: TrainingState) -> None:
    layers = noise_layers(noisy.model).values()
    means = torch.cat([Mean()(layer).scores for layer in layers]).cpu()
    kept = torch.cat([layer.mask for layer in layers]).cpu()
    for values, colour, label in (
        (means, _PRUNED, f"before pruning ({len(means)})"),
        (means[kept], _KEPT, f"after pruning ({int(kept.sum())})"),
    ):
        axis.hist(values.tolist(), bins=40, range=(0, 1), color=colour, label=label)
    axis.set_title("Expected noise E[θ] of all structures")
    axis.set_xlabel("E[θ]")
    axis.set_ylabel("structures")
    axis.legend(fontsize=9)


def _draw_scores(axis: Axes, noisy: TrainingState, config: TrainConfig) -> None:
    chosen_by = config.build_criterion()
    criterion = chosen_by if isinstance(chosen_by, BMRSOdds | BMRSNormal | BMRSUniform) else BMRSOdds()
    border = 0.0 if isinstance(criterion, BMRSOdds) else -criterion.tolerance
    sign = "≤" if isinstance(criterion, BMRSOdds) else "≥"
    layers = noise_layers(noisy.model)
    for position, layer in enumerate(layers.values()):
        scores, kept = criterion(layer).scores.cpu(), layer.mask.cpu()
        spread = position + torch.linspace(-0.3, 0.3, len(scores))
        for chosen, colour, label in ((~kept, _PRUNED, "pruned"), (kept, _KEPT, "kept")):
            _scatter(axis, spread[chosen], scores[chosen], colour, label if position == 0 else None)
    axis.axhline(border, color="black", linewidth=1)
    axis.set_yscale("symlog", linthresh=0.1)
    if not isinstance(criterion, BMRSOdds):
        axis.set_ylim(top=max(1.0, 2 * axis.dataLim.ymax))  # margins of a logarithmic axis take up half of it
    axis.set_xticks(range(len(layers)), list(layers))
    axis.set_title(f"{criterion.score_name} of each structure; pruned where {sign} {border + 0:.3g}")
    axis.set_ylabel(f"{criterion.score_name} (nats, logarithmic beyond ±0.1)")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=9)


def _scatter(axis: Axes, x: Tensor, y: Tensor, colour: str, label: str | None) -> None:
    axis.scatter(x.tolist(), y.tolist(), s=12, color=colour, label=label)
