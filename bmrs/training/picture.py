"""The picture of a run: accuracy and structures over the epochs, E[θ] and ΔF of the structures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bmrs.criteria import BMRSNormal, BMRSUniform, Mean
from bmrs.noise_layer import noise_layers
from bmrs.training.checkpoint import TrainingState
from bmrs.training.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT, _PRUNED, _DENSE = "#0072B2", "#D55E00", "#666666"


def draw(path: Path, *, noisy: TrainingState, dense: TrainingState, config: TrainConfig) -> None:
    """Draw a finished run into a PNG file.

    Args:
        path: The file.
        noisy: The pruned network with its noise layers and its history.
        dense: The network trained without noise.
        config: The run's options.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 8), dpi=120, layout="constrained")
    figure.suptitle(
        f"{config.model} on {config.data}: {config.mode} pruning by {config.criterion}", fontsize=14
    )
    axes = figure.subplots(2, 2)
    _draw_accuracy(axes[0, 0], noisy.history, dense.history)
    _draw_kept(axes[0, 1], noisy)
    last = len(noisy.history) + 0.5
    for axis in axes[0]:
        if config.settings.fine_tune_epochs:
            axis.axvspan(config.settings.epochs + 0.5, last, color="0.93", zorder=0, label="fine-tuning")
        axis.set_xlim(0.5, last)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    _draw_expected_noise(axes[1, 0], noisy)
    _draw_delta_f(axes[1, 1], noisy, config)
    figure.savefig(path)


def _draw_accuracy(axis: Axes, noisy: list[dict[str, Any]], dense: list[dict[str, Any]]) -> None:
    for history, colour, label in ((dense, _DENSE, "dense, without noise"), (noisy, _KEPT, "masked")):
        values = [100 * row["validation_accuracy"] for row in history]
        axis.plot([row["epoch"] for row in history], values, ".-", color=colour, label=label)
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


def _draw_delta_f(axis: Axes, noisy: TrainingState, config: TrainConfig) -> None:
    chosen_by = config.build_criterion()
    criterion = chosen_by if isinstance(chosen_by, BMRSNormal | BMRSUniform) else BMRSNormal()
    layers = noise_layers(noisy.model)
    for position, layer in enumerate(layers.values()):
        scores, kept = criterion(layer).scores.cpu(), layer.mask.cpu()
        spread = position + torch.linspace(-0.3, 0.3, len(scores))
        for chosen, colour, label in ((~kept, _PRUNED, "pruned"), (kept, _KEPT, "kept")):
            _scatter(axis, spread[chosen], scores[chosen], colour, label if position == 0 else None)
    axis.axhline(-criterion.tolerance, color="black", linewidth=1)
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_ylim(top=max(1.0, 2 * axis.dataLim.ymax))  # margins of a logarithmic axis take up half of it
    axis.set_xticks(range(len(layers)), list(layers))
    axis.set_title(f"ΔF of each structure; pruned where ΔF ≥ {0 - criterion.tolerance:.3g}")
    axis.set_ylabel("ΔF (nats, logarithmic beyond ±0.1)")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=9)


def _scatter(axis: Axes, x: Tensor, y: Tensor, colour: str, label: str | None) -> None:
    axis.scatter(x.tolist(), y.tolist(), s=12, color=colour, label=label)
