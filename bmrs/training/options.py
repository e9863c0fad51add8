"""What options of a run have in common: their flags, help texts and kinds of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, get_args, get_origin

from bmrs.checks import is_finite, shown


class ConfigError(ValueError):
    """An option has a bad value or does not go with another; the message names it."""


def option(default: Any, help: str, *, group: str, metavar: str | None = None) -> Any:
    """Return a dataclass field for an option of the command line.

    Args:
        default: its default; None where that depends on other options, which `help` then tells.
        help: what it does, and its default.
        group: heading that it stands under in the help.
        metavar: word for its value in the help; None for the words that it takes.
    """
    return field(default=default, metadata={"help": help, "group": group, "metavar": metavar})


def flag(name: str) -> str:
    """Return the command line's flag of an option."""
    return f"--{name.replace('_', '-')}"


def in_words(kind: Any) -> str:
    """Return what values a type of options takes, such as "a number or a text"."""
    *others, last = _describe(kind)
    return f"{', '.join(others)} or {last}" if others else last


def words_of(kind: Any) -> tuple[str, ...]:
    """Return the words that a type of options takes; empty for one that takes other values."""
    literals = [each for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
    if kind is bool or bool in get_args(kind):
        return ("true", "false")
    return get_args(literals[0]) if literals else ()


def fits(value: object, kind: Any) -> bool:
    """Return whether a value is of a type of options; a whole number is a number, True is none."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(fits(value, each) for each in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, float) or (isinstance(value, int) and is_finite(value))
    return isinstance(value, kind)


def check_text(name: str, value: str) -> None:
    """Raise ConfigError unless a text, such as a path, can be written into a file and given to the system."""
    if not value:
        raise ConfigError(f"{name} must not be empty")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"{name} must be text in UTF-8 without NUL characters, got {shown(value)}")


def checked_texts(options: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise ConfigError where an option's text is none that a path or device can have.

    Args:
        options: what was given.
        names: by option, what it is called where it is asked for.
    """
    for name, called in names.items():
        values = options.get(name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None:
                check_text(called, value)


def check_number(
    name: str, value: Any, *, minimum: float, or_equal: bool = True, maximum: float | None = None
) -> None:
    """Raise ConfigError if an option is a number out of its range; words and None pass."""
    if value is None or isinstance(value, str):
        return
    finite = isinstance(value, int) or is_finite(value)
    if not finite or value < minimum or (value == minimum and not or_equal):
        expected = f"of at least {minimum}" if or_equal else f"greater than {minimum}"
        raise ConfigError(f"{flag(name)} must be a number {expected}, got {shown(value)}")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{flag(name)} must be a number of at most {maximum}, got {shown(value)}")


def _describe(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_args(kind):
        return [text for each in get_args(kind) for text in _describe(each)]
    return {int: ["a whole number"], float: ["a number"], str: ["a text"], bool: ["true or false"]}.get(
        kind, []
    )
