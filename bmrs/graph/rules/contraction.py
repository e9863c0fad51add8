"""Operators that multiply and sum: linear layers, convolutions, products of matrices, attention, embeddings.

In the space of all their indices these are pointwise products, of which the summed-over dimensions vanish. Channels
along those are *read*: they stay where what reads them does, unless they are constant and the constant can be accounted
for.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch
from torch import Tensor

from bmrs.graph.channels import (
    Read,
    compressed,
    varying_axes,
    without_repetition,
)
from bmrs.graph.rules.registry import Call, rule
from bmrs.graph.values import IT_IS_READ, Findings, Value, combine


def contract(
    findings: Findings,
    a: Value,
    a_axes: str,
    b: Value,
    b_axes: str,
    out_axes: str,
    *,
    ignored: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the layers of a sum of products, with a letter for each dimension, as in Einstein's notation.

    Args:
        findings: where ties and constraints go.
        a: the first factor.
        a_axes: letters of its dimensions.
        b: the second factor.
        b_axes: letters of its dimensions.
        out_axes: letters of the result's.
        ignored: bool of the shape of ``a``: elements that the sum need not read though they are not zero.

    Returns:
        Layers with the dimensions ``out_axes``; sizes of letters that are not in ``a`` or ``b`` are 1.
    """
    letters = "".join(dict.fromkeys(out_axes + a_axes + b_axes))
    sizes = dict.fromkeys(letters, 1)
    for value, axes in ((a, a_axes), (b, b_axes)):
        for letter, size in zip(axes, value.shape, strict=True):
            sizes[letter] = max(sizes[letter], size)
    space = [sizes[letter] for letter in letters]
    summed = {i for i, letter in enumerate(letters) if letter not in out_axes}

    def placed(x: Tensor, axes: str) -> Tensor:
        order = sorted(range(len(axes)), key=lambda d: letters.index(axes[d]))
        present = set(axes)
        x = x.permute(order)
        for i, letter in enumerate(letters):
            if letter not in present:
                x = x.unsqueeze(i)
        return x

    operands = []
    for value, axes in ((a, a_axes), (b, b_axes)):
        shape = list(placed(torch.empty(1).expand(value.shape), axes).shape)
        operands.append((shape, [placed(layer, axes) for layer in value.layers]))
    layers = combine(findings, space, operands)
    # Of size 1 along the dimensions that it does not vary along: the whole space can be huge.
    silent = torch.zeros([1] * len(space), dtype=torch.bool)
    for value, axes in ((a, a_axes), (b, b_axes)):
        if value.constant is not None:
            silent = silent | (without_repetition(placed(value.constant, axes))[0] == 0)
    if ignored is not None:
        silent = silent | without_repetition(placed(ignored, a_axes))[0]
    return tuple(sum_layers(findings, layers, tuple(summed), silent))


def sum_layers(
    findings: Findings,
    layers: Sequence[Tensor],
    summed: Sequence[int],
    silent: Tensor | None,
    note: str = IT_IS_READ,
) -> list[Tensor]:
    """Return the layers of a sum over dimensions, which vanish.

    Args:
        findings: where constraints go.
        layers: those of what is summed.
        summed: the dimensions.
        silent: bool, broadcasting with the layers: elements that can leave the sum without changing it; None if there
            are none.
        note: why what is summed stays.
    """
    rest: list[Tensor] = []
    read: list[tuple[Tensor, Tensor | None]] = []
    for layer in layers:
        axes = set(varying_axes(layer))
        if not axes & set(summed):
            rest.append(_without_axes(layer, summed))
        elif axes <= set(summed):
            read.append((layer, None))
        else:
            entries = findings.entries(layer, [d for d in axes if d not in summed])
            read.append((layer, entries))
            shape = list(layer.shape)
            rest.append(_without_axes(entries.expand(shape), summed))
    for read_layer, entries_of_it in read:
        _read(findings, read_layer, entries_of_it, rest, silent, note)
    return rest


def _without_axes(layer: Tensor, axes: Sequence[int]) -> Tensor:
    for d in sorted(axes, reverse=True):
        layer = layer.select(d, 0)
    return layer


