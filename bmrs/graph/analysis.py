"""Which channels of a captured model can leave it: the rules, asked for every operation, and what follows from them."""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from bmrs.graph.capture import Captured
from bmrs.graph.channels import (
    AtLeastOne,
    Staying,
    compressed,
    smallest_staying,
    varying_axes,
    without_repetition,
)
from bmrs.graph.layer_norms import Fit, LayerNorm, layer_norms
from bmrs.graph.operators import CONVOLUTIONS, FILLS, GATES, LINEAR, SCATTERS, TRANSPOSED_CONVOLUTIONS
from bmrs.graph.rms_norms import RmsNorm, rms_norms
from bmrs.graph.rules import RULES, Call, unknown
from bmrs.graph.rules.convolution import pads
from bmrs.graph.values import IT_IS_READ, Findings, Value

_LARGEST_CONSTANT = 10_000_000
_PRODUCTS = (
    *(*LINEAR, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *GATES),
    *("matmul", "bmm", "mm", "baddbmm", "einsum", "scaled_dot_product_attention"),
)
_CONVOLUTIONS = {*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, "convolution"}


@dataclass(frozen=True)
class NormChange:
    """What makes up for the channels that leave a normalisation.

    Attributes:
        layer: its qualified name.
        weight: qualified name of its weight.
        attribute: of the layer, where it takes ε from.
        eps: the new ε.
        gain: factor on the weight.
        bias: qualified name of its bias, None if there is none.
        shift: what is added to what the weight multiplies, through the bias.
    """

    layer: str
    weight: str
    attribute: str
    eps: float
    gain: float
    bias: str | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class Analysis:
    """What can leave a captured model.

    Attributes:
        captured: the model.
        findings: channels and constraints.
        values: of each node of the graph; a list for one with several results.
        calls: of each node that calls an operator.
        parameters: values of parameters and buffers by qualified name, once each.
        staying: the channels that stay with the masks as they are.
        norms: normalisations by the root mean square that zeros can leave, by the operation that takes it.
        layer_norms: layer norms that constants may leave, by their operation.
        fits: what makes up for the channels that leave layer norms, by the name of the weight, as far as it is known.
    """

    captured: Captured
    findings: Findings
    values: dict[fx.Node, Any]
    calls: dict[fx.Node, Call]
    parameters: dict[str, Value]
    staying: Staying
    norms: dict[fx.Node, RmsNorm]
    layer_norms: dict[fx.Node, LayerNorm]
    fits: Mapping[str, Fit] = field(default_factory=dict)

    def share_left(self, node: fx.Node) -> float:
        """Return the share of the channels that is left in the statistics that a normalisation takes."""
        call = self.calls[node]
        x: Value = call["input"] or call["self"]
        return self.kept_shape(x)[-1] / x.shape[-1]

    def approximated(self) -> dict[fx.Node, LayerNorm]:
        """Return the layer norms that channels leave, by their operation."""
        return {node: norm for node, norm in self.layer_norms.items() if self.share_left(node) < 1}

    def changes(self) -> dict[fx.Node, NormChange]:
        """Return what changes in normalisations that channels leave, by their operation."""
        found = {}
        for node, norm in self.norms.items():
            if (left := self.share_left(node)) < 1:
                found[node] = NormChange(norm.layer, norm.weight, norm.attribute, norm.eps / left, left**-0.5)
        for node, layer_norm in self.approximated().items():
            if (fit := self.fits.get(layer_norm.weight)) is not None:
                own = (layer_norm.layer, layer_norm.weight, layer_norm.attribute)
                eps = layer_norm.eps / self.share_left(node)
                found[node] = NormChange(*own, eps, fit.gain, layer_norm.bias, fit.shift)
        return found

    def noise_calls(self, name: str | None = None) -> Iterator[Call]:
        """Iterate over the calls of noise layers, or of the one of a name, in an order of computation."""
        for call in self.calls.values():
            if call.operator == "mark_noise" and name in (None, call["name"]):
                yield call

    def stays(self, channels: Tensor) -> Tensor:
        """Return which channels are kept, bool of their shape."""
        return self.staying.of(channels)

    def kept(self, value: Value, axis: int) -> Tensor | None:
        """Return the entries of a value that are kept along a dimension, int64; None for all."""
        layer = value.layer_along(axis)
        if layer is None:
            return None
        stays = self.stays(without_repetition(layer)[0])
        others = [d for d in range(stays.dim()) if d != axis % stays.dim()]
        stays = stays.any(dim=others) if others else stays
        return None if stays.all() else stays.nonzero().flatten()

    def kept_shape(self, value: Value) -> torch.Size:
        """Return the shape of what is kept of a value."""
        sizes = []
        for axis, size in enumerate(value.shape):
            kept = self.kept(value, axis)
            sizes.append(size if kept is None else len(kept))
        for layer in value.layers:
            *rows, last = varying_axes(layer) or (0,)
            number = int(self.stays(without_repetition(layer)[0]).sum())
            if rows:
                # As many in each row, but not always the same ones.
                sizes[last] = number // math.prod(sizes[axis] for axis in rows)
        return torch.Size(sizes)

    def reasons(self, channels: Tensor) -> list[str]:
        """Return why channels stay, "" for those that leave, of channels of shape (number,)."""
        found, roots = [], self.findings.ties.roots()
        for root, cause in zip(
            roots[channels].tolist(), self.staying.cause_of(channels).tolist(), strict=True
        ):
            note, place = self.findings.notes[cause] if cause >= 0 else ("", "")
            if note == IT_IS_READ:
                of_constants = self.findings.constants.get(place, ())
                note = next((more for its, more in of_constants if (roots[its] == root).any()), note)
            found.append(f"{note} at {place}" if place else note)
        return found


