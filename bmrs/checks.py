"""Checks of arguments; what they raise names the argument, what it must be and what it is."""

from __future__ import annotations

import math
import numbers

from torch import nn


def check_integer(name: str, value: object, *, minimum: int | None = None) -> None:
    """Raise TypeError unless a value is an int and no bool, ValueError if it is less than a minimum."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_number(name: str, value: object, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    """Raise TypeError unless a value is a number, ValueError unless it is finite, not below one and above another."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < minimum or value <= above:
        bounds = "" if minimum == -math.inf else f" and at least {minimum:g}"
        bounds += "" if above == -math.inf else f" and greater than {above:g}"
        raise ValueError(f"{name} must be finite{bounds}, got {value}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_module(value: object) -> None:
    """Raise TypeError unless a model is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {value!r}")


def one_line(value: object, *, limit: int = 200) -> str:
    """Return a value as text for a message: one line, cut where it is long, without the C++ frames of torch."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list within lists without end
        return f"a {type(value).__name__} that is too long to show"
    text = text.split("\nException raised from ")[0]
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit and len(text) <= 4 * limit else f"{line[:limit]}…"
