"""Noise factors moved into the parameters around them.

A noise layer multiplies a tensor y by factors f = E[θ] · mask ≥ 0. A network that computes the same without it is found
in one of three ways, and exactly so:

- Backward, towards the inputs: f·(W·y + b) = (f·W)·y + f·b, so that linear layers, convolutions and the affine parts of
  normalisations take f up in their rows; f·r(y) = r(f·y) for what is positively homogeneous and keeps channels apart,
  such as ReLU and pooling; f·(a + b) = f·a + f·b; f·(a · b) = (f·a) · b. Nothing else may read a tensor on the way,
  because it would see the factors too.
- Forward, towards the outputs: W·(f·y) = (W·f)·y, so that linear layers, convolutions and recurrent layers take f up
  in their columns and batch norms in their statistics, behind what is homogeneous or moves elements. All that read the
  tensor have to.
- Where y is itself a parameter or a part of one, as the weights of recurrent layers are, it becomes f·y.

Parameters that are used several times can take factors up only if they meet the same ones every time. Where no way
is open, the factors stay, as one multiplication.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bmrs.graph.analysis import Analysis
from bmrs.graph.channels import compressed, varying_axes
from bmrs.graph.operators import CONVOLUTIONS, GATES, LINEAR, TRANSPOSED_CONVOLUTIONS
from bmrs.graph.rules import Call
from bmrs.graph.values import Value

_HOMOGENEOUS = (
    *("relu", "leaky_relu", "dropout", "feature_dropout", "alpha_dropout", "mark_noise"),
    *("to", "_to_copy", "contiguous", "clone", "alias", "detach", "abs"),
)
_POOLS = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
)
_RESHAPINGS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze")
_PERMUTATIONS = ("permute", "transpose", "t", "numpy_T", "mT", "movedim", "swapaxes")
_PICKS = ("select", "slice", "narrow", "flip")
_REDUCTIONS = ("mean", "sum", "amax")
_MATRIX_PRODUCTS = (*LINEAR, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
_AFFINE_NORMS = {"batch_norm": 1, "instance_norm": 1, "group_norm": 1, "layer_norm": -1}

# They may return what they take, as dropout does in evaluation mode.
_SAME_TENSOR = (
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "to",
    "contiguous",
    "alias",
    "detach",
    "slice",
    "select",
)

Tensors = dict[str, Tensor]
Part = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of the parameters of one operation.

    Attributes:
        node: the operation.
        parameters: qualified names of those that change.
        factors: what they are changed by.
        apply: changes them, given all tensors by name; float64, in place.
        part: where the operation reads a slice of a parameter alone, its dimension, start and end.
    """

    node: fx.Node
    parameters: tuple[str, ...]
    factors: Tensor
    apply: Callable[[Tensors], None]
    part: Part | None = None


