"""Reading a graph: the rules, asked for every operation in an order of computation."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import predispatch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from bmrs.graph.capture import Captured
from bmrs.graph.layer_norms import layer_norms
from bmrs.graph.nodes import (
    groups_of,
    is_kernel_of_each_channel,
    layer_of,
    line_of,
    name_layers,
    only_goes_on,
    only_starts_recurrences,
    operator_name,
    place_of,
    summed_into_along,
    tensors_in,
)
from bmrs.graph.operators import CONVOLUTIONS, FILLS, GATES, LINEAR, TRANSPOSED_CONVOLUTIONS
from bmrs.graph.overwriting import overwrite
from bmrs.graph.own_bias import is_stock, would_use_bias
from bmrs.graph.rms_norms import rms_norms
from bmrs.graph.rules import RULES, Call, unknown
from bmrs.graph.rules.convolution import pads
from bmrs.graph.values import Findings, Value

_LARGEST_CONSTANT = 10_000_000
_PRODUCTS = (
    *(*LINEAR, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *GATES),
    *("matmul", "bmm", "mm", "baddbmm", "einsum", "scaled_dot_product_attention"),
)
_BATCHES = (predispatch._add_batch_dim, predispatch._remove_batch_dim)
_CONVOLUTIONS = {*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, "convolution"}


class UnknownSizeError(ValueError):
    """A size depends on values of the input."""


class NoOperatorError(ValueError):
    """A graph calls a function of Python, as those by which torch.func.grad works, for a tensor."""


class Reader:
    """Goes through a graph in an order of computation.

    Args:
        captured: the model.
        findings: what is found is added to it.

    Attributes:
        values: of each node read so far; a list for one with several results.
        calls: of each node that calls an operator.
        parameters: values of parameters and buffers by qualified name, once each.
        norms: normalisations by the root mean square that zeros can leave, by the operation that takes it.
        layer_norms: layer norms that constants may leave, by their operation.
        written: channels of what is written in code, such as zeros that a loop starts from.
        read_in_batches: values that are read within torch.vmap.
        line: the user's line that is being read, as a part of a sentence.
    """

    def __init__(self, captured: Captured, findings: Findings) -> None:
        self.captured, self.findings = captured, findings
        self.line = ""
        self.written: list[Tensor] = []
        self.read_in_batches: list[Value] = []
        self.values: dict[fx.Node, Any] = {}
        self.calls: dict[fx.Node, Call] = {}
        self.parameters: dict[str, Value] = {}
        name_layers(captured.program.graph_module, captured.model)
        path_of = {n: layer_of(n) for n in captured.graph.nodes if n.op == "call_function"}
        self.norms, self.layer_norms = rms_norms(captured, path_of), layer_norms(captured, path_of)
        self._modules = dict(captured.model.named_modules(remove_duplicate=False))
        self._by_tensor: dict[int, Value] = {}
        self._batched: set[fx.Node] = set()
        # A tensor can have several placeholders, of which one is used.
        self._users: dict[int, list[fx.Node]] = defaultdict(list)
        for node in captured.graph.nodes:
            for read in node.all_input_nodes:
                if read.name in captured.tensors:
                    self._users[id(captured.tensors[read.name])].append(node)

    def run(self, graph: fx.Graph, inputs: Sequence[Any] = ()) -> list[Any]:
        """Read a graph. Of one that is called by another the inputs are given, and the results are returned."""
        self._check_operators(graph)
        given = iter(inputs)
        for node in graph.nodes:
            self.findings.place, self.line = place_of(node), line_of(node)
            if node.op == "placeholder":
                self.values[node] = next(given) if inputs else self._placeholder(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                results = node.args[0]
                return [
                    self._resolve(x) for x in (results if isinstance(results, list | tuple) else [results])
                ]
        return []

    def _check_operators(self, graph: fx.Graph) -> None:
        # Before anything is computed: what is in front of such a function may hold tensors of its transform.
        operators = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)
        for node in graph.nodes:
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            if node.target in _BATCHES:
                continue
            if not isinstance(node.target, operators) and tensors_in(node.meta.get("val")):
                self.findings.place, self.line = place_of(node), line_of(node)
                raise NoOperatorError

    def _placeholder(self, node: fx.Node) -> Any:
        example = node.meta.get("val")
        tensor = self.captured.tensors.get(node.name)
        if tensor is None:
            return Value(_sizes(example.shape)) if isinstance(example, Tensor) else _concrete(example)
        name = self.captured.names.get(node.name)
        if id(tensor) not in self._by_tensor:
            self._by_tensor[id(tensor)] = Value(
                tensor.shape, tuple(self._layers_of(tensor, name)), None, tensor, name
            )
        value = self._by_tensor[id(tensor)]
        if name is not None:
            self.parameters[name] = value
        return value

    def _layers_of(self, tensor: Tensor, name: str | None) -> list[Tensor]:
        """Return new channels of a parameter along every dimension that can be cut."""
        if name is None or not tensor.is_floating_point() or not tensor.numel():
            return []
        users = [user for user in self._users[id(tensor)] if user.op == "call_function"]
        if not users:
            return []
        names = {operator_name(user) for user in users}
        if names & _CONVOLUTIONS and tensor.dim() > 2:
            groups = groups_of(next(u for u in users if operator_name(u) in _CONVOLUTIONS))
            rows = self.findings.new_layer(tensor.shape, 0)
            if groups == 1:
                return [rows, self.findings.new_layer(tensor.shape, 1)]
            if tensor.shape[1] == 1:
                return [rows]
            per_group = self.findings.ties.new(groups, 1, tensor.shape[1])
            columns = per_group.expand(groups, len(tensor) // groups, -1).reshape(tensor.shape[:2])
            return [rows, columns.view(*tensor.shape[:2], *[1] * (tensor.dim() - 2)).expand(tensor.shape)]
        axes = [1] if "embedding" in names else range(tensor.dim())
        return [self.findings.new_layer(tensor.shape, axis) for axis in axes if tensor.shape[axis] > 1]

    def _call(self, node: fx.Node) -> Any:
        if node.target in _BATCHES or not self._batched.isdisjoint(node.all_input_nodes):
            return self._call_in_batches(node)
        if node.target is operator.getitem:
            container = self._resolve(node.args[0])
            place: Any = node.args[1]
            return container[place] if isinstance(container, list | tuple) else None
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._call_graph(node)
        example = node.meta.get("val")
        if not isinstance(node.target, torch._ops.OpOverload):
            return _concrete(example)
        if not tensors_in(example):
            return _concrete(example)
        if node in self.layer_norms and not self._can_shift_behind(node):
            self.layer_norms[node] = replace(self.layer_norms[node], dropped=True)
        call = self._described(node, example)
        self.calls[node] = call
        constant = self._evaluated(call)
        if constant is not None and not any(value.layers for value in call.values()):
            return self._initial_state(node, call.operator, constant)
        result: Any = RULES.get(call.operator, unknown)(self.findings, call)
        if isinstance(result, list) and not isinstance(example, list | tuple):
            (result,) = result
        if isinstance(constant, Value) and isinstance(result, Value):
            result = replace(result, constant=None, tensor=constant.tensor)
        overwrite(self.values, self.calls, node, result)
        return self._initial_state(node, call.operator, result)

    def _initial_state(self, node: fx.Node, name: str, value: Any) -> Any:
        """Give what recurrences and sums start from channels, where it is one number that can be there fewer times.

        Likewise one kernel that is repeated for each channel of a depthwise convolution.
        """
        if name in ("expand", "repeat") and isinstance(value, Value) and is_kernel_of_each_channel(node):
            self.written.append(self.findings.new_layer(value.shape, 0))
            return replace(value, layers=(self.written[-1],))
        if name not in FILLS or not isinstance(value, Value) or len(value.shape) < 2:
            return value
        if (dim := summed_into_along(node)) is not None:
            axes = [d for d, size in enumerate(value.shape) if d != dim % len(value.shape) and size > 1]
            return replace(value, layers=tuple(self.findings.new_layer(value.shape, d) for d in axes))
        if not only_starts_recurrences(node):
            known = value.known() if node.meta["val"].is_floating_point() and only_goes_on(node) else None
            return value if known is None or known.any() else self._written(value)
        first, *between, last = value.shape
        channels = self.findings.ties.new(first, *[1] * len(between), last)
        return replace(value, layers=(channels.expand(value.shape),))

    def _written(self, value: Value) -> Value:
        """Give zeros that are written in code channels beside the first dimension, as to the state of a loop.

        They leave with what they meet, and stay where that is nothing which could be pruned.
        """
        layers = [self.findings.new_layer(value.shape, d) for d, n in enumerate(value.shape) if d and n > 1]
        self.written += layers
        zeros = torch.zeros((), dtype=torch.float64).expand(value.shape)
        return replace(value, layers=tuple(layers), constant=zeros, tensor=None)

    def _described(self, node: fx.Node, example: Any) -> Call:
        assert isinstance(node.target, torch._ops.OpOverload)
        arguments: dict[str, Any] = {}
        for i, argument in enumerate(node.target._schema.arguments):
            if i < len(node.args) and not argument.kwarg_only:
                arguments[argument.name] = self._resolve(node.args[i])
            elif argument.name in node.kwargs:
                arguments[argument.name] = self._resolve(node.kwargs[argument.name])
            else:
                arguments[argument.name] = argument.default_value
        shapes = tuple(_sizes(tensor.shape) for tensor in tensors_in(example))
        can_shift, new_bias = self._can_shift(node, arguments)
        norm, zeros = self.layer_norms.get(node), node in self.norms
        behind = None if norm is None else norm.constants_behind
        return Call(operator_name(node), node.target, arguments, shapes, can_shift, new_bias, zeros, behind)

    def _can_shift(self, node: fx.Node, arguments: dict[str, Any]) -> tuple[bool, str]:
        """Return whether a bias of its own can take up a constant, and the name of one that there is not yet."""
        weight = arguments.get("weight") or arguments.get("mat2")
        bias = arguments.get("bias") or (arguments.get("self") if operator_name(node) == "addmm" else None)
        if not isinstance(weight, Value) or weight.parameter is None:
            return False, ""
        others = [user for user in self._users[id(weight.tensor)] if user is not node]
        if any(operator_name(user) != "embedding" for user in others):
            return False, ""
        if isinstance(bias, Value):
            return bias.parameter is not None and len(self._users[id(bias.tensor)]) == 1, ""
        # Of a table that is shared, the weight has the table's name.
        path = layer_of(node) if others else weight.parameter.rpartition(".")[0]
        layer = self.captured.model.get_submodule(path)
        own = getattr(layer, "weight", None) is weight.tensor and getattr(layer, "bias", None) is None
        takes_one = own and (is_stock(layer) or self._would_use_bias(node, layer))
        return (True, f"{path}.bias".lstrip(".")) if takes_one else (False, "")

    def _would_use_bias(self, node: fx.Node, layer: nn.Module) -> bool:
        """Return whether an operation is in a layer's own code, which would hand a bias on to it."""
        source = node.args[0] if node.args else None
        if self._modules.get(layer_of(node)) is not layer or not isinstance(source, fx.Node):
            return False
        # What the layer is given: it may pad that first, or move its dimensions.
        while source.op == "call_function" and self._modules.get(layer_of(source)) is layer:
            read = [n for n in source.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            if len(read) != 1:
                break
            (source,) = read
        x, known = self.values.get(source), self.captured.own_biases
        if layer not in known:
            known[layer] = isinstance(x, Value) and would_use_bias(layer, x.shape, source.meta["val"].dtype)
        return known[layer]

    def _can_shift_behind(self, node: fx.Node) -> bool:
        """Return whether biases could stand in for constants that a layer norm takes, wherever they are read."""
        constant = self._resolve(node.args[0]).constant
        if constant is None:
            return True
        known = ~constant.isnan().reshape(-1, constant.shape[-1]).all(dim=0)
        return self._can_shift_in(node, known, set())

    def _can_shift_in(self, node: fx.Node, constants: Tensor, seen: set[fx.Node]) -> bool:
        for user in node.users.keys() - seen:
            seen.add(user)
            name = operator_name(user) if isinstance(user.target, torch._ops.OpOverload) else ""
            if name == "mark_noise":
                factors = self._resolve(user.args[1]).tensor
                if len(factors) == len(constants) and not factors.cpu()[constants].any():
                    continue  # all zero from here on
            if name in _PRODUCTS:
                call = self._described(user, user.meta["val"])
                if not call.can_shift or (
                    name in CONVOLUTIONS and pads(call["padding"], call["weight"].shape[2:])
                ):
                    return False
            elif user not in self.layer_norms and not self._can_shift_in(user, constants, seen):
                return False
        return True

    def _evaluated(self, call: Call) -> Value | list[Value] | None:
        """Return the result itself, if it does not depend on the input."""
        values = call.values()
        if (
            any(value.tensor is None for value in values)
            or sum(s.numel() for s in call.shapes) > _LARGEST_CONSTANT
        ):
            return None
        if torch.Tag.nondeterministic_seeded in call.target.tags or call.target._schema.is_mutable:
            return None
        if call.target is torch.ops.bmrs.mark_noise.default:
            return None
        arguments = {name: _own_tensors(argument) for name, argument in call.arguments.items()}
        with torch.no_grad():
            results = call.target(**arguments)
        if isinstance(results, Tensor):
            return Value(results.shape, tensor=results)
        return [Value(result.shape, tensor=result) for result in results]

    def _call_graph(self, node: fx.Node) -> Any:
        """Read a graph that is called by another, such as a part without autocast, and return its results."""
        owner = node.graph.owning_module
        graphs = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        if len(graphs) != 1 or owner is None:
            return self._stop(node)
        place = node.args.index(graphs[0])
        inner = owner.get_submodule(str(graphs[0].target))
        assert isinstance(inner, fx.GraphModule)
        return self.run(inner.graph, [self._resolve(a) for a in node.args[place + 1 :]])

    def _call_in_batches(self, node: fx.Node) -> Any:
        """Keep what torch.vmap runs over; within it tensors lack a dimension, and what comes out has no channels."""
        example = node.meta.get("val")
        if operator_name(node) == "mark_noise":
            raise ValueError(
                f"noise layer {node.args[3]!r} lies within torch.vmap{self.line}, where channels cannot be followed: "
                "put the noise behind what vmap returns"
            )
        self._keep_inputs(node, "torch.vmap runs over it")
        self.read_in_batches += [v for n in node.all_input_nodes for v in as_list(self.values.get(n))]
        if node.target is not _BATCHES[1] or not isinstance(example, FakeTensor):
            self._batched.add(node)
            self.norms.pop(node, None)
            self.layer_norms.pop(node, None)
            return None
        return Value(_sizes(example.shape))

    def _keep_inputs(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            for value in as_list(self.values.get(source)):
                self.findings.stay_all(value, reason)

    def _stop(self, node: fx.Node) -> Any:
        self._keep_inputs(node, f"there is no rule for {node.target}")
        example = node.meta.get("val")
        values = [Value(_sizes(t.shape)) for t in tensors_in(example)]
        return values if isinstance(example, list | tuple) else values[0] if values else None

    def _resolve(self, argument: Any) -> Any:
        """Return an argument with values and numbers in place of nodes."""
        if isinstance(argument, list | tuple):
            return [self._resolve(item) for item in argument]
        return map_arg(argument, self.values.get)


def _sizes(shape: Sequence[Any]) -> torch.Size:
    sizes = [_concrete(size) for size in shape]
    if any(size is None for size in sizes):
        raise UnknownSizeError
    return torch.Size(sizes)


def _concrete(value: Any) -> Any:
    """Return the number that a symbol is in the example, and anything else as it is."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    return value


def _own_tensors(argument: Any) -> Any:
    if isinstance(argument, Value):
        return argument.tensor
    return [_own_tensors(item) for item in argument] if isinstance(argument, list | tuple) else argument


def as_list(values: Any) -> list[Value]:
    """Return the values among the results of an operation, which may be one, several or none."""
    return [v for v in (values if isinstance(values, list | tuple) else [values]) if isinstance(v, Value)]
