"""Convolutions: products of their kernel's matrix with the channels, in groups, at every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bmrs.graph.channels import STAYS, EqualNumbers, Read, compressed, varying_axes
from bmrs.graph.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from bmrs.graph.rules.contraction import NO_BIAS, contract, say_which_constants_stay, uniform, with_rank
from bmrs.graph.rules.registry import Call, rule
from bmrs.graph.values import IT_IS_READ, Findings, Value, combine


@rule(*CONVOLUTIONS, "convolution", *TRANSPOSED_CONVOLUTIONS)
def convolution(findings: Findings, call: Call) -> Value:
    """Follow convolutions, transposed and grouped ones too."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    spatial = len(weight.shape) - 2
    if len(x.shape) == spatial + 1:
        batched = replace(
            call,
            arguments={**call.arguments, "input": with_rank(x, spatial + 2)},
            shapes=(torch.Size([1, *call.shape]),),
        )
        value = convolution(findings, batched)
        assert isinstance(value, Value)
        constant = None if value.constant is None else value.constant[0]
        return Value(call.shape, tuple(layer[0] for layer in value.layers), constant)
    layers_of_x = []
    for layer in x.layers:
        along = varying_axes(layer)
        if along == (1,):
            layers_of_x.append(layer)
        elif 1 in along and 0 not in along:
            # As behind a pixel shuffle: a channel leaves where all its positions do.
            findings.whole(layer, along[1:], "a convolution runs over its dimension")
            layers_of_x.append(findings.entries(layer, [1]).expand(layer.shape))
        else:
            findings.stay(layer, "a convolution runs over its dimension")
    x = Value(x.shape, tuple(layers_of_x), x.constant, x.tensor)
    # A weight that something else reads first has channels along its kernel too.
    of_kernel = [layer for layer in weight.layers if max(varying_axes(layer), default=0) > 1]
    for layer in of_kernel:
        findings.stay(layer, "a kernel keeps its size")
    weight = replace(weight, layers=tuple(x for x in weight.layers if all(x is not y for y in of_kernel)))
    transposed = "transpose" in call.operator or bool(call["transposed"])
    groups = call["groups"]
    readable = constants_through(call, x.constant, transposed=transposed)
    if groups > 1:
        layers, constant = _grouped(findings, call, x, weight, readable, transposed)
    else:
        ignored = None
        if readable is not None:
            ignored = (
                (~readable.isnan() if call.can_shift else readable == 0)
                .view(1, -1, *[1] * spatial)
                .expand(x.shape)
            )
        reduced = Value(torch.Size([1, x.shape[1]]), tuple(y.flatten(2)[:1, :, 0] for y in x.layers))
        kernel = Value(
            torch.Size(weight.shape[:2]),
            tuple(y.flatten(2)[:, :, 0] for y in weight.layers),
            None,
            weight.tensor,
        )
        if ignored is not None:
            ignored = ignored.flatten(2)[:1, :, 0]
        axes = "io" if transposed else "oi"
        layers = tuple(
            layer.view(1, -1, *[1] * spatial).expand(call.shape)
            for layer in contract(findings, reduced, "ni", kernel, axes, "no", ignored=ignored)
        )
        constant = None
        known = readable if findings.follow_constants and not transposed else None
        if known is not None and weight.tensor is not None:
            constant = _grouped_constants(call, known.view(1, -1), weight.tensor)
    if bias is not None:
        view = (1, -1, *[1] * spatial)
        bias_layers = [y.view(view) for y in bias.layers]
        shape = [1, bias.shape[0], *[1] * spatial]
        layers = combine(findings, call.shape, [(call.shape, layers), (shape, bias_layers)])
    if x.constant is not None and (reason := _why_constants_stay(call, transposed)):
        constants = uniform(x.constant, [d for d in range(len(x.shape)) if d != 1]).flatten()
        say_which_constants_stay(findings, x.channels_along(1), constants, reason)
    return Value(call.shape, layers, constant)


def constants_through(call: Call, constant: Tensor | None, *, transposed: bool) -> Tensor | None:
    """Return constants of a batch's channels that a convolution reads as such, else NaN; of shape (channels,)."""
    if constant is None:
        return None
    rank, channels = constant.dim(), constant.shape[1]
    constant = uniform(constant, [d for d in range(rank) if d != 1])
    constant = constant.expand(1, channels, *[1] * (rank - 2)).flatten()
    if transposed or pads(call["padding"], call["weight"].shape[2:]):
        # Beside zeros, and where fewer weights overlap, all constants but 0 differ from place to place.
        constant = constant.where(constant == 0, torch.nan)
    return None if constant.isnan().all() else constant


