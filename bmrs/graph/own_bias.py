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

    Its forward is run without and with a bias, on a tensor of no values, and may do the same in both cases alone.

    Args:
        layer: of a class that derives from `torch.nn.Linear` or a convolution, with a weight of its own.
        shape: of what it takes.
        dtype: of what it takes.
    """
    if not isinstance(layer, nn.Linear | _ConvNd) or isinstance(layer, _ConvTransposeNd):
        return False
    try:
        return _hands_on(layer, shape, dtype)
    except Exception:  # it takes something else, or looks at values
        return False


def _hands_on(layer: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> bool:
    weight = layer.get_parameter("weight")
    bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
    calls = []
    for its_bias in (None, bias):
        trial = copied(layer, share=True)
        trial._parameters["bias"] = its_bias
        seen = _Calls(weight, bias)
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(tuple(shape), dtype=dtype, device=weight.device)
            with seen:
                trial.forward(x)
        calls.append(seen)
    without, with_it = calls
    return with_it.took_bias == [True] and without.functions == with_it.functions


class _Calls(TorchFunctionMode):
    """Notes the functions that are called, and of each that is given a bias whether it is the weight's product."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias
        self.functions: list[Any] = []
        self.took_bias: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = any(leaf is self._bias for leaf in tree_leaves((args, kwargs)))
        if not given or getattr(func, "__name__", "") != "__get__":  # its dtype and the like tell nothing
            self.functions.append(func)
            if given:
                by_name = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
                own = by_name.get("weight") is self._weight and by_name.get("bias") is self._bias
                self.took_bias.append(func in _PRODUCTS and own)
        return func(*args, **kwargs)
