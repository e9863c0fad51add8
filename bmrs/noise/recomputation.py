"""Noise whose input is not kept for backward: the layer that it stands behind computes it again.

The gradients of μ and log σ need what the noise multiplied. A normalisation keeps its own input for its own gradient
and takes little time, so that its result can be made again from that and need not stay in memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Run = partial[Tensor]


def _batch_norm(layer: Any) -> Run:
    of_batch = layer.training or layer.running_mean is None
    return partial(
        F.batch_norm,
        # Those of training have been updated already; others may be before backward, which no version of them tells.
        running_mean=None if of_batch else layer.running_mean.clone(),
        running_var=None if of_batch else layer.running_var.clone(),
        weight=layer.weight,
        bias=layer.bias,
        training=of_batch,
        eps=layer.eps,
    )


def _layer_norm(layer: Any) -> Run:
    shape = layer.normalized_shape
    return partial(F.layer_norm, normalized_shape=shape, weight=layer.weight, bias=layer.bias, eps=layer.eps)


def _rms_norm(layer: Any) -> Run:
    return partial(F.rms_norm, normalized_shape=layer.normalized_shape, weight=layer.weight, eps=layer.eps)


def _group_norm(layer: Any) -> Run:
    groups = layer.num_groups
    return partial(F.group_norm, num_groups=groups, weight=layer.weight, bias=layer.bias, eps=layer.eps)


# How each computes its result from its input. Of other activations autograd keeps the result and not the input.
_RUNS: dict[type[nn.Module], Callable[[Any], Run]] = {
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.GELU: lambda layer: partial(F.gelu, approximate=layer.approximate),
    nn.SiLU: lambda _: partial(F.silu),
    nn.Mish: lambda _: partial(F.mish),
    nn.Hardswish: lambda _: partial(F.hardswish),
}
RECOMPUTED = tuple(kind.__name__ for kind in _RUNS)
_FORWARDS = {kind: kind.forward for kind in _RUNS}


def can_recompute(layer: nn.Module) -> bool:
    """Return whether a layer is one of those in ``RECOMPUTED``, and keeps its input as it is."""
    return type(layer) in _RUNS and not getattr(layer, "inplace", False) and "forward" not in vars(layer)


@contextmanager
def input_recomputed(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Iterator[None]:
    """Have autograd keep what a layer takes in the place of what it returned.

    Nothing changes where no gradients are asked for, where the layer's own need not keep its input, where torch.compile
    or activation checkpointing decides what is kept, and for what a layer was converted to since.

    Args:
        layer: one that `can_recompute`.
        inputs: its arguments.
        output: what it returned, which no other hook has changed.
    """
    if not (_is_plain_call(layer, inputs, output) and _autograd_is_free() and _keeps(layer, inputs[0])):
        yield
        return
    run = _RUNS[type(layer)](layer)
    parts = (inputs[0].detach(), *(part for part in run.keywords.values() if isinstance(part, Tensor)))
    recomputed = _Recomputed(run, tuple(map(_Kept.of, parts)), _autocast_of(output.device.type))
    multiplied = weakref.ref(output)  # as autograd keeps this function too

    def keep(tensor: Tensor) -> _Kept | _Recomputed:
        result = multiplied()
        return recomputed if result is not None and tensor.is_set_to(result) else _Kept.of(tensor)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor()):
        yield


class _Kept(NamedTuple):
    """A tensor that must not change until backward."""

    value: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept:
        return cls(tensor, tensor._version)

    def tensor(self) -> Tensor:
        if self.value._version != self.version:
            raise RuntimeError(
                "a tensor that the gradient of noise needs was changed in place between forward and backward: its "
                f"shape is {tuple(self.value.shape)}, its version {self.value._version}, expected {self.version}. "
                "Call backward before that, or add_noise without recompute"
            )
        return self.value


class _Recomputed(NamedTuple):
    """A layer's result, as the function that makes it again, what that reads first of all, and under which autocast."""

    run: Run
    parts: tuple[_Kept, ...]
    autocast: dict[str, Any]

    def tensor(self) -> Tensor:
        first, *_ = [part.tensor() for part in self.parts]
        with torch.no_grad(), torch.autocast(**self.autocast):
            return self.run(first)


def _is_plain_call(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> bool:
    """Return whether a layer's function alone has made its output from its input."""
    return (
        can_recompute(layer)
        and type(layer).forward is _FORWARDS[type(layer)]
        and not torch.nn.modules.module._global_forward_hooks
        and len(inputs) == 1
        and type(inputs[0]) is type(output) is Tensor
        and not (output.is_nested or output.is_meta)
    )


def _keeps(layer: nn.Module, x: Tensor) -> bool:
    """Return whether autograd keeps the input of a layer anyway."""
    return x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _autograd_is_free() -> bool:
    """Return whether nothing else decides what is kept."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # no transform of torch.func
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def _autocast_of(device: str) -> dict[str, Any]:
    return {
        "device_type": device,
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
