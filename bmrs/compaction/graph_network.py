"""Networks put together from a description: a ``torch.fx.GraphModule`` of operators.

Batch norms and dropout are stock layers there, so that it can be trained further; everything else is an operator of
ATen.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from bmrs.compaction.cutting import Cut
from bmrs.compaction.describing import describe
from bmrs.compaction.description import (
    NOISE,
    SCALAR_FUNCTIONS,
    Description,
    Operation,
    Reference,
    check_operator,
)
from bmrs.compaction.trusting_operators import check_sizes, takes_sizes_on_trust
from bmrs.graph.analysis import Analysis
from bmrs.noise.layer import NoiseLayer


def build_graph_network(
    analysis: Analysis, the_cut: Cut, remaining: Mapping[str, str], noise: Mapping[str, NoiseLayer]
) -> fx.GraphModule:
    """Return the network of what is left of a captured model.

    Args:
        analysis: the model.
        the_cut: its smaller tensors.
        remaining: names of noise layers of which the multiplication stays.
        noise: by name, noise layers that stay.
    """
    new_biases = the_cut.tensors.keys() - analysis.parameters.keys()
    description = describe(analysis, remaining, noise, new_biases=new_biases)
    of_noise = {f"{name}.{key}": t for name, layer in noise.items() for key, t in layer.state_dict().items()}
    tensors = {**the_cut.tensors, **description.constants, **of_noise}
    for placeholder, tensor in analysis.captured.tensors.items():
        tensors.setdefault(analysis.captured.names.get(placeholder, f"constants.{placeholder}"), tensor)
    tensors = _apart_from(analysis.captured.tensors.values(), tensors)
    own = dict(analysis.captured.model.named_parameters(remove_duplicate=False))
    frozen = {name for name, parameter in own.items() if not parameter.requires_grad}
    for call in analysis.calls.values():
        if call.new_bias in new_biases and call["weight"].parameter in frozen:
            frozen.add(call.new_bias)
    for name, layer in noise.items():
        frozen |= {f"{name}.{key}" for key, p in layer.named_parameters() if not p.requires_grad}
    network = build(description, tensors, parameters={*own, *new_biases}, frozen=frozen)
    placed = dict(network.named_modules())
    for name, layer in noise.items():
        if isinstance(new := placed.get(_without_keywords(name)), NoiseLayer):
            new.backend, new.generator = layer.backend, layer.generator
    return network


def _apart_from(old: Iterable[Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors, with copies of those that lie in the memory of others."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in old}
    own = {id(t): t.clone() if t.untyped_storage().data_ptr() in taken else t for t in tensors.values()}
    return {name: own[id(tensor)] for name, tensor in tensors.items()}


def build(
    description: Description, tensors: Mapping[str, Tensor], *, parameters: set[str], frozen: set[str]
) -> fx.GraphModule:
    """Make a network of a description.

    Args:
        description: its operations.
        tensors: its tensors by name; the network takes them over.
        parameters: names of those that are parameters; the others are buffers.
        frozen: names of parameters that are not trained.

    Raises:
        UnsupportedError: an operator is not one of those that a description may hold.
        KeyError: a tensor is missing.
    """
    root = nn.Module()
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    placeholders: dict[str, fx.Node] = {}
    made: dict[int, Tensor] = {}

    def argument(value: Any) -> Any:
        if isinstance(value, Reference):
            return nodes[value.name]
        return [argument(item) for item in value] if isinstance(value, list | tuple) else value

    layers = {op.args[1]: op for op in description.operations if op.kind == "layer"}
    for operation in layers.values():
        _add_layer(root, operation, tensors, frozen)
    first = [op for op in description.operations if op.kind == "input"]
    for operation in (*first, *(op for op in description.operations if op.kind != "input")):
        name, args = operation.name, operation.args
        if placeholders and operation.kind != "input" and not nodes:
            nodes |= _checked(graph, first, placeholders)
        if operation.kind == "input":
            placeholders[name] = graph.placeholder(name)
        elif operation.kind == "tensor":
            if operation.target.rpartition(".")[0] in layers:
                nodes[name] = graph.get_attr(_without_keywords(operation.target))
                continue
            tensor = tensors[operation.target]
            if id(tensor) not in made:
                is_parameter = operation.target in parameters
                made[id(tensor)] = (
                    nn.Parameter(tensor.detach(), requires_grad=operation.target not in frozen)
                    if is_parameter
                    else tensor.detach()
                )
            path = _register(root, operation.target, made[id(tensor)])
            nodes[name] = graph.get_attr(path)
        elif operation.kind == "call":
            target = check_operator(operation.target, name)
            kwargs = {key: argument(value) for key, value in operation.kwargs.items()}
            given = tuple(map(argument, args))
            if takes_sizes_on_trust(operation.target):
                checked = graph.call_function(check_sizes, given, {**kwargs, "operator": operation.target})
                checked.meta["is_wrapped"] = True
                given = (checked, *given[1:])
            nodes[name] = graph.call_function(target, given, kwargs)
        elif operation.kind == "scalar":
            nodes[name] = graph.call_function(SCALAR_FUNCTIONS[operation.target], tuple(map(argument, args)))
        elif operation.kind == "item":
            nodes[name] = graph.call_function(operator.getitem, (argument(args[0]), args[1]))
        elif operation.kind == "layer":
            nodes[name] = graph.call_module(_without_keywords(str(args[1])), (argument(args[0]),))
        elif operation.kind == "scale":
            nodes[name] = _scale(graph, argument(args[0]), argument(args[1]), args[2])
    graph.output(pytree.tree_map(argument, description.outputs, is_leaf=lambda x: isinstance(x, Reference)))
    _take_arguments(graph, description)
    module = fx.GraphModule(root, graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module.eval()


_AS_MADE = "as in the example that the network was made with"


def check_inputs(*values: Any, names: tuple[str, ...], expected: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs of a network that was captured, if they are such as it was captured for.

    Args:
        values: the inputs.
        names: their names.
        expected: for each of them ``("sizes", sizes)`` or ``("constant", value)``. A size is a number, or a letter with
            a least and a largest number, the latter None for none; equal letters are equal sizes.

    Raises:
        ValueError: one is not; it is named.
    """
    known: dict[str, int] = {}
    for value, name, (kind, wanted) in zip(values, names, expected, strict=True):
        if kind == "constant":
            if value != wanted:
                raise ValueError(f"{name} must be {wanted!r}, {_AS_MADE}, got {value!r}")
            continue
        shape = getattr(value, "shape", None)
        if shape is None or len(shape) != len(wanted):
            raise ValueError(
                f"{name} must be a tensor of {len(wanted)} dimensions, got {shape or type(value).__name__}"
            )
        for d, (size, allowed) in enumerate(zip(shape, wanted, strict=True)):
            if isinstance(allowed, int):
                fits, words = size == allowed, str(allowed)
            else:
                letter, lower, upper = allowed
                known.setdefault(letter, size)
                fits = size >= lower and (upper is None or size <= upper) and size == known[letter]
                words = f"at least {lower}" + ("" if upper is None else f" and at most {upper}")
                words += "" if size == known[letter] else f" and {known[letter]} as before"
            if not fits:
                raise ValueError(f"size {d} of {name} must be {words}, {_AS_MADE}, got {int(size)}")
    return values


