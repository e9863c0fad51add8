"""First half of compaction: noise layers folded into their neighbours, every layer at its full width.

A noise layer multiplies the channels of a tensor y by factors f = E[θ] · mask ≥ 0. The network that computes y
instead of f·y, and whose other layers make up for it, is found in one of two ways, and exactly so:

- Forward, if all that read f·y can: with weights W, a linear or convolution layer has W(f·y) = (W·f)y, so that its
  input columns take up f (zero padding is 0 either way); a batch norm takes f up in its statistics; and
  r(f·y) = f·r(y) for an operation r that is positively homogeneous and keeps channels apart, such as ReLU,
  pooling or another noise layer, behind which f moves on.
- Backward, if forward is barred by an operation that is not homogeneous, by an addition, whose other
  operand would have to carry the same factors, or by the model's output: the same rules, read from right to left, lead
  to the layers whose output rows take f up, W and bias alike. f·(a + b) = f·a + f·b moves into both operands of an
  addition. Nothing else may read a tensor on the way, because it would see the factors too.

Noise behind the batch norm of a residual branch thus moves backward into that batch norm.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bmrs.compaction.stock_layers import (
    BATCH_NORMS,
    CONVOLUTIONS,
    DROPOUTS,
    HOMOGENEOUS_ACTIVATIONS,
    POOLS,
    STOCK_LAYERS,
    WEIGHT_LAYERS,
    Addition,
    WeightLayer,
    copy_layer,
    number_of_spatial_dimensions,
)
from bmrs.compaction.tracing import Step
from bmrs.noise_layer import NoiseLayer

_NO_TAKER = "no linear, convolution or batch norm layer can take it up before"
# Layers, each with factors on its input or output channels.
_Takers: TypeAlias = list[tuple[nn.Module, Tensor]]


@dataclass
class Operation:
    """A folded step.

    Attributes:
        step: the step of the original network.
        layer: float64 copy of its stock layer with noise folded in; None for a noise layer.
        factors: for a noise layer, its expected noise times its mask, float64 of shape (num_structures,).
        axis: dimension of its inputs along which the channels lie; None while no layer has told.
        rows: output channels of a linear or convolution layer that are left; None for all.
    """

    step: Step
    layer: nn.Module | None
    factors: Tensor | None
    axis: int | None
    rows: Tensor | None = None

    def flattened_channels(self) -> Tensor:
        """For a flattening, the channel that each feature of its output comes from."""
        assert self.axis is not None
        shape = self.step.input_shape
        return (
            torch.arange(shape[self.axis])
            .repeat_interleave(math.prod(shape[self.axis + 1 :]))
            .repeat(math.prod(shape[1 : self.axis]))
        )

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the original layer's tensors."""
        tensors = self.step.module.state_dict().values()
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def is_depthwise(layer: nn.Module) -> bool:
    """True for a convolution with one filter for each channel, which keeps channels apart."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def fold_noise(steps: list[Step]) -> list[Operation]:
    """Fold the expected noise of a network, times its mask, into float64 copies of the other layers.

    Raises:
        ValueError: a layer is not supported, or a noise layer cannot be folded; both are named.
    """
    axes = channel_axes(steps)
    operations = []
    for step in steps:
        if isinstance(step.module, NoiseLayer):
            operations.append(Operation(step, None, step.module.expected_noise().double(), axes[step]))
        else:
            layer = _with_affine(copy_layer(step.module, torch.float64))
            operations.append(Operation(step, layer, None, axes[step]))
    folding = _Folding(operations)
    for operation in operations:
        if operation.factors is not None:
            folding.fold(operation.step, operation.factors)
    return operations


def channel_axes(steps: list[Step]) -> dict[Step, int | None]:
    """The dimension of each step's inputs along which the channels lie, None while no layer has told.

    Raises:
        ValueError: a step is not supported, or does not act along the channels; it is named.
    """
    input_axes: dict[Step, int | None] = {}
    output_axes: dict[Step | None, int | None] = {None: None}
    for step in steps:
        _check_supported(step)
        axes = {output_axes[source] for source in step.inputs} - {None}
        if len(axes) > 1:
            raise ValueError(
                f"compact cannot follow the channels through {step}: they lie along dimensions "
                f"{' and '.join(map(str, sorted(axes, key=str)))} of its inputs"
            )
        axis = axes.pop() if axes else None
        _check_axis(step, axis)
        input_axes[step] = axis
        output_axes[step] = _output_axis(step, axis)
    return input_axes


def _output_axis(step: Step, axis: int | None) -> int | None:
    module = step.module
    if isinstance(module, nn.Linear):
        return len(step.output_shape) - 1
    if isinstance(module, (*CONVOLUTIONS, *BATCH_NORMS)):
        return 1
    if isinstance(module, NoiseLayer):
        return module.dim % len(step.input_shape)
    return 1 if axis is not None and isinstance(module, nn.Flatten) else axis


class _BarredError(Exception):
    """Factors cannot move on; the message says why, as the end of a sentence."""


class _Folding:
    """Moves factors through a network to the layers that take them up."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = {operation.step: operation for operation in operations}
        self.last = operations[-1].step if operations else None
        self.readers: dict[Step | None, list[Operation]] = defaultdict(list)
        for operation in operations:
            for source in dict.fromkeys(operation.step.inputs):
                self.readers[source].append(operation)

    def fold(self, noise: Step, factors: Tensor) -> None:
        """Make the network the same without a noise layer as it was with it."""
        try:
            for layer, its_factors in self._forward(noise, factors):
                _multiply_input(layer, its_factors)
            return
        except _BarredError as error:
            obstacle = error
        try:
            for layer, its_factors in self._backward(noise, factors):
                _multiply_rows(layer, its_factors)
        except _BarredError as error:
            raise ValueError(
                f"noise layer {noise} cannot be folded: it cannot move forward past {obstacle}, and {error}"
            ) from None

    def _forward(self, step: Step, factors: Tensor) -> _Takers:
        """The layers that can take up factors on a step's result in their inputs."""
        if step is self.last:
            raise _BarredError("the model's output")
        takers: _Takers = []
        for reader in self.readers[step]:
            if isinstance(reader.layer, (*WEIGHT_LAYERS, *BATCH_NORMS)):
                takers.append((reader.layer, factors))
            elif isinstance(reader.layer, nn.Flatten):
                takers += self._forward(reader.step, factors[reader.flattened_channels()])
            elif _lets_factors_pass(reader):
                takers += self._forward(reader.step, factors)
            else:
                raise _BarredError(str(reader.step))
        return takers

    def _backward(self, step: Step, factors: Tensor) -> _Takers:
        """The layers that can take up factors on each of a step's inputs in their outputs."""
        takers: _Takers = []
        for source in dict.fromkeys(step.inputs):
            others = [reader.step for reader in self.readers[source] if reader.step is not step]
            if source is not None and others:
                raise _BarredError(f"backward it would act on {' and '.join(map(str, others))} too")
            operation = None if source is None else self.operations[source]
            if operation is None:
                raise _BarredError(_NO_TAKER)
            if isinstance(operation.layer, (*WEIGHT_LAYERS, *BATCH_NORMS)):
                takers.append((operation.layer, factors))
            elif isinstance(operation.layer, nn.Flatten) and operation.axis is not None:
                takers += self._backward(operation.step, _unflattened(operation, factors))
            elif _lets_factors_pass(operation) or isinstance(operation.layer, Addition):
                takers += self._backward(operation.step, factors)
            else:
                raise _BarredError(_NO_TAKER)
        return takers