class _BarredError(Exception):
    """Factors cannot move on; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Folding:
    """How the noise layers of a network are folded.

    Attributes:
        edits: changes of parameters, in the order in which they are to be made.
        remaining: by name of a noise layer that cannot be folded, why not.
    """

    edits: list[Edit]
    remaining: dict[str, str]


def fold_noise(analysis: Analysis, new_biases: Mapping[fx.Node, str]) -> Folding:
    """Find the parameters that take up the factors of every noise layer.

    Args:
        analysis: the network.
        new_biases: names of biases that operations without one get.
    """
    folder = _Folder(analysis, new_biases)
    proposals: dict[str, list[Edit]] = defaultdict(list)
    remaining: dict[str, str] = {}
    for node, call in analysis.calls.items():
        if call.operator != "mark_noise":
            continue
        name, factors = call["name"], call["factors"].tensor.detach().cpu().double()
        if folder.would_overwrite(node):
            remaining[name] = "what follows works in place, on a tensor that others read"
        if bool((_of_what_stays(analysis, call, factors) == 1).all()):
            continue
        shape = [1] * len(call.shape)
        shape[call["dim"]] = len(factors)
        placed = compressed(factors.view(shape).expand(call.shape))
        try:
            proposals[name] += folder.fold(node, placed)
        except _BarredError as error:
            remaining.setdefault(name, str(error))
    edits = []
    for name, proposed in proposals.items():
        reason = remaining.get(name) or folder.contradiction(proposed)
        if reason:
            remaining[name] = reason
        else:
            edits += folder.once_each(proposed)
    return Folding(edits, remaining)


def _of_what_stays(analysis: Analysis, call: Call, factors: Tensor) -> Tensor:
    kept = analysis.kept(call["x"], call["dim"])
    return factors if kept is None else factors[kept]


class _Folder:
    def __init__(self, analysis: Analysis, new_biases: Mapping[fx.Node, str]) -> None:
        self.calls, self.values, self.new_biases = analysis.calls, analysis.values, new_biases
        self.users: dict[int, set[fx.Node]] = defaultdict(set)
        for node, call in analysis.calls.items():
            for value in call.values():
                if value.tensor is not None:
                    self.users[id(value.tensor)].add(node)
        self.tensors = {name: value.tensor for name, value in analysis.parameters.items()}

    def fold(self, noise: fx.Node, factors: Tensor) -> list[Edit]:
        """Return the edits that stand in for a noise layer's multiplication."""
        value = self.calls[noise]["x"]
        if value.parameter is not None:
            return [self._parameter(noise, value.parameter, factors, None)]
        try:
            return self._backward(noise.args[0], noise, factors)
        except _BarredError as error:
            obstacle = error
        try:
            return self._forward(noise, factors)
        except _BarredError as error:
            raise _BarredError(f"{obstacle}, and {error}") from None

    def would_overwrite(self, noise: fx.Node) -> bool:
        """Return whether an operation in place would, without the noise layer, overwrite a tensor that others read."""
        behind = [noise]
        for node in behind:
            behind += [user for user in node.users if self._shares_memory(user) and user not in behind]
        beside = [user for user in getattr(noise.args[0], "users", ()) if user is not noise]
        for node in beside:
            beside += [user for user in node.users if self._shares_memory(node) and user not in beside]
        if any(_writes(node) for node in beside):
            return True
        writes = any(_writes(user) for node in behind for user in node.users)
        return writes and self._is_read_by_others(noise.args[0], noise)

    def _shares_memory(self, node: fx.Node) -> bool:
        call = self.calls.get(node)
        return call is not None and call.operator in (*_RESHAPINGS, *_PERMUTATIONS, *_SAME_TENSOR)

    def _is_read_by_others(self, node: object, reader: fx.Node) -> bool:
        if not isinstance(node, fx.Node) or node not in self.calls:
            return True
        if any(user is not reader for user in node.users):
            return True
        return (self._shares_memory(node) or _writes(node)) and self._is_read_by_others(node.args[0], node)

    def contradiction(self, edits: list[Edit]) -> str:
        """Return why edits cannot be made, as another use of a parameter meets other factors; "" if they can."""
        by_parameter: dict[str, list[Edit]] = defaultdict(list)
        for edit in edits:
            for name in edit.parameters:
                by_parameter[name].append(edit)
        for name, its_edits in by_parameter.items():
            tensor = self.tensors.get(name)
            users = self.users[id(tensor)] if tensor is not None else {its_edits[0].node}
            if len(users) == 1:
                continue
            for part in dict.fromkeys(edit.part for edit in its_edits):
                of_part = [edit for edit in its_edits if edit.part == part]
                same = all(torch.equal(edit.factors, of_part[0].factors) for edit in of_part)
                readers = {user for user in users if part is None or self._may_read(user, part)}
                if {edit.node for edit in of_part} != readers or not same or len(of_part) != len(readers):
                    return f"{name!r} is also used without this noise"
        return ""

    def _may_read(self, user: fx.Node, part: Part) -> bool:
        """Return whether an operation may read a part of a parameter, as all do but slices beside it."""
        read = self._slice(user)
        return read is None or read[0] != part[0] or (read[1] < part[2] and part[1] < read[2])

    def _slice(self, node: fx.Node) -> Part | None:
        """Return dimension, start and end of a slice of a parameter, None for another operation."""
        call = self.calls.get(node)
        if call is None or call.operator != "slice" or call["step"] != 1 or call["self"].parameter is None:
            return None
        dim = call["dim"] % len(call.shape)
        start = call["start"] or 0
        start += call["self"].shape[dim] if start < 0 else 0
        return dim, start, start + call.shape[dim]

    def once_each(self, edits: list[Edit]) -> list[Edit]:
        """Return one edit for every parameter, where several uses of it ask for the same one."""
        seen: set[tuple[tuple[str, ...], Part | None]] = set()
        result = []
        for edit in edits:
            shared = any(
                len(self.users[id(self.tensors[name])]) > 1
                for name in edit.parameters
                if name in self.tensors
            )
            key = (edit.parameters, edit.part)
            if shared and key in seen:
                continue
            seen.add(key)
            result.append(edit)
        return result

    def _backward(self, node: object, reader: fx.Node, factors: Tensor) -> list[Edit]:
        if not isinstance(node, fx.Node) or node not in self.calls:
            raise _BarredError("backward it meets what has no parameters")
        others = [user for user in node.users if user is not reader]
        if others:
            raise _BarredError(f"backward it would act on {others[0].name} too")
        call = self.calls[node]
        if (its_part := self._slice(node)) is not None:
            return [self._parameter(node, call["self"].parameter, factors, its_part)]
        if call.operator in _MATRIX_PRODUCTS or call.operator in _AFFINE_NORMS:
            return [self._rows(node, call, factors)]
        if call.operator == "embedding":
            return [self._parameter(node, self._own(call["weight"]), _vector(factors, -1), None)]
        if call.operator in _HOMOGENEOUS:
            return self._backward(node.args[0], node, factors)
        if call.operator in _POOLS:
            return self._backward(node.args[0], node, _resampled(call, factors, self._shape(node.args[0])))
        if call.operator in _RESHAPINGS:
            return self._backward(node.args[0], node, compressed(factors.reshape(self._shape(node.args[0]))))
        if call.operator in _PERMUTATIONS:
            places = torch.arange(factors.numel()).view(self._shape(node.args[0]))
            moved = _run(call, places).flatten()
            back = torch.empty_like(moved)
            back[moved] = torch.arange(len(moved))
            return self._backward(node.args[0], node, compressed(factors.flatten()[back].view(places.shape)))
        if call.operator == "add" and call["alpha"] == 1:
            parts = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            if (
                len(parts) == 2
                and parts[0] is not parts[1]
                and all(self._shape(p) == factors.shape for p in parts)
            ):
                return [edit for part in parts for edit in self._backward(part, node, factors)]
        if call.operator == "mul":
            for part in (a for a in node.args[:2] if isinstance(a, fx.Node)):
                if self._shape(part) == factors.shape:
                    try:
                        return self._backward(part, node, factors)
                    except _BarredError:
                        continue
        raise _BarredError(f"backward it cannot pass {node.name}")

    def _forward(self, node: fx.Node, factors: Tensor) -> list[Edit]:
        edits: list[Edit] = []
        if bool((factors == 1).all()):
            return edits
        for reader in node.users:
            call = self.calls.get(reader)
            if reader.target is torch.ops.aten._assert_tensor_metadata.default:
                continue
            if call is None:
                raise _BarredError("forward it meets the model's output")
            if call.operator in _MATRIX_PRODUCTS:
                edits.append(self._columns(reader, call, node, factors))
            elif call.operator in GATES:
                edits += self._recurrent_columns(reader, call, node, factors)
            elif call.operator == "bmm":
                edits.append(self._columns_of_each(reader, node, factors))
            elif call.operator == "batch_norm" and not call["training"]:
                edits.append(self._statistics(reader, call, factors))
            elif call.operator in _HOMOGENEOUS:
                edits += self._forward(reader, factors)
            elif call.operator in _POOLS:
                edits += self._forward(reader, _resampled(call, factors, call.shape))
            elif call.operator in (*_RESHAPINGS, *_PERMUTATIONS, *_PICKS):
                edits += self._forward(reader, compressed(_run(call, factors)))
            elif call.operator in _REDUCTIONS:
                edits += self._forward(reader, _reduced(call, factors))
            elif call.operator in ("cat", "select_scatter"):
                edits += self._forward(reader, self._put_together(reader, call, node, factors))
            elif call.operator == "mul" and reader.args[0] is not reader.args[1]:
                edits += self._forward(reader, factors.expand(call.shape))
            else:
                raise _BarredError(f"forward it cannot pass {reader.name}")
        return edits

    def _put_together(self, node: fx.Node, call: Call, source: fx.Node, factors: Tensor) -> Tensor:
        """Return the factors of a tensor that consists of others, of which one has some."""

        def placed(argument: object) -> Tensor:
            ones = torch.ones((), dtype=factors.dtype)
            return factors if argument is source else ones.expand(self._shape(argument))

        if call.operator == "cat":
            parts = [placed(part) for part in node.args[0]]  # type: ignore[union-attr]
            return compressed(torch.cat(parts, call["dim"]))
        whole, replacement = map(placed, node.args[:2])
        return compressed(torch.select_scatter(whole, replacement, call["dim"], call["index"]))

    def _shape(self, node: object) -> torch.Size:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, Value):
            raise _BarredError("backward it meets what has no parameters")
        return value.shape

    def _rows(self, node: fx.Node, call: Call, factors: Tensor) -> Edit:
        """Return the edit of W and b that makes the operation f·(W·x + b)."""
        vector = _vector(factors, _AFFINE_NORMS.get(call.operator, _channel_axis(call)))
        weight = self._own(call["mat2"] if call.operator == "addmm" else call["weight"])
        bias_value = call["self"] if call.operator == "addmm" else call["bias"]
        names = [weight]
        if bias_value is not None:
            names.append(self._own(bias_value))
        elif node in self.new_biases:
            names.append(self.new_biases[node])
        elif call.operator in _AFFINE_NORMS:
            raise _BarredError(f"{node.name} has no bias")
        if call.operator in TRANSPOSED_CONVOLUTIONS and call["groups"] > 1:
            raise _BarredError(f"{node.name} is grouped and transposed")
        rows = 1 if call.operator == "addmm" or call.operator in TRANSPOSED_CONVOLUTIONS else 0
        expected = call["mat2"] if call.operator == "addmm" else call["weight"]
        if expected.shape[rows] != len(vector):
            raise _BarredError(f"{node.name} has a weight of another shape")

        def apply(tensors: Tensors) -> None:
            for name, dim in zip(names, (rows, 0), strict=False):
                shape = [1] * tensors[name].dim()
                shape[dim] = -1
                tensors[name].mul_(vector.to(tensors[name].device).view(shape))

        return Edit(node, tuple(names), vector, apply)

    def _columns(self, node: fx.Node, call: Call, source: fx.Node, factors: Tensor) -> Edit:
        """Return the edit of W that makes the operation W·(f·x)."""
        x = "mat1" if call.operator == "addmm" else "input"
        if call[x] is not self.values[source]:
            raise _BarredError(f"{node.name} takes it as a weight")
        vector = _vector(factors, _channel_axis(call))
        value = call["mat2"] if call.operator == "addmm" else call["weight"]
        name, shape = self._own(value), value.shape
        if call.operator in ("addmm", *TRANSPOSED_CONVOLUTIONS):
            per_weight = vector.view(-1, *[1] * (len(shape) - 1))
        else:
            groups = call["groups"] or 1
            per_weight = vector.view(groups, -1).repeat_interleave(shape[0] // groups, dim=0)
            per_weight = per_weight.view(*shape[:2], *[1] * (len(shape) - 2))

        def apply(tensors: Tensors) -> None:
            tensors[name].mul_(per_weight.to(tensors[name].device))

        return Edit(node, (name,), vector, apply)

    def _recurrent_columns(self, node: fx.Node, call: Call, source: fx.Node, factors: Tensor) -> list[Edit]:
        """Return the edits of the weights with which a recurrent layer reads its input."""
        x = "data" if call["input"] is None else "input"
        states = call["hx"] if isinstance(call["hx"], list) else [call["hx"]]
        if call[x] is not self.values[source] or any(state is self.values[source] for state in states):
            raise _BarredError(f"{node.name} takes it as a state")
        vector = _vector(factors, -1)
        parameters = call["params"]
        directions = 2 if call["bidirectional"] else 1
        per_direction = len(parameters) // (call["num_layers"] * directions)
        edits = []
        for value in parameters[: directions * per_direction : per_direction]:
            name = self._own(value)

            def apply(tensors: Tensors, name: str = name) -> None:
                tensors[name].mul_(vector.to(tensors[name].device))

            edits.append(Edit(node, (name,), vector, apply))
        return edits

    def _parameter(self, node: fx.Node, name: str, factors: Tensor, part: Part | None) -> Edit:
        """Return the edit that multiplies a parameter or a slice of it."""

        def apply(tensors: Tensors) -> None:
            tensor = tensors[name]
            if part is not None:
                dim, start, end = part
                tensor = tensor.narrow(dim, start, end - start)
            tensor.mul_(factors.to(tensor.device))

        return Edit(node, (name,), factors, apply, part)

    def _columns_of_each(self, node: fx.Node, source: fx.Node, factors: Tensor) -> Edit:
        """Return the edit of all matrices, as experts have them, that makes the operation W·(f·x), or (x·f)·W."""
        place = 0 if node.args[0] is source else 1
        summed = factors.dim() - 1 if place == 0 else factors.dim() - 2
        vector = _vector(factors, summed)
        name, axis = self._matrices(node.args[1 - place], node, 1 if place == 0 else 2)
        shape = [1, 1, 1]
        shape[axis] = -1

        def apply(tensors: Tensors) -> None:
            tensors[name].mul_(vector.to(tensors[name].device).view(shape))

        return Edit(node, (name,), vector, apply)

    def _matrices(self, node: object, reader: fx.Node, axis: int) -> tuple[str, int]:
        """Return the parameter of which matrices are picked, and which of its dimensions one of theirs is."""
        while isinstance(node, fx.Node) and (call := self.calls.get(node)) is not None:
            if any(user is not reader for user in node.users) or len(call.shape) != 3:
                break
            if call.operator in ("transpose", "mT"):
                swapped = {call["dim0"] % 3, call["dim1"] % 3} if call.operator == "transpose" else {1, 2}
                axis = next(iter(swapped - {axis})) if axis in swapped else axis
            elif call.operator != "index" or len(call["indices"]) != 1 or len(call["self"].shape) != 3:
                break
            reader, node = node, node.args[0]
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, Value) or len(value.shape) != 3 or axis == 0:
            raise _BarredError(f"forward it cannot pass {reader.name}")
        return self._own(value), axis

    def _statistics(self, node: fx.Node, call: Call, factors: Tensor) -> Edit:
        """Return the edit that makes a batch norm of x what it was of f·x.

        The statistics become those of x, so that the layer can be trained further, and the weight makes up for eps. A
        channel with factor 0 has a constant output.
        """
        vector, eps = _vector(factors, 1), call["eps"]
        weight, bias, mean, var = (
            self._own(call[name]) for name in ("weight", "bias", "running_mean", "running_var")
        )

        def apply(tensors: Tensors) -> None:
            f = vector.to(tensors[mean].device)
            zero = f == 0
            divisor = f.masked_fill(zero, 1.0)
            scale = tensors[weight] * (tensors[var] + eps).rsqrt()
            tensors[bias].copy_((tensors[bias] - tensors[mean] * scale).where(zero, tensors[bias]))
            tensors[weight].mul_(((tensors[var] + eps * f**2) / (tensors[var] + eps)).sqrt()).masked_fill_(
                zero, 0.0
            )
            tensors[var].div_(divisor**2)
            tensors[mean].div_(divisor)

        return Edit(node, (weight, bias, mean, var), vector, apply)

    def _own(self, value: Value | None) -> str:
        if value is None or value.parameter is None:
            raise _BarredError("it has no weight of its own")
        return value.parameter


