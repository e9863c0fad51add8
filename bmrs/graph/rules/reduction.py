"""Operators that reduce, normalise or resample along dimensions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from bmrs.graph.channels import compressed, varying_axes, without_repetition
from bmrs.graph.rules.contraction import sum_layers, uniform
from bmrs.graph.rules.pointwise import pointwise
from bmrs.graph.rules.registry import Call, rule
from bmrs.graph.values import Findings, Value, combine


def _dimensions(call: Call, rank: int) -> list[int]:
    """Return the dimensions that an operator reduces, all of them where it names none."""
    dims = call["dim"]
    if dims is None or dims == []:
        return list(range(rank))
    return sorted({d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])})


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "any",
    "all",
    "prod",
    "var",
    "std",
    "norm",
    "logsumexp",
    "linalg_vector_norm",
    "linalg_norm",
    "var_mean",
    "std_mean",
)
def reduced(findings: Findings, call: Call) -> Value | list[Value]:
    """Read channels that are summed over, but for zeros; keep those along other dimensions apart."""
    if isinstance(call["other"], Value):  # the larger or smaller of two
        return pointwise(findings, call)
    x: Value = call["self"]
    if not x.shape.numel():
        return [Value(shape) for shape in call.shapes]  # of no elements, as of an empty slice
    rank = len(x.shape)
    dims = _dimensions(call, rank)
    known = x.known()
    silent = None
    if _ignores_zeros(call) and x.constant is not None:
        silent = without_repetition(x.constant)[0] == 0
    layers = []
    for layer in sum_layers(findings, x.layers, dims, silent):
        for d in dims if call["keepdim"] else ():
            layer = layer.unsqueeze(d)
        layers.append(layer)
    constants = [None] if known is None else _of_constants(call, known.contiguous(), dims)
    return [
        Value(shape, tuple(y.expand(shape) for y in layers), constant)
        for shape, constant in zip_longest(call.shapes, constants[: len(call.shapes)])
    ]


def _of_constants(call: Call, known: Tensor, dims: list[int]) -> list[Tensor | None]:
    """Return the results for constants, NaN for what varies; None of those that no constant tells, as of indices."""
    if call.operator in ("any", "all") or (call["dtype"] is not None and not call["dtype"].is_floating_point):
        return [None]
    options = {"dtype": torch.float64} if "dtype" in call.arguments else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deviations of one entry, which are NaN
        results = call.target(**{**call.arguments, "self": known.nan_to_num(0.0), **options})
    # Not every operator makes NaN of NaN: norms of order 0 count it.
    varies = known.isnan().double().amax(dims, keepdim=bool(call["keepdim"])) > 0
    found = [results] if isinstance(results, Tensor) else list(results)
    return [
        compressed(result.masked_fill(varies, torch.nan)) if result.is_floating_point() else None
        for result in found
    ]


def _ignores_zeros(call: Call) -> bool:
    """Return whether fewer zeros change nothing."""
    if call.operator in ("norm", "linalg_vector_norm", "linalg_norm"):
        order = call["p" if call.operator == "norm" else "ord"]
        dims = call["dim"]
        if call.operator == "linalg_norm" and order is not None and len(dims or (0, 1)) > 1:
            return False  # of matrices
        return order is None or order >= 0
    return call.operator == "sum" or call.ignores_zeros


@rule("cosine_similarity")
def compared(findings: Findings, call: Call) -> Value:
    """Read the channels of both tensors that are summed over, but for those that are zeros in both."""
    both: list[Value] = [call["x1"], call["x2"]]
    shape = torch.broadcast_shapes(*(x.shape for x in both))
    layers = combine(findings, shape, [(x.shape, x.layers) for x in both])
    zeros = [x.constant == 0 for x in both if x.constant is not None]
    silent = None
    if len(zeros) == len(both):
        silent = without_repetition(compressed(zeros[0].expand(shape) & zeros[1].expand(shape)))[0]
    summed = sum_layers(findings, layers, [(1 if call["dim"] is None else call["dim"]) % len(shape)], silent)
    return Value(call.shape, tuple(layer.expand(call.shape) for layer in summed))


@rule(
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "sort",
    "topk",
    "argmax",
    "argmin",
    "argsort",
    "logcumsumexp",
)
def mixed(findings: Findings, call: Call) -> list[Value]:
    """Keep all entries along a dimension, as each depends on all others."""
    x: Value = call["self"]
    dims = _dimensions(call, len(x.shape))
    kept = []
    for layer in x.layers:
        axes = set(varying_axes(layer))
        if not axes & set(dims):
            kept.append(layer)
        elif axes <= set(dims):
            findings.stay(layer, f"{call.operator} runs over all channels")
        else:
            # As of gates that branches compete for: a channel leaves all branches or none.
            findings.whole(layer, dims, f"{call.operator} runs over its dimension")
            kept.append(findings.entries(layer, sorted(axes - set(dims))).expand(layer.shape))
    constant = None
    if x.constant is not None and call.operator in _ACCUMULATIONS:
        constant = compressed(_ACCUMULATIONS[call.operator](x.constant.contiguous(), dims[0]))
    elif x.constant is not None and call.operator in ("sort", "topk"):
        constant = uniform(x.constant, dims)
    results = []
    for place, shape in enumerate(call.shapes):
        same_rank = len(shape) == len(x.shape)
        layers = tuple(_resized(layer, shape) for layer in kept) if same_rank else ()
        if not same_rank:
            for layer in kept:
                findings.stay(layer, f"{call.operator} is not followed")
        known = _resized(constant, shape) if constant is not None and same_rank and place == 0 else None
        results.append(Value(shape, layers, known))
    return results


_ACCUMULATIONS: dict[str, Callable[..., Tensor]] = {"cumsum": torch.cumsum, "cumprod": torch.cumprod}


def _resized(layer: Tensor, shape: torch.Size) -> Tensor:
    """Return a layer for a tensor of other sizes along dimensions that the layer does not vary along."""
    for d in range(layer.dim()):
        if layer.shape[d] != shape[d] or layer.stride(d) == 0:
            layer = layer.narrow(d, 0, 1)
    return layer.expand(shape)


@rule("tril", "triu")
def triangle(findings: Findings, call: Call) -> Value:
    """Follow matrices of which one half becomes 0, by the numbers of rows and columns."""
    x: Value = call["self"]
    matrix = {len(x.shape) - 2, len(x.shape) - 1}
    for layer in x.layers:
        if matrix & set(varying_axes(layer)):
            findings.stay(layer, f"{call.operator} counts it")
    layers = tuple(layer for layer in x.layers if not matrix & set(varying_axes(layer)))
    constant = None if x.constant is None else x.constant.where(x.constant == 0, torch.nan)
    return Value(call.shape, layers, constant)


@rule(
    *(
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "max_pool2d_with_indices",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
    ),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool1d_with_indices"),
    *(
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "upsample_bilinear2d",
        "upsample_linear1d",
    ),
    *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa"),
    "_upsample_bicubic2d_aa",
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact3d", "upsample_nearest2d_vec"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d", "lp_pool2d", "grid_sampler"),
)
def pooled(findings: Findings, call: Call) -> list[Value]:
    """Keep channels along the first dimensions apart; the last dimensions are resampled."""
    x: Value = call["self"] if isinstance(call["self"], Value) else call["input"]
    spatial = _spatial_dimensions(call, x)
    first = len(x.shape) - spatial
    results = []
    kept = []
    for layer in x.layers:
        if any(d >= first for d in varying_axes(layer)):
            findings.stay(layer, f"{call.operator} runs over its dimension")
        else:
            kept.append(layer)
    constant = None
    if x.constant is not None:
        constant = uniform(x.constant, range(first, len(x.shape)))
        if (call.operator.startswith("avg") and _averages_padding(call)) or call.operator in (
            "lp_pool2d",
            "grid_sampler",
        ):
            constant = constant.where(constant == 0, torch.nan)
    for shape in call.shapes:
        its_constant = (
            None
            if constant is None
            else compressed(constant.expand(*x.shape[:first], *[1] * spatial)).expand(shape)
        )
        results.append(Value(shape, tuple(_resized(layer, shape) for layer in kept), its_constant))
    return results


_FOURIER_TRANSFORMS = [
    f"fft_{inverse}{real}fft{n}" for inverse in ("", "i") for real in ("", "r") for n in ("", "2", "n")
]


@rule(*_FOURIER_TRANSFORMS, "fft_fftshift", "fft_ifftshift")
def transformed(findings: Findings, call: Call) -> Value:
    """Keep channels apart that lie beside the dimensions of a Fourier transform, which makes zeros of zeros."""
    x: Value = call["self"]
    dims = _dimensions(call, len(x.shape))
    kept = []
    for layer in x.layers:
        if set(dims) & set(varying_axes(layer)):
            findings.stay(layer, f"{call.operator} runs over its dimension")
        else:
            kept.append(_resized(layer, call.shape))
    constant = None
    if x.constant is not None:
        known = uniform(x.constant, dims)
        constant = _resized(known.where(known == 0, torch.nan).expand(x.shape), call.shape)
    return Value(call.shape, tuple(kept), constant)


@rule("max_unpool2d", "max_unpool3d")
def unpooled(findings: Findings, call: Call) -> Value:
    """Follow channels through the inverse of a maximum over windows, which puts zeros around what it moves."""
    x, indices = call["self"], call["indices"]
    first = len(x.shape) - int(call.operator[-2])
    kept = []
    for layer in combine(findings, x.shape, [(value.shape, value.layers) for value in (x, indices)]):
        if any(d >= first for d in varying_axes(layer)):
            findings.stay(layer, f"{call.operator} runs over its dimension")
        else:
            kept.append(_resized(layer, call.shape))
    constant = None
    if x.constant is not None:
        known = uniform(x.constant, range(first, len(x.shape)))
        constant = _resized(known.where(known == 0, torch.nan).expand(x.shape), call.shape)
    return Value(call.shape, tuple(kept), constant)


def _spatial_dimensions(call: Call, x: Value) -> int:
    digits = [c for c in call.operator if c.isdigit()]
    return int(digits[0]) if digits else len(x.shape) - 2


def _averages_padding(call: Call) -> bool:
    """Return whether an average pool changes a constant."""
    if call["divisor_override"] is not None:
        return True
    padding = call["padding"]
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return padded and bool(call["count_include_pad"])


@rule("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm", "cudnn_batch_norm")
def batch_norm(findings: Findings, call: Call) -> list[Value]:
    """Scale and shift every channel by itself."""
    x: Value = call["input"]
    parameters = [call[name] for name in ("weight", "bias", "running_mean", "running_var")]
    view = [1, -1, *[1] * (len(x.shape) - 2)]
    operands: list[tuple[Sequence[int], Sequence[Tensor]]] = [(x.shape, x.layers)]
    for parameter in parameters:
        if parameter is not None:
            shape = [parameter.shape[0] if d < 0 else d for d in view]
            operands.append((shape, [y.view(view) for y in parameter.layers]))
    own = call["training"] or call["use_input_stats"]
    for layer in x.layers if own else ():
        findings.whole(layer, [0, *range(2, len(x.shape))], "the statistics of a normalisation count it")
    layers = combine(findings, x.shape, operands)
    value = Value(x.shape, layers, _normalised_constant(call, x, parameters, view, own_statistics=bool(own)))
    return [value, *(Value(shape) for shape in call.shapes[1:])]


def _normalised_constant(
    call: Call, x: Value, parameters: list[Value | None], view: list[int], *, own_statistics: bool
) -> Tensor | None:
    if x.constant is None:
        return None
    weight, bias, mean, var = (
        None if p is None or p.tensor is None else p.tensor.detach().double().view(view) for p in parameters
    )
    constant = x.constant
    if own_statistics:
        # What is the same everywhere has no variance: only the bias remains.
        reduced = uniform(constant, [d for d in range(constant.dim()) if d != 1])
        result = torch.zeros_like(reduced).masked_fill(reduced.isnan(), torch.nan)
    else:
        if mean is None or var is None:
            return None
        result = (constant - mean) * (var + call["eps"]).rsqrt()
    result = result if weight is None else result * weight
    result = result if bias is None else result + bias
    return compressed(result.expand(x.shape))


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(findings: Findings, call: Call) -> list[Value]:
    """Keep all channels along the last dimensions, since the statistics over them count zeros too.

    Zeros leave a mean square that its layer makes up for, and constants a layer norm that may be approximated.
    """
    x: Value = call["input"]
    rank = len(call["normalized_shape"])
    dims = range(len(x.shape) - rank, len(x.shape))
    leaving = call.ignores_zeros or call.constants_behind is not None
    for layer in x.layers:
        if leaving and varying_axes(layer) == (len(x.shape) - 1,):
            silent = None
            if x.constant is not None:
                silent = x.constant == 0 if call.ignores_zeros else ~x.constant.isnan()
            sum_layers(findings, [layer], list(dims), silent, "the statistics of a normalisation count it")
            continue
        findings.whole(layer, dims, "the statistics of a normalisation count it")
        if x.constant is not None and set(varying_axes(layer)) & set(dims):
            # Constant before, and no longer behind.
            channels, constant = without_repetition(layer, x.constant)
            findings.stay(channels[~constant.isnan()], "the statistics of a normalisation count it")
    operands: list[tuple[Sequence[int], Sequence[Tensor]]] = [(x.shape, x.layers)]
    operands += [(p.shape, p.layers) for p in (call["weight"], call["bias"]) if p is not None]
    behind = None
    if leaving and x.constant is not None:
        (known,) = without_repetition(x.constant)
        found = call.constants_behind(known) if call.constants_behind else known.where(known == 0, torch.nan)
        behind = compressed(found).expand(x.shape)
    value = Value(x.shape, combine(findings, x.shape, operands), behind)
    return [value, *(Value(shape) for shape in call.shapes[1:])]


@rule("group_norm", "native_group_norm")
def group_norm(findings: Findings, call: Call) -> list[Value]:
    """Keep groups of channels whole, since there are statistics for each."""
    x: Value = call["input"]
    groups = call["num_groups"] or call["group"]
    weight, bias = call["weight"], call["bias"]
    shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    for layer in x.layers:
        grouped = compressed(layer.reshape(shape))
        findings.whole(grouped, range(2, len(shape)), "the statistics of a normalisation count it")
    view = [1, -1, *[1] * (len(x.shape) - 2)]
    operands: list[tuple[Sequence[int], Sequence[Tensor]]] = [(x.shape, x.layers)]
    for parameter in (weight, bias):
        if parameter is not None:
            operands.append(
                ([parameter.shape[0] if d < 0 else d for d in view], [y.view(view) for y in parameter.layers])
            )
    layers = combine(findings, x.shape, operands)
    constant = None
    if x.constant is not None and (bias is None or bias.tensor is not None):
        # A group that is the same everywhere has no variance: only the bias remains.
        reduced = uniform(compressed(x.constant.reshape(shape)), range(2, len(shape)))
        gone = (~reduced.isnan()).expand(shape[0], groups, shape[2], *[1] * (len(shape) - 3)).flatten(1, 2)
        shift = torch.zeros(1) if bias is None else bias.tensor.detach().double().view(view)
        constant = compressed(shift.double().expand(gone.shape).masked_fill(~gone, torch.nan).expand(x.shape))
    if x.constant is not None:
        behind = torch.full((), torch.nan).expand(x.shape) if constant is None else constant
        for layer in x.layers:
            channels, was, is_now = without_repetition(layer, x.constant, behind)
            no_longer = channels[~was.isnan() & is_now.isnan()].unique()
            findings.say_of_counted(no_longer, "the statistics of a normalisation count it")
    value = Value(x.shape, layers, constant)
    return [value, *(Value(s) for s in call.shapes[1:])]


@rule("glu")
def gated(findings: Findings, call: Call) -> Value:
    """Multiply the first half by the sigmoid of the second: both keep the same channels."""
    x: Value = call["self"]
    axis = call["dim"] % len(x.shape)
    half = x.shape[axis] // 2
    operands = [
        (call.shape, [compressed(layer.narrow(axis, start, half)) for layer in x.layers])
        for start in (0, half)
    ]
    layers = combine(findings, call.shape, operands)
    constant = None
    if x.constant is not None:
        first, gate = x.constant.narrow(axis, 0, half), x.constant.narrow(axis, half, half)
        constant = compressed((first * gate.sigmoid()).masked_fill(first == 0, 0.0))
    return Value(call.shape, layers, constant)
