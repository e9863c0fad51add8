"""What linear layers and convolutions read and return, seen while a network runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bmrs.compaction.comparison import without_fast_path
from bmrs.graph.inputs import Inputs, map_tensors

_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.addmm: ("bias", "input", "weight"),
    **dict.fromkeys(_CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
}
# The operators themselves, as a network that is a graph calls them.
_BY_OPERATOR = {"linear": F.linear, "addmm": torch.addmm} | {f.__name__: f for f in _CONVOLUTIONS}


@dataclass(frozen=True)
class Product:
    """One product of an input and a weight.

    Attributes:
        weight: the name of the weight.
        read: the input.
        result: of the weight and, if there is one, the bias.
        bias: what is added; None for nothing.
        options: stride, padding, dilation, groups and kernel of a convolution; empty for a linear layer.
        transposed: whether the rows of the weight are inputs.
    """

    weight: str
    read: Tensor
    result: Tensor
    bias: Tensor | None
    options: Mapping[str, Any]
    transposed: bool = False

    @property
    def axis(self) -> int:
        """The dimension of channels, of input and result."""
        return 1 if self.options else -1

    @property
    def groups(self) -> int:
        """Parts of the input that have weights of their own."""
        return int(self.options.get("groups", 1))

    def features(self, x: Tensor) -> Tensor:
        """Return what each output reads, (..., inputs), of an input of which some groups may be left out."""
        if not self.options:
            return x
        kernel = self.kernel
        sizes = {name: _each(self.options[name], len(kernel)) for name in ("stride", "dilation")}
        return windows(x, kernel, padding=self.options["padding"], **sizes)

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel has a filter of its own."""
        return self.groups == self.read.shape[1] == self.result.shape[1] > 1 if self.options else False

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of a convolution's kernel."""
        return tuple(self.options["kernel"])


class _SeenEnoughError(BaseException):
    """What was looked for has been seen, and the rest of the network need not run."""


class _Watching(TorchFunctionMode):
    """Calls a function with each product of certain weights.

    Args:
        weights: by name.
        see: the function, which is also given the input itself, of which the product holds a copy.
        number: of products after which the network stops; None for all that there are.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], see: Callable[[Product, Tensor], None], number: int | None
    ) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._see, self._left = see, number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._left == 0:  # the model went on, though it was told to stop
            raise _SeenEnoughError
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        plain = _BY_OPERATOR.get(func._schema.name.split("::")[1]) if _is_operator(func) else func
        if plain not in _ARGUMENTS:
            return func(*args, **kwargs)
        arguments = dict(zip(_ARGUMENTS[plain], args, strict=False)) | kwargs
        name = self._names.get(id(arguments.get("weight")))
        scaled = plain is torch.addmm and (kwargs.get("alpha", 1), kwargs.get("beta", 1)) != (1, 1)
        if name is None or scaled:
            return func(*args, **kwargs)
        source, weight = arguments["input"], arguments["weight"]
        read = source.clone()  # the result may be written over it
        result = func(*args, **kwargs)
        options: dict[str, Any] = {}
        if plain in _CONVOLUTIONS:
            defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            options = {option: arguments.get(option, default) for option, default in defaults.items()}
            options["kernel"] = weight.shape[2:]
        product = Product(name, read, result, arguments.get("bias"), options, plain is torch.addmm)
        self._seen(product, source)
        return result

    @property
    def has_seen_enough(self) -> bool:
        """Whether the network was told to stop."""
        return self._left == 0

    def _attention(self, args: Any, kwargs: Any) -> Any:
        """Run torch's attention, whose last product no function but its own makes, with ones in place of its weight."""
        bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        weight, bias = (bound.arguments[name] for name in ("out_proj_weight", "out_proj_bias"))
        name = self._names.get(id(weight))
        if name is None:
            return F.multi_head_attention_forward(*args, **kwargs)
        ones = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        bound.arguments.update(out_proj_weight=ones, out_proj_bias=None)
        read, weights = F.multi_head_attention_forward(*bound.args, **bound.kwargs)
        result = F.linear(read, weight, bias)
        self._seen(Product(name, read, result, bias, {}), read)
        return result, weights

    def _seen(self, product: Product, source: Tensor) -> None:
        read, result = product.read, product.result.clone()
        if product.options and read.dim() == len(product.kernel) + 1:
            read, result = read[None], result[None]
        self._see(replace(product, read=read, result=result), source)
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                raise _SeenEnoughError


def watch(
    model: nn.Module,
    inputs: Inputs,
    weights: Mapping[str, Tensor],
    see: Callable[[Product, Tensor], None],
    *,
    number: int | None = None,
) -> None:
    """Run a network and call a function with each product of certain weights.

    Args:
        model: the network.
        inputs: its arguments, which are left as they are.
        weights: parameters of the network, by any name.
        see: the function, which is also given the input itself, of which the product holds a copy.
        number: of products after which the network stops; None for all that there are.
    """
    args, kwargs = map_tensors(torch.clone, inputs)
    watching = _Watching(weights, see, number)
    try:
        with watching, without_fast_path():
            model(*args, **kwargs)
    except BaseException:
        if not watching.has_seen_enough:
            raise


def products(
    model: nn.Module, inputs: Inputs, weights: Mapping[str, Tensor], *, number: int | None = None
) -> dict[str, list[Product]]:
    """Return the products of certain weights by their names, see `watch`."""
    found: dict[str, list[Product]] = {name: [] for name in weights}
    watch(model, inputs, weights, lambda product, _: found[product.weight].append(product), number=number)
    return found


def patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Return what each output position of a convolution reads, of shape (N, *positions, channels · kernel size)."""
    padding: str | int | tuple[int, ...] = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    return windows(x, layer.kernel_size, stride=layer.stride, padding=padding, dilation=layer.dilation)


def windows(
    x: Tensor,
    kernel: tuple[int, ...],
    *,
    stride: tuple[int, ...],
    padding: str | int | tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Return what each output position of a convolution reads, of shape (N, *positions, channels · kernel size).

    Args:
        x: of shape (N, channels, *sizes).
        kernel: its sizes.
        stride: for each dimension.
        padding: for each dimension or all, with zeros; or "same" or "valid".
        dilation: for each dimension.
    """
    spatial = len(kernel)
    if padding == "same":
        missing = [d * (size - 1) for size, d in zip(kernel, dilation, strict=True)]
        ends = [(n // 2, n - n // 2) for n in missing]
    else:
        ends = [(n, n) for n in _each(0 if isinstance(padding, str) else padding, spatial)]
    if any(map(any, ends)):
        x = F.pad(x, [n for both in reversed(ends) for n in both])
    for i, (size, step, distance) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, (size - 1) * distance + 1, step)[..., ::distance]
    # (N, channels, *positions, *kernel) to (N, *positions, channels, *kernel).
    return x.movedim(1, 1 + spatial).flatten(1 + spatial)


def _each(sizes: Any, number: int) -> tuple[int, ...]:
    """Return sizes for each dimension, of which torch takes one for all."""
    sizes = tuple(sizes) if isinstance(sizes, list | tuple) else (sizes,)
    return sizes * number if len(sizes) == 1 else sizes


def _is_operator(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload)
