"""Second half of compaction: channels that are constant wherever they are used leave the network.

Every output channel of a linear or convolution layer has a number of its own. A feature, an entry of a tensor along
its channel dimension, carries the number of the channel that it comes from, through all operations that keep channels
apart, up to the next linear or convolution layers, which mix them; flattening turns a channel into several features.
A feature is dead where its value is the same in all examples and at all positions: 0 behind a noise layer that
prunes it, and what the operations behind make of this constant.

A channel is removed only if every mixing layer that reads it finds it dead; the constant, times the weights that read
it, then moves into that layer's bias. It stays if it is a part of the model's output or input, where zeros beside a
constant other than 0 make it differ from position to position, where a softmax sums over it, and where the groups of
a convolution would become unequal. A layer that would lose all its channels keeps one.

An addition ties channels: those that it adds leave together or stay together. Their sum is dead, with the sum of the
constants as its value, only if both are; a channel that is pruned in one branch and not in the other stays in both,
with zero weights in the one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor, nn

from bmrs.compaction.folding import Operation, batch_norm_scale_and_shift, is_depthwise
from bmrs.compaction.stock_layers import (
    AVERAGE_POOLS,
    BATCH_NORMS,
    CONVOLUTIONS,
    DROPOUTS,
    MIXING_ACTIVATIONS,
    POOLS,
    WEIGHT_LAYERS,
    Addition,
    WeightLayer,
)
from bmrs.compaction.tracing import Step


def remove_dead_channels(operations: list[Operation]) -> None:
    """Remove, in place, the channels that are dead wherever they are used from all layers."""
    channels = _Channels(operations)
    removable = channels.removable()
    if not removable.any():
        return
    for operation in operations:
        layer = operation.layer
        before, after = channels.inputs(operation)[0], channels.features[operation.step]
        if _mixes(layer) and before is not None:
            gone = removable[before.channel]
            _add_to_bias(layer, before.value.masked_fill(~gone, 0.0))
            _keep_columns(layer, ~gone)
        if after is not None and isinstance(layer, (*WEIGHT_LAYERS, *BATCH_NORMS)):
            kept = ~removable[after.channel]
            _keep_rows(layer, kept)
            operation.rows = kept.nonzero().flatten()


@dataclass
class _Features:
    """The features of a tensor in the network with noise folded in; all of shape (number of features,).

    Attributes:
        channel: number of the channel that each comes from.
        dead: bool, True where each is constant.
        value: the constant, float64; meaningless elsewhere.
    """

    channel: Tensor
    dead: Tensor
    value: Tensor


class _Channels:
    """What is known of all channels of a network with noise folded in.

    Attributes:
        features: features of the result of each step; None where they are those of the model's input.
    """

    def __init__(self, operations: list[Operation]) -> None:
        self.operations = operations
        self.features: dict[Step | None, _Features | None] = {None: None}
        self.count = 0
        for operation in operations:
            self.features[operation.step] = self._result(operation)

    def inputs(self, operation: Operation) -> list[_Features | None]:
        """Features of each input of an operation."""
        return [self.features[source] for source in operation.step.inputs]

    def _result(self, operation: Operation) -> _Features | None:
        layer = operation.layer
        if _mixes(layer):
            return self._new_features(layer)
        inputs = [features for features in self.inputs(operation) if features is not None]
        if len(inputs) < len(operation.step.inputs):
            return None
        features = inputs[0]
        if isinstance(layer, Addition):
            other = inputs[1]
            return replace(features, dead=features.dead & other.dead, value=features.value + other.value)
        if operation.factors is not None:
            # The folded weights around it ignore these features, so that they count as 0 from here on.
            zeroed = operation.factors == 0
            return replace(
                features, dead=features.dead | zeroed, value=features.value.masked_fill(zeroed, 0.0)
            )
        if isinstance(layer, nn.Flatten):
            index = operation.flattened_channels()
            return _Features(features.channel[index], features.dead[index], features.value[index])
        features = _as_read(layer, features)
        return replace(features, value=_constant_result(layer, features.value))

    def _new_features(self, layer: WeightLayer) -> _Features:
        rows, device = len(layer.weight), layer.weight.device
        channel = torch.arange(self.count, self.count + rows, device=device)
        self.count += rows
        return _Features(
            channel,
            torch.zeros_like(channel, dtype=torch.bool),
            torch.zeros_like(channel, dtype=torch.float64),
        )

    def removable(self) -> Tensor:
        """Channels that can go, bool of shape (number of channels,)."""
        known = [features.channel for features in self.features.values() if features is not None]
        removable = torch.ones(self.count, dtype=torch.bool, device=known[0].device if known else None)
        for operation in self.operations:
            inputs = self.inputs(operation)
            for features in inputs:
                if features is None:
                    continue
                if _mixes(operation.layer) or isinstance(operation.layer, MIXING_ACTIVATIONS):
                    removable[features.channel[~_as_read(operation.layer, features).dead]] = False
                elif any(other is None for other in inputs):
                    removable[features.channel] = False
        output = self.features[self.operations[-1].step] if self.operations else None
        if output is not None:
            removable[output.channel] = False
        return self._consistent(removable)

    def _consistent(self, removable: Tensor) -> Tensor:
        """A part of these channels whose removal leaves every layer and addition whole."""
        while True:
            before = removable.clone()
            self._tie(removable)
            for operation in self.operations:
                if not _mixes(operation.layer):
                    continue
                before_it, behind_it = self.inputs(operation)[0], self.features[operation.step]
                assert behind_it is not None
                if removable[behind_it.channel].all():
                    removable[behind_it.channel[0]] = False
                for features in (behind_it, before_it):
                    if features is not None:
                        balanced = _balanced(removable[features.channel], _groups(operation.layer))
                        removable[features.channel[~balanced]] = False
            if torch.equal(removable, before):
                return removable

    def _tie(self, removable: Tensor) -> None:
        """Keep, in place, all channels that are added to one that stays."""
        while True:
            before = removable.clone()
            for operation in self.operations:
                inputs = [features.channel for features in self.inputs(operation) if features is not None]
                if isinstance(operation.layer, Addition) and len(inputs) == 2:
                    stays = ~(removable[inputs[0]] & removable[inputs[1]])
                    for channel in inputs:
                        removable[channel[stays]] = False
            if torch.equal(removable, before):
                return


def _mixes(layer: nn.Module | None) -> TypeGuard[WeightLayer]:
    """True for a layer whose outputs each depend on many input channels, so that its outputs are new channels."""
    return isinstance(layer, WEIGHT_LAYERS) and not is_depthwise(layer)


def _as_read(layer: nn.Module | None, features: _Features) -> _Features:
    """Features as a layer sees them, alive where its result is not the same everywhere.

    Beside zeros, all constants but 0 differ from position to position; a softmax sums over all features.
    """
    if isinstance(layer, MIXING_ACTIVATIONS):
        return replace(features, dead=torch.zeros_like(features.dead))
    padded = (isinstance(layer, CONVOLUTIONS) and _pads_with_zeros(layer)) or (
        isinstance(layer, AVERAGE_POOLS) and _averages_padding(layer)
    )
    return replace(features, dead=features.dead & (features.value == 0)) if padded else features


def _constant_result(layer: nn.Module | None, value: Tensor) -> Tensor:
    """What a layer that keeps channels apart makes of constants, one for each channel."""
    if isinstance(layer, BATCH_NORMS):
        scale, shift = batch_norm_scale_and_shift(layer)
        return value * scale + shift
    if isinstance(layer, CONVOLUTIONS):
        value = value * layer.weight.flatten(1).sum(1)
        return value if layer.bias is None else value + layer.bias
    if layer is None or isinstance(layer, (*POOLS, *DROPOUTS, *MIXING_ACTIVATIONS)):
        return value
    # Not in place, because others may read the same constants.
    return layer(value.clone())


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
