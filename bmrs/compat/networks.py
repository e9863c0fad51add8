"""What the authors' modules do to a whole network: KL, masks, switches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

import bmrs_kernels
from bmrs.checks import check_choice, check_module
from bmrs.compat.layers import Averaging, PruningLayer
from bmrs.compat.upgrading import upgrade
from bmrs.graph.ties import producers
from bmrs.noise.lookup import noise_layers
from bmrs.noise.producers import by_output
from bmrs.noise.wrappers import inside_wrappers


def named_pruning_layers(model: nn.Module) -> dict[str, PruningLayer]:
    """Return the pruning layers of a model by qualified name, subclasses too; a shared one appears once.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module(model)
    modules = inside_wrappers(model).named_modules()
    return {name: module for name, module in modules if isinstance(module, PruningLayer)}


def gather_pruning_layers(model: nn.Module) -> list[PruningLayer]:
    """Return the pruning layers of a model, in module order."""
    return list(named_pruning_layers(model).values())


def calculate_model_kl(
    model: nn.Module | Iterable[PruningLayer], averaging: Averaging | None = None
) -> Tensor:
    """Return the KL divergence of a model in nats, a scalar: a term of the training loss.

    Args:
        model: a model with pruning layers, or these layers.
        averaging: ``"sum"`` over all structures, or ``"mean"`` over each layer's structures and then over layers; what
            the layers' ``kl_averaging`` say if None. Neither divides by the number of training examples.

    Raises:
        TypeError: something is neither a module nor a pruning layer.
        ValueError: there is no pruning layer, or the layers disagree and ``averaging`` is None.
    """
    layers = gather_pruning_layers(model) if isinstance(model, nn.Module) else list(model)
    for layer in layers:
        if not isinstance(layer, PruningLayer):
            raise TypeError(f"the layers must be pruning layers of bmrs.compat, got {type(layer).__name__}")
    if not layers:
        raise ValueError("the model has no pruning layer: put those of bmrs.compat into it")
    if averaging is None:
        found = sorted({layer.kl_averaging for layer in layers})
        if len(found) > 1:
            raise ValueError(f"the layers' kl_averaging are {' and '.join(found)}: give averaging")
        averaging = layers[0].kl_averaging
    check_choice("averaging", averaging, get_args(Averaging))
    enabled = [layer for layer in layers if layer.enabled]
    if not enabled:
        return layers[0].mu.new_zeros(())
    terms = [_joint_kl(group, averaging) for group in _of_one_kind(enabled)]
    total = torch.stack([term.to(terms[0]) for term in terms]).sum()
    return total if averaging == "sum" else total / len(layers)


def _of_one_kind(layers: Sequence[PruningLayer]) -> list[list[PruningLayer]]:
    groups: dict[tuple[Any, ...], list[PruningLayer]] = {}
    for layer in layers:
        groups.setdefault((layer.a, layer.b, layer.mu.dtype, layer.mu.device), []).append(layer)
    return list(groups.values())


def _joint_kl(layers: Sequence[PruningLayer], averaging: Averaging) -> Tensor:
    """Return the sum of the layers' KL, or of their means, in one call of the kernel."""
    divergence = bmrs_kernels.kl_divergence(
        torch.cat([layer.mu.flatten() for layer in layers]),
        torch.cat([layer.logsigma.flatten() for layer in layers]),
        lower=layers[0].a,
        upper=layers[0].b,
    ).where(torch.cat([layer.kept.flatten() for layer in layers]), 0.0)
    if averaging == "mean":
        shares = [divergence.new_full((n,), 1.0 / n) for n in (layer.mu.numel() for layer in layers)]
        divergence = divergence * torch.cat(shares)
    return divergence.sum()


def disable(model: nn.Module) -> None:
    """Let activations through all pruning layers unchanged, and leave their KL and `compress` out."""
    for layer in gather_pruning_layers(model):
        layer.enabled = False


