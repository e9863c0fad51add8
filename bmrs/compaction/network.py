"""Compacted networks as lists of named layers: building them from stock parts, and reading them back."""

from __future__ import annotations

import functools
import keyword
import operator
import re
from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import count

from torch import fx, nn

from bmrs.compaction.stock_layers import Addition


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
    """True if each node takes the result of the one before it alone."""
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


def read_network(model: nn.Module) -> list[Node]:
    """The nodes of a network that `build_network` built.

    Raises:
        TypeError: the model is anything else; what is wrong is named.
    """
    if type(model) is nn.Sequential:
        nodes = _read_chain(model)
    elif isinstance(model, fx.GraphModule):
        nodes = _read_graph(model)
    else:
        raise TypeError(
            "save needs the nn.Sequential or torch.fx.GraphModule that bmrs.compact returns, "
            f"got {type(model).__name__}"
        )
    try:
        _check_inputs(nodes)
        _check_names(nodes)
    except ValueError as error:
        raise TypeError(f"save cannot describe this network: {error}") from error
    return nodes


def _read_chain(model: nn.Sequential) -> list[Node]:
    # With duplicates: a layer in two places is read as two.
    named = model.named_modules(remove_duplicate=False)
    nodes = [Node(name, layer, ()) for name, layer in named if name and "." not in name]
    before = _names_before(nodes)
    return [replace(node, inputs=(name,)) for node, name in zip(nodes, before, strict=False)]


def _read_graph(model: fx.GraphModule) -> list[Node]:
    names: dict[object, str | None] = {}
    nodes: list[Node] = []
    for node in model.graph.nodes:
        if node.op == "placeholder" and not names:
            names[node] = None
            continue
        if node.op == "output" and nodes and names.get(node.args[0]) == nodes[-1].name:
            break
        layer = _layer_of_call(node, model)
        if layer is None or node.kwargs or any(source not in names for source in node.args):
            raise TypeError(f"save cannot describe the call at {node.name!r}: {node.format_node()}")
        names[node] = str(node.target) if node.op == "call_module" else node.name
        nodes.append(Node(str(names[node]), layer, tuple(names[source] for source in node.args)))
    return nodes


def free_name(wanted: str, taken: Container[str]) -> str:
    """A name for a node, like the wanted one, that is neither taken nor an attribute of torch's containers."""
    name = re.sub(r"\W", "_", wanted, flags=re.ASCII)
    name = name if _can_be_child(name) else f"{name}_"
    candidates = (name if i == 1 else f"{name}_{i}" for i in count(1))
    return next(candidate for candidate in candidates if candidate not in taken)


def _names_before(nodes: Sequence[Node]) -> list[str | None]:
    return [None, *(node.name for node in nodes)]


def _layer_of_call(node: fx.Node, model: fx.GraphModule) -> nn.Module | None:
    if node.op == "call_module":
        return model.get_submodule(str(node.target))
    return Addition() if node.op == "call_function" and node.target is operator.add else None


def _check_inputs(nodes: Sequence[Node]) -> None:
    known: set[str | None] = {None}
    for node in nodes:
        if node.name in known:
            raise _unusable(node, "its name is taken")
        expected = 2 if isinstance(node.layer, Addition) else 1
        if len(node.inputs) != expected or not known.issuperset(node.inputs):
            raise _unusable(
                node, f"its inputs {list(node.inputs)} are not {expected} of the layers before it"
            )
        known.add(node.name)


def _check_names(nodes: Sequence[Node]) -> None:
    for node in nodes:
        # They become a part of code that torch.fx generates, of a chain too where one traces it.
        if not re.fullmatch(r"\w+", node.name, re.ASCII) or not _can_be_child(node.name):
            raise _unusable(node, "its name cannot be that of a layer")


def _can_be_child(name: str) -> bool:
    """True for a name that a container can have as an attribute, and has not by itself."""
    # A result of the name "self" would take the model's place in the generated code.
    return name != "self" and not keyword.iskeyword(name) and name not in _container_attributes()


@functools.cache
def _container_attributes() -> frozenset[str]:
    return frozenset((*dir(nn.Sequential()), *dir(fx.GraphModule({}, fx.Graph()))))


def _unusable(node: Node, reason: str) -> ValueError:
    return ValueError(f"its layer {node.name!r} ({type(node.layer).__name__}) cannot be built: {reason}")
