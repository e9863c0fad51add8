"""Changes of one operation's parameters that stand in for a multiplication of its input or its output by factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from bmrs.graph.analysis import Analysis
from bmrs.graph.channels import varying_axes
from bmrs.graph.operators import CONVOLUTIONS, LINEAR, TRANSPOSED_CONVOLUTIONS
from bmrs.graph.rules import Call
from bmrs.graph.values import Value

MATRIX_PRODUCTS = (*LINEAR, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
AFFINE_NORMS = {"batch_norm": 1, "instance_norm": 1, "group_norm": 1, "layer_norm": -1}
"""Normalisations by the dimension that their weights lie along."""

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


class BarredError(Exception):
    """Factors cannot move on; the message says why, as the end of a sentence."""


class Edits:
    """Makes the edits of operations.

    Args:
        analysis: the network.
        new_biases: names of biases that operations without one get.
    """

    def __init__(self, analysis: Analysis, new_biases: Mapping[fx.Node, str]) -> None:
        self._calls, self._values, self._new_biases = analysis.calls, analysis.values, new_biases

    def rows(self, node: fx.Node, call: Call, factors: Tensor) -> Edit:
        """Return the edit of W and b that makes the operation f·(W·x + b)."""
        vector = vector_of(factors, AFFINE_NORMS.get(call.operator, _channel_axis(call)))
        weight = own(call["mat2"] if call.operator == "addmm" else call["weight"])
        bias_value = call["self"] if call.operator == "addmm" else call["bias"]
        names = [weight]
        if bias_value is not None:
            names.append(own(bias_value))
        elif node in self._new_biases:
            names.append(self._new_biases[node])
        elif call.operator in AFFINE_NORMS:
            raise BarredError(f"{node.name} has no bias")
        if call.operator in TRANSPOSED_CONVOLUTIONS and call["groups"] > 1:
            raise BarredError(f"{node.name} is grouped and transposed")
        rows = 1 if call.operator == "addmm" or call.operator in TRANSPOSED_CONVOLUTIONS else 0
        expected = call["mat2"] if call.operator == "addmm" else call["weight"]
        if expected.shape[rows] != len(vector):
            raise BarredError(f"{node.name} has a weight of another shape")

        def apply(tensors: Tensors) -> None:
            for name, dim in zip(names, (rows, 0), strict=False):
                shape = [1] * tensors[name].dim()
                shape[dim] = -1
                tensors[name].mul_(vector.to(tensors[name].device).view(shape))

        return Edit(node, tuple(names), vector, apply)

    def columns(self, node: fx.Node, call: Call, source: fx.Node, factors: Tensor) -> Edit:
        """Return the edit of W that makes the operation W·(f·x)."""
        x = "mat1" if call.operator == "addmm" else "input"
        if call[x] is not self._values[source]:
            raise BarredError(f"{node.name} takes it as a weight")
        vector = vector_of(factors, _channel_axis(call))
        value = call["mat2"] if call.operator == "addmm" else call["weight"]
        name, shape = own(value), value.shape
        if call.operator in ("addmm", *TRANSPOSED_CONVOLUTIONS):
            per_weight = vector.view(-1, *[1] * (len(shape) - 1))
        else:
            groups = call["groups"] or 1
            per_weight = vector.view(groups, -1).repeat_interleave(shape[0] // groups, dim=0)
            per_weight = per_weight.view(*shape[:2], *[1] * (len(shape) - 2))

        def apply(tensors: Tensors) -> None:
            tensors[name].mul_(per_weight.to(tensors[name].device))

        return Edit(node, (name,), vector, apply)

    def recurrent_columns(self, node: fx.Node, call: Call, source: fx.Node, factors: Tensor) -> list[Edit]:
        """Return the edits of the weights with which a recurrent layer reads its input."""
        x = "data" if call["input"] is None else "input"
        states = call["hx"] if isinstance(call["hx"], list) else [call["hx"]]
        if call[x] is not self._values[source] or any(state is self._values[source] for state in states):
            raise BarredError(f"{node.name} takes it as a state")
        vector = vector_of(factors, -1)
        parameters = call["params"]
        directions = 2 if call["bidirectional"] else 1
        per_direction = len(parameters) // (call["num_layers"] * directions)
        edits = []
        for value in parameters[: directions * per_direction : per_direction]:
            name = own(value)

            def apply(tensors: Tensors, name: str = name) -> None:
                tensors[name].mul_(vector.to(tensors[name].device))

            edits.append(Edit(node, (name,), vector, apply))
        return edits

    def parameter(self, node: fx.Node, name: str, factors: Tensor, part: Part | None) -> Edit:
        """Return the edit that multiplies a parameter or a slice of it."""

        def apply(tensors: Tensors) -> None:
            tensor = tensors[name]
            if part is not None:
                dim, start, end = part
                tensor = tensor.narrow(dim, start, end - start)
            tensor.mul_(factors.to(tensor.device))

        return Edit(node, (name,), factors, apply, part)

    def columns_of_each(self, node: fx.Node, source: fx.Node, factors: Tensor) -> Edit:
        """Return the edit of all matrices, as experts have them, that makes the operation W·(f·x), or (x·f)·W."""
        place = 0 if node.args[0] is source else 1
        summed = factors.dim() - 1 if place == 0 else factors.dim() - 2
        vector = vector_of(factors, summed)
        name, axis = self._matrices(node.args[1 - place], node, 1 if place == 0 else 2)
        shape = [1, 1, 1]
        shape[axis] = -1

        def apply(tensors: Tensors) -> None:
            tensors[name].mul_(vector.to(tensors[name].device).view(shape))

        return Edit(node, (name,), vector, apply)

    def _matrices(self, node: object, reader: fx.Node, axis: int) -> tuple[str, int]:
        """Return the parameter of which matrices are picked, and which of its dimensions one of theirs is."""
        while isinstance(node, fx.Node) and (call := self._calls.get(node)) is not None:
            if any(user is not reader for user in node.users) or len(call.shape) != 3:
                break
            if call.operator in ("transpose", "mT"):
                swapped = {call["dim0"] % 3, call["dim1"] % 3} if call.operator == "transpose" else {1, 2}
                axis = next(iter(swapped - {axis})) if axis in swapped else axis
            elif call.operator != "index" or len(call["indices"]) != 1 or len(call["self"].shape) != 3:
                break
            reader, node = node, node.args[0]
        value = self._values.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, Value) or len(value.shape) != 3 or axis == 0:
            raise BarredError(f"forward it cannot pass {reader.name}")
        return own(value), axis

    def statistics(self, node: fx.Node, call: Call, factors: Tensor) -> Edit:
        """Return the edit that makes a batch norm of x what it was of f·x.

        The statistics become those of x, so that the layer can be trained further, and the weight makes up for eps. A
        channel with factor 0 has a constant output.
        """
        vector, eps = vector_of(factors, 1), call["eps"]
        weight, bias, mean, var = (
            own(call[name]) for name in ("weight", "bias", "running_mean", "running_var")
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


def own(value: Value | None) -> str:
    """Return the name of the parameter that a value is.

    Raises:
        BarredError: it is none.
    """
    if value is None or value.parameter is None:
        raise BarredError("it has no weight of its own")
    return value.parameter


def _channel_axis(call: Call) -> int:
    """Return the dimension of a linear or convolution layer's channels, from the end, as the batch may be missing."""
    return -1 if call.operator in LINEAR else 1 - len(call["weight"].shape) if call["weight"] else 1


def vector_of(factors: Tensor, axis: int) -> Tensor:
    """Return factors that vary along one dimension alone as a vector."""
    axis %= factors.dim()
    if set(varying_axes(factors)) - {axis}:
        raise BarredError("it scales parts of one channel differently")
    for d in range(factors.dim() - 1, -1, -1):
        if d != axis:
            factors = factors.select(d, 0)
    return factors
