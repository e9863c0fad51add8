"""Operators that make each element of the result from the elements at the same place of what they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmrs.graph.channels import AtLeastOne, compressed, without_repetition
from bmrs.graph.operators import plain_name
from bmrs.graph.rules.registry import Call, rule
from bmrs.graph.values import Findings, Value, combine

_ACTIVATIONS = (
    *(
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "sigmoid",
        "tanh",
        "hardtanh",
    ),
    *("hardswish", "hardsigmoid", "softplus", "softsign", "log_sigmoid", "logit", "hardshrink", "softshrink"),
    *("threshold", "prelu", "_prelu_kernel", "rrelu"),
)
_ARITHMETIC = (
    *(
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "pow",
        "neg",
        "abs",
        "exp",
        "log",
        "log1p",
        "expm1",
        "sqrt",
        "rsqrt",
    ),
    *("square", "reciprocal", "sin", "cos", "tan", "atan", "erf", "sign", "floor", "ceil", "round", "trunc"),
    *(
        "clamp",
        "clamp_min",
        "clamp_max",
        "clip",
        "minimum",
        "maximum",
        "fmin",
        "fmax",
        "where",
        "lerp",
        "addcmul",
    ),
    *(
        "addcdiv",
        "remainder",
        "fmod",
        "floor_divide",
        "true_divide",
        "multiply",
        "subtract",
        "divide",
        "atan2",
    ),
    *("exp2", "log2", "log10", "sinh", "cosh", "asin", "acos", "nan_to_num", "masked_fill", "copy", "fill"),
    *(
        "special_expit",
        "special_erf",
        "special_erfc",
        "erfc",
        "sinc",
        "xlogy",
        "hypot",
        "logaddexp",
        "float_power",
    ),
)
_LOGIC = (
    *(
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "logical_and",
        "logical_or",
        "logical_not",
        "logical_xor",
        "isnan",
        "isinf",
    ),
    *("isfinite", "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "__and__", "__or__", "isclose"),
)


@rule(*_ACTIVATIONS, *_ARITHMETIC, *_LOGIC)
def pointwise(findings: Findings, call: Call) -> Value:
    """Tie the channels that meet."""
    values = call.values()
    if call.operator in ("prelu", "_prelu_kernel"):
        values = [call["self"], _along_channels(call["weight"], call.shape)]
    layers = combine(findings, call.shape, [(value.shape, value.layers) for value in values])
    return Value(call.shape, layers, _constant(call, values))


def _along_channels(weight: Value, shape: torch.Size) -> Value:
    """Return the weight of a PReLU, one for each entry of the second dimension, as it meets its input."""
    if weight.shape.numel() == 1 or len(weight.shape) == len(shape):
        return weight
    view = (1, -1, *[1] * (len(shape) - 2)) if len(shape) > 1 else (-1,)
    layers = tuple(layer.reshape(view) for layer in weight.layers)
    tensor = None if weight.tensor is None else weight.tensor.reshape(view)
    return Value(torch.Size([d if d > 0 else weight.shape[0] for d in view]), layers, None, tensor)


def _constant(call: Call, values: list[Value]) -> Tensor | None:
    """Return what the operation makes of constants; elements that it makes from anything else are NaN."""
    if not call.shape.numel():
        return None  # of no elements, as of an empty slice
    known = [value.known() for value in values]
    if all(constant is None for constant in known):
        return None
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    constants = [nan.expand(value.shape) if k is None else k for value, k in zip(values, known, strict=True)]
    arguments = list(without_repetition(*(c.expand(call.shape) for c in constants)))
    varies = torch.stack([c.isnan() for c in arguments]).any(dim=0)
    settled = _settled(call, values, arguments)
    if settled is not None:
        varies &= ~settled
    if varies.all():
        return None
    # Of what varies, neither infinity as a factor of 0 nor 0 as its divisor is thought of.
    in_place_of_varying = 1.0 if call.operator in _QUOTIENTS else 0.0
    result = _run(call, values, [c.nan_to_num(in_place_of_varying) for c in arguments])
    return compressed(result.double().masked_fill(varies, torch.nan)).expand(call.shape)


_QUOTIENTS = ("div", "divide", "true_divide", "remainder", "fmod", "addcdiv")


def _settled(call: Call, values: list[Value], constants: list[Tensor]) -> Tensor | None:
    """Return where constants alone decide what comes out, whatever the others are; None if that is nowhere.

    Args:
        call: the operation.
        values: its tensors.
        constants: what these are, of one shape, with NaN for what varies.
    """
    known = {id(value): constant for value, constant in zip(values, constants, strict=True)}

    def of(name: str) -> Tensor:
        argument = call[name]
        number = argument if isinstance(argument, int | float) else torch.nan
        return known.get(id(argument), torch.tensor(number, dtype=torch.float64))

    if call.operator in ("mul", "multiply"):
        return torch.stack([constant == 0 for constant in constants]).any(dim=0)
    if call.operator in ("div", "divide", "true_divide", "remainder", "fmod") and len(constants) == 2:
        return (constants[0] == 0) & constants[1].isnan()
    if call.operator == "where":
        return of("self") == of("other")
    if call.operator == "masked_fill":
        return of("self") == of("value")
    if call.operator == "lerp":
        return of("self") == of("end")
    if call.operator == "addcmul":
        return ~of("self").isnan() & ((of("tensor1") == 0) | (of("tensor2") == 0))
    if call.operator == "addcdiv":
        return ~of("self").isnan() & (of("tensor1") == 0) & of("tensor2").isnan()
    return None


def _run(call: Call, values: list[Value], tensors: list[Tensor]) -> Tensor:
    """Return the operation's result on other tensors in place of its values."""
    if call.operator in ("prelu", "_prelu_kernel"):
        x, weight = tensors
        return torch.where(x > 0, x, weight * x)
    replaced = iter(tensors)
    arguments: dict[str, Any] = {}
    for name, argument in call.arguments.items():
        if isinstance(argument, Value):
            tensor = next(replaced)
            if not argument.shape and tensor.numel():
                tensor = tensor.flatten()[0]  # single numbers were expanded, which fills do not take
            is_condition = name == "condition" or (name == "mask" and call.operator == "masked_fill")
            argument = tensor.bool() if is_condition or call.operator.startswith(_ON_BOOLEANS) else tensor
        arguments[name] = argument
    result = _functional(call)(**arguments)
    assert isinstance(result, Tensor)
    return result


