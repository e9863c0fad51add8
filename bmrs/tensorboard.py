"""Noise in TensorBoard: histograms of what decides, and numbers of what is left."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

import bmrs_kernels
from bmrs.noise.divergence import kl_divergence
from bmrs.noise.lookup import LayerGroup, required_noise_layers


class Writer(Protocol):
    """What is written to: ``torch.utils.tensorboard.SummaryWriter``, or whatever has two of its methods."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Add a number at a step."""

    def add_histogram(self, tag: str, values: Tensor, global_step: int) -> None:
        """Add the distribution of numbers at a step."""


@torch.no_grad()
def write_noise(writer: Writer | None, model: nn.Module, *, step: int, kl: float | None = None) -> None:
    """Write where the noise of a model is, and what is left of its structures.

    Histograms, over the structures that are kept: ``bmrs/expected_noise/<layer>``, E[θ], and ``bmrs/delta_f/<layer>``,
    ΔF of the log-normal reduction in nats, where 0 and above means off for `BMRSNormal`. Numbers: ``bmrs/kept`` and
    ``bmrs/kept/<layer>``, structures; ``bmrs/compression``, pruned structures in percent, as the paper counts it; and
    ``bmrs/kl``, in nats.

    Args:
        writer: a ``SummaryWriter``; where there are several processes, None on all but the first, which all take part
            because parameters may be sharded.
        model: a model with noise layers.
        step: what it is written for.
        kl: the KL term as the loss has it; the sum over all structures if None.

    Raises:
        ValueError: the model has no noise layer.
    """
    write_histograms(writer, model, step=step)
    kl = kl_divergence(model, weight=1.0).item() if kl is None else kl
    for tag, number in {"bmrs/kl": kl, **structures_left(model)}.items():
        if writer is not None:
            writer.add_scalar(tag, number, step)


@torch.no_grad()
def write_histograms(writer: Writer | None, model: nn.Module, *, step: int) -> None:
    """Write the histograms of `write_noise` alone; arguments and errors as there."""
    for name, layer in required_noise_layers(model).items():
        group = LayerGroup((layer,))
        kept = group.joined("kept")
        for tag, function in (
            ("expected_noise", bmrs_kernels.noise_mean),
            ("delta_f", bmrs_kernels.delta_f_lognormal),
        ):
            values = group.computed(function)[kept]
            if writer is not None and len(values):
                writer.add_histogram(f"bmrs/{tag}/{name or '(model)'}", values, step)


def structures_left(model: nn.Module) -> dict[str, float]:
    """Return what is left of the structures of a model, by the tags of `write_noise`."""
    layers = required_noise_layers(model)
    kept = {name: int(LayerGroup((layer,)).joined("kept").sum()) for name, layer in layers.items()}
    structures = sum(layer.num_structures for layer in layers.values())
    return {
        "bmrs/kept": sum(kept.values()),
        **{f"bmrs/kept/{name or '(model)'}": count for name, count in kept.items()},
        "bmrs/compression": 100.0 * (1 - sum(kept.values()) / structures),
    }
