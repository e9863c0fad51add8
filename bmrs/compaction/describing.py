"""Describing what is left of a captured model by its operators, for where the model's own code cannot run narrower.

The sizes that are written into the operations are corrected for the channels that leave.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bmrs.compaction.description import (
    NOISE,
    SCALAR_FUNCTIONS,
    Description,
    Operation,
    Reference,
    UnsupportedError,
    check_operator,
    references,
)
from bmrs.compaction.surgery import groups_left
from bmrs.graph.analysis import Analysis
from bmrs.graph.nodes import layer_of
from bmrs.graph.operators import DROPOUTS, FILLS
from bmrs.graph.rules import Call
from bmrs.graph.stock_layers import BATCH_NORMS, constructor_arguments
from bmrs.graph.values import Value
from bmrs.noise.layer import NoiseLayer, stored_arguments

_DROPPED = ("_assert_scalar", "_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size")
_VIEWS = ("aten.view.default", "aten._unsafe_view.default")


def describe(
    analysis: Analysis,
    remaining: Mapping[str, str],
    noise: Mapping[str, NoiseLayer] | None = None,
    *,
    new_biases: Collection[str] = (),
) -> Description:
    """Return the operations of a captured model, narrower where channels leave.

    Args:
        analysis: the model.
        remaining: names of noise layers of which a multiplication by fixed factors stays.
        noise: by name, noise layers that stay, as they are to be.
        new_biases: names of biases that layers without one get.

    Raises:
        UnsupportedError: an operation cannot be described; it is named.
    """
    return _Describer(analysis, remaining, noise or {}, new_biases).description()


class _Describer:
    def __init__(
        self,
        analysis: Analysis,
        remaining: Mapping[str, str],
        noise: Mapping[str, NoiseLayer],
        new_biases: Collection[str],
    ) -> None:
        self.analysis, self.remaining, self.noise, self.new_biases = analysis, remaining, noise, new_biases
        self.operations: list[Operation] = []
        self.references: dict[fx.Node, Any] = {}
        self.layers: set[str] = set()
        self.constants: dict[str, Tensor] = {}
        takes_eps = {node: norm.adds_eps or node for node, norm in analysis.norms.items()}
        self.eps = {takes_eps.get(node, node): change.eps for node, change in analysis.changes().items()}

    def description(self) -> Description:
        program = self.analysis.captured.program
        self._graph(program.graph, program.graph_module, None)
        results = self._output(program.graph.output_node())
        spec = program.call_spec
        flat = results[-len(program.graph_signature.user_outputs) :]
        out_tree = _plain_tree(pytree.tree_unflatten(flat, spec.out_spec))
        in_tree = _plain_tree(pytree.tree_unflatten([None] * spec.in_spec.num_leaves, spec.in_spec))
        read = {
            reference.name for op in self.operations for reference in references((op.args, dict(op.kwargs)))
        }
        read |= {reference.name for reference in references(out_tree)}
        needed = tuple(op for op in self.operations if op.kind != "tensor" or op.name in read)
        return Description(needed, out_tree, in_tree, self.constants)

    def _output(self, node: fx.Node) -> list[Any]:
        return [self._argument(value) for value in node.args[0]]  # type: ignore[union-attr]

    def _graph(self, graph: fx.Graph, owner: nn.Module, inputs: list[Any] | None) -> None:
        given = iter(inputs or ())
        for node in graph.nodes:
            if node.op == "placeholder":
                if inputs is not None:
                    self.references[node] = next(given)
                    continue
                self._placeholder(node)
            elif node.op == "call_function":
                self._call(node, owner)

    def _placeholder(self, node: fx.Node) -> None:
        captured = self.analysis.captured
        if node.name in captured.tensors:
            target = captured.names.get(node.name, f"constants.{node.name}")
            self._add(Operation(node.name, "tensor", target), node)
        else:
            self._add(Operation(node.name, "input", "", self._expected(node)), node)

    def _expected(self, node: fx.Node) -> tuple[Any, ...]:
        """Return what an input has to be: a list of sizes, or a constant."""
        example = node.meta.get("val")
        if not isinstance(example, Tensor):
            return ("constant", example)
        ranges = self.analysis.captured.program.range_constraints
        sizes: list[Any] = []
        for size in example.shape:
            fixed = size if isinstance(size, int) else size.node.maybe_as_int()
            if fixed is not None:
                sizes.append(fixed)
                continue
            limits = ranges.get(size.node.expr)
            lower, upper = (0, math.inf) if limits is None else (int(limits.lower), limits.upper)
            # torch.export takes 2 for the least size of all that vary.
            sizes.append([str(size), lower if lower > 2 else 0, int(upper) if upper < 2**40 else None])
        return ("sizes", sizes)

    def _add(self, operation: Operation, node: fx.Node) -> None:
        self.operations.append(operation)
        self.references[node] = Reference(operation.name)

    def _call(self, node: fx.Node, owner: nn.Module) -> None:
        target = node.target
        if target is operator.getitem:
            source = self.references[node.args[0]]  # type: ignore[index]
            if isinstance(source, list | tuple):
                self.references[node] = source[node.args[1]]  # type: ignore[index]
            elif source.name in self.layers:
                self.references[node] = source
            else:
                self._add(Operation(node.name, "item", "", (source, node.args[1])), node)
            return
        if isinstance(target, torch._ops.HigherOrderOperator):
            self._inner_graph(node, owner)
            return
        if not isinstance(target, torch._ops.OpOverload):
            name = getattr(target, "__name__", "")
            if name not in SCALAR_FUNCTIONS:
                raise UnsupportedError(
                    f"a network cannot be described with {node.name!r}, a call of {target}"
                )
            self._add(Operation(node.name, "scalar", name, tuple(map(self._argument, node.args))), node)
            return
        call = self.analysis.calls.get(node)
        name = target._schema.name.split("::")[1]
        if name in _DROPPED:
            return
        if call is not None and call.operator == "mark_noise":
            self._noise(node, call)
        elif call is not None and self._is_layer(node, call):
            self._layer(node, call)
        else:
            args, kwargs = self._narrower(node, call) if call is not None else (node.args, node.kwargs)
            operator_name = f"{target.namespace}.{name}.{target._overloadname}"
            if call is not None and (parts := self._parts(node, call)):
                operator_name, args, kwargs = "aten.split_with_sizes.default", (node.args[0], *parts), {}
            if operator_name in _VIEWS:
                # Narrower operands can come out in another order of memory, which a view may not take.
                operator_name = "aten.reshape.default"
                kwargs = {"shape" if key == "size" else key: value for key, value in kwargs.items()}
            check_operator(operator_name, node.name)
            self._add(
                Operation(
                    node.name,
                    "call",
                    operator_name,
                    tuple(map(self._argument, args)),
                    {key: self._argument(value) for key, value in kwargs.items()},
                ),
                node,
            )

    def _inner_graph(self, node: fx.Node, owner: nn.Module) -> None:
        graphs = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        if len(graphs) != 1:
            raise UnsupportedError(
                f"a network cannot be described with {node.name!r}, a call of {node.target}"
            )
        inner = owner.get_submodule(str(graphs[0].target))
        assert isinstance(inner, fx.GraphModule)
        if "autocast" in node.name and node.args[2]:
            raise UnsupportedError(
                f"a network cannot be described with autocast inside its forward, at {node.name!r}"
            )
        place = node.args.index(graphs[0])
        self._graph(inner.graph, inner, [self._argument(a) for a in node.args[place + 1 :]])
        outputs = inner.graph.output_node().args[0]
        self.references[node] = [self._argument(value) for value in outputs]  # type: ignore[union-attr]

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.references[argument]
        if isinstance(argument, Reference):
            return argument
        if isinstance(argument, list | tuple):
            return [self._argument(item) for item in argument]
        return argument

    def _noise(self, node: fx.Node, call: Call) -> None:
        x, name = self._argument(node.args[0]), call["name"]
        if name in self.noise:
            if self.noise[name].hooked == "hidden":
                raise UnsupportedError(
                    f"a network cannot be described with the noise {name!r} on hidden units, of which one draw is "
                    "multiplied on several tensors"
                )
            # Its activation, if it has one, is an operation of its own.
            arguments = {**stored_arguments(self.noise[name]), "activation": None}
            self._add(Operation(node.name, "layer", NOISE, (x, name), arguments), node)
        elif name in self.remaining:
            factors = self._argument(node.args[1])
            self._add(Operation(node.name, "scale", "", (x, factors, call["dim"])), node)
        else:
            self.references[node] = x

    def _is_layer(self, node: fx.Node, call: Call) -> bool:
        if call.operator in DROPOUTS:
            return True
        return (
            call.operator == "batch_norm" and layer_of(node) != "" and type(self._module(node)) in BATCH_NORMS
        )

    def _module(self, node: fx.Node) -> nn.Module | None:
        path = layer_of(node)
        try:
            return self.analysis.captured.model.get_submodule(path)
        except AttributeError:
            return None

    def _layer(self, node: fx.Node, call: Call) -> None:
        module = self._module(node)
        x = self._argument(node.args[0])
        if call.operator in DROPOUTS:
            of_features = {3: "Dropout1d", 5: "Dropout3d"}.get(len(call.shape), "Dropout2d")
            kind = {
                "dropout": "Dropout",
                "feature_dropout": of_features,
                "alpha_dropout": "AlphaDropout",
                "feature_alpha_dropout": "FeatureAlphaDropout",
            }[call.operator]
            arguments: dict[str, Any] = {"p": call["p"]}
            path = f"dropouts.{node.name}"
        else:
            assert module is not None
            kind, path = type(module).__name__, layer_of(node)
            arguments = constructor_arguments(module)
            arguments["num_features"] = self.analysis.kept_shape(call["running_mean"] or call["weight"])[0]
        self.layers.add(node.name)
        self._add(Operation(node.name, "layer", kind, (x, path), arguments), node)

    def _narrower(self, node: fx.Node, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of an operator for smaller tensors."""
        changes = self._changes(node, call)
        if call.new_bias in self.new_biases:
            name = f"{node.name}_bias"
            self.operations.append(Operation(name, "tensor", call.new_bias))
            changes = {**changes, "bias": Reference(name)}
        assert isinstance(node.target, torch._ops.OpOverload)
        names = [argument.name for argument in node.target._schema.arguments]
        args, kwargs = list(node.args), dict(node.kwargs)
        for name, value in changes.items():
            place = names.index(name)
            if place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return tuple(args), kwargs

    def _changes(self, node: fx.Node, call: Call) -> dict[str, Any]:
        analysis, name = self.analysis, call.operator
        result = analysis.values.get(node)
        source = call["self"] if isinstance(call["self"], Value) else call["input"]
        if name in ("view", "reshape", "_unsafe_view", "expand", "broadcast_to", *FILLS) and isinstance(
            result, Value
        ):
            key = "size" if call["size"] is not None else "shape"
            given = self._given(node, key)
            kept = analysis.kept_shape(result)
            offset = len(given) - len(kept)
            return {
                key: [
                    new if isinstance(old, int) and old >= 0 and new != result.shape[i - offset] else old
                    for i, (old, new) in enumerate(zip(given, kept, strict=True))
                ]
            }
        if name == "repeat" and isinstance(result, Value):
            given, kept = self._given(node, "repeats"), analysis.kept_shape(result)
            own = (1,) * (len(kept) - len(source.shape)) + tuple(analysis.kept_shape(source))
            return {
                "repeats": [
                    old if new == full else new // size
                    for old, new, full, size in zip(given, kept, result.shape, own, strict=True)
                ]
            }
        if name == "unflatten" and isinstance(result, Value):
            axis, sizes = call["dim"] % len(source.shape), self._given(node, "sizes")
            kept = analysis.kept_shape(result)[axis : axis + len(sizes)]
            return {
                "sizes": [k if isinstance(s, int) and s >= 0 else s for s, k in zip(sizes, kept, strict=True)]
            }
        if name in ("slice", "narrow", "select") and isinstance(source, Value):
            return self._positions(call, source)
        if name in ("index", "index_select") and isinstance(result, Value):
            return self._renumbered(node, call, source, result)
        if name in ("layer_norm", "rms_norm"):
            rank = len(call["normalized_shape"])
            shape = list(analysis.kept_shape(source)[-rank:])
            changed = {} if shape == list(call["normalized_shape"]) else {"normalized_shape": shape}
            return {**changed, "eps": self.eps[node]} if node in self.eps else changed
        if node in self.eps:
            return {"other": self.eps[node]}
        if name == "group_norm":
            size = source.shape[1] // call["num_groups"]
            left = analysis.kept_shape(source)[1] // size
            return {} if left == call["num_groups"] else {"num_groups": left}
        if name.startswith("conv") and (call["groups"] or 1) > 1:
            left = groups_left(analysis, call)
            return {} if left == call["groups"] else {"groups": left}
        if name == "scaled_dot_product_attention":
            width = call["query"].shape[-1]
            cut = analysis.kept_shape(call["query"])[-1] != width
            return {"scale": 1 / math.sqrt(width)} if cut and call["scale"] is None else {}
        return {}

    def _parts(self, node: fx.Node, call: Call) -> tuple[list[int], int] | None:
        """Return sizes and dimension of the parts that a tensor is split into, None if they are what they were."""
        results = self.analysis.values.get(node)
        if call.operator not in ("split", "chunk", "split_with_sizes", "tensor_split") or not isinstance(
            results, list
        ):
            return None
        axis = call["dim"] % len(results[0].shape)
        if self.analysis.kept(call["self"], axis) is None:
            return None
        return [self.analysis.kept_shape(result)[axis] for result in results], axis

    def _given(self, node: fx.Node, name: str) -> list[Any]:
        assert isinstance(node.target, torch._ops.OpOverload)
        names = [argument.name for argument in node.target._schema.arguments]
        place = names.index(name)
        given = node.args[place] if place < len(node.args) else node.kwargs[name]
        return list(given)  # type: ignore[arg-type]

    def _renumbered(self, node: fx.Node, call: Call, source: Value, result: Value) -> dict[str, Any]:
        """Return known indices along channels, renumbered for the channels that are left."""
        key = "index" if call.operator == "index_select" else "indices"
        indices = [call["index"]] if key == "index" else list(call["indices"])
        picks = [d for d, index in enumerate(indices) if index is not None]
        axis = call["dim"] % len(source.shape) if key == "index" else picks[0]
        kept, left = self.analysis.kept(source, axis), self.analysis.kept(result, axis)
        if kept is None:
            return {}
        index = indices[0 if key == "index" else axis].tensor.detach().cpu()
        numbers = torch.full((source.shape[axis],), -1)
        numbers[kept] = torch.arange(len(kept))
        new = numbers[index if left is None else index[left]]
        name = f"{node.name}_index"
        self.constants[f"constants.{name}"] = new
        self.operations.append(Operation(name, "tensor", f"constants.{name}"))
        reference = Reference(name)
        return {
            key: reference
            if key == "index"
            else [reference if d == axis else None for d in range(len(indices))]
        }

    def _positions(self, call: Call, source: Value) -> dict[str, Any]:
        axis = call["dim"] % len(source.shape)
        kept = self.analysis.kept(source, axis)
        if kept is None:
            return {}
        size = source.shape[axis]

        def moved(position: Any) -> int:
            position = (
                size if position is None else max(0, position + size) if position < 0 else min(position, size)
            )
            return int((kept < position).sum())

        if call.operator == "select":
            return {"index": moved(call["index"])}
        if call.operator == "narrow":
            start = moved(call["start"])
            return {"start": start, "length": moved(call["start"] + call["length"]) - start}
        return {"start": moved(call["start"] or 0), "end": moved(call["end"])} if call["step"] == 1 else {}


def _plain_tree(tree: Any) -> Any:
    """Return a tree with dicts, lists and tuples alone, as of the outputs of transformers' classes."""
    if isinstance(tree, Mapping):
        return {str(key) if isinstance(key, str) else key: _plain_tree(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_plain_tree(value) for value in tree)
    if isinstance(tree, list):
        return [_plain_tree(value) for value in tree]
    return tree
