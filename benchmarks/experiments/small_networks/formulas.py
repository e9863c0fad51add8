"""What the authors' formulas decide in float32, on the posteriors of the first epochs and of the last one.

The training itself has right numbers. A comparison with NaN is false, and the authors' code keeps what compares as
kept: a structure whose signal-to-noise ratio is NaN goes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import bmrs
from benchmarks.experiments.deadline import Deadline
from benchmarks.experiments.small_networks import scores
from benchmarks.experiments.small_networks.trunk import CPU, Row, Trunk
from benchmarks.rivals import plain
from bmrs.criteria import PAPER_TOLERANCE
from bmrs.data import Dataset
from bmrs.noise.lookup import noise_layers
from bmrs.training import algorithm1
from bmrs.training.checkpoint import TrainingState
from bmrs.training.evaluation import accuracy

FIRST_EPOCHS = 3


def as_printed(trunk: Trunk, data: Dataset) -> Row:
    """Train the first epochs again, and return what the formulas say after each of them and after the last one."""
    config = trunk.config
    state = algorithm1.new_state(config, data, noise=True, device=CPU)
    found: list[Row] = []

    def look(state: TrainingState) -> None:
        found.append({"epoch": len(state.history), **_decisions(state.model, data)})

    first = replace(config, epochs=FIRST_EPOCHS, fine_tune_epochs=0)
    algorithm1.train(state, data, first, save=look, progress=Deadline(trunk.conditions.deadline))
    found.append({"epoch": config.settings.epochs, **_decisions(trunk.load(data), data)})
    return {**trunk.subject._asdict(), "settings": config.settings._asdict(), "epochs": found}


def pruned_by_snr(trunk: Trunk, data: Dataset, *, as_computed: bool) -> Row:
    """Train with pruning by SNR ≤ 1 after every epoch, as the authors' code prunes: the last structure of a layer too.

    Args:
        trunk: whose settings the training has; numbers other than the SNR are right.
        data: the images.
        as_computed: whether the SNR is computed as the authors' code does, in which case NaN prunes.
    """
    config = trunk.config
    state = algorithm1.new_state(config, data, noise=True, device=CPU)
    layers = noise_layers(state.model)
    wrongly = 0

    def prune(state: TrainingState) -> None:
        nonlocal wrongly
        if len(state.history) > config.settings.epochs:
            return
        for layer in layers.values():
            going = layer.mask & bmrs.SNR()(layer).prune
            if as_computed:
                computed = layer.mask & ~(snr_as_computed(layer.mu, layer.log_sigma) > 1)
                wrongly += int((computed & ~going).sum())
                going = computed
            layer.set_kept(layer.mask & ~going)
        # Nothing is pruned by the training itself, which would have to compact a network without a layer.
        state.history[-1]["kept"] = {name: int(layer.mask.sum()) for name, layer in layers.items()}

    algorithm1.train(state, data, config, save=prune, progress=Deadline(trunk.conditions.deadline))
    return {
        **trunk.subject._asdict(),
        "settings": config.settings._asdict(),
        "as_computed": as_computed,
        "pruned_wrongly": wrongly,
        "kept": [list(row["kept"].values()) for row in state.history],
        "test_accuracy": round(100 * accuracy(state.model, data.test), 2),
        "seconds": round(sum(row["seconds"] for row in state.history), 1),
    }


@torch.no_grad()
def snr_as_computed(mu: Tensor, log_sigma: Tensor, lower: float = -20.0, upper: float = 0.0) -> Tensor:
    """Return E[θ]/sd(θ) with moments from exp(x²)·erfc(x), in which an overflow of exp(x²) counts as 1.

    That loses all of E[θ] where μ lies more than 13.3 σ below the upper end.
    """
    mean, square = (_moment(mu, log_sigma, power, lower, upper) for power in (1, 2))
    return mean / (square - mean * mean).sqrt()


def _moment(mu: Tensor, log_sigma: Tensor, power: int, lower: float, upper: float) -> Tensor:
    sigma = plain.scale(log_sigma)
    ends = [(end, (end - mu) / sigma) for end in (lower, upper)]
    low, high = (
        _scaled_erfc((power * sigma - z) / plain.SQRT2) * torch.exp(power * end - z * z / 2)
        for end, z in ends
    )
    return (high - low) / (2 * (plain.normal_cdf(ends[1][1]) - plain.normal_cdf(ends[0][1])))


def _scaled_erfc(x: Tensor) -> Tensor:
    product = torch.exp(x * x) * torch.erfc(x)
    return torch.where(product.isfinite(), product, torch.ones_like(product))


@torch.no_grad()
def _decisions(model: nn.Module, data: Dataset) -> dict[str, Any]:
    layers = list(noise_layers(model).values())
    snr = [snr_as_computed(layer.mu, layer.log_sigma) for layer in layers]
    kept = [values > 1 for values in snr]
    # The authors' ΔF has no 2π, is computed in float64, and a structure goes unless it is below 0.
    delta_f = [plain.delta_f_lognormal(layer.mu.double(), layer.log_sigma.double()) for layer in layers]
    kept_n = [values + PAPER_TOLERANCE < 0 for values in delta_f]
    row: Row = {
        "structures": sum(layer.num_structures for layer in layers),
        "snr_nan": _count(values.isnan() for values in snr),
        "snr_pruned": _count(~values for values in kept),
        "snr_pruned_rightly": _count(bmrs.SNR()(layer).prune for layer in layers),
        "bmrs_n_not_finite": _count(~values.isfinite() for values in delta_f),
        "bmrs_n_pruned": _count(~values for values in kept_n),
        "bmrs_n_pruned_rightly": _count(scores.RULES["bmrs-n-authors"](layer).prune for layer in layers),
    }
    masks = [layer.mask.clone() for layer in layers]
    scores.set_kept(model, kept)
    row["snr_accuracy"] = round(100 * accuracy(model, data.test), 2)
    scores.set_kept(model, masks)
    row["accuracy"] = round(100 * accuracy(model, data.test), 2)
    return row


def _count(flags: Any) -> int:
    return sum(int(each.sum()) for each in flags)
