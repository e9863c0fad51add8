"""The torch layers that a compacted network is made of: kinds, arguments and rebuilding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHT_LAYERS = (nn.Linear, *CONVOLUTIONS)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAX_POOLS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
AVERAGE_POOLS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
POOLS = (*MAX_POOLS, *AVERAGE_POOLS)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# f(s·x) = s·f(x) for every s >= 0.
HOMOGENEOUS_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)
OTHER_ACTIVATIONS = (
    nn.ReLU6,
    nn.Tanh,
    nn.Sigmoid,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Softplus,
)
# Every output depends on every input channel.
MIXING_ACTIVATIONS = (nn.Softmax, nn.LogSoftmax)


class Addition(nn.Module):
    """The sum of two tensors of one shape, which torch has no layer for; not a part of compacted networks."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x + y."""
        return x + y


WeightLayer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

STOCK_LAYERS: tuple[type[nn.Module], ...] = (
    *WEIGHT_LAYERS,
    *BATCH_NORMS,
    *POOLS,
    *DROPOUTS,
    *HOMOGENEOUS_ACTIVATIONS,
    *OTHER_ACTIVATIONS,
    *MIXING_ACTIVATIONS,
    nn.Flatten,
)

# Where a parameter lives and in what dtype is its tensor's affair; the last two are deprecated names.
_NOT_STORED = ("self", "device", "dtype", "min_value", "max_value")


def argument_names(layer_type: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of a stock layer's constructor arguments, without device and dtype."""
    parameters = inspect.signature(layer_type.__init__).parameters.values()
    named = (p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return tuple(name for name in named if name not in _NOT_STORED)


def constructor_arguments(layer: nn.Module) -> dict[str, Any]:
    """Return arguments that a stock layer was, or could have been, constructed with."""
    arguments = {name: getattr(layer, name) for name in argument_names(type(layer))}
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"] is not None
        # Torch 2.11 lacks this argument of batch norm; left out, it follows from ``affine``.
        if arguments["bias"] == arguments.get("affine"):
            del arguments["bias"]
    return arguments


def build_layer(
    layer_type: type[nn.Module], arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """Construct a stock layer around given tensors, without initialising and without copying them.

    Args:
        layer_type: one of `STOCK_LAYERS`.
        arguments: its constructor arguments.
        tensors: exactly the tensors of its state_dict.

    Raises:
        TypeError, ValueError: the constructor refuses the arguments.
        RuntimeError: the tensors are not those of such a layer.
    """
    with torch.device("meta"):
        layer = layer_type(**arguments)
    layer.load_state_dict(tensors, assign=True)
    return layer


def copy_layer(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a stock layer alone, without hooks and added children, in another floating dtype."""
    arguments = constructor_arguments(layer)
    own = {name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))}
    tensors = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name in own}
    return build_layer(type(layer), arguments, tensors).to(dtype)


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether a convolution has one filter for each channel, which keeps channels apart."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def number_of_spatial_dimensions(layer: nn.Module | type[nn.Module]) -> int:
    """Return 1, 2 or 3 for a convolution or pooling layer or its type, as in its name."""
    layer_type = layer if isinstance(layer, type) else type(layer)
    return int(layer_type.__name__[-2])