def _lets_factors_pass(operation: Operation) -> bool:
    passing = (*HOMOGENEOUS_ACTIVATIONS, *POOLS, *DROPOUTS)
    return operation.layer is None or isinstance(operation.layer, passing)


def _unflattened(flatten: Operation, factors: Tensor) -> Tensor:
    """The factors of the channels, from those of the features that a flattening makes of them."""
    channel = flatten.flattened_channels()
    unflattened = factors.new_zeros(int(channel.max()) + 1)
    unflattened[channel] = factors
    if not torch.equal(unflattened[channel], factors):
        raise _BarredError("it scales features of one channel differently")
    return unflattened


def _check_supported(step: Step) -> None:
    module = step.module
    if not isinstance(module, NoiseLayer) and type(module) not in (*STOCK_LAYERS, Addition):
        raise ValueError(f"compact does not support layer {step}")
    if isinstance(module, BATCH_NORMS) and module.running_mean is None:
        raise ValueError(f"compact does not support layer {step} without running statistics")
    if isinstance(module, (*CONVOLUTIONS, *POOLS)):
        expected = number_of_spatial_dimensions(module) + 2
        if len(step.input_shape) != expected:
            raise ValueError(
                f"compact needs batched input of {expected} dimensions at layer {step}, "
                f"got shape {tuple(step.input_shape)}"
            )


