"""Noise layers and the KL term of the training loss with the plain formulas, in place of the project's functions."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

import bmrs_kernels
from benchmarks.rivals import plain
from bmrs import NoiseLayer

KLWeight: TypeAlias = Literal["elbo", "mean"]
Uniforms: TypeAlias = Literal["philox", "torch"]

_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


class PlainNoiseLayer(nn.Module):
    """The training mode of a noise layer with the plain formulas; it has no mask.

    Args:
        layer: the layer whose options, μ and log σ are taken over; it shares no memory with this one.
        uniforms: ``"philox"`` takes one seed from torch's generator, as a call of `bmrs.NoiseLayer` does, and draws
            the uniforms that belong to it: after the same ``torch.manual_seed`` both layers meet identical uniforms.
            ``"torch"`` draws them with ``torch.rand``, as one would write it; this is faster.

    Attributes:
        mu: parameter of shape (structures,).
        log_sigma: parameter of the same shape.
    """

    def __init__(self, layer: NoiseLayer, *, uniforms: Uniforms = "philox") -> None:
        super().__init__()
        self.uniforms = uniforms
        self.dim, self.granularity, self.activation = layer.dim, layer.granularity, layer.activation
        self.lower, self.upper = layer.lower, layer.upper
        self.mu = nn.Parameter(layer.mu.detach().clone())
        self.log_sigma = nn.Parameter(layer.log_sigma.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``activation(x) · θ`` in the shape of x, which has the structures along ``dim``."""
        dim = self.dim % x.dim()
        return plain.multiply_noise(
            x if self.activation is None else _ACTIVATIONS[self.activation](x),
            self.mu,
            self.log_sigma,
            dim=dim,
            granularity=self.granularity,
            uniform=self._seeded_uniforms(x, dim) if self.uniforms == "philox" else None,
            lower=self.lower,
            upper=self.upper,
        ).to(x.dtype)

    def _seeded_uniforms(self, x: Tensor, dim: int) -> Tensor:
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=x.device)
        shape = plain.draw_shape(x.shape, dim, self.granularity)
        return bmrs_kernels.philox_uniform(seed, shape, device=x.device)


def use_plain_formulas(model: nn.Module, *, uniforms: Uniforms = "philox") -> nn.Module:
    """Replace every noise layer below a model by a plain one with the same values, in place, and return the model.

    Args:
        model: a model with noise layers.
        uniforms: see `PlainNoiseLayer`.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NoiseLayer):
                setattr(parent, name, PlainNoiseLayer(child, uniforms=uniforms))
    return model


def kl_divergence(model: nn.Module, *, weight: KLWeight, dataset_size: int) -> Tensor:
    """Return the KL term in nats, a scalar, weighted as by `bmrs.kl_divergence` with nothing pruned.

    Args:
        model: a model with plain noise layers.
        weight: ``"elbo"``: the sum over all structures divided by ``dataset_size``; ``"mean"``: the mean over each
            layer's structures, then over layers.
        dataset_size: number of training examples, at least 1.
    """
    terms = [
        plain.kl_divergence(layer.mu, layer.log_sigma, layer.lower, layer.upper)
        for layer in model.modules()
        if isinstance(layer, PlainNoiseLayer)
    ]
    if weight == "mean":
        return torch.stack([term.mean() for term in terms]).mean()
    return torch.cat(terms).sum() / dataset_size


def largest_excess(model: nn.Module) -> float:
    """Return the largest (μ - upper)/σ of all structures, plain or not: how many σ a mode lies beyond the interval."""
    layers = [layer for layer in model.modules() if isinstance(layer, NoiseLayer | PlainNoiseLayer)]
    with torch.no_grad():
        excesses = [(layer.mu - layer.upper) / plain.scale(layer.log_sigma) for layer in layers]
        return torch.cat(excesses).max().item() if excesses else -math.inf
