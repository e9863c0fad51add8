"""`predict`: what a network says on average over draws of its noise, and how far the draws differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from bmrs.checks import check_choice, check_integer
from bmrs.graph.inputs import as_inputs
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers, required_noise_layers
from bmrs.noise.wrappers import inside_wrappers

Predicted: TypeAlias = Literal["probabilities", "outputs"]


class Prediction(NamedTuple):
    """Moments of a network's outputs over draws of θ, both of the shape of its outputs, without gradients.

    Attributes:
        mean: mean over the draws; of classes, their probabilities, which add up to 1.
        std: standard deviation over the draws (with draws - 1 in the denominator), in the units of the mean.
    """

    mean: Tensor
    std: Tensor


def predict(
    model: nn.Module,
    x: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    of: Predicted = "probabilities",
    draws: int = 20,
    generator: torch.Generator | None = None,
) -> Prediction:
    """Return mean and spread of a network's predictions over draws of its noise variables θ.

    θ of the structures that are kept is drawn as in training, at each layer's granularity; pruned structures are off;
    batch norms, dropout and all else are in evaluation mode. That works before compaction, and behind it for what
    ``compact(..., keep_noise=True)`` returned. The spread is that of θ alone: weights have no posterior here.

    Args:
        model: a model with noise layers that returns one floating tensor. Modes, buffers and torch's random number
            generators are afterwards as they were.
        x: its input, as `bmrs.compact` takes it.
        of: ``"probabilities"`` takes the softmax over dimension 1, as `torch.nn.functional.cross_entropy` has it (over
            the only one, if there is one alone), of each draw's outputs; ``"outputs"`` takes these as they are.
        draws: how many, at least 2.
        generator: what all noise is drawn from; None for one with the seed 0, so that equal calls are equal.

    Raises:
        TypeError: ``model`` is not a module, it returns something else than a floating tensor, ``x`` is nothing that
            `bmrs.compact` takes, or ``generator`` is none.
        ValueError: the model has no noise layer, ``draws`` is less than 2, or ``of`` is unknown.
    """
    check_integer("draws", draws, minimum=2)
    check_choice("of", of, get_args(Predicted))
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    model = inside_wrappers(model)
    if not noise_layers(model):
        raise ValueError(
            f"the model ({type(model).__name__}) has no noise layer to draw from: bmrs.add_noise adds them, and "
            "bmrs.compact(..., keep_noise=True) leaves them in a smaller network"
        )
    layers = list(required_noise_layers(model).values())
    args, kwargs = as_inputs(x, model)
    mean = squares = torch.zeros(())
    with torch.no_grad(), _drawing(model, layers, generator or torch.Generator().manual_seed(0)):
        for number in range(1, draws + 1):
            outputs = model(*args, **kwargs)
            if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
                kind = (
                    f"a tensor of {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
                )
                raise TypeError(
                    f"predict needs a model that returns one floating tensor, and {type(model).__name__} returned "
                    f"{kind}: wrap it in a module that returns the tensor"
                )
            dtype, values = outputs.dtype, outputs.double()
            if of == "probabilities":
                values = values.softmax(dim=min(1, values.dim() - 1))
            # Welford's update, as differences of sums of squares would cancel.
            mean = mean.to(values)
            before = values - mean
            mean = mean + before / number
            squares = squares.to(values) + before * (values - mean)
    return Prediction(mean.to(dtype), (squares / (draws - 1)).sqrt().to(dtype))


@contextmanager
def _drawing(model: nn.Module, layers: Sequence[NoiseLayer], generator: torch.Generator) -> Iterator[None]:
    """Have a model's noise layers draw from a generator, and all else be in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    generators = {layer: layer.generator for layer in layers}
    try:
        model.eval()
        for layer in layers:
            layer.train()
            layer.generator = generator
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, its_own in generators.items():
            layer.generator = its_own
