"""First half of compaction: noise layers folded into their neighbours, every layer at its full width.

A chain of layers is a sequence of channel spaces: the output channels of a linear or convolution layer,
through all operations that keep channels apart, up to the next linear or convolution layer, which mixes
them. A noise layer scales the channels of its space. The factors move forward through operations that
commute with them, into the input weights of the next layer that has any; before an operation that does
not commute, they move backward into the last layer with weights instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    WeightLayer,
    copy_layer,
    number_of_spatial_dimensions,
)
from bmrs.compaction.tracing import Step
from bmrs.noise_layer import NoiseLayer


@dataclass
class Operation:
    """A folded step.

    Attributes:
        step: the step of the original chain.
        layer: float64 copy of its stock layer with noise folded in; None for a noise layer.
        zeroed: for a noise layer, the structures that it sets to zero, bool of shape (num_structures,).
        axis: dimension of its input along which the channels lie; None while no layer has told.
    """

    step: Step
    layer: nn.Module | None
    zeroed: Tensor | None
    axis: int | None

    def flattened_channels(self) -> Tensor:
        """For a flattening, the channel that each feature of its output comes from."""
        assert self.axis is not None
        return _flattened_channels(self.step.input_shape, self.axis)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the original layer's tensors."""
        tensors = self.step.module.state_dict().values()
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def is_depthwise(layer: nn.Module) -> bool:
    """True for a convolution with one filter for each channel, which keeps channels apart."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def _flattened_channels(shape: torch.Size, axis: int) -> Tensor:
    """The channel that each feature comes from after flattening a tensor of this shape (batch first)."""
    return (
        torch.arange(shape[axis])
        .repeat_interleave(math.prod(shape[axis + 1 :]))
        .repeat(math.prod(shape[1:axis]))
    )


class _Factors:
    """Factors on the channels of the current tensor that no weight has taken up yet.

    Attributes:
        axis: dimension of the current tensor along which its channels lie; None at the model's input.
        values: float64 factor for each channel or flattened feature; None if none is pending.
        noise: the noise layers that they come from.
        absorber: the last layer with weights, if only operations that commute with factors follow it.
        rows: the absorber's output channel that each feature comes from.
    """

    def __init__(self) -> None:
        self.axis: int | None = None
        self.values: Tensor | None = None
        self.noise: list[Step] = []
        self.absorber: nn.Module | None = None
        self.rows: Tensor | None = None

    def multiply(self, step: Step, factors: Tensor) -> None:
        self.values = factors if self.values is None else self.values * factors
        self.noise.append(step)

    def take(self) -> Tensor | None:
        values, self.values = self.values, None
        self.noise = []
        return values

    def restart(self, layer: nn.Module, num_channels: int, device: torch.device) -> None:
        self.absorber = layer
        self.rows = torch.arange(num_channels, device=device)

    def flatten(self, shape: torch.Size) -> None:
        if self.axis is None:
            return
        channel = _flattened_channels(shape, self.axis)
        self.axis = 1
        self.values = None if self.values is None else self.values[channel]
        self.rows = None if self.rows is None else self.rows[channel]

    def fold_backward(self, before: str) -> None:
        """Multiply the absorber's output by the pending factors, which cannot pass what comes next."""
        if self.values is None:
            return
        names = " and ".join(map(str, self.noise))
        values = self.take()
        if self.absorber is None or self.rows is None or values is None:
            raise ValueError(
                f"noise layer {names} cannot be folded: it cannot move forward past {before}, and no linear, "
                "convolution or batch norm layer can take it up before"
            )
        factors = values.new_zeros(int(self.rows.max()) + 1)
        factors[self.rows] = values
        if not torch.equal(factors[self.rows], values):
            raise ValueError(
                f"noise layer {names} cannot be folded: it cannot move forward past {before}, and it scales "
                "features of one channel differently"
            )
        multiply_rows(self.absorber, factors)


def fold_noise(steps: list[Step]) -> list[Operation]:
    """Fold the expected noise of a chain, times its mask, into float64 copies of the other layers.

    Raises:
        ValueError: a layer is not supported, or a noise layer cannot be folded; both are named.
    """
    factors = _Factors()
    operations = []
    for step in steps:
        _check_supported(step)
        _check_axis(step, factors.axis)
        axis = factors.axis
        if isinstance(step.module, NoiseLayer):
            factors.axis = step.module.dim % len(step.input_shape)
            expected = step.module.expected_noise().double()
            factors.multiply(step, expected)
            operations.append(Operation(step, None, expected == 0, factors.axis))
        else:
            layer = _with_affine(copy_layer(step.module, torch.float64))
            _pass(step, layer, factors)
            operations.append(Operation(step, layer, None, axis))
    factors.fold_backward("the model's output")
    return operations


def _check_supported(step: Step) -> None:
    module = step.module
    if not isinstance(module, NoiseLayer) and type(module) not in STOCK_LAYERS:
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


def _pass(step: Step, layer: nn.Module, factors: _Factors) -> None:
    """Move the pending factors past a layer, or into it, or before it."""
    if isinstance(layer, WEIGHT_LAYERS):
        pending = factors.take()
        if pending is not None:
            multiply_columns(layer, pending)
        factors.axis = len(step.output_shape) - 1 if isinstance(layer, nn.Linear) else 1
        factors.restart(layer, step.output_shape[factors.axis], layer.weight.device)
    elif isinstance(layer, BATCH_NORMS):
        pending = factors.take()
        if pending is not None:
            _scale_batch_norm_input(layer, pending)
        factors.axis = 1
        factors.restart(layer, layer.num_features, layer.weight.device)
    elif isinstance(layer, nn.Flatten):
        factors.flatten(step.input_shape)
    elif not isinstance(layer, (*HOMOGENEOUS_ACTIVATIONS, *POOLS, *DROPOUTS)):
        factors.fold_backward(str(step))
        factors.absorber = None


def multiply_rows(layer: nn.Module, factors: Tensor) -> None:
    """Multiply each output channel of a linear, convolution or batch norm layer by a factor."""
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter.mul_(factors.view(-1, *[1] * (parameter.dim() - 1)))


def multiply_columns(layer: WeightLayer, factors: Tensor) -> None:
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


def _scale_batch_norm_input(layer: _BatchNorm, factors: Tensor) -> None:
    """Make batch norm of x what it was of factors · x.

    The statistics become those of x, so that the layer can be trained further. A channel with factor 0 has a
    constant output.
    """
    assert layer.running_mean is not None
    assert layer.running_var is not None
    zero = factors == 0
    divisor = factors.masked_fill(zero, 1.0)
    _, constant = batch_norm_scale_and_shift(layer)
    with torch.no_grad():
        layer.bias.copy_(constant.where(zero, layer.bias))
        layer.weight.masked_fill_(zero, 0.0)
        layer.running_var.copy_((layer.running_var + layer.eps) / divisor**2 - layer.eps)
        layer.running_mean.div_(divisor)
