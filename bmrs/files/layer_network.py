"""Networks of stock layers as lists of named layers: chains, and the graphs of layers and additions of older files."""

from __future__ import annotations

import functools
import keyword
import operator
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from bmrs.checks import shown
from bmrs.graph.stock_layers import STOCK_LAYERS, Addition


@dataclass(frozen=True)
class Node:
    """One layer of a network.

    Attributes:
        name: its name, unique in the network, of letters, digits and underscores.
        layer: a stock layer, or an `Addition`.
        inputs: names of earlier nodes whose results it takes, two for an addition and otherwise one; None
            stands for the model's input.
    """

    name: str
    layer: nn.Module
    inputs: tuple[str | None, ...]


def is_chain(nodes: Sequence[Node]) -> bool:
    """Return whether each node takes the result of the one before it alone."""
    return all(node.inputs == (name,) for node, name in zip(nodes, _names_before(nodes), strict=False))


def build_network(nodes: Sequence[Node]) -> nn.Sequential | fx.GraphModule:
    """Put a network together, in evaluation mode.

    Args:
        nodes: its layers in an order of execution; the last one gives the output.

    Returns:
        ``nn.Sequential`` of the layers if they are a chain; otherwise a ``torch.fx.GraphModule``, whose
        generated ``forward`` calls the layers and ``operator.add``.

    Raises:
        ValueError: a name or the inputs of a node are not as `Node` says; it is named.
    """
    _check_inputs(nodes)
    _check_names(nodes)
    if is_chain(nodes):
        return nn.Sequential(OrderedDict((node.name, node.layer) for node in nodes)).eval()
    graph = fx.Graph()
    results: dict[str | None, fx.Node] = {None: graph.placeholder("x")}
    for node in nodes:
        inputs = tuple(results[name] for name in node.inputs)
        if isinstance(node.layer, Addition):
            results[node.name] = graph.create_node("call_function", operator.add, inputs, name=node.name)
        else:
            results[node.name] = graph.create_node("call_module", node.name, inputs, name=node.name)
    graph.output(results[nodes[-1].name])
    layers = {node.name: node.layer for node in nodes if not isinstance(node.layer, Addition)}
    return fx.GraphModule(layers, graph).eval()


def read_chain(model: nn.Module) -> list[Node] | None:
    """Return the nodes of a chain of stock layers, None if a model is anything else.

    Raises:
        TypeError: a layer's name cannot be described; it is named.
    """
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        return None
    children = list(model.named_children())
    hooked = model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model)
    # With a layer in two places its weights are shared, which a chain cannot say.
    if (
        not children
        or hooked
        or len(children) != len(model)
        or not all(_is_plain(layer) for _, layer in children)
    ):
        return None
    nodes = [Node(name, layer, ()) for name, layer in children]
    nodes = [replace(node, inputs=(name,)) for node, name in zip(nodes, _names_before(nodes), strict=False)]
    try:
        _check_names(nodes)
    except ValueError as error:
        raise TypeError(f"save cannot describe this network: {error}") from error
    return nodes


def _is_plain(layer: nn.Module) -> bool:
    """Return whether this is a stock layer that its constructor arguments and tensors describe in full."""
    hooked = (
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer)
    )
    frozen = any(not parameter.requires_grad for parameter in layer.parameters())
    return (
        type(layer) in STOCK_LAYERS and not hooked and not frozen and not any(True for _ in layer.children())
    )


def _names_before(nodes: Sequence[Node]) -> list[str | None]:
    return [None, *(node.name for node in nodes)]


def _check_inputs(nodes: Sequence[Node]) -> None:
    known: set[str | None] = {None}
    for node in nodes:
        if node.name in known:
            raise _unusable(node, "its name is taken")
        expected = 2 if isinstance(node.layer, Addition) else 1
        if len(node.inputs) != expected or not known.issuperset(node.inputs):
            raise _unusable(
                node, f"its inputs {shown(list(node.inputs))} are not {expected} of the layers before it"
            )
        known.add(node.name)


def _check_names(nodes: Sequence[Node]) -> None:
    for node in nodes:
        # They become a part of code that torch.fx generates, of a chain too where one traces it.
        if not re.fullmatch(r"\w+", node.name, re.ASCII) or not _can_be_child(node.name):
            raise _unusable(node, "its name cannot be that of a layer")


def _can_be_child(name: str) -> bool:
    """Return whether a container can have an attribute of this name, and has none by itself."""
    # A result of the name "self" would take the model's place in the generated code.
    return name != "self" and not keyword.iskeyword(name) and name not in _container_attributes()


@functools.cache
def _container_attributes() -> frozenset[str]:
    return frozenset((*dir(nn.Sequential()), *dir(fx.GraphModule({}, fx.Graph()))))


def _unusable(node: Node, reason: str) -> ValueError:
    return ValueError(f"its layer {shown(node.name)} ({type(node.layer).__name__}) cannot be built: {reason}")
