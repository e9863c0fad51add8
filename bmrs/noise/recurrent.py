"""Noise on the hidden units of recurrent layers, which acts wherever a unit is read.

A unit's state h_t is read by the recurrence, by the next of stacked layers, and outside as a part of the output and of
the last state. Noise makes it θ·h_t for all of them, with one θ for a whole call. Other units read it through matrices
alone, and W·(θ·h) = (W·diag θ)·h, so that torch's kernels compute it from weights with scaled columns, and what the
layer returns is scaled. What is elementwise in a step, such as z·h_{t-1} of a GRU and the cells of an LSTM, is
that of h_t itself: it belongs to the unit and is not read by another one. A unit with θ = 0 is read by nobody.

An initial state counts as a state: it is multiplied when it is read. With projections (``proj_size``) the units are
read by the projection alone, and its columns are what is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bmrs.noise.channel_scale import ChannelScale
from bmrs.noise.layer import NoiseLayer

_Multiplier = Callable[[Tensor], Tensor]


class HiddenNoise(nn.Module):
    """What multiplies the hidden units of a recurrent layer, as its child ``noise``.

    Args:
        parts: what multiplies along the last dimension, for each layer and direction, by the end of its weights' names
            such as ``"l0"`` and ``"l0_reverse"``. Units without it stay as they are.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.drawn: dict[str, _Multiplier] = {}

    def draw(self) -> None:
        """Draw what is to multiply everything in one call of the layer."""
        self.drawn = {name: _multiplier(part) for name, part in self.named_children()}

    def scaled(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor along whose last dimension the units of a layer and direction lie, multiplied."""
        return self.drawn[name](tensor) if name in self.drawn else tensor


def _multiplier(part: nn.Module) -> _Multiplier:
    if isinstance(part, ChannelScale):
        return part.scaled
    assert isinstance(part, NoiseLayer)
    theta: Tensor = part(torch.ones_like(part.mu))
    return lambda tensor: tensor * theta.to(tensor.dtype)


def hidden_parts(layer: nn.RNNBase) -> list[str]:
    """Return what the names of a recurrent layer's weights end in, for each layer and direction, as in ``"l0"``."""
    return [name for names in _by_layer(layer) for name in names]


def _by_layer(layer: nn.RNNBase) -> Iterator[list[str]]:
    for number in range(layer.num_layers):
        yield [f"l{number}{direction}" for direction in ("", "_reverse")[: 1 + layer.bidirectional]]


# Functions of the module, not closures, so that the hooks survive deepcopy and pickle.
def scale_weights(layer: nn.RNNBase, inputs: tuple[Any, ...]) -> None:
    """Let a recurrent layer compute with scaled weights, from now until `scale_states`; a hook in front of it."""
    noise = _hidden_noise_of(layer)
    noise.draw()
    layer._update_flat_weights()
    if layer._weights_have_changed():
        raise ValueError(
            f"noise on the hidden units of {type(layer).__name__} cannot act: its weights are computed anew whenever "
            "they are looked at, as by a parametrization: call torch.nn.utils.parametrize.remove_parametrizations"
        )
    weights: dict[str, Tensor] = {name: getattr(layer, name) for name in layer._flat_weights_names}
    before: list[str] = []
    for names in _by_layer(layer):
        for name in names:
            key = f"weight_hr_{name}" if layer.proj_size else f"weight_hh_{name}"
            weights[key] = noise.scaled(name, weights[key])
            if before and not layer.proj_size:
                weights[f"weight_ih_{name}"] = _side_by_side(noise, before, weights[f"weight_ih_{name}"])
        before = names
    layer._flat_weights = list(weights.values())


def scale_states(layer: nn.RNNBase, inputs: tuple[Any, ...], output: Any) -> Any:
    """Give a recurrent layer its own weights back, and scale what it returns; a hook behind it, even if it failed."""
    layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
    noise = _hidden_noise_of(layer)
    if output is None or layer.proj_size:
        noise.drawn = {}
        return output
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            f"noise on the hidden units of {type(layer).__name__} needs a layer that returns its output and its state, "
            f"got {type(output).__name__}"
        )
    sequence, state = output
    *_, last = _by_layer(layer)
    if isinstance(sequence, PackedSequence):
        sequence = sequence._replace(data=_side_by_side(noise, last, sequence.data))
    else:
        sequence = _side_by_side(noise, last, sequence)
    # Of an LSTM, cells come with it.
    hidden, *cells = state if isinstance(state, tuple) else (state,)
    hidden = _row_by_row(noise, hidden_parts(layer), hidden)
    noise.drawn = {}
    return sequence, (hidden, *cells) if cells else hidden


def _side_by_side(noise: HiddenNoise, names: list[str], tensor: Tensor) -> Tensor:
    """Scale a tensor along whose last dimension the units of one or both directions lie."""
    if len(names) == 1:
        return noise.scaled(names[0], tensor)
    size = tensor.shape[-1] // len(names)
    parts = [tensor[..., i * size : (i + 1) * size] for i in range(len(names))]
    return torch.cat([noise.scaled(name, part) for name, part in zip(names, parts, strict=True)], dim=-1)


def _row_by_row(noise: HiddenNoise, names: list[str], states: Tensor) -> Tensor:
    """Scale states of all layers and directions, which lie along the first dimension."""
    if len(names) == 1:
        return noise.scaled(names[0], states)
    for i, name in enumerate(names):
        states = torch.select_scatter(states, noise.scaled(name, states[i]), 0, i)
    return states


def _hidden_noise_of(layer: nn.Module) -> HiddenNoise:
    noise = layer._modules.get("noise")
    if not isinstance(noise, HiddenNoise):
        raise RuntimeError(
            f"{type(layer).__name__} has the hook that applies noise to hidden units but lost its child 'noise': a "
            "conversion after add_noise made a new layer without it; convert the model before add_noise"
        )
    return noise
