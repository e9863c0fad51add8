"""Checks of arguments; what they raise names the argument, what it must be and what it is."""

from __future__ import annotations

import math
import numbers
import os
from pathlib import Path


def check_integer(name: str, value: object, *, minimum: int | None = None) -> None:
    """Raise TypeError unless a value is an int and no bool, ValueError if it is less than a minimum."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(value)}")


def check_number(name: str, value: object, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    """Raise TypeError unless a value is a number, ValueError unless it is finite, not below one and above another."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not is_finite(value) or value < minimum or value <= above:
        bounds = "" if minimum == -math.inf else f" and at least {minimum:g}"
        bounds += "" if above == -math.inf else f" and greater than {above:g}"
        raise ValueError(f"{name} must be finite{bounds}, got {shown(value)}")


def is_finite(value: numbers.Real | float) -> bool:
    """Return whether a number is one of floating point, and neither NaN nor infinite."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an int of more than 308 digits
        return False


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def as_path(name: str, value: object) -> Path:
    """Return a path; raise TypeError if a value is none."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a str or os.PathLike, got {shown(value)}")
    return Path(value)


def check_module(value: object) -> None:
    """Raise TypeError unless a model is a module."""
    from torch import nn  # options are checked without it

    if not isinstance(value, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(value)}")


def one_line(text: object, *, limit: int = 200) -> str:
    """Return a text, such as an error, for a message: in one line, cut where it is long, without torch's C++ frames."""
    whole = str(text).split("\nException raised from ")[0]
    line = " ".join(whole[: 4 * limit].split())
    return line if len(line) <= limit and len(whole) <= 4 * limit else f"{line[:limit]}…"


def shown(value: object) -> str:
    """Return a value as a message shows it: its ``repr``, in one line and cut where it is long."""
    try:
        return one_line(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, lists within lists without end
        return f"a value of type {type(value).__name__} that is too long to show"
