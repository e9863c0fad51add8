"""Files with options, in YAML or JSON: read as what they have to be, names with one plain value each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmrs.checks import one_line, shown
from bmrs.training.config import ConfigError

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
        events = list(yaml.parse(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is no YAML or JSON file: {one_line(error)}") from error
    inside = events[2:-2]  # without the starts and ends of stream and document
    if not inside or not isinstance(inside[0], yaml.MappingStartEvent):
        raise ConfigError(f"{path} must hold options, as in 'lr: 1e-3', got {shown(text)}")
    if not isinstance(inside[-1], yaml.MappingEndEvent):
        raise ConfigError(f"{path} must hold one document of options, got several")
    names: list[str] = []
    for position, event in enumerate(inside[1:-1]):
        place = f"{path}, line {event.start_mark.line + 1}"
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or event.anchor is not None:
            after = f" of {shown(names[-1])}" if names else ""
            raise ConfigError(f"{place}: the value{after} must be a plain number or text")
        if len(event.value) > _LONGEST_VALUE:
            raise ConfigError(f"{place}: {shown(event.value)} is too long")
        if position % 2 == 0:
            if event.value not in known:
                raise ConfigError(f"{place}: there is no option {shown(event.value)}")
            names.append(event.value)
    _check_once(path, names)


def read_json(path: Path) -> dict[str, Any]:
    """Return the options of a run's ``config.json``.

    Raises:
        ConfigError: it is not a mapping, or a name stands there twice.
    """
    text = _read(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once(path, [name for name, _ in pairs])
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


def _check_once(path: Path, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path} gives {shown(name)} more than once")