_ON_BOOLEANS = ("bitwise", "__and__", "__or__", "logical")


def _functional(call: Call) -> Any:
    """Return the operator that returns a new tensor, of one that may write into what it takes."""
    name, overload = call.target._schema.name.split("::")[1], call.target._overloadname
    plain = plain_name(name)
    return call.target if plain == name else getattr(getattr(torch.ops.aten, plain), overload)


@rule("mark_noise")
def noise(findings: Findings, call: Call) -> Value:
    """Follow a noise layer in evaluation mode: a factor for each structure, constant zeros where it is pruned."""
    x, factors = call["x"], call["factors"].tensor
    assert factors is not None
    axis, shape = call["dim"] % len(call.shape), [1] * len(call.shape)
    shape[axis] = len(factors)
    layers = combine(
        findings, call.shape, [(x.shape, x.layers), (shape, [y.view(shape) for y in call["factors"].layers])]
    )
    along = Value(call.shape, layers).channels_along(axis)
    if call["structure_size"] > 1 and along is not None:
        # Of heads, a whole one.
        findings.add(AtLeastOne(along, call["structure_size"]), "no layer is left empty")
    factors = factors.detach().cpu().double()
    pruned = (factors == 0).view(shape)
    known = x.known()
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    constant = nan.expand(call.shape) if known is None else known
    constant, zero = without_repetition(constant, pruned.expand(call.shape))
    constant = (constant * factors.view(shape)).masked_fill(zero, 0.0)
    return Value(call.shape, layers, compressed(constant).expand(call.shape))