def enable(model: nn.Module) -> None:
    """Undo `disable`."""
    for layer in gather_pruning_layers(model):
        layer.enabled = True


def get_weight_l2(
    model: nn.Module, example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None
) -> list[Tensor]:
    """Return, for each pruning layer in module order, the L2 norms of the weights that make its structures.

    Args:
        model: a model with pruning layers.
        example_inputs: an input of the model; needed only where torch.fx cannot follow its code.

    Raises:
        ValueError: the layer that makes a pruning layer's structures is not found, or has another number of outputs.
    """
    layers = named_pruning_layers(model)
    copied = copy.deepcopy(inside_wrappers(model))
    enable(copied)  # what is not enabled has no noise to be followed
    copied = upgrade(copied)
    found = producers(copied, "get_weight_l2", example_inputs)
    sources = [found.get(noise) for noise in noise_layers(copied).values()]
    return [
        _norms(name, layer, source) for (name, layer), source in zip(layers.items(), sources, strict=True)
    ]


def _norms(name: str, layer: PruningLayer, source: nn.Module | None) -> Tensor:
    rows = None if source is None else by_output(source, source.get_parameter("weight"))
    if rows is None or len(rows) != layer.mu.numel():
        what = "none: give example_inputs" if rows is None else f"{type(source).__name__} with {len(rows)}"
        raise ValueError(
            f"pruning layer {name!r} must follow a linear or convolution layer with {layer.mu.numel()} output "
            f"channels, one for each structure, got {what}"
        )
    return rows.detach().flatten(1).norm(dim=1)


@torch.no_grad()
def compress(
    model: nn.Module,
    set_mask: bool = True,
    thresh: float | None = None,
    sigma_p_tilde: float | None = None,
    mu_p_tilde: float | None = None,
    l2_norm: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Call `PruningLayer.compress` of every pruning layer, and return the masks.

    Args:
        model: a model with pruning layers.
        set_mask: whether the layers take the masks over.
        thresh: one threshold for all of them; their own if None.
        sigma_p_tilde: as for the layers.
        mu_p_tilde: as for the layers.
        l2_norm: norms for each layer in module order, as `get_weight_l2` returns them, or by layer name.

    Raises:
        ValueError: there is no pruning layer, norms are missing, or a layer refuses; it is named, and no mask changes.
    """
    layers = named_pruning_layers(model)
    if not layers:
        raise ValueError("the model has no pruning layer: put those of bmrs.compat into it")
    norms = _norms_by_name(l2_norm, list(layers))
    masks = {}
    for name, layer in layers.items():
        if layer.enabled:
            masks[name] = layer.decided(thresh, sigma_p_tilde, mu_p_tilde, norms[name], name=name)
    if set_mask:
        for name, mask in masks.items():
            layers[name].mask.copy_(mask)
    return [masks[name] if name in masks else layer.mask.clone() for name, layer in layers.items()]


def _norms_by_name(
    norms: Sequence[Tensor] | Mapping[str, Tensor] | None, names: list[str]
) -> Mapping[str, Tensor | None]:
    if norms is None:
        return dict.fromkeys(names)
    if not isinstance(norms, Mapping):
        if len(norms) != len(names):
            raise ValueError(
                f"l2_norm must be a list of the norms of {len(names)} pruning layers, as get_weight_l2 returns it, got "
                f"{len(norms)}"
            )
        return dict(zip(names, norms, strict=True))
    if norms.keys() != set(names):
        raise ValueError(f"l2_norm must name the pruning layers {names}, got {list(norms)}")
    return norms


def usable_neuron_pct(model: nn.Module) -> float:
    """Return how many per cent of all structures are not pruned, from 0 to 100.

    Raises:
        ValueError: there is no pruning layer.
    """
    layers = gather_pruning_layers(model)
    if not layers:
        raise ValueError("the model has no pruning layer: put those of bmrs.compat into it")
    kept = sum(int(layer.kept.sum()) for layer in layers)
    return 100.0 * kept / sum(layer.mask.numel() for layer in layers)
