"""Recurrent layers: LSTM, GRU and RNN, stacked or in both directions.

A hidden unit is a row of each gate's block in the weights and biases, a column of the recurrent weight and of the next
layer's, and an entry of all states. Others read it through these columns, the layer's output and its last state; what
is elementwise in a step stays within the unit. It leaves where the columns are zeros, as noise on hidden units makes
them, and nothing behind reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bmrs.graph.channels import EqualNumbers, Read, varying_axes, without_repetition
from bmrs.graph.operators import CELLS, GATES
from bmrs.graph.rules.contraction import uniform
from bmrs.graph.rules.registry import Call, rule
from bmrs.graph.values import Findings, Value

_CUT = "it meets a tensor that cannot be cut"


@dataclass(frozen=True)
class _Direction:
    """One direction of one layer.

    Attributes:
        into, recurrent: its weights.
        biases: its biases.
        projection: its third weight, of an LSTM with projections.
        units: channels of its hidden units.
        states: channels of what it hands on: the units, or their projections.
    """

    into: Value
    recurrent: Value
    biases: Sequence[Value]
    projection: Value | None
    units: Tensor
    states: Tensor


@rule(*GATES)
def recurrent(findings: Findings, call: Call) -> list[Value]:
    """Follow recurrent layers, whose input can lose channels, and which can lose hidden units."""
    x, initial = call["input"] or call["data"], call["hx"]
    initial = initial if isinstance(initial, list) else [initial]
    projected = len(initial) == 2 and initial[0].shape[-1] != initial[1].shape[-1]
    parameters: list[Value] = list(call["params"])
    number = 2 + 2 * call["has_biases"] + projected
    parts = [parameters[i : i + number] for i in range(0, len(parameters), number)]
    directions = [_direction(findings, part, GATES[call.operator], projected) for part in parts]
    both = 2 if call["bidirectional"] else 1
    layers = [directions[i : i + both] for i in range(0, len(directions), both)]

    _read_input(findings, x, [direction.into for direction in layers[0]])
    for before, layer in pairwise(layers):
        handed_on = torch.cat([direction.states for direction in before])
        for direction in layer:
            _read_columns(findings, direction.into, handed_on, by=direction.units)
    units, states = (
        torch.stack([getattr(direction, name) for direction in directions]) for name in ("units", "states")
    )
    # Sizes that are equal are taken for those of a layer without projections.
    least = states.shape[1] + 1 if projected else 0
    note = (
        "as many hidden units stay in each layer and direction" if len(units) > 1 else "projections are fewer"
    )
    findings.add(EqualNumbers(units, least=least), note)
    for value, channels in zip(initial, (states, units), strict=False):
        _tie_state(findings, value, channels)

    output = torch.cat([direction.states for direction in layers[-1]]).expand(call.shapes[0])
    results = [Value(call.shapes[0], (output,))]
    for shape, channels in zip(call.shapes[1:], (states, units), strict=False):
        results.append(Value(shape, (_along_states(channels, shape),)))
    return results


@rule(*CELLS)
def cell(findings: Findings, call: Call) -> list[Value]:
    """Follow one step of a recurrence; its units are those of the states that it returns."""
    states: list[Value] = call["hx"] if isinstance(call["hx"], list) else [call["hx"]]
    into, recurrent, biases = call["w_ih"], call["w_hh"], [call["b_ih"], call["b_hh"]]
    gates = CELLS[call.operator]
    units = findings.new_layer([into.shape[0] // gates], 0)
    for value in (into, recurrent, *filter(None, biases)):
        _tie(findings, value, 0, units.repeat(gates))
    _read_input(findings, call["input"], [into])
    _read_input(findings, states[0], [recurrent])
    # What is kept of a state from step to step: of an LSTM the second one, of a plain recurrence nothing.
    for value in states[1:] if len(states) > 1 else states[: call.operator == "gru_cell"]:
        _tie_state(findings, value, units[None])
    return [Value(shape, (units.expand(shape),)) for shape in call.shapes]


def _direction(findings: Findings, part: list[Value], gates: int, projected: bool) -> _Direction:
    into, recurrent, *biases = part
    projection = biases.pop() if projected else None
    units = findings.new_layer([into.shape[0] // gates], 0)
    for value in (into, recurrent, *biases):
        _tie(findings, value, 0, units.repeat(gates))
    states = units
    if projection is not None:
        states = findings.ties.new(projection.shape[0])
        findings.stay(states, "it is a projection of a recurrent layer")
        _tie(findings, projection, 0, states)
        _read_columns(findings, projection, units, by=states)
    _read_columns(findings, recurrent, states, by=units)
    return _Direction(into, recurrent, biases, projection, units, states)


def _tie(findings: Findings, value: Value, axis: int, channels: Tensor) -> None:
    own = value.channels_along(axis)
    if own is not None:
        findings.tie(own, channels)
        return
    findings.stay_all(value, _CUT)
    findings.stay(channels, _CUT)


def _read_columns(findings: Findings, weight: Value, channels: Tensor, *, by: Tensor) -> None:
    """Note that units read states through the columns of a weight, unless these are zeros."""
    _tie(findings, weight, 1, channels)
    findings.add(
        Read(channels, by_any=(by,), quiet=_zero_columns(weight)), "the recurrent layer itself reads it"
    )


def _zero_columns(weight: Value) -> Tensor:
    if weight.constant is None:
        return torch.zeros(weight.shape[1], dtype=torch.bool)
    (constant,) = without_repetition(weight.constant)
    return (constant == 0).all(dim=0).expand(weight.shape[1])


def _read_input(findings: Findings, x: Value, weights: Sequence[Value]) -> None:
    axis = len(x.shape) - 1
    for layer in x.layers:
        if varying_axes(layer) != (axis,):
            findings.stay(layer, "a recurrent layer runs over its dimension")
    channels = x.channels_along(axis)
    for weight in weights:
        columns = weight.channels_along(1)
        if channels is None and columns is not None:
            findings.stay(columns, _CUT)
        elif channels is not None:
            _tie(findings, weight, 1, channels)
    if channels is not None:
        zero = torch.zeros_like(channels, dtype=torch.bool)
        if x.constant is not None:
            zero = (uniform(x.constant, range(axis)).flatten().expand(channels.shape) == 0) | zero
        findings.add(Read(channels, quiet=zero), "a recurrent layer reads it")


def _along_states(channels: Tensor, shape: torch.Size) -> Tensor:
    """Return channels of all layers and directions, of shape (layers · directions, units), laid over their states."""
    between = [1] * (len(shape) - 2)
    return channels.view(len(channels), *between, -1).expand(shape)


def _tie_state(findings: Findings, value: Value, channels: Tensor) -> None:
    """Tie an initial state to the units that it is one of."""
    states = _along_states(channels, value.shape)
    axis = len(value.shape) - 1
    if not any(axis in varying_axes(layer) for layer in value.layers) and value.shape[axis] > 1:
        findings.stay(channels, "its initial state cannot be cut")
        return
    for layer in value.layers:
        axes = set(varying_axes(layer))
        if axis in axes and axes <= {0, axis}:
            findings.tie(layer, states)
        else:
            findings.stay(layer, "it lies along another dimension of a recurrent layer's state")
