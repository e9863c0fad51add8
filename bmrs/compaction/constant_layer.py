"""What becomes of layers that nothing is left of: they keep their names and hooks, and lose their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


class ConstantLayer(nn.Module):
    """A linear layer or convolution that gives its bias, or zeros, whatever it takes; see `make_constant`.

    Attributes:
        channels: of its outputs.
        windows: of a convolution, for each spatial dimension: kernel size, stride, dilation, and all zeros around.
        bias: of shape (channels,), or None.
        weight: of shape (channels, 0), for code that asks for the dtype or device of a layer's weight.
    """

    channels: int
    windows: tuple[tuple[int, int, int, int], ...]
    bias: nn.Parameter | None
    weight: Tensor

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Return the bias at every place of the layer's outputs."""
        spatial = len(self.windows)
        shape: list[int] = [*x.shape[: x.dim() - spatial - 1], self.channels]
        if not spatial:
            shape = [*x.shape[:-1], self.channels]
        for place, (size, stride, dilation, padding) in enumerate(self.windows):
            shape.append((x.shape[place - spatial] + padding - dilation * (size - 1) - 1) // stride + 1)
        # In memory of its own, as what follows may work in place.
        zeros = x.new_zeros(shape)
        return zeros if self.bias is None else zeros + self.bias.view(-1, *[1] * spatial)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"{self.channels}, bias={self.bias is not None}"


class PassingLayer(nn.Module):
    """A layer that returns what it takes, because nobody reads it."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Return x."""
        return x


def make_constant(layer: nn.Module, channels: int, *, bias: bool) -> None:
    """Turn a linear layer or convolution into a `ConstantLayer`, in place.

    Args:
        layer: the layer.
        channels: of its outputs.
        bias: whether it keeps its bias, if it has one.
    """
    windows: tuple[tuple[int, int, int, int], ...] = ()
    if isinstance(layer, _ConvNd):
        # Of each dimension both sides, the last dimension first.
        sides = layer._reversed_padding_repeated_twice
        padding = [sides[i] + sides[i + 1] for i in range(len(sides) - 2, -1, -2)]
        windows = tuple(zip(layer.kernel_size, layer.stride, layer.dilation, padding, strict=True))
    layer.__class__ = ConstantLayer  # so that all that refers to it goes on doing so
    assert isinstance(layer, ConstantLayer)
    layer.channels, layer.windows = channels, windows
    weight = layer._parameters.pop("weight")
    assert weight is not None
    layer.register_buffer("weight", weight.detach().new_empty(channels, 0), persistent=False)
    if not bias:
        layer._parameters["bias"] = None


def make_passing(layer: nn.Module) -> None:
    """Turn a layer into a `PassingLayer`, in place."""
    layer.__class__ = PassingLayer
    layer._parameters.clear()
    layer._buffers.clear()