def _read(
    findings: Findings,
    layer: Tensor,
    entries: Tensor | None,
    results: Sequence[Tensor],
    silent: Tensor | None,
    note: str,
) -> None:
    """Note that a sum reads channels, where what it results in stays."""
    if silent is None:
        silent = torch.zeros([1] * layer.dim(), dtype=torch.bool)
    # Silent at all places where the channels lie.
    axes = varying_axes(layer)
    others = [d for d in range(layer.dim()) if d not in axes]
    quiet = silent.all(dim=others, keepdim=True) if others else silent
    (channels,) = without_repetition(layer)
    quiet = quiet.expand(channels.shape)
    if entries is not None:
        findings.add(Read(channels, by=entries.expand(channels.shape), quiet=quiet), note)
        return
    by_any = tuple(without_repetition(r)[0].flatten() for r in results if varying_axes(r))
    findings.add(Read(channels.flatten(), by_any=by_any, quiet=quiet.flatten()), note)


def say_which_constants_stay(
    findings: Findings, channels: Tensor | None, constants: Tensor, reason: str
) -> None:
    """Say of channels why they are read although they are the same everywhere; whether they are is told elsewhere.

    Args:
        findings: where that goes.
        channels: what may be read, of shape (number,); nothing is said of None.
        constants: their constants, NaN or 0 for those that this is not about.
        reason: what keeps a constant from being accounted for.
    """
    held = ~constants.isnan() & (constants != 0)
    if channels is not None and held.any():
        of_them = channels[held.expand(channels.shape)]
        findings.say_of_constants(of_them, f"a constant other than 0 is left of it, {reason}")


NO_BIAS = "and no bias can take it up"


@rule("linear")
def linear(findings: Findings, call: Call) -> Value:
    """Follow x·Wᵀ + b; what a channel adds that is constant at all places, the bias can add in its stead."""
    return _affine(findings, call, call["input"], call["weight"], "oi", call["bias"])


@rule("addmm")
def addmm(findings: Findings, call: Call) -> Value:
    """Follow b + x·W."""
    plain = call["beta"] == 1 and call["alpha"] == 1
    if not plain:
        findings.stay_all(call["mat1"], "a factor of addmm is not 1")
    return _affine(findings, call, call["mat1"], call["mat2"], "io", call["self"])


def _affine(
    findings: Findings, call: Call, x: Value, weight: Value, weight_axes: str, bias: Value | None
) -> Value:
    around = "abcdefgh"[: len(x.shape) - 1]
    ignored = _movable_constants(call, x, len(x.shape) - 1)
    layers = contract(findings, x, around + "i", weight, weight_axes, around + "o", ignored=ignored)
    layers = tuple(layer.expand(call.shape) for layer in layers)
    if ignored is None and x.constant is not None:
        constants = uniform(x.constant, range(len(around))).flatten()
        say_which_constants_stay(findings, x.channels_along(-1), constants, NO_BIAS)
    if bias is not None:
        layers = combine(findings, call.shape, [(call.shape, layers), (bias.shape, bias.layers)])
    follow = findings.follow_constants
    constant = _affine_constant(x, weight, weight_axes, bias, call.shape) if follow else None
    return Value(call.shape, layers, constant)


def _affine_constant(
    x: Value, weight: Value, weight_axes: str, bias: Value | None, shape: torch.Size
) -> Tensor | None:
    """Return the results where all inputs are constant, NaN elsewhere."""
    if x.constant is None or weight.tensor is None or (bias is not None and bias.tensor is None):
        return None
    (read,) = without_repetition(x.constant)
    read = read.expand(*read.shape[:-1], x.shape[-1])
    if not (~read.isnan()).all(dim=-1).any():
        return None
    matrix = weight.tensor.detach().cpu().double()
    result = read @ (matrix if weight_axes == "io" else matrix.T)
    if bias is not None and bias.tensor is not None:
        result = result + bias.tensor.detach().cpu().double()
    return compressed(result).expand(shape)


