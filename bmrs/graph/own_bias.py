"""Whether a layer whose code is the user's own would use a bias that it has not yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bmrs.graph.copies import copied
from bmrs.noise.hooks import hooks_of_noise

_STOCK = (
    *(nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward),
    *(nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward),
)
_PRODUCTS = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d)


def is_stock(layer: nn.Module) -> bool:
    """Return whether a layer does what torch's linear layers and convolutions do."""
    return type(layer).forward in _STOCK


def would_use_bias(layer: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether the code of a layer without bias would hand one to the product with its weight, and nothing else.

    Its forward is run without and with a bias, on tensors of no values, in both modes and for larger ones too, and has
    to do the same each time: one that pads what does not fit puts zeros beside a constant for other sizes.

    Args:
        layer: of a class that derives from `torch.nn.Linear` or a convolution, with a weight of its own.
        shape: of what it takes.
        dtype: of what it takes.
    """
    if not isinstance(layer, nn.Linear | _ConvNd) or isinstance(layer, _ConvTransposeNd):
        return False
    noise = {hook for _, hook in hooks_of_noise(layer)}
    if not {*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()} <= noise:
        return False  # they may look at it
    try:
        return _hands_on(layer, shape, dtype)
    except Exception:  # it takes something else, or looks at values
        return False


def _hands_on(layer: nn.Linear | _ConvNd, shape: Sequence[int], dtype: torch.dtype) -> bool:
    weight = layer.get_parameter("weight")
    bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
    places = weight.dim() - 2
    # One of so many sizes does not fit its stride.
    more = range(1, max(layer.stride) + 1) if isinstance(layer, _ConvNd) else range(0)
    larger = [
        (*shape[: len(shape) - places], *(size + n for size in shape[len(shape) - places :])) for n in more
    ]
    trials = [(shape, mode) for mode in (False, True)] + [(its_shape, False) for its_shape in larger]
    first: _Calls | None = None
    for its_shape, mode in trials:
        without, with_it = (_calls(layer, weight, each, its_shape, dtype, mode) for each in (None, bias))
        first = first or with_it
        if with_it.took_bias != [True] or without.functions != with_it.functions:
            return False
        if with_it.options != first.options or (mode is False and with_it.functions != first.functions):
            return False
    return True


def _calls(
    layer: nn.Module,
    weight: Tensor,
    bias: nn.Parameter | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    training: bool,
) -> _Calls:
    trial = copied(layer, share="parameters").train(training)
    trial._parameters["bias"] = bias
    seen = _Calls(weight, bias)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(tuple(shape), dtype=dtype, device=weight.device)
        with seen:
            trial.forward(x)
    return seen


class _Calls(TorchFunctionMode):
    """Notes the functions that are called, and of each that is given a bias whether it is the weight's product.

    Attributes:
        functions: the functions.
        took_bias: of each that is given the bias, whether it is the product.
        options: what these, and padding, are given beside tensors.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias
        self.functions: list[Any] = []
        self.took_bias: list[bool] = []
        self.options: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        given = self._bias is not None and any(leaf is self._bias for leaf in leaves)
        if not given or getattr(func, "__name__", "") != "__get__":  # its dtype and the like tell nothing
            self.functions.append(func)
            if given:
                by_name = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
                own = by_name.get("weight") is self._weight and by_name.get("bias") is self._bias
                self.took_bias.append(func in _PRODUCTS and own)
            if given or func is functional.pad:
                self.options.append([leaf for leaf in leaves if not isinstance(leaf, Tensor)])
        return func(*args, **kwargs)