def analyse(captured: Captured, *, follow_constants: bool = True, all_stay: bool = False) -> Analysis:
    """Find the channels of a captured model that stay, by asking the rules for every operation.

    Args:
        captured: the model.
        follow_constants: see `Findings`.
        all_stay: whether all do, whatever is constant, as of a model that is described as it is.

    Raises:
        ValueError: the size of a tensor depends on values of the input, or a function is transformed, as by
            torch.vmap; the place is named.
    """
    reader = _Reader(captured, Findings(follow_constants=follow_constants))
    try:
        reader.run(captured.graph)
    except UnknownSizeError:
        raise ValueError(
            f"the sizes at {reader.findings.place} depend on values of the input{reader.line}, and channels cannot be "
            "followed through it. Without removing anything, bmrs.fold(model) makes a network without noise layers"
        ) from None
    except NoOperatorError:
        raise ValueError(
            f"channels cannot be followed through {reader.findings.place}{reader.line}, which is no operator but a "
            "part of torch.vmap, torch.func.grad or the like: compute with whole tensors there instead. Without "
            "removing anything, bmrs.fold(model) makes a network without noise layers"
        ) from None
    for node in captured.graph.output_node().all_input_nodes:
        for value in _as_list(reader.values.get(node)):
            reader.findings.place = "the model's output"
            reader.findings.stay_all(value, "it is an output of the model")
    findings = reader.findings
    unread = _unread(findings)
    if unread.numel():
        findings.place = ""
        findings.stay(unread, "nothing reads it in any case")
    staying = smallest_staying(findings.ties, findings.constraints, nothing_is_quiet=all_stay)
    return Analysis(
        *(captured, findings, reader.values, reader.calls, reader.parameters, staying),
        norms=reader.norms,
        layer_norms=reader.layer_norms,
    )


def _unread(findings: Findings) -> Tensor:
    """Return channels that nothing reads even if nothing is pruned, such as rows that a slice leaves out."""
    needs = [constraint for constraint in findings.constraints if not isinstance(constraint, AtLeastOne)]
    staying = smallest_staying(findings.ties, needs, nothing_is_quiet=True)
    channels = torch.arange(len(findings.ties))
    return channels[~staying.of(channels)]