def _movable_constants(call: Call, x: Value, axis: int) -> Tensor | None:
    """Return which elements of x are constants that a bias can stand in for: those equal all along their channel."""
    if x.constant is None or not call.can_shift:
        return None
    equal = uniform(x.constant, [d for d in range(len(x.shape)) if d != axis])
    return (~equal.isnan()).expand(x.shape)


def uniform(constant: Tensor, axes: Sequence[int]) -> Tensor:
    """Return constants that are equal along dimensions, NaN where they are not; these dimensions get size 1."""
    (reduced,) = without_repetition(constant)
    axes = [d for d in axes if reduced.shape[d] > 1]
    if axes:
        same = reduced.amax(axes, keepdim=True) == reduced.amin(axes, keepdim=True)
        first = reduced
        for d in axes:
            first = first.narrow(d, 0, 1)
        reduced = first.where(same, torch.nan)
    return reduced


@rule("matmul", "bmm", "mm", "dot", "mv", "baddbmm")
def matmul(findings: Findings, call: Call) -> Value:
    """Follow products of matrices, in batches that broadcast."""
    a, b = (call["self"], call["other"] or call["mat2"] or call["vec"] or call["tensor"])
    if call.operator == "baddbmm":
        a, b = call["batch1"], call["batch2"]
    if len(a.shape) < 2 or len(b.shape) < 2:
        for value in (a, b):
            findings.stay_all(value, "it is a vector in a product")
        return Value(call.shape)
    rank = len(call.shape)
    a, b = (with_rank(value, rank) for value in (a, b))
    batch = "abcdefgh"[: rank - 2]
    a_axes, b_axes, out_axes = batch + "mk", batch + "kn", batch + "mn"
    layers = tuple(layer.expand(call.shape) for layer in contract(findings, a, a_axes, b, b_axes, out_axes))
    if call.operator == "baddbmm":
        bias = call["self"]
        layers = combine(findings, call.shape, [(call.shape, layers), (bias.shape, bias.layers)])
        return Value(call.shape, layers)
    return Value(call.shape, layers, _zero_products([(a, a_axes), (b, b_axes)], out_axes, call.shape))


def with_rank(value: Value, rank: int) -> Value:
    """Return a value with dimensions of size 1 in front."""
    missing = rank - len(value.shape)
    shape = torch.Size([1] * missing + list(value.shape))
    raise_ = lambda x: x[(None,) * missing] if missing else x  # noqa: E731
    return Value(
        shape,
        tuple(map(raise_, value.layers)),
        None if value.constant is None else raise_(value.constant),
        None if value.tensor is None else raise_(value.tensor),
    )


def _zero_products(factors: Sequence[tuple[Value, str]], out_axes: str, shape: torch.Size) -> Tensor | None:
    """Return constants of a sum of products: 0 where one factor is 0 all along what is summed; see `contract`."""
    zero = torch.zeros([1] * len(out_axes), dtype=torch.bool)
    for value, axes in factors:
        if value.constant is None:
            continue
        its = without_repetition(value.constant)[0] == 0
        if summed := [d for d, letter in enumerate(axes) if letter not in out_axes]:
            its = its.all(dim=summed)
        left = [letter for letter in axes if letter in out_axes]
        its = its.permute([left.index(letter) for letter in out_axes if letter in left])
        zero = zero | its[tuple(slice(None) if letter in left else None for letter in out_axes)]
    if not zero.any():
        return None
    zeros = torch.zeros(zero.shape, dtype=torch.float64).masked_fill(~zero, torch.nan)
    return compressed(zeros).expand(shape)


