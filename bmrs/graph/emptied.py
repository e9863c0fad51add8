"""Layers of a captured model that nothing is left of: what they make is always the same, or nobody reads it.

Where all structures of a residual branch are pruned, its last layer adds a constant to the shortcut, whatever the input
is. All before it in the branch is computed for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bmrs.graph.analysis import Analysis
from bmrs.graph.capture import MarkedNoise
from bmrs.graph.nodes import layer_of
from bmrs.graph.operators import CONVOLUTIONS, LINEAR, is_view, shares_memory
from bmrs.graph.rules import Call
from bmrs.graph.rules.contraction import uniform
from bmrs.graph.rules.convolution import constants_through
from bmrs.graph.values import Value
from bmrs.noise.placement import is_transposed_linear


@dataclass(frozen=True)
class Emptied:
    """What nothing is left of.

    Attributes:
        constant: linear layers and convolutions whose input is constant, by their operation, with that constant; of
            shape (channels,), float64.
        unread: linear layers and convolutions of which nobody reads what they make, by their operation.
        passing: names of other layers with parameters of which nobody reads what they make, of its input's shape.
        dead: all operations that nobody reads the results of.
    """

    constant: dict[fx.Node, Tensor]
    unread: tuple[fx.Node, ...] = ()
    passing: tuple[str, ...] = ()
    dead: frozenset[fx.Node] = frozenset()


NOTHING = Emptied({})


def emptied_layers(analysis: Analysis) -> Emptied:
    """Find the layers that nothing is left of with the masks as they are.

    There are none in a network of which an output no longer depends on the input: it has no shortcut.
    """
    graph = analysis.captured.graph
    own = {n: c for n, c in analysis.calls.items() if n.graph is graph and _is_layer(analysis, n, c)}
    known = {node: found for node, call in own.items() if (found := _constant_input(call)) is not None}
    if not known or has_constant_output(analysis):
        return NOTHING
    live = _live(graph, known)
    dead = frozenset(node for node in graph.nodes if node.op == "call_function" and node not in live)
    return Emptied(
        {node: constant for node, constant in known.items() if node in live},
        tuple(node for node in own if node in dead),
        tuple(name for name in _passing(analysis, dead) if name not in {layer_name(c) for c in own.values()}),
        dead,
    )


def has_constant_output(analysis: Analysis) -> bool:
    """Return whether an output does not depend on the input, with the masks as they are, and does without them."""
    captured = analysis.captured
    reached: set[fx.Node] = set()
    dependent: set[fx.Node] = set()
    for node in captured.graph.nodes:
        is_input = node.op == "placeholder" and node.name not in captured.tensors
        if is_input or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            known = node.op != "output" and not is_input and _is_known(analysis.values.get(node))
            if is_input or (not known and any(n in dependent for n in node.all_input_nodes)):
                dependent.add(node)
    outputs = [n for n in captured.graph.output_node().all_input_nodes if n in reached]
    return any(node not in dependent for node in outputs)


def _is_known(value: object) -> bool:
    """Return whether all of a value is the same for all inputs of the network."""
    if not isinstance(value, Value):
        return False
    return value.tensor is not None or (value.constant is not None and not bool(value.constant.isnan().any()))


def weight_of(call: Call) -> Value:
    """Return the weight of a linear layer or convolution."""
    weight: Value = call["mat2"] if call.operator == "addmm" else call["weight"]
    return weight


def layer_name(call: Call) -> str:
    """Return the qualified name of a linear layer or convolution, from that of its weight."""
    return (weight_of(call).parameter or "").rpartition(".")[0]


def _is_layer(analysis: Analysis, node: fx.Node, call: Call) -> bool:
    """Return whether an operation is all that a layer of its own weights does."""
    if call.operator not in (*LINEAR, *CONVOLUTIONS) or not call.can_shift:
        return False
    name = layer_name(call)
    if not name or name != layer_of(node) or weight_of(call).parameter != f"{name}.weight":
        return False
    bias = call["self"] if call.operator == "addmm" else call["bias"]
    if bias is not None and bias.parameter != f"{name}.bias":
        return False
    layer = analysis.captured.model.get_submodule(name)
    if _is_read_by_a_fast_path(analysis, name):
        return False
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    if isinstance(layer, _ConvNd):
        stock = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
        return not isinstance(layer, _ConvTransposeNd) and type(layer).forward in stock
    return is_transposed_linear(layer)


def _is_read_by_a_fast_path(analysis: Analysis, name: str) -> bool:
    """Return whether a layer's weights are read by torch's kernel for encoder layers, which calls no layers."""
    parent = analysis.captured.model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, nn.TransformerEncoderLayer)


def _constant_input(call: Call) -> Tensor | None:
    """Return what each channel of the input of a linear layer or convolution is, None unless all are constant."""
    x: Value = call["mat1"] if call.operator == "addmm" else call["input"]
    if x.constant is None or x.shape.numel() == 0:
        return None
    if call.operator in LINEAR:
        constant = uniform(x.constant, range(len(x.shape) - 1)).flatten().expand(x.shape[-1])
    else:
        batched = len(x.shape) == len(call["weight"].shape)
        found = constants_through(call, x.constant if batched else x.constant[None], transposed=False)
        if found is None:
            return None
        constant = found
    return None if constant.isnan().any() else constant


def _live(graph: fx.Graph, constant: Collection[fx.Node]) -> set[fx.Node]:
    """Return the operations whose results reach an output, not counting what constant layers read."""
    live: set[fx.Node] = set()
    waiting = list(graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node in live:
            continue
        live.add(node)
        # What is written into it later counts too.
        waiting += [writer for writer in _writers(node) if writer not in live]
        if node not in constant:
            waiting += node.all_input_nodes
    return live


def _writers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield operations that write into a tensor, or into a view of it."""
    seen = [node]
    for tensor in seen:
        for user in tensor.users:
            if not isinstance(user.target, torch._ops.OpOverload) or user in seen:
                continue
            if user.target._schema.is_mutable:
                yield user
            # Noise is gone in the smaller network.
            elif user.target is torch.ops.bmrs.mark_noise.default or is_view(user.target):
                seen.append(user)


def _passing(analysis: Analysis, dead: frozenset[fx.Node]) -> Iterator[str]:
    """Yield names of layers without layers in them that take and give one tensor of one shape, all for nothing."""
    of_layer: dict[str, list[fx.Node]] = {}
    for node in analysis.calls:
        of_layer.setdefault(layer_of(node), []).append(node)
    modules = dict(analysis.captured.model.named_modules())
    for name, nodes in of_layer.items():
        layer = modules.get(name)
        if (
            layer is None
            or not dead.issuperset(nodes)
            or not any(True for _ in layer.parameters(recurse=False))
            or _is_read_by_a_fast_path(analysis, name)
        ):
            continue
        if not all(isinstance(child, MarkedNoise) for child in layer.children()):
            continue
        given = {n for node in nodes for n in node.all_input_nodes if n not in nodes}
        given = {n for n in given if n.name not in analysis.captured.tensors}
        results = [node for node in nodes if any(user not in nodes for user in node.users)]
        if len(given) != 1 or len(results) != 1:
            continue
        taken, returned = (analysis.values.get(node) for node in (*given, *results))
        same = isinstance(taken, Value) and isinstance(returned, Value) and taken.shape == returned.shape
        # What it takes would be overwritten where what it returns is; that does not matter if it is for nothing too.
        (source,) = given
        if same and (not any(_writers(results[0])) or (source in dead and not _shares_memory(source))):
            yield name


def _shares_memory(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and shares_memory(node.target)