def _checked(
    graph: fx.Graph, inputs: list[Operation], placeholders: dict[str, fx.Node]
) -> dict[str, fx.Node]:
    names, expected = tuple(op.name for op in inputs), tuple(op.args for op in inputs)
    checked = graph.call_function(
        check_inputs, tuple(placeholders[name] for name in names), {"names": names, "expected": expected}
    )
    # When the network is unpickled, its code is traced anew, but not through this function.
    checked.meta["is_wrapped"] = True
    return {name: graph.call_function(operator.getitem, (checked, i)) for i, name in enumerate(names)}


def _take_arguments(graph: fx.Graph, description: Description) -> None:
    """Make the network take the arguments of the model that it was made from."""
    args, kwargs = description.in_tree
    if not kwargs and all(value is None for value in args):
        return
    in_spec = pytree.tree_structure((tuple(args), dict(kwargs)), is_leaf=lambda x: x is None)
    names = [*(f"argument_{i}" for i in range(len(args))), *kwargs]
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, in_spec, None)))


def _without_keywords(path: str) -> str:
    """Return a path of which the code that torch.fx generates can name every part."""
    return ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in path.split("."))


def _register(root: nn.Module, name: str, tensor: Tensor) -> str:
    name = _without_keywords(name)
    path, _, last = name.rpartition(".")
    owner = _submodule(root, path)
    if last not in owner._parameters and last not in owner._buffers:
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor)
    return name


def _submodule(root: nn.Module, path: str) -> nn.Module:
    owner = root
    for part in path.split(".") if path else ():
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    return owner


def _add_layer(
    root: nn.Module, operation: Operation, tensors: Mapping[str, Tensor], frozen: set[str]
) -> None:
    path = str(operation.args[1])
    parent, _, last = _without_keywords(path).rpartition(".")
    owner = _submodule(root, parent)
    if last not in owner._modules:
        with torch.device("meta"):  # whatever sizes are described, nothing is allocated for them
            made: type[nn.Module] = NoiseLayer if operation.target == NOISE else getattr(nn, operation.target)
            layer = made(**operation.kwargs)
        own = {
            key: tensors[f"{path}.{key}"].detach().clone()
            for key in layer.state_dict()
            if f"{path}.{key}" in tensors
        }
        if "num_batches_tracked" in layer.state_dict():
            own.setdefault("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        missing = [key for key in layer.state_dict() if key not in own]
        if missing:
            raise KeyError(f"{path}.{missing[0]}")
        layer.load_state_dict(own, assign=True)
        if isinstance(layer, NoiseLayer):
            layer.compacted = True
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(f"{path}.{key}" not in frozen)
        owner.add_module(last, layer.eval())


def _scale(graph: fx.Graph, x: fx.Node, factors: fx.Node, dim: int) -> fx.Node:
    """Multiply by factors along a dimension, counted from the front or the end."""
    aten = torch.ops.aten
    if dim == -1:
        return graph.call_function(aten.mul.Tensor, (x, factors))
    moved = graph.call_function(aten.movedim.int, (x, dim, -1))
    scaled = graph.call_function(aten.mul.Tensor, (moved, factors))
    return graph.call_function(aten.movedim.int, (scaled, -1, dim))
