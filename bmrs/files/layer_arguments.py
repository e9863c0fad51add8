"""Constructor arguments of layers in a file's description: types and ranges.

torch's constructors take what comes, and it is the forward that fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from torch import nn

from bmrs.checks import shown
from bmrs.graph.stock_layers import CONVOLUTIONS, POOLS, number_of_spatial_dimensions
from bmrs.noise.layer import NoiseLayer
from bmrs_kernels.options import Activation, Granularity

_LARGEST = 2**31 - 1

_Check = tuple[str, Callable[[Any], bool]]  # what is expected, in words, and whether a value is that


def check_arguments(layer_type: type[nn.Module], arguments: Mapping[str, Any]) -> None:
    """Raise ValueError unless arguments are such as a layer can be built and run with."""
    checks = _checks(layer_type)
    for name, value in arguments.items():
        expected, fits = checks.get(name, ("", lambda value: True))
        if not fits(value):
            raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    if layer_type in POOLS:
        _check_padding(layer_type, arguments)


def _is_whole(value: Any, minimum: int = -_LARGEST) -> bool:
    return type(value) is int and minimum <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(value) < 1e300


def _whole(minimum: int) -> _Check:
    return f"a whole number of at least {minimum}", lambda value: _is_whole(value, minimum)


def _sizes(dimensions: int, minimum: int, *, none: bool = False) -> _Check:
    """One number for all spatial dimensions, or one for each."""

    def fits(value: Any) -> bool:
        if not isinstance(value, list | tuple):
            return _is_whole(value, minimum)
        return len(value) == dimensions and all(
            (none and size is None) or _is_whole(size, minimum) for size in value
        )

    return f"a whole number of at least {minimum} or {dimensions} of them", fits


def _one_of(*choices: Any) -> _Check:
    return (
        f"one of {', '.join(map(repr, choices))}",
        lambda value: isinstance(value, str) and value in choices,
    )


_BOOL: _Check = "true or false", lambda value: isinstance(value, bool)
_NUMBER: _Check = "a finite number", _is_finite
_BOUND: _Check = "a number", lambda value: _is_number(value) and not math.isnan(value)

_CHECKS: dict[str, _Check] = {
    "in_features": _whole(0),
    "out_features": _whole(0),
    "in_channels": _whole(0),
    "out_channels": _whole(0),
    "num_features": _whole(0),
    "groups": _whole(1),
    "bias": _BOOL,
    "padding_mode": _one_of("zeros", "reflect", "replicate", "circular"),
    "eps": ("a finite number of at least 0", lambda value: _is_finite(value) and value >= 0),
    "momentum": ("a finite number or null", lambda value: value is None or _is_finite(value)),
    "affine": _BOOL,
    "track_running_stats": _BOOL,
    "return_indices": _BOOL,
    "ceil_mode": _BOOL,
    "count_include_pad": _BOOL,
    "divisor_override": (
        "a whole number other than 0 or null",
        lambda value: value is None or (_is_whole(value) and value != 0),
    ),
    "p": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "inplace": _BOOL,
    "negative_slope": _NUMBER,
    "alpha": _NUMBER,
    "beta": _NUMBER,
    "threshold": _NUMBER,
    "min_val": _BOUND,
    "max_val": _BOUND,
    "approximate": _one_of("none", "tanh"),
    "dim": ("a whole number or null", lambda value: value is None or _is_whole(value)),
    "start_dim": ("a whole number", _is_whole),
    "end_dim": ("a whole number", _is_whole),
}


_CHECKS_OF_NOISE: dict[str, _Check] = {
    "num_structures": _whole(1),
    "structure_size": _whole(1),
    "dim": ("a whole number", _is_whole),
    "granularity": _one_of(*get_args(Granularity)),
    "activation": ("null or a known one", lambda value: value is None or value in get_args(Activation)),
    **dict.fromkeys(("lower", "upper", "initial_mu", "initial_log_sigma"), _NUMBER),
    "same_on_all_ranks": _BOOL,
    # They are the machine's and the program's.
    **dict.fromkeys(("backend", "generator"), ("left out", lambda value: False)),
}


def _checks(layer_type: type[nn.Module]) -> dict[str, _Check]:
    if layer_type is NoiseLayer:
        return _CHECKS_OF_NOISE
    if layer_type not in (*CONVOLUTIONS, *POOLS):
        return _CHECKS
    dimensions = number_of_spatial_dimensions(layer_type)
    padding = _sizes(dimensions, 0)
    if layer_type in CONVOLUTIONS:
        expected, fits = padding
        padding = (f"{expected}, 'same' or 'valid'", lambda value: value in ("same", "valid") or fits(value))
    return _CHECKS | {
        "kernel_size": _sizes(dimensions, 1),
        "stride": _sizes(dimensions, 1),
        "padding": padding,
        "dilation": _sizes(dimensions, 1),
        "output_size": _sizes(dimensions, 0, none=dimensions > 1),
    }


def _check_padding(layer_type: type[nn.Module], arguments: Mapping[str, Any]) -> None:
    """Raise ValueError where a pool would have windows of nothing but padding."""
    if "kernel_size" not in arguments:
        return  # adaptive
    dimensions = number_of_spatial_dimensions(layer_type)
    kernel, padding, dilation = (
        value if isinstance(value, list | tuple) else [value] * dimensions
        for value in (arguments["kernel_size"], arguments.get("padding", 0), arguments.get("dilation", 1))
    )
    for size, around, step in zip(kernel, padding, dilation, strict=True):
        if 2 * around > step * (size - 1) + 1:
            raise ValueError(
                f"padding must be at most half of kernel_size, got {shown(arguments['padding'])} and "
                f"{shown(arguments['kernel_size'])}"
            )