@rule("einsum")
def einsum(findings: Findings, call: Call) -> Value:
    """Follow sums of products of tensors, with a letter for each dimension, two after two."""
    values: list[Value] = list(call["tensors"])
    *names, out = _spelled_out(call["equation"], [value.shape for value in values])
    if any(len(set(name)) < len(name) for name in names):
        for value in values:
            findings.stay_all(value, f"einsum {call['equation']} takes a diagonal")
        return Value(call.shape)
    if len(values) == 1:
        values, names = [*values, Value(torch.Size([1]))], [*names, "1"]
    product, axes = values[0], names[0]
    for i, (value, its) in enumerate(zip(values[1:], names[1:], strict=True), start=2):
        wanted = set(out).union(*names[i:])
        left = out if i == len(values) else "".join(x for x in dict.fromkeys(axes + its) if x in wanted)
        sizes = dict.fromkeys(left, 1)
        for letter, size in zip(axes + its, [*product.shape, *value.shape], strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
        shape = torch.Size(sizes[letter] for letter in left)
        layers = contract(findings, product, axes, value, its, left)
        zeros = _zero_products([(product, axes), (value, its)], left, shape)
        product, axes = Value(shape, tuple(layer.expand(shape) for layer in layers), zeros), left
    return product


def _spelled_out(equation: str, shapes: Sequence[torch.Size]) -> list[str]:
    """Return letters for the dimensions of each tensor and of the result, also for those that dots stand for."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow:
        out = "..." + "".join(sorted(x for x in set(inputs) if x.isalpha() and inputs.count(x) == 1))
    free = "".join(letter for letter in string.ascii_letters if letter not in equation)
    hidden = [
        len(shape) - len(name) + 3 if "..." in name else 0 for name, shape in zip(names, shapes, strict=True)
    ]
    most = max(hidden)
    dots = [free[most - number : most] for number in (*hidden, most)]
    return [name.replace("...", its) for name, its in zip((*names, out), dots, strict=True)]


@rule("embedding")
def embedding(findings: Findings, call: Call) -> Value:
    """Follow rows of a table: its columns are channels of the result."""
    weight = call["weight"]
    along = weight.channels_along(1)
    rows = weight.layer_along(0)
    if rows is not None:
        findings.stay(rows, "rows of a table are picked by the input")
    if along is None:
        findings.stay_all(weight, "a table is picked from by the input")
        return Value(call.shape)
    return Value(call.shape, (along.expand(call.shape),))


@rule("scaled_dot_product_attention")
def attention(findings: Findings, call: Call) -> Value:
    """Follow softmax(q·kᵀ·scale + mask)·v; the scale is kept as it is when the width of heads changes."""
    q, k, v, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    rank = len(call.shape)
    batch = "abcdefgh"[: rank - 2]
    if call["enable_gqa"] and q.shape[-3] != k.shape[-3]:
        repeats = q.shape[-3] // k.shape[-3]
        k, v = (_repeated(findings, value, repeats, rank - 3) for value in (k, v))
    scores_shape = torch.Size([*call.shape[:-1], k.shape[-2]])
    layers = contract(findings, q, batch + "tw", k, batch + "sw", batch + "ts")
    layers = tuple(layer.expand(scores_shape) for layer in layers)
    if mask is not None:
        layers = combine(findings, scores_shape, [(scores_shape, layers), (mask.shape, mask.layers)])
    keys = len(scores_shape) - 1
    for layer in layers:
        if keys in varying_axes(layer):
            # Where a key is zero its score is too, which counts like any other.
            findings.stay(layer, "attention's softmax runs over all keys")
    scores = Value(scores_shape, tuple(layer for layer in layers if keys not in varying_axes(layer)))
    layers = contract(findings, scores, batch + "ts", v, batch + "sw", batch + "tw")
    zeros = _zero_products([(v, batch + "sw")], batch + "tw", call.shape)
    return Value(call.shape, tuple(layer.expand(call.shape) for layer in layers), zeros)


def _repeated(findings: Findings, value: Value, repeats: int, axis: int) -> Value:
    """Return keys or values once for each query of their group, in that order."""
    constant = None if value.constant is None else value.constant.repeat_interleave(repeats, axis)
    shape = torch.Size([n * repeats if d == axis else n for d, n in enumerate(value.shape)])
    along = value.layer_along(axis)
    if along is None:
        # One group: whatever varies along some other dimension is in each of its repetitions.
        along = next(iter(value.layers), None)
    layers = [
        findings.repeated(layer, axis, repeats) if layer is along else layer.repeat_interleave(repeats, axis)
        for layer in value.layers
    ]
    return Value(shape, tuple(map(compressed, layers)), constant)
