"""The layers whose output channels structures are, and where their weights have them."""

from __future__ import annotations

from torch import Tensor, nn

from bmrs.noise.placement import is_transposed_linear

TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
STOCK_PRODUCERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED_CONVOLUTIONS)


def is_producer(layer: nn.Module) -> bool:
    """Return whether a layer is linear or a convolution, transposed or not, whose outputs structures can be."""
    return isinstance(layer, STOCK_PRODUCERS) or is_transposed_linear(layer)


def by_output(producer: nn.Module, tensor: Tensor) -> Tensor:
    """Return a tensor of the shape of a producer's weight with the output channels first.

    Transposed convolutions have them second, in groups, and GPT-2's linear layer last.
    """
    if isinstance(producer, TRANSPOSED_CONVOLUTIONS):
        return tensor.unflatten(0, (producer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return tensor.T if is_transposed_linear(producer) else tensor