def _channel_axis(call: Call) -> int:
    """Return the dimension of a linear or convolution layer's channels, from the end, as the batch may be missing."""
    return -1 if call.operator in LINEAR else 1 - len(call["weight"].shape) if call["weight"] else 1


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _vector(factors: Tensor, axis: int) -> Tensor:
    """Return factors that vary along one dimension alone as a vector."""
    axis %= factors.dim()
    if set(varying_axes(factors)) - {axis}:
        raise _BarredError("it scales parts of one channel differently")
    for d in range(factors.dim() - 1, -1, -1):
        if d != axis:
            factors = factors.select(d, 0)
    return factors


def _resampled(call: Call, factors: Tensor, shape: torch.Size) -> Tensor:
    """Return factors on the other side of a pool, along whose windows they must not vary."""
    rank = factors.dim()
    windows = range(rank - next(int(letter) for letter in call.operator if letter.isdigit()), rank)
    if set(windows) & set(varying_axes(factors)):
        raise _BarredError("it scales what is pooled differently")
    for d in windows:
        factors = factors.narrow(d, 0, 1)
    return factors.expand(shape)


def _reduced(call: Call, factors: Tensor) -> Tensor:
    """Return factors behind a sum, mean or maximum over dimensions along which they do not vary."""
    rank = factors.dim()
    dims = call["dim"] if isinstance(call["dim"], list) else [] if call["dim"] is None else [call["dim"]]
    over = {d % rank for d in dims} or set(range(rank))
    if over & set(varying_axes(factors)):
        raise _BarredError("it scales what is summed differently")
    for d in over:
        factors = factors.narrow(d, 0, 1)
    return compressed(factors.reshape(call.shape))


def _run(call: Call, x: Tensor) -> Tensor:
    result = call.target(**{**call.arguments, "self": x})
    assert isinstance(result, Tensor)
    assert result.numel() == math.prod(call.shape)
    return result
