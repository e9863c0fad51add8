"""Second half of compaction: channels that are constant leave their channel space."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bmrs.compaction.folding import Operation, batch_norm_scale_and_shift, is_depthwise
from bmrs.compaction.stock_layers import (
    AVERAGE_POOLS,
    BATCH_NORMS,
    CONVOLUTIONS,
    DROPOUTS,
    MAX_POOLS,
    MIXING_ACTIVATIONS,
    WEIGHT_LAYERS,
    WeightLayer,
)


def remove_dead_channels(operations: list[Operation]) -> None:
    """Remove, in place, the channels that noise layers set to zero from all layers of their space."""
    mixing = [
        (i, operation.layer)
        for i, operation in enumerate(operations)
        if isinstance(operation.layer, WEIGHT_LAYERS) and not is_depthwise(operation.layer)
    ]
    # Channels before the first and behind the last of them are the model's inputs and outputs.
    for (start, source), (end, consumer) in pairwise(mixing):
        space = _ChannelSpace(source, operations[start + 1 : end], consumer)
        removed = space.removable_channels()
        if removed.any():
            space.remove(removed)


class _ChannelSpace:
    """The output channels of one linear or convolution layer, up to the next.

    A feature is what the next layer sees of a channel: the channel itself, or one of its positions after
    flattening. A dead feature has one value in all examples and at all positions.

    Args:
        source: the layer whose output channels they are.
        between: the operations that keep the channels apart.
        consumer: the layer that mixes them.
    """

    def __init__(self, source: WeightLayer, between: Sequence[Operation], consumer: WeightLayer) -> None:
        self.source = source
        self.between = between
        self.consumer = consumer
        num_channels, device = source.weight.shape[0], source.weight.device
        self.channel = torch.arange(num_channels, device=device)
        self.dead = torch.zeros(num_channels, dtype=torch.bool, device=device)
        self.value = torch.zeros(num_channels, dtype=torch.float64, device=device)
        for operation in between:
            self._follow(operation)
        if isinstance(consumer, CONVOLUTIONS) and _pads_with_zeros(consumer):
            self._revive_nonzero()

    def _follow(self, operation: Operation) -> None:
        """Update dead features and their values by an operation of the network with noise folded in."""
        layer = operation.layer
        if operation.zeroed is not None:
            # The folded weights around it ignore these features, so that they count as 0 from here on.
            self.dead |= operation.zeroed
            self.value = self.value.masked_fill(operation.zeroed, 0.0)
        elif isinstance(layer, nn.Flatten):
            index = operation.flattened_channels()
            self.channel, self.dead, self.value = self.channel[index], self.dead[index], self.value[index]
        elif isinstance(layer, BATCH_NORMS):
            scale, shift = batch_norm_scale_and_shift(layer)
            self.value = self.value * scale + shift
        elif isinstance(layer, CONVOLUTIONS):
            if _pads_with_zeros(layer):
                self._revive_nonzero()
            self.value = self.value * layer.weight.flatten(1).sum(1)
            self.value = self.value if layer.bias is None else self.value + layer.bias
        elif isinstance(layer, AVERAGE_POOLS):
            if _averages_padding(layer):
                self._revive_nonzero()
        elif isinstance(layer, MIXING_ACTIVATIONS):
            self.dead = torch.zeros_like(self.dead)
        elif layer is not None and not isinstance(layer, (*MAX_POOLS, *DROPOUTS)):
            self.value = layer(self.value)

    def _revive_nonzero(self) -> None:
        """Zeros beside a constant other than 0: it differs from position to position from here on."""
        self.dead = self.dead & (self.value == 0)

    def removable_channels(self) -> Tensor:
        """Channels that can go, bool: their features are all dead, and groups of convolutions stay equal."""
        removable = torch.ones(self.source.weight.shape[0], dtype=torch.bool, device=self.channel.device)
        removable[self.channel[~self.dead]] = False
        if removable.all():
            removable[0] = False
        while True:
            balanced = _balanced(_balanced(removable, _groups(self.source)), _groups(self.consumer))
            if torch.equal(balanced, removable):
                return removable
            removable = balanced

    def remove(self, removed: Tensor) -> None:
        """Take channels out of every layer; their constant values go to the consumer's bias."""
        kept = ~removed
        gone = removed[self.channel]
        _add_to_bias(self.consumer, self.value.masked_fill(~gone, 0.0))
        _keep_columns(self.consumer, ~gone)
        _keep_rows(self.source, kept)
        channel = torch.arange(len(removed), device=removed.device)
        for operation in self.between:
            if isinstance(operation.layer, nn.Flatten):
                channel = channel[operation.flattened_channels()]
            elif operation.layer is not None and any(True for _ in operation.layer.parameters()):
                _keep_rows(operation.layer, kept[channel])


def _groups(layer: WeightLayer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _balanced(removable: Tensor, groups: int) -> Tensor:
    """As many of the channels as leave all groups of equal size."""
    by_group = removable.view(groups, -1)
    count = by_group.sum(dim=1).min()
    return (by_group & (by_group.cumsum(dim=1) <= count)).flatten()


def _pads_with_zeros(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _averages_padding(layer: nn.Module) -> bool:
    """True if an average pool does not map a constant to itself."""
    if getattr(layer, "divisor_override", None) is not None:
        return True
    padding = getattr(layer, "padding", 0)
    pads = any(padding) if isinstance(padding, tuple) else padding > 0
    return pads and bool(getattr(layer, "count_include_pad", False))


def _add_to_bias(layer: WeightLayer, inputs: Tensor) -> None:
    """Add what constant inputs, one for each input channel, contribute to a layer's outputs."""
    if not inputs.any():
        return
    groups = _groups(layer)
    weight = layer.weight.flatten(2).sum(2) if layer.weight.dim() > 2 else layer.weight
    rows = inputs.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    contribution = (weight * rows).sum(dim=1)
    layer.bias = nn.Parameter(contribution if layer.bias is None else layer.bias + contribution)


def _keep_columns(layer: WeightLayer, kept: Tensor) -> None:
    """Remove input channels of a linear or convolution layer, equally many in each group."""
    groups = _groups(layer)
    parts = zip(layer.weight.chunk(groups), kept.chunk(groups), strict=True)
    layer.weight = nn.Parameter(torch.cat([weight[:, keep] for weight, keep in parts]))
    if isinstance(layer, nn.Linear):
        layer.in_features = layer.weight.shape[1]
    else:
        layer.in_channels = layer.weight.shape[1] * groups


def _keep_rows(layer: nn.Module, kept: Tensor) -> None:
    """Remove output channels of a linear, convolution or batch norm layer; of a depthwise one inputs too."""
    depthwise = is_depthwise(layer)
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter[kept]))
    count = int(kept.sum())
    if isinstance(layer, nn.Linear):
        layer.out_features = count
    elif isinstance(layer, CONVOLUTIONS):
        layer.out_channels = count
        if depthwise:
            layer.in_channels = layer.groups = count
    elif isinstance(layer, BATCH_NORMS):
        layer.num_features = count
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean, layer.running_var = layer.running_mean[kept], layer.running_var[kept]
