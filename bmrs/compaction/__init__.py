"""Compaction: a masked network becomes a smaller one of stock torch layers.

`tracing` turns the model into layers and additions, `folding` folds the noise into their weights, `removal` takes
the pruned structures out, `network` puts the result together, `compact` checks it, and `refit` makes up for what is
gone, if asked to.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from bmrs.compaction.folding import Operation, fold_noise
from bmrs.compaction.network import Node, build_network, free_name
from bmrs.compaction.refit import Origin, refit
from bmrs.compaction.removal import remove_dead_channels
from bmrs.compaction.stock_layers import BATCH_NORMS, POOLS, WEIGHT_LAYERS, Addition
from bmrs.compaction.tracing import Step, single_input, trace
from bmrs.noise_layer import NoiseLayer, noise_layers

__all__ = ["compact"]

TOLERANCE = 1e-4


def compact(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    expected_noise: bool = True,
    refit_to: nn.Module | None = None,
) -> nn.Sequential | fx.GraphModule:
    """Return the network that a masked model is in evaluation mode, without noise or pruned structures.

    The expected noise, times the mask, is folded into neighbouring weights in float64; pruned structures are
    removed from the layer that makes them, from the layers behind it and from the input of the next one. What
    a pruned structure still contributes as a constant, through the bias of a batch norm behind it, moves into
    the next layer's bias. A pruned structure stays, with zero weights, where zero padding makes that inexact,
    where it is an output of the model, and where a grouped convolution's groups would become unequal.

    Additions, as in residual blocks, tie the channels that they add: a channel goes where all noise that can
    silence it does so in every branch, and stays everywhere, with zero weights where it is pruned, if one branch
    keeps it. `bmrs.prune` with ``example_inputs`` decides on tied channels together. Noise can sit anywhere in a
    branch, and on a sum that no identity shortcut carries past it; on one that does, it cannot be folded.

    The model must consist of linear, convolution (1d to 3d, grouped and depthwise too), batch norm, pooling,
    activation, dropout, flatten and identity layers, as modules or function calls, and additions of two tensors of
    one shape, in any arrangement that torch.fx can trace, from one input to one output.

    With ``refit_to`` the result does not stop at the masked model's outputs. After they have been checked, each linear
    and convolution layer gets the weights with which its outputs on ``example_inputs`` are closest to those of the
    full network, by least squares: what pruned structures contributed is told from the ones that stay, as far as
    it can be. That takes no training and no labels, and gives most of the lost accuracy back.

    Args:
        model: any such model, in any mode; it is left as it is.
        example_inputs: its input, or a sequence of that one input; at least one real example, in the model's
            dtype and on its device. With ``refit_to`` some thousand training examples.
        expected_noise: False multiplies the structures that stay by 1 instead of E[θ], so that weights that were
            trained without noise, as before `bmrs.learn_posteriors`, come out as they are: a better start for
            fine-tuning. The outputs are then compared with those of the masked model with θ = 1.
        refit_to: the network that was pruned, as it was trained, with layers of the same names: a copy made before
            `bmrs.add_noise`, or the dense network whose weights the model has. It is left as it is.

    Returns:
        ``nn.Sequential`` of stock layers where these are a chain, and a ``torch.fx.GraphModule`` of stock layers
        and additions where the network branches. It is in evaluation mode, with the dtypes and device of the
        model and children named after its layers. Before refitting, the outputs equal the masked model's within
        1e-4 of the largest (within 16 units of rounding in 16-bit models), which is checked on the example.

    Raises:
        TypeError: ``example_inputs`` is not one tensor.
        ValueError: the model is not such a network, a noise layer cannot be folded, or ``refit_to`` is another
            network; the place is named.
        RuntimeError: the outputs differ on the example.
    """
    example = single_input(example_inputs)
    masked = copy.deepcopy(model).eval()
    if not expected_noise:
        for layer in noise_layers(masked).values():
            layer.expected_noise = functools.partial(_mask_alone, layer)  # type: ignore[method-assign]
    with torch.no_grad():
        operations = fold_noise(trace(masked, example))
        remove_dead_channels(operations)
        nodes = _nodes(operations)
        compacted = build_network([node for node, _ in nodes])
        _check_outputs(masked, compacted, example)
        if refit_to is not None:
            origins = _origins(nodes)
            refit(compacted, origins, refit_to, example)
    return compacted


def _mask_alone(layer: NoiseLayer) -> Tensor:
    return layer.mask.to(layer.mu.dtype)


def _origins(nodes: list[tuple[Node, Operation]]) -> dict[str, Origin]:
    """Where the linear and convolution layers come from, by their names in the compacted network."""
    calls: Counter[str] = Counter()
    origins = {}
    for node, operation in nodes:
        if isinstance(node.layer, WEIGHT_LAYERS):
            name = operation.step.name
            rows = operation.rows
            if rows is None:
                rows = torch.arange(len(node.layer.weight), device=node.layer.weight.device)
            origins[node.name] = Origin(name, calls[name], rows)
            calls[name] += 1
    return origins


def _nodes(operations: list[Operation]) -> list[tuple[Node, Operation]]:
    """The remaining layers in their original dtypes, by readable names, each with what it was made from."""
    nodes: dict[str, Node] = {}
    made_from: dict[str, Operation] = {}
    names: dict[Step | None, str | None] = {None: None}
    for operation in operations:
        step, layer = operation.step, operation.layer
        inputs = tuple(names[source] for source in step.inputs)
        if layer is None:
            names[step] = inputs[0]
            continue
        name = free_name(step.name or type(layer).__name__.lower(), nodes)
        names[step] = name
        nodes[name] = Node(name, layer.to(operation.dtype), inputs)
        made_from[name] = operation
    _keep_what_others_read(nodes)
    return [(node, made_from[name]) for name, node in nodes.items()]


def _keep_what_others_read(nodes: dict[str, Node]) -> None:
    """Let a layer work in place only on a tensor that is new and that nothing else reads."""
    readers = Counter(name for node in nodes.values() for name in node.inputs)
    for node in nodes.values():
        source = nodes.get(str(node.inputs[0]))
        owned = source is not None and isinstance(
            source.layer, (*WEIGHT_LAYERS, *BATCH_NORMS, *POOLS, Addition)
        )
        if getattr(node.layer, "inplace", False) and not (owned and readers[node.inputs[0]] == 1):
            node.layer.inplace = False  # type: ignore[assignment]


def _check_outputs(masked: nn.Module, compacted: nn.Module, example: Tensor) -> None:
    # In float64: TF32 and the like would make differently shaped products differ by more than the tolerance.
    narrow = [t.dtype for t in compacted.state_dict().values() if t.is_floating_point()]
    tolerance = max([TOLERANCE, *(16 * torch.finfo(dtype).eps for dtype in narrow if dtype.itemsize < 4)])
    # Cloned, as a model may overwrite its input.
    expected = masked.double()(example.double().clone())
    found = copy.deepcopy(compacted).double()(example.double().clone())
    error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not error <= tolerance * scale:
        raise RuntimeError(
            f"the compacted model's outputs differ from the masked model's by {error:.3g}, more than "
            f"{tolerance:.3g} of their largest magnitude {scale:.3g}"
        )