def _why_constants_stay(call: Call, transposed: bool) -> str:
    """Return why a convolution reads constants other than 0 like all else, "" if it need not."""
    if transposed:
        return _why_transposed(call)
    if pads(call["padding"], call["weight"].shape[2:]):
        return "beside the zeros of the padding"
    return "" if call.can_shift else NO_BIAS


def _why_transposed(call: Call) -> str:
    """Return why a transposed convolution reads constants other than 0 like all else."""
    strides, paddings, dilations = (
        each * (len(call.shape) - 2) if len(each) == 1 else each
        for each in (call["stride"], call["padding"], call["dilation"])
    )
    if any(stride > 1 for stride in strides):
        return "which meets other weights from place to place, as the stride is more than 1"
    reach = [(size - 1) * d for size, d in zip(call["weight"].shape[2:], dilations, strict=True)]
    if any(padding < its for padding, its in zip(paddings, reach, strict=True)):
        return "which fewer weights meet at the borders"
    return "which is not followed through transposed convolutions"


def pads(padding: object, kernel_size: Sequence[int]) -> bool:
    """Return whether a convolution puts zeros around its input."""
    if isinstance(padding, str):
        return padding == "same" and any(size > 1 for size in kernel_size)
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


def _grouped(
    findings: Findings, call: Call, x: Value, weight: Value, readable: Tensor | None, transposed: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return layers and constants of a grouped convolution: groups leave whole, or as many channels of each.

    The rows of the weight are numbered by the result's channels, or by the input's if transposed; the columns are those
    of the other side in each group, and get channels of their own there.
    """
    groups, spatial = call["groups"], len(call.shape) - 2
    inputs, outputs = x.shape[1], call.shape[1]
    before = x.channels_along(1)
    rows = weight.channels_along(0)
    columns = weight.layer_along(1)
    if before is None:
        before = torch.full((inputs,), STAYS)
    if rows is None or (weight.shape[1] > 1 and (columns is None or not _is_joint(columns))):
        findings.stay(before, "the weight of a grouped convolution is computed")
        findings.stay_all(weight, "the weight of a grouped convolution is computed")
        return (), None
    after = torch.full((outputs,), STAYS)
    other = findings.ties.new(outputs) if transposed else before
    if transposed:
        findings.tie(rows, before)
        after, other = other, other
    else:
        after = rows
    if columns is not None:
        its_columns = columns.flatten(2)[..., 0] if columns.dim() > 2 else columns
        per_row = other.view(groups, -1).repeat_interleave(len(rows) // groups, dim=0)
        findings.tie(its_columns.contiguous(), per_row)
    read_by, into = before.view(groups, -1), after.view(groups, -1)
    if inputs == outputs == groups:
        findings.tie(before, after)
    else:
        findings.same_entries(read_by, into, (0,))
    for channels in (read_by, into):
        if channels.shape[1] > 1:
            findings.add(EqualNumbers(channels), "groups stay of equal size")
    silent = torch.zeros(groups, inputs // groups, dtype=torch.bool)
    constant = None
    if readable is not None:
        per_group = readable.view(groups, -1)
        silent = ~per_group.isnan() if call.can_shift else per_group == 0
        if not transposed and weight.tensor is not None:
            constant = _grouped_constants(call, per_group, weight.tensor)
    if inputs > groups:
        for group_in, group_out, quiet in zip(read_by, into, silent, strict=True):
            findings.add(Read(group_in, by_any=(group_out,), quiet=quiet), IT_IS_READ)
    layer = after.view(1, -1, *[1] * spatial).expand(call.shape)
    return (layer,), constant


def _is_joint(columns: Tensor) -> bool:
    return 0 in varying_axes(columns)


def _grouped_constants(call: Call, per_group: Tensor, weight: Tensor) -> Tensor | None:
    """Return the results of groups of which all inputs are constant."""
    known = ~per_group.isnan().any(dim=1)
    if not known.any():
        return None
    groups = len(per_group)
    kernel = weight.detach().double().flatten(2).sum(2)
    inputs = per_group.nan_to_num(0.0).repeat_interleave(len(kernel) // groups, dim=0)
    result = (kernel * inputs).sum(dim=1)
    bias = call["bias"]
    if bias is not None:
        if bias.tensor is None:
            return None
        result = result + bias.tensor.detach().double()
    result = result.where(known.repeat_interleave(len(kernel) // groups), torch.nan)
    return compressed(result.view(1, -1, *[1] * (len(call.shape) - 2)).expand(call.shape))
