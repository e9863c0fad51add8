"""The KL term of the training loss."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

import bmrs_kernels
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import LayerGroup, layers_of_one_kind, required_noise_layers
from bmrs.noise.parameters import note_gradients, warn_of_weight_decay
from bmrs.noise.sharded import check_gradients_arrive

_MOST_NAMES = 3

_LOSSES_WITHOUT_DRAW = 200
"""How often a layer may be left out of a step, as experts and branches of stochastic depth are, before that is told."""

KLWeight: TypeAlias = Literal["elbo", "mean"] | float | Mapping[str, float]


def kl_divergence(model: nn.Module, *, weight: KLWeight, dataset_size: int | None = None) -> Tensor:
    """Return the weighted KL(posterior‖prior) of a model's noise layers, to be added to the data loss.

    Warns once if an optimizer applies weight decay to the noise, as far as it can tell, and once of each noise layer
    that is in evaluation mode while the model is in training mode, or that has multiplied nothing in 200 losses.

    Pruned structures are gone: they add neither KL nor gradient. What each of the others adds does not depend on
    how many are left.

    Args:
        model: a model with noise layers.
        weight: ``"elbo"``: the sum over all structures divided by ``dataset_size``, which with the mean data
            loss of a minibatch is the negative ELBO per example (Eq. 3 of arXiv 2406.01345). ``"mean"``: the
            mean over each layer's structures, pruned ones included as zeros, then over layers (what the paper's
            tables were made with). A number: that number times the sum. A mapping from the qualified names of all noise
            layers to numbers: the sum of each layer, times its number.
        dataset_size: number of training examples; required by ``"elbo"``, unused otherwise.

    Returns:
        A scalar tensor in nats, on the first noise layer's device. Its backward raises RuntimeError where `fully_shard`
        has already taken the gradients of a step away, and would lose its own.

    Raises:
        ValueError: the model has no noise layer, ``weight`` is unknown, negative or not finite or not of the model's
            noise layers, or ``"elbo"`` comes without a positive ``dataset_size``.
    """
    layers = required_noise_layers(model)
    warn_of_weight_decay(layers)
    if model.training:
        _warn_of_quiet_noise(layers)
    shares: dict[NoiseLayer, float] | None = None
    if isinstance(weight, Mapping):
        shares, scale = _shares(weight, layers), 1.0
    else:
        scale = _scale(weight, dataset_size, len(layers))
        if weight == "mean":
            # All structures, not the kept ones: these would pay more with each one pruned, until none is left.
            shares = {layer: 1.0 / layer.num_structures for layer in layers.values()}
    groups = layers_of_one_kind(layers.values())
    terms = [_group_divergence(group, shares) for group in groups]
    divergence = scale * torch.stack([term.to(terms[0].device, terms[0].dtype) for term in terms]).sum()
    if divergence.requires_grad:
        _warn_of_idle_noise(model, layers)
        note_gradients(divergence, layers)
        check_gradients_arrive(divergence, model, layers)
    return divergence


def _warn_of_quiet_noise(layers: dict[str, NoiseLayer]) -> None:
    """Warn, once for a layer, of noise that is switched off in training."""
    quiet = [name for name, layer in layers.items() if not layer.training and not layer.was_found_quiet]
    if not quiet or torch.compiler.is_compiling():
        return
    for name in quiet:
        layers[name].was_found_quiet = True
    warnings.warn(
        f"the model is in training mode, but its noise layers {_listed(quiet)} are in evaluation mode, as after eval() "
        "on the layers that they were added to, say to freeze batch norms: they draw no noise and multiply by E[θ], "
        "while their KL counts. Switch each on again with train()",
        stacklevel=3,
    )


def _warn_of_idle_noise(model: nn.Module, layers: dict[str, NoiseLayer]) -> None:
    """Warn, once for a layer, of noise that has multiplied nothing while that of others has."""
    idle = {name: layer for name, layer in layers.items() if not layer.has_drawn and layer.training}
    if not idle or torch.compiler.is_compiling() or not any(layer.has_drawn for layer in layers.values()):
        return
    told = []
    for name, layer in idle.items():
        layer.losses_without_draw += 1
        if layer.losses_without_draw == _LOSSES_WITHOUT_DRAW:
            told.append(name)
    if told and not any(map(_runs_out_of_sight, model.modules())):
        warnings.warn(
            f"the noise layers {_listed(told)} have multiplied nothing so far, in {_LOSSES_WITHOUT_DRAW} losses that "
            "count their KL, which alone moves them. If the model's code never calls the layers that they were added "
            "to, as where it gives their weights to torch.nn.functional, nothing of them can be pruned: call these "
            "layers, or leave them out with add_noise's where",
            stacklevel=3,
        )


def _runs_out_of_sight(module: nn.Module) -> bool:
    """Return whether a part of a model runs as a copy, or compiled, so that its noise leaves no trace here."""
    compiled = isinstance(module, torch._dynamo.OptimizedModule) if "torch._dynamo" in sys.modules else False
    return compiled or module._compiled_call_impl is not None or isinstance(module, nn.DataParallel)


def _listed(names: list[str]) -> str:
    return ", ".join([*map(repr, names[:_MOST_NAMES]), *["..."] * (len(names) > _MOST_NAMES)])


def _group_divergence(group: LayerGroup, shares: dict[NoiseLayer, float] | None) -> Tensor:
    """Return the sum over the structures of layers of one kind, each times its layer's share if there are any."""
    if shares is not None:
        # Layers of one share behind each other, so that their shares are one piece.
        group = LayerGroup(tuple(sorted(group.layers, key=shares.__getitem__)))
    divergence = group.computed(bmrs_kernels.kl_divergence).where(
        group.joined("mask") > group.joined("pruned"), 0.0
    )
    if shares is not None:
        pieces = [
            divergence.new_full((sum(layer.num_structures for layer in layers),), share)
            for share, layers in itertools.groupby(group.layers, key=shares.__getitem__)
        ]
        divergence = divergence * torch.cat(pieces)
    return divergence.sum()


def _shares(weights: Mapping[str, float], layers: dict[str, NoiseLayer]) -> dict[NoiseLayer, float]:
    if weights.keys() != layers.keys():
        raise ValueError(f"weight must name the model's noise layers {sorted(layers)}, got {sorted(weights)}")
    words = [name for name, weight in weights.items() if isinstance(weight, str)]
    if words:
        raise ValueError(f"weight must map {words[0]!r} to a number, got {weights[words[0]]!r}")
    return {layer: _scale(weights[name], None, 1) for name, layer in layers.items()}


def _scale(weight: Literal["elbo", "mean"] | float, dataset_size: int | None, num_layers: int) -> float:
    if weight == "elbo":
        if (
            isinstance(dataset_size, bool)
            or not isinstance(dataset_size, Real | Tensor)
            or not 1 <= dataset_size < math.inf
        ):
            raise ValueError(
                "weight='elbo' divides by the number of training examples: "
                f"dataset_size must be a positive int, got {dataset_size}"
            )
        return 1.0 / dataset_size
    if weight == "mean":
        return 1.0 / num_layers
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight < math.inf:
        raise ValueError(f"weight must be 'elbo', 'mean' or a finite number >= 0, got {weight!r}")
    return float(weight)
