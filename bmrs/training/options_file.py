"""Files with options, in YAML or JSON: read as what they have to be, names with one plain value each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmrs.checks import one_line, shown
from bmrs.training.options import ConfigError

_LONGEST_FILE = 2**16  # bytes; one with all options takes two thousand
_LONGEST_VALUE = 4096  # characters, as of paths; a number of more digits than Python reads is longer


def check_yaml(path: Path, known: Sequence[str]) -> None:
    """Check that a file is a mapping of known names to plain values, before it is parsed for good.

    YAML can do more, which no option needs: tags, references, nesting, several documents. JSON is YAML.

    Raises:
        ConfigError: it is not, or a name stands there twice; the place is named.
        OSError: it cannot be read.
    """
    import yaml

    text = _read(path)
    try:
        # Event by event, as to parse lists within lists to their end takes PyYAML minutes.
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        next(events), next(events, None)  # the starts of stream and document
        if not isinstance(next(events, None), yaml.MappingStartEvent):
            raise ConfigError(f"{path} must hold options, as in 'lr: 1e-3', got {shown(text)}")
        names: list[str] = []
        is_name = True
        for event in events:
            place = f"{path}, line {event.start_mark.line + 1}"
            if isinstance(event, yaml.MappingEndEvent):
                break
            _check_plain(event, place, names)
            if is_name and event.value not in known:
                raise ConfigError(f"{place}: there is no option {shown(event.value)}")
            if is_name and event.value in names:
                raise ConfigError(f"{place}: {shown(event.value)} is given more than once")
            if is_name:
                names.append(event.value)
            is_name = not is_name
        next(events)  # the end of the document
        if not isinstance(next(events), yaml.StreamEndEvent):
            raise ConfigError(f"{path} must hold one document of options, got several")
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is no YAML or JSON file: {one_line(error)}") from error


def _check_plain(event: Any, place: str, names: Sequence[str]) -> None:
    """Raise ConfigError unless an event of YAML is a plain scalar, with neither tag nor reference."""
    if getattr(event, "value", None) is None or event.tag is not None or event.anchor is not None:
        after = f" of {shown(names[-1])}" if names else ""
        raise ConfigError(f"{place}: the value{after} must be a plain number or text")
    if len(event.value) > _LONGEST_VALUE:
        raise ConfigError(f"{place}: {shown(event.value)} is too long")


def read_json(path: Path) -> dict[str, Any]:
    """Return the options of a run's ``config.json``.

    Raises:
        ConfigError: it is not a mapping, or a name stands there twice.
    """
    text = _read(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{shown(twice[0])} is given more than once")
        return dict(pairs)

    try:
        options = json.loads(text, object_pairs_hook=once)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{type(error).__name__}: {one_line(error)}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"it must hold options, got {shown(options)}")
    return options


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_LONGEST_FILE + 1)
    if len(content) > _LONGEST_FILE:
        raise ConfigError(f"{path} is no file with options: it has more than {_LONGEST_FILE} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be text in UTF-8: {error}") from error
