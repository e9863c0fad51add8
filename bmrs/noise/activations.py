"""What a noise layer can do to its input before it multiplies the noise on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bmrs_kernels.options import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}

ACTIVATION_LAYERS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
"""The layers that do what a noise layer's ``activation`` does."""


def activated(x: Tensor, activation: Activation | None) -> Tensor:
    """Return activation(x)."""
    return x if activation is None else ACTIVATIONS[activation](x)