def _check_axis(step: Step, axis: int | None) -> None:
    """Raise unless a layer acts along the dimension of its input that the channels lie along."""
    if isinstance(step.module, NoiseLayer):
        acts_along = step.module.dim % len(step.input_shape)
    elif isinstance(step.module, nn.Linear):
        acts_along = len(step.input_shape) - 1
    elif isinstance(step.module, (*CONVOLUTIONS, *BATCH_NORMS, *POOLS)):
        acts_along = 1
    else:
        return
    if acts_along == 0 or axis not in (None, acts_along):
        raise ValueError(
            f"compact cannot follow the channels through layer {step}: it acts along dimension {acts_along} "
            f"of its input of shape {tuple(step.input_shape)}, whose channels lie along {axis or 1}"
        )


def _with_affine(layer: nn.Module) -> nn.Module:
    """Batch norm with weight and bias, which can take up factors; any other layer as it is."""
    if isinstance(layer, BATCH_NORMS) and layer.running_mean is not None:
        layer.affine = True
        if layer.weight is None:
            layer.weight = nn.Parameter(torch.ones_like(layer.running_mean))
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(layer.running_mean))
    return layer


def _multiply_rows(layer: nn.Module, factors: Tensor) -> None:
    """Multiply each output channel of a linear, convolution or batch norm layer by a factor."""
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter.mul_(factors.view(-1, *[1] * (parameter.dim() - 1)))


def _multiply_columns(layer: WeightLayer, factors: Tensor) -> None:
    """Multiply each input channel of a linear or convolution layer by a factor."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = layer.weight
    per_row = factors.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    with torch.no_grad():
        weight.mul_(per_row.view(*weight.shape[:2], *[1] * (weight.dim() - 2)))


def batch_norm_scale_and_shift(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Batch norm in evaluation mode as scale · x + shift, each of shape (num_features,)."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    scale = layer.weight * (layer.running_var + layer.eps).rsqrt()
    return scale, layer.bias - layer.running_mean * scale


def _multiply_input(layer: nn.Module, factors: Tensor) -> None:
    """Make a linear, convolution or batch norm layer of x what it was of factors · x."""
    if isinstance(layer, WEIGHT_LAYERS):
        _multiply_columns(layer, factors)
    elif isinstance(layer, BATCH_NORMS):
        _scale_batch_norm_input(layer, factors)


def _scale_batch_norm_input(layer: _BatchNorm, factors: Tensor) -> None:
    """Make batch norm of x what it was of factors · x.

    The statistics become those of x, so that the layer can be trained further, and the weight makes up for eps. A
    channel with factor 0 has a constant output.
    """
    assert layer.running_mean is not None
    assert layer.running_var is not None
    zero = factors == 0
    divisor = factors.masked_fill(zero, 1.0)
    _, constant = batch_norm_scale_and_shift(layer)
    with torch.no_grad():
        layer.bias.copy_(constant.where(zero, layer.bias))
        eps_of_x = layer.eps * factors**2
        layer.weight.mul_(((layer.running_var + eps_of_x) / (layer.running_var + layer.eps)).sqrt())
        layer.weight.masked_fill_(zero, 0.0)
        layer.running_var.div_(divisor**2)
        layer.running_mean.div_(divisor)