class _Reader:
    """Goes through a graph in an order of computation."""

    def __init__(self, captured: Captured, findings: Findings) -> None:
        self.captured, self.findings = captured, findings
        self.line = ""
        self.values: dict[fx.Node, Any] = {}
        self.calls: dict[fx.Node, Call] = {}
        self.parameters: dict[str, Value] = {}
        path_of = {n: layer_of(n) for n in captured.graph.nodes if n.op == "call_function"}
        self.norms, self.layer_norms = rms_norms(captured, path_of), layer_norms(captured, path_of)
        self._by_tensor: dict[int, Value] = {}
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
            self.findings.place, self.line = place_of(node), _line_of(node)
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
            if not isinstance(node.target, operators) and _tensors_in(node.meta.get("val")):
                self.findings.place, self.line = place_of(node), _line_of(node)
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
        if name is None or not tensor.is_floating_point():
            return []
        users = [user for user in self._users[id(tensor)] if user.op == "call_function"]
        if not users:
            return []
        names = {_operator_name(user) for user in users}
        if names & _CONVOLUTIONS and tensor.dim() > 2:
            groups = _groups_of(next(u for u in users if _operator_name(u) in _CONVOLUTIONS))
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
        if node.target is operator.getitem:
            container = self._resolve(node.args[0])
            place: Any = node.args[1]
            return container[place] if isinstance(container, list | tuple) else None
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._call_graph(node)
        example = node.meta.get("val")
        if not isinstance(node.target, torch._ops.OpOverload):
            return _concrete(example)
        if not _tensors_in(example):
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
        self._overwrite(node, result)
        return self._initial_state(node, call.operator, result)

    def _initial_state(self, node: fx.Node, name: str, value: Any) -> Any:
        """Give what recurrences and sums start from channels, where it is one number that can be there fewer times."""
        if name not in FILLS or not isinstance(value, Value) or len(value.shape) < 2:
            return value
        if (dim := _summed_into_along(node)) is not None:
            axes = [d for d, size in enumerate(value.shape) if d != dim % len(value.shape) and size > 1]
            return replace(value, layers=tuple(self.findings.new_layer(value.shape, d) for d in axes))
        if not _starts(node):
            return value
        first, *between, last = value.shape
        channels = self.findings.ties.new(first, *[1] * len(between), last)
        return replace(value, layers=(channels.expand(value.shape),))

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
        shapes = tuple(_sizes(tensor.shape) for tensor in _tensors_in(example))
        can_shift, new_bias = self._can_shift(node, arguments)
        norm, zeros = self.layer_norms.get(node), node in self.norms
        behind = None if norm is None else norm.constants_behind
        return Call(_operator_name(node), node.target, arguments, shapes, can_shift, new_bias, zeros, behind)

    def _can_shift(self, node: fx.Node, arguments: dict[str, Any]) -> tuple[bool, str]:
        """Return whether a bias of its own can take up a constant, and the name of one that there is not yet."""
        weight = arguments.get("weight") or arguments.get("mat2")
        bias = arguments.get("bias") or (arguments.get("self") if _operator_name(node) == "addmm" else None)
        if not isinstance(weight, Value) or weight.parameter is None:
            return False, ""
        others = [user for user in self._users[id(weight.tensor)] if user is not node]
        if any(_operator_name(user) != "embedding" for user in others):
            return False, ""
        if isinstance(bias, Value):
            return bias.parameter is not None and len(self._users[id(bias.tensor)]) == 1, ""
        # Of a table that is shared, the weight has the table's name.
        path = layer_of(node) if others else weight.parameter.rpartition(".")[0]
        layer = self.captured.model.get_submodule(path)
        own = getattr(layer, "weight", None) is weight.tensor and getattr(layer, "bias", None) is None
        stock = type(layer).forward in (nn.Linear.forward, *_forwards_of_convolutions())
        return (True, f"{path}.bias".lstrip(".")) if own and stock else (False, "")

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
            name = _operator_name(user) if isinstance(user.target, torch._ops.OpOverload) else ""
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

    def _stop(self, node: fx.Node) -> Any:
        for source in node.all_input_nodes:
            for value in _as_list(self.values.get(source)):
                self.findings.stay_all(value, f"there is no rule for {node.target}")
        example = node.meta.get("val")
        values = [Value(_sizes(t.shape)) for t in _tensors_in(example)]
        return values if isinstance(example, list | tuple) else values[0] if values else None

    def _overwrite(self, node: fx.Node, result: Any) -> None:
        """Let all that read the same memory after an operation in place read its result."""
        assert isinstance(node.target, torch._ops.OpOverload)
        if not node.target._schema.is_mutable or not isinstance(result, Value) or not node.args:
            return
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return
        before = self.values.get(source)
        self.values[source] = replace(result, parameter=None)
        unchanged = _equal_constants(before, result)
        while _is_view(source):
            call, source = self.calls.get(source), source.args[0]
            assert isinstance(source, fx.Node)
            value = self.values[source]
            if isinstance(value, Value):
                unchanged = None if unchanged is None else _of_all(call, unchanged, value.shape)
                known = value.known()
                constant = None if known is None or unchanged is None else known.where(unchanged, torch.nan)
                constant = None if constant is None else compressed(constant)
                self.values[source] = replace(value, constant=constant, tensor=None, parameter=None)

    def _resolve(self, argument: Any) -> Any:
        """Return an argument with values and numbers in place of nodes."""
        if isinstance(argument, list | tuple):
            return [self._resolve(item) for item in argument]
        return map_arg(argument, self.values.get)


