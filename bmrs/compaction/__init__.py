"""Compaction: a masked network becomes a smaller one of stock torch layers.

`tracing` turns the model into a chain of layers, `folding` folds the noise into their weights, `removal`
takes the pruned structures out, and `compact` puts the result together and checks it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bmrs.compaction.folding import Operation, fold_noise
from bmrs.compaction.removal import remove_dead_channels
from bmrs.compaction.tracing import trace_chain

__all__ = ["compact"]

TOLERANCE = 1e-4


def compact(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> nn.Sequential:
    """Return the network that a masked model is in evaluation mode, without noise or pruned structures.

    The expected noise, times the mask, is folded into neighbouring weights in float64; pruned structures are
    removed from the layer that makes them, from the layers behind it and from the input of the next one. What
    a pruned structure still contributes as a constant, through the bias of a batch norm behind it, moves into
    the next layer's bias. A pruned structure stays, with zero weights, where zero padding makes that inexact,
    where it is an output of the model, and where a grouped convolution's groups would become unequal.

    The model must be a chain of linear, convolution (1d to 3d, grouped and depthwise too), batch norm,
    pooling, activation, dropout, flatten and identity layers, as modules or function calls, that torch.fx can
    trace.

    Args:
        model: any such model, in any mode; it is left as it is.
        example_inputs: its input, or a sequence of that one input; at least one real example, in the model's
            dtype and on its device.

    Returns:
        ``nn.Sequential`` of stock layers in evaluation mode, with the dtypes and device of the model and
        children named after its layers. The outputs equal the masked model's within 1e-4 of the largest
        (within 16 units of rounding in 16-bit models), which is checked on the example.

    Raises:
        TypeError: ``example_inputs`` is not one tensor.
        ValueError: the model is not such a chain, or a noise layer cannot be folded; the place is named.
        RuntimeError: the outputs differ on the example.
    """
    example = _single_input(example_inputs)
    masked = copy.deepcopy(model).eval()
    with torch.no_grad():
        operations = fold_noise(trace_chain(masked, example))
        remove_dead_channels(operations)
        compacted = _assemble(operations)
        _check_outputs(masked, compacted, example)
    return compacted


def _single_input(example_inputs: Tensor | Sequence[Tensor]) -> Tensor:
    inputs = [example_inputs] if isinstance(example_inputs, Tensor) else list(example_inputs)
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        names = ", ".join(type(value).__name__ for value in inputs)
        raise TypeError(f"example_inputs must be one tensor, as compact handles chains; got ({names})")
    if inputs[0].numel() == 0:
        raise ValueError(f"example_inputs must hold an example, was of shape {tuple(inputs[0].shape)}")
    return inputs[0]


def _assemble(operations: list[Operation]) -> nn.Sequential:
    """The remaining layers in their original dtypes, by readable names."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for operation in operations:
        if operation.layer is not None:
            layers[_child_name(operation, layers)] = operation.layer.to(operation.dtype)
    return nn.Sequential(layers).eval()


def _child_name(operation: Operation, taken: OrderedDict[str, nn.Module]) -> str:
    name = operation.step.name.replace(".", "_") or type(operation.step.module).__name__.lower()
    # nn.Sequential refuses children that hide its own attributes.
    name = f"{name}_" if hasattr(nn.Sequential(), name) else name
    candidates = (name if i == 1 else f"{name}_{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def _check_outputs(masked: nn.Module, compacted: nn.Module, example: Tensor) -> None:
    # In float64: TF32 and the like would make differently shaped products differ by more than the tolerance.
    narrow = [t.dtype for t in compacted.state_dict().values() if t.is_floating_point()]
    tolerance = max([TOLERANCE, *(16 * torch.finfo(dtype).eps for dtype in narrow if dtype.itemsize < 4)])
    expected = masked.double()(example.double())
    found = copy.deepcopy(compacted).double()(example.double())
    error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not error <= tolerance * scale:
        raise RuntimeError(
            f"the compacted model's outputs differ from the masked model's by {error:.3g}, more than "
            f"{tolerance:.3g} of their largest magnitude {scale:.3g}"
        )
