"""Which pruned structures to give back, so that round numbers of them stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import bmrs_kernels
from bmrs.graph.analysis import Analysis
from bmrs.graph.ties import same_channels
from bmrs.noise.layer import NoiseLayer


def structures_to_give_back(
    analysis: Analysis, layers: Mapping[str, NoiseLayer], multiple: int
) -> dict[str, Tensor]:
    """Choose the pruned structures with the most evidence for them, so that multiples of a number stay.

    Args:
        analysis: of the model with its masks as they are.
        layers: its noise layers by name.
        multiple: of which the numbers of entries that stay have to be multiples.

    Returns:
        By name of a noise layer, structures that are pruned and would leave; empty if all numbers are right.
    """
    found: dict[str, Tensor] = {}
    for names in same_channels(analysis):
        group = [layers[name] for name in names]
        size = group[0].structure_size
        leaving = _leaving(analysis, names[0], size)
        stay = int((~leaving).sum())
        if stay * size % multiple == 0 or not leaving.any():
            continue
        missing = next(
            n for n in range(1, len(leaving) + 1) if n == leaving.sum() or (stay + n) * size % multiple == 0
        )
        evidence_against = torch.stack([_delta_f(layer) for layer in group]).sum(dim=0)
        candidates = leaving.nonzero().flatten()
        chosen = candidates[evidence_against[candidates].argsort()[:missing]]
        for name in names:
            pruned = chosen[~layers[name].mask.cpu()[chosen]]
            if len(pruned):
                found[name] = pruned
    return found


def _leaving(analysis: Analysis, name: str, size: int) -> Tensor:
    """Return which structures of a noise layer leave, bool."""
    call = next(analysis.noise_calls(name))
    channels = call["x"].channels_along(call["dim"])
    return ~analysis.stays(channels).view(-1, size).any(dim=1)


def _delta_f(layer: NoiseLayer) -> Tensor:
    return bmrs_kernels.delta_f_lognormal(
        layer.mu.detach(), layer.log_sigma.detach(), lower=layer.lower, upper=layer.upper
    ).cpu()
