"""How much a network's outputs depend on what its layers compute.

Layers cannot be compared by what each of them loses of its own variance: much of that may never reach the outputs. To
first order a disturbance d of what a layer computes at a position changes the outputs by J·d, and adds tr(G·E[d·dᵀ]) to
their variance, with

    G = Σ over positions of E[Jᵀ·J],

if disturbances of different positions know nothing of each other. With random signs v, E[Jᵀ·J] is the mean of g·gᵀ over
g = Jᵀ·v, which a backward pass gives (Hutchinson, "A stochastic estimator of the trace of the influence matrix for
Laplacian smoothing splines", 1989).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bmrs.graph.inputs import Inputs
from bmrs.graph.stock_layers import WeightLayer

_DRAWS = 4
"""Backward passes for each batch."""


def sensitivities(
    network: nn.Module, layers: Sequence[WeightLayer], batches: Sequence[Inputs]
) -> dict[WeightLayer, Tensor] | None:
    """Return G of each layer, over the variance of the outputs; of several outputs each counts the same.

    Args:
        network: runs without noise; its parameters need not require gradients.
        layers: of it, each called once at most; those that have no part in the outputs get zeros.
        batches: arguments of its forward pass.

    Returns:
        float64, (outputs, outputs) of each layer; None if the outputs are constant, or have no finite gradients.
    """
    scales = _scales(network, batches)
    generator = torch.Generator().manual_seed(0)
    found: dict[WeightLayer, Tensor] = {
        layer: torch.zeros(2 * layer.weight.shape[:1], dtype=torch.float64, device=layer.weight.device)
        for layer in layers
    }
    count = 0
    for inputs in batches:
        try:
            outputs, probes = _probed(network, layers, inputs)
        except RuntimeError:  # it runs without gradients alone
            return None
        if len(outputs) != len(scales):
            return None
        weighted = [
            (output, scale)
            for output, scale in zip(outputs, scales, strict=True)
            if output.requires_grad and scale > 0
        ]
        if not weighted:
            return None
        count += len(weighted[0][0]) if weighted[0][0].dim() else 1
        for _ in range(_DRAWS):
            signs = [
                scale * (2 * torch.randint(0, 2, output.shape, generator=generator) - 1).to(output)
                for output, scale in weighted
            ]
            try:
                gradients = torch.autograd.grad(
                    [output for output, _ in weighted],
                    list(probes.values()),
                    signs,
                    retain_graph=True,
                    allow_unused=True,
                )
            except RuntimeError:  # an operation has no derivative
                return None
            for layer, gradient in zip(probes, gradients, strict=True):
                if gradient is not None:
                    found[layer] += _products(layer, gradient)
    if not all(total.isfinite().all() for total in found.values()):
        return None
    return {layer: total / (count * _DRAWS) for layer, total in found.items()}


def _probed(
    network: nn.Module, layers: Sequence[WeightLayer], inputs: Inputs
) -> tuple[list[Tensor], dict[WeightLayer, Tensor]]:
    """Run a network, and return its outputs and zeros that were added to what layers compute.

    Outputs have gradients for these zeros, even where the weights are frozen.
    """
    probes: dict[WeightLayer, Tensor] = {}

    def probe(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        probes[layer] = torch.zeros_like(output, requires_grad=True)  # type: ignore[index]
        return output + probes[layer]  # type: ignore[index]

    handles = [layer.register_forward_hook(probe) for layer in layers]
    try:
        with torch.enable_grad():
            args, kwargs = tree_map_only(Tensor, _saveable, inputs)
            return _tensors(network(*args, **kwargs)), probes
    finally:
        for handle in handles:
            handle.remove()


def _saveable(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x


def _products(layer: nn.Module, gradient: Tensor) -> Tensor:
    """Return g·gᵀ, added up over examples and positions."""
    channels = 1 - layer.weight.dim()  # type: ignore[operator]
    rows = gradient.double().movedim(channels, -1).reshape(-1, gradient.shape[channels])
    return rows.T @ rows


@torch.no_grad()
def _scales(network: nn.Module, batches: Sequence[Inputs]) -> list[float]:
    """Return for each tensor of the outputs one over the root of its variance over examples, 0 if it is constant."""
    variances: dict[int, list[float]] = defaultdict(list)
    for args, kwargs in batches:
        for place, output in enumerate(_tensors(network(*args, **kwargs))):
            # Within a batch, as outputs of several batches can differ in their shapes.
            several = output.dim() > 0 and len(output) > 1
            variances[place].append(float(output.double().var(dim=0).sum()) if several else 0.0)
    means = [sum(values) / len(values) for values in variances.values()]
    return [1 / math.sqrt(mean) if 0 < mean < math.inf else 0.0 for mean in means]


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
