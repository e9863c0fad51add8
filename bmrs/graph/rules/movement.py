"""Operators that move elements and change none: they move the channels in just the same way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bmrs.graph.channels import STAYS, compressed, varying_axes, without_repetition
from bmrs.graph.operators import DROPOUTS
from bmrs.graph.rules.contraction import uniform
from bmrs.graph.rules.registry import Call, rule, unknown
from bmrs.graph.values import Findings, Value, combine, joined


@rule(
    *("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "lift_fresh"),
    *(*DROPOUTS, "positive", "real"),
)
def same(findings: Findings, call: Call) -> Value:
    """Follow what returns the tensor itself; dropout does nothing in evaluation mode."""
    value = call["self"] if isinstance(call["self"], Value) else call["input"]
    assert isinstance(value, Value)
    # Tensors written in code, such as indices, are detached.
    tensor = value.tensor if call.operator in ("detach", "alias", "lift_fresh") else None
    return Value(call.shape, value.layers, value.known(), tensor)


@rule(
    *(
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "view_as",
        "reshape_as",
    ),
    *("permute", "transpose", "t", "numpy_T", "mT", "adjoint", "movedim", "moveaxis", "swapaxes", "swapdims"),
    *("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile"),
    *("slice", "select", "narrow", "diagonal", "flip", "roll", "rot90", "unfold", "unbind", "chunk", "split"),
    *(
        "split_with_sizes",
        "tensor_split",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "native_channel_shuffle",
    ),
)
def moved(findings: Findings, call: Call) -> Value | list[Value]:
    """Follow elements of one tensor in another order, some of them several times or not at all."""
    name = "self" if "self" in call.arguments else "input"
    value = call[name]
    others = [v for v in call.values() if v is not value]
    if any(other.tensor is None for other in others) and call.operator in ("repeat_interleave", "roll"):
        findings.stay_all(value, f"{call.operator} depends on the input")
        return [Value(shape) for shape in call.shapes]

    renumbering = {
        "roll": lambda: call["dims"] or range(len(value.shape)),
        "slice": lambda: [call["dim"]] if call["step"] != 1 else [],
        "unfold": lambda: [call["dimension"]],
        "diagonal": lambda: [call["dim1"], call["dim2"]],
    }
    for axis in renumbering.get(call.operator, list)():
        layer = value.layer_along(axis)
        if layer is not None:
            # Which entries it picks depends on their numbers.
            findings.stay(layer, f"{call.operator} counts it")

    _keep_shuffles_whole(findings, call, value)

    def move(x: Tensor) -> Any:
        if call.operator in ("view", "_unsafe_view", "view_as"):
            # Channels are laid out otherwise in memory.
            return x.reshape(call.shape)
        return call.target(**{**plain_arguments(call), name: x})

    results = moved_alike(findings, call, value, move)
    if call.operator in ("view_as", "reshape_as", "expand_as"):
        # The other one gives the sizes: what lies along one dimension of both leaves together, and repetitions with
        # what they are brought to, as under `F.normalize`.
        (result,), other = results, call["other"]
        own = value if call.operator == "expand_as" else result
        operands = [(own.shape, own.layers), (other.shape, other.layers)]
        return [replace(result, layers=combine(findings, result.shape, operands))]
    if call.operator in ("expand", "broadcast_to"):
        behind_groups = _expanded_behind_groups(findings, value, results[0])
        return [behind_groups if value.layers else _expanded_for_channels(findings, value, behind_groups)]
    return results


def _expanded_for_channels(findings: Findings, value: Value, result: Value) -> Value:
    """Let repetitions leave of what all channels share, such as a norm or a gate, with the channels that they meet."""
    offset = len(result.shape) - len(value.shape)
    axes = [axis + offset for axis, size in enumerate(value.shape) if size == 1 < result.shape[axis + offset]]
    if result.layers or len(axes) != 1 or axes[0] == 0:
        return result
    return replace(result, layers=(findings.new_layer(result.shape, axes[0]),))


def _expanded_behind_groups(findings: Findings, value: Value, result: Value) -> Value:
    """Let repetitions leave that are next to what they repeat, which is how keys are brought to the queries of a group.

    Nothing else would tell that fewer of them can stay; wherever that cannot be, what they meet keeps them.
    """
    offset = len(result.shape) - len(value.shape)
    axes = [
        axis + offset
        for axis, size in enumerate(value.shape)
        if axis and size == 1 < result.shape[axis + offset]
        if value.layers and (value.shape[axis - 1] == 1 or value.layer_along(axis - 1) is not None)
    ]
    if len(axes) != 1:
        return result
    layer = findings.new_layer(result.shape, axes[0])
    findings.repetitions.update(without_repetition(layer)[0].flatten().tolist())
    return replace(result, layers=(*result.layers, layer))


def _joined_with_groups(findings: Findings, value: Value) -> Value:
    """Return a value of which groups and their repetitions, if they lie along one dimension, became channels of it."""
    places = findings.repetitions_in(value)
    if places is None:
        return value
    axis = varying_axes(places)[0]
    others = [layer for layer in value.layers if layer is not places]
    groups = next((x for x in others if axis in varying_axes(x)), next(iter(others), None))
    if groups is None:
        return value
    along = without_repetition(places.movedim(axis, -1))[0].flatten()
    repeats = len(along.unique())
    # In turn for each group.
    order = along.view(-1, repeats) if len(along) == places.shape[axis] and not len(along) % repeats else None
    split = groups.unflatten(axis, (-1, repeats)) if order is not None else groups
    if order is None or not (order == order[0]).all() or axis + 1 in varying_axes(compressed(split)):
        findings.stay(places, "repetitions and what they repeat lie in another order")
        return replace(value, layers=tuple(others))
    joined = findings.repeated(split.select(axis + 1, 0), axis, repeats, order[0])
    return replace(value, layers=(*(layer for layer in others if layer is not groups), joined))


def _keep_shuffles_whole(findings: Findings, call: Call, value: Value) -> None:
    """Keep what shuffles take together: blocks of channels for pixels, the same channels of every group."""
    if call.operator == "pixel_shuffle":
        axis, block, along = len(value.shape) - 3, call["upscale_factor"] ** 2, 1
    elif call.operator in ("channel_shuffle", "native_channel_shuffle"):
        axis, block, along = 1, value.shape[1] // call["groups"], 0
    else:
        return
    for layer in value.layers:
        grouped = compressed(layer.unflatten(axis, (-1, block)))
        findings.whole(grouped, [axis + along], f"{call.operator} takes blocks of channels")


def plain_arguments(call: Call) -> dict[str, Any]:
    """Return arguments with values replaced by tensors: their own, or empty ones of their shape."""

    def plain(argument: Any) -> Any:
        if isinstance(argument, Value):
            if argument.tensor is not None:
                return argument.tensor
            return torch.empty(argument.shape, device="meta")
        return [plain(item) for item in argument] if isinstance(argument, list | tuple) else argument

    return {name: plain(argument) for name, argument in call.arguments.items()}


def moved_alike(
    findings: Findings,
    call: Call,
    value: Value,
    move_channels: Callable[[Tensor], Any],
    move_constants: Callable[[Tensor], Any] | None = None,
) -> list[Value]:
    """Return the results of an operation that moves channels and constants of a value as it moves the elements."""
    layers = [_as_list(move_channels(layer)) for layer in value.layers]
    known = value.known()
    constants = None if known is None else _as_list((move_constants or move_channels)(known))
    results = []
    for i, shape in enumerate(call.shapes):
        its_layers = tuple(compressed(moved[i]) for moved in layers)
        for layer in its_layers:
            if varying_axes(layer):
                findings.product(layer)
                if shape.numel() < value.shape.numel():
                    findings.at_least_one(layer)
            else:
                findings.stay(layer, "it is picked by its number")
        its_layers = tuple(layer for layer in its_layers if varying_axes(layer))
        result = Value(shape, its_layers, None if constants is None else compressed(constants[i]))
        if len(shape) < len(value.shape):
            result = _joined_with_groups(findings, result)
        results.append(replace(result, layers=joined(findings, result.layers)))
    return results


def _as_list(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, list | tuple) else [result]


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def padded(findings: Findings, call: Call) -> Value:
    """Follow padding: what is put around stays; reflections and copies are moved elements."""
    value = call["self"]
    pad, mode = list(call["pad"] or call["padding"]), call["mode"] or "constant"
    if call.operator.startswith("reflection"):
        mode = "reflect"
    axes = [len(value.shape) - 1 - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]]
    if mode != "constant":
        # As much has to be left as is copied to the other end.
        along = [layer for layer in value.layers if set(axes) & set(varying_axes(layer))]
        for layer in along:
            findings.stay(layer, f"{mode} padding copies a part of it")
        value = replace(value, layers=tuple(x for x in value.layers if all(x is not y for y in along)))

    def pad_with(fill: float) -> Callable[[Tensor], Tensor]:
        if mode == "constant":
            return lambda x: torch.constant_pad_nd(x, pad, fill)
        return lambda x: torch.ops.aten.pad(x.double(), pad, mode).to(x.dtype)

    fill = call["value"] or 0.0
    if not axes and value.constant is not None:
        # Nothing is put around this size, but may be around others.
        value = replace(value, constant=value.constant.where(value.constant == fill, torch.nan))
    if mode == "constant" and not any(axis in varying_axes(layer) for layer in value.layers for axis in axes):
        # Around all channels alike: the padding belongs to the channel that it pads.
        return moved_alike(findings, call, value, lambda x: _grown(x, call.shape), pad_with(fill))[0]
    return moved_alike(findings, call, value, pad_with(STAYS), pad_with(fill))[0]


def _grown(layer: Tensor, shape: torch.Size) -> Tensor:
    """Return channels that do not vary along the dimensions that grow, for the grown tensor."""
    for d in range(layer.dim()):
        if layer.shape[d] != shape[d]:
            layer = layer.narrow(d, 0, 1)
    return layer.expand(shape)


@rule("im2col")
def windows(findings: Findings, call: Call) -> Value:
    """Follow the channels of feature maps into the columns of windows, where each has as many entries as a window."""
    x: Value = call["self"]
    axis, entries = len(x.shape) - 3, math.prod(call["kernel_size"])

    def in_columns(layer: Tensor) -> Tensor:
        channels = layer[..., :1, :1].flatten(-2)
        channels = compressed(channels).expand(*channels.shape[:axis], x.shape[axis], 1)
        return compressed(channels.repeat_interleave(entries, dim=axis)).expand(call.shape)

    layers = []
    for layer in x.layers:
        if max(varying_axes(layer), default=0) <= axis:
            layers.append(in_columns(layer))
        else:
            findings.stay(layer, "im2col runs over its dimension")
    constant = None
    if x.constant is not None:
        constant = uniform(x.constant, (axis + 1, axis + 2))
        if any(call["padding"]):
            constant = constant.where(constant == 0, torch.nan)
        constant = in_columns(constant)
    return Value(call.shape, tuple(layers), constant)


@rule("col2im")
def overlapped(findings: Findings, call: Call) -> Value:
    """Follow columns of windows back into the channels of feature maps, all entries of a channel at once."""
    x: Value = call["self"]
    axis, entries = len(x.shape) - 2, math.prod(call["kernel_size"])

    def of_channels(tensor: Tensor) -> Tensor:
        parts = tensor.unflatten(axis, (-1, entries))
        return parts[..., :1, :1].expand(*parts.shape[: axis + 1], *call.shape[-2:])

    layers = []
    for layer in x.layers:
        if max(varying_axes(layer), default=0) > axis:
            findings.stay(layer, "col2im runs over its dimension")
            continue
        grouped = compressed(layer.unflatten(axis, (-1, entries)))
        findings.whole(grouped, [axis + 1], "col2im sums up all entries of a channel")
        first = findings.entries(grouped, [d for d in varying_axes(grouped) if d != axis + 1])
        layers.append(
            compressed(of_channels(first.expand(grouped.shape).flatten(axis, axis + 1))).expand(call.shape)
        )
    constant = None
    if x.constant is not None:
        known = uniform(x.constant.unflatten(axis, (-1, entries)), (axis + 1, axis + 2))
        known = known.where(known == 0, torch.nan).expand(*known.shape[: axis + 1], entries, x.shape[-1])
        constant = compressed(of_channels(known.flatten(axis, axis + 1)))
    return Value(call.shape, tuple(layers), constant)


@rule("cat", "concat", "concatenate", "hstack", "vstack", "dstack")
def concatenated(findings: Findings, call: Call) -> Value | list[Value]:
    """Follow tensors behind each other: so are their channels along that dimension, and others are tied."""
    values: list[Value] = [v for v in call["tensors"] if v.shape != torch.Size([0])]
    axis = _STACKED_ALONG.get(call.operator, call["dim"])
    if any(len(value.shape) != len(call.shape) for value in values):  # which get dimensions first
        return unknown(findings, call)
    axis %= len(call.shape)
    along = [value.layer_along(axis) for value in values]
    layers = []
    if any(layer is not None for layer in along):
        parts = [
            torch.full((1,), STAYS).expand(value.shape) if layer is None else layer
            for value, layer in zip(values, along, strict=True)
        ]
        layer = _cat(parts, axis, call.shape)
        findings.product(layer)
        layers.append(layer)
    # The other dimensions, looked at where the concatenated one has a single entry.
    operands, of_fixed_size = [], False
    for value, own in zip(values, along, strict=True):
        if value.shape[axis] == 0:
            of_fixed_size = of_fixed_size or not value.layers
            continue
        shape = [1 if d == axis else size for d, size in enumerate(value.shape)]
        operands.append((shape, [x.narrow(axis, 0, 1) for x in value.layers if x is not own]))
    if not operands:
        return Value(call.shape)
    for layer in combine(findings, operands[0][0], operands):
        if of_fixed_size:
            findings.stay(layer, "it meets a tensor without entries, whose other sizes stay")
        elif layers and set(varying_axes(layer)) & set(varying_axes(layers[0])):
            findings.stay(layer, "channels along different dimensions meet")
        else:
            layers.append(layer.expand(call.shape))
    return Value(call.shape, tuple(layers), _known_cat(values, axis, call.shape))


_STACKED_ALONG = {"vstack": 0, "hstack": 1, "dstack": 2}


def _cat(parts: list[Tensor], axis: int, shape: torch.Size) -> Tensor:
    # Along the other dimensions none of them may vary.
    for d in range(len(shape)):
        if d != axis and all(part.stride(d) == 0 or part.shape[d] == 1 for part in parts):
            parts = [part.narrow(d, 0, 1) for part in parts]
    return compressed(torch.cat(parts, axis)).expand(shape)


def _known_cat(values: list[Value], axis: int, shape: torch.Size) -> Tensor | None:
    known = [value.known() for value in values]
    if all(constant is None for constant in known):
        return None
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    parts = [nan.expand(v.shape) if k is None else k for v, k in zip(values, known, strict=True)]
    return _cat(parts, axis, shape)


@rule("stack")
def stacked(findings: Findings, call: Call) -> Value:
    """Follow tensors along a new dimension, which has no channels; what lies at the same place is tied."""
    values: list[Value] = list(call["tensors"])
    axis = call["dim"] % len(call.shape)
    operands = [
        ([*v.shape[:axis], 1, *v.shape[axis:]], [layer.unsqueeze(axis) for layer in v.layers]) for v in values
    ]
    layers = combine(findings, operands[0][0], operands)
    raised = [
        Value(torch.Size(shape), (), None if (known := value.known()) is None else known.unsqueeze(axis))
        for (shape, _), value in zip(operands, values, strict=True)
    ]
    return Value(
        call.shape, tuple(layer.expand(call.shape) for layer in layers), _known_cat(raised, axis, call.shape)
    )


@rule("view_as_complex")
def paired(findings: Findings, call: Call) -> Value:
    """Follow pairs of real and imaginary parts that become one number: both stay or both leave."""
    x: Value = call["self"]
    last = len(x.shape) - 1
    layers = []
    for layer in x.layers:
        if last in varying_axes(layer):
            findings.whole(layer, [last], "view_as_complex takes pairs")
            others = [d for d in varying_axes(layer) if d != last]
            if not others:
                continue
            layer = findings.entries(layer, others).expand(x.shape)
        layers.append(layer[..., 0])
    constant = None
    if x.constant is not None:
        known = uniform(x.constant, [last])[..., 0].expand(call.shape)
        constant = compressed(known.where(known == 0, torch.nan))
    return Value(call.shape, tuple(layers), constant)


@rule("view_as_real")
def unpaired(findings: Findings, call: Call) -> Value:
    """Follow complex numbers that become pairs."""
    x: Value = call["self"]
    constant = None
    if x.constant is not None:
        constant = compressed(x.constant.where(x.constant == 0, torch.nan)[..., None].expand(call.shape))
    return Value(call.shape, tuple(layer[..., None].expand(call.shape) for layer in x.layers), constant)
