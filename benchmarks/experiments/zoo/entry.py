"""What the zoo says about a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.experiments.zoo.inputs import Inputs


@dataclass(frozen=True)
class Entry:
    """A network with its inputs and the places of its noise.

    Attributes:
        name: name of the architecture.
        build: returns the network; the weights follow from the seed that the caller sets.
        inputs: returns arguments and keyword arguments of forward; floating ones have the given dtype, and the
            values do not depend on the seed that the caller sets.
        noise: keyword arguments of successive calls of ``bmrs.add_noise``.
        heads: glob patterns of attention output projections, each with the number of heads that its input consists
            of; one noise variable per head could multiply that input.
        needs_transformers: whether ``build`` imports the transformers library.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    noise: tuple[dict[str, Any], ...]
    heads: tuple[tuple[str, int], ...] = ()
    needs_transformers: bool = False


def randomize_vectors(model: nn.Module) -> None:
    """Move biases, scales and slopes away from trivial values such as 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def estimate_statistics(model: nn.Module, inputs: Inputs) -> None:
    """Give batch norms statistics like those of training; with the initial ones, signals fade in deep networks."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.9  # Some of the initial variance stays, so that none is nearly 0.
    args, kwargs = inputs(torch.get_default_dtype())
    with torch.no_grad():
        model.train()(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def entry_of(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Inputs,
    *noise: str | dict[str, Any],
    heads: Sequence[tuple[str, int]] = (),
    needs_transformers: bool = False,
) -> Entry:
    """Return an entry whose biases, scales and statistics are away from their initial values.

    Args:
        name: as in `Entry`.
        build: returns the network as its constructor leaves it.
        inputs: as in `Entry`.
        noise: for each call of ``bmrs.add_noise`` its keyword arguments, or ``where`` alone.
        heads: as in `Entry`.
        needs_transformers: as in `Entry`.
    """

    def build_with_random_vectors() -> nn.Module:
        model = build()
        randomize_vectors(model)
        estimate_statistics(model, inputs)
        return model

    places = tuple({"where": place} if isinstance(place, str) else place for place in noise)
    return Entry(name, build_with_random_vectors, inputs, places, tuple(heads), needs_transformers)


def noise_at(where: str, num_structures: int, dim: int = 1) -> dict[str, Any]:
    """Noise behind a layer whose structures cannot be inferred."""
    return {"where": where, "num_structures": num_structures, "dim": dim}