def place_of(node: fx.Node) -> str:
    """Return an operation's name and the layer that it belongs to, for messages."""
    path = layer_of(node)
    name = _operator_name(node) if node.op == "call_function" else node.name
    return f"{name} in layer {path!r}" if path else str(name)


def _line_of(node: fx.Node) -> str:
    """Return the user's line that an operation comes from, as a part of a sentence."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    places = [i for i, line in enumerate(lines) if line.startswith("File ")]
    return f" ({', '.join(lines[places[-1] :][:2])})" if places else ""


def layer_of(node: fx.Node) -> str:
    """Return the qualified name of the innermost layer that an operation belongs to, "" for the model."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(stack.values())), "")


def _operator_name(node: fx.Node) -> str:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    name = target._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _starts(node: fx.Node) -> bool:
    """Return whether nothing but recurrent layers reads a tensor, or others like it."""
    return all(
        isinstance(user.target, torch._ops.OpOverload)
        and (_operator_name(user) in GATES or (_operator_name(user) == "zeros_like" and _starts(user)))
        for user in node.users
    )


def _summed_into_along(node: fx.Node) -> int | None:
    """Return the dimension along which nothing but entries at indices are put into a tensor, None if more is done."""
    dims = {
        user.args[1]
        if user.args[0] is node
        and isinstance(user.target, torch._ops.OpOverload)
        and _operator_name(user) in SCATTERS
        else None
        for user in node.users
        if len(user.args) > 1
    }
    (dim,) = dims if len(dims) == 1 else (None,)
    return dim if isinstance(dim, int) else None


def _groups_of(node: fx.Node) -> int:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    place = names.index("groups")
    return int(node.args[place] if place < len(node.args) else node.kwargs.get("groups", 1))  # type: ignore[arg-type]


def _equal_constants(before: object, after: Value) -> Tensor | None:
    """Return where a tensor is the same constant as before, None if that is nowhere known."""
    was, is_now = (before.known() if isinstance(before, Value) else None), after.known()
    return None if was is None or is_now is None or was.shape != is_now.shape else was == is_now


def _of_all(call: Call | None, holds: Tensor, shape: torch.Size) -> Tensor | None:
    """Return of a tensor what holds for a part of it, which an operation picks; nothing is said of the rest.

    What does not hold for one of the entries that are picked along a dimension does not for any; None if it is not
    known which they are.
    """
    if call is None or call.operator not in ("select", "slice", "narrow"):
        return None
    axis = call["dim"] % len(shape)
    holds = holds.unsqueeze(axis) if call.operator == "select" else holds.all(dim=axis, keepdim=True)
    return holds.expand(shape)


def _is_view(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not node.target._schema.is_mutable


def _tensors_in(example: Any) -> list[Tensor]:
    if isinstance(example, Tensor):
        return [example]
    return [t for t in example if isinstance(t, Tensor)] if isinstance(example, list | tuple) else []


class UnknownSizeError(ValueError):
    """A size depends on values of the input."""


class NoOperatorError(ValueError):
    """A graph calls a function of Python, as those by which torch.vmap works, for a tensor."""


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


def _as_list(values: Any) -> list[Value]:
    return [v for v in (values if isinstance(values, list | tuple) else [values]) if isinstance(v, Value)]


@functools.cache
def _forwards_of_convolutions() -> tuple[Any, ...]:
    return (
        *(nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward),
        *(nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward),
    )
