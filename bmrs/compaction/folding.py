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
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bmrs.compaction.edits import (
    AFFINE_NORMS,
    MATRIX_PRODUCTS,
    BarredError,
    Edit,
    Edits,
    Part,
    own,
    vector_of,
)
from bmrs.graph.analysis import Analysis
from bmrs.graph.channels import compressed, varying_axes
from bmrs.graph.operators import GATES, RESHAPINGS
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
_PERMUTATIONS = ("permute", "transpose", "t", "numpy_T", "mT", "movedim", "swapaxes")
_PICKS = ("select", "slice", "narrow", "flip")
_REDUCTIONS = ("mean", "sum", "amax")

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
        except BarredError as error:
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
        self.calls, self.values = analysis.calls, analysis.values
        self._edits = Edits(analysis, new_biases)
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
            return [self._edits.parameter(noise, value.parameter, factors, None)]
        try:
            return self._backward(noise.args[0], noise, factors)
        except BarredError as error:
            obstacle = error
        try:
            return self._forward(noise, factors)
        except BarredError as error:
            raise BarredError(f"{obstacle}, and {error}") from None

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
        return call is not None and call.operator in (*RESHAPINGS, *_PERMUTATIONS, *_SAME_TENSOR)

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
            raise BarredError("backward it meets what has no parameters")
        others = [user for user in node.users if user is not reader]
        if others:
            raise BarredError(f"backward it would act on {others[0].name} too")
        call = self.calls[node]
        if (its_part := self._slice(node)) is not None:
            return [self._edits.parameter(node, call["self"].parameter, factors, its_part)]
        if call.operator in MATRIX_PRODUCTS or call.operator in AFFINE_NORMS:
            return [self._edits.rows(node, call, factors)]
        if call.operator == "embedding":
            return [self._edits.parameter(node, own(call["weight"]), vector_of(factors, -1), None)]
        if call.operator in _HOMOGENEOUS:
            return self._backward(node.args[0], node, factors)
        if call.operator in _POOLS:
            return self._backward(node.args[0], node, _resampled(call, factors, self._shape(node.args[0])))
        if call.operator in RESHAPINGS:
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
                    except BarredError:
                        continue
        raise BarredError(f"backward it cannot pass {node.name}")

    def _forward(self, node: fx.Node, factors: Tensor) -> list[Edit]:
        edits: list[Edit] = []
        if bool((factors == 1).all()):
            return edits
        for reader in node.users:
            call = self.calls.get(reader)
            if reader.target is torch.ops.aten._assert_tensor_metadata.default:
                continue
            if call is None:
                raise BarredError("forward it meets the model's output")
            if call.operator in MATRIX_PRODUCTS:
                edits.append(self._edits.columns(reader, call, node, factors))
            elif call.operator in GATES:
                edits += self._edits.recurrent_columns(reader, call, node, factors)
            elif call.operator == "bmm":
                edits.append(self._edits.columns_of_each(reader, node, factors))
            elif call.operator == "batch_norm" and not call["training"]:
                edits.append(self._edits.statistics(reader, call, factors))
            elif call.operator in _HOMOGENEOUS:
                edits += self._forward(reader, factors)
            elif call.operator in _POOLS:
                edits += self._forward(reader, _resampled(call, factors, call.shape))
            elif call.operator in (*RESHAPINGS, *_PERMUTATIONS, *_PICKS):
                edits += self._forward(reader, compressed(_run(call, factors)))
            elif call.operator in _REDUCTIONS:
                edits += self._forward(reader, _reduced(call, factors))
            elif call.operator in ("cat", "select_scatter"):
                edits += self._forward(reader, self._put_together(reader, call, node, factors))
            elif call.operator == "mul" and reader.args[0] is not reader.args[1]:
                edits += self._forward(reader, factors.expand(call.shape))
            else:
                raise BarredError(f"forward it cannot pass {reader.name}")
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
            raise BarredError("backward it meets what has no parameters")
        return value.shape


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _resampled(call: Call, factors: Tensor, shape: torch.Size) -> Tensor:
    """Return factors on the other side of a pool, along whose windows they must not vary."""
    rank = factors.dim()
    windows = range(rank - next(int(letter) for letter in call.operator if letter.isdigit()), rank)
    if set(windows) & set(varying_axes(factors)):
        raise BarredError("it scales what is pooled differently")
    for d in windows:
        factors = factors.narrow(d, 0, 1)
    return factors.expand(shape)


def _reduced(call: Call, factors: Tensor) -> Tensor:
    """Return factors behind a sum, mean or maximum over dimensions along which they do not vary."""
    rank = factors.dim()
    dims = call["dim"] if isinstance(call["dim"], list) else [] if call["dim"] is None else [call["dim"]]
    over = {d % rank for d in dims} or set(range(rank))
    if over & set(varying_axes(factors)):
        raise BarredError("it scales what is summed differently")
    for d in over:
        factors = factors.narrow(d, 0, 1)
    return compressed(factors.reshape(call.shape))


def _run(call: Call, x: Tensor) -> Tensor:
    result = call.target(**{**call.arguments, "self": x})
    assert isinstance(result, Tensor)
    assert result.numel() == math.prod(call.shape)
    return result
