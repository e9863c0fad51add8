"""Checks of the arguments of noise layers."""

from __future__ import annotations


def check_integer(name: str, value: object) -> None:
    """Raise TypeError unless a value is an int and no bool."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, was {value!r}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, was {value!r}")
