"""The config with which a class of transformers builds the compacted network by itself, where there is one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

from torch import nn

from bmrs.files.narrowing import built, shapes_of

Axis: TypeAlias = "tuple[str, int]"
# Of a sub-config ("" for the config itself): values of its fields.
Change: TypeAlias = "tuple[str, dict[str, Any]]"
_UNSET_WIDTHS = ("inner", "intermediate", "ff", "head_dim")
_MOST_TRIALS = 16


def own_config(
    model: nn.Module,
    config: Any,
    full: nn.Module,
    numbers: Mapping[str, Mapping[str, float]],
    is_right: Callable[[Any], bool],
) -> Any | None:
    """Return a config that builds a compacted model, None if none is found.

    Compaction that leaves all layers equally wide is, to a class, another number in a field of its config: a width, or
    a number of heads. Which field is found by trying: every number that could be in proportion to a size that changed
    is changed alone, and those are taken that together change all that has to change and nothing else.

    Args:
        model: the compacted model.
        config: that of the model before compaction.
        full: the model that this builds.
        numbers: by qualified name of a module, attributes that changed with the sizes, as ε.
        is_right: whether a config builds the model; asked last.
    """
    config = _with(config, list(_changes_of_numbers(config, full, numbers)))
    wanted, before = _sizes(shapes_of(model)), _sizes(shapes_of(full))
    if wanted.keys() != before.keys():
        return None
    wrong = frozenset(axis for axis, size in wanted.items() if size != before[axis])
    ratios = {(before[axis], wanted[axis]) for axis in wrong}
    effects: list[tuple[frozenset[Axis], Change]] = []
    for change in _changes(config, ratios):
        try:
            after = _sizes(shapes_of(built(type(model), _with(config, [change]))))
        except Exception:  # whatever a class says of a config that it cannot build
            continue
        if after.keys() != before.keys():
            continue
        touched = frozenset(axis for axis, size in after.items() if size != before[axis])
        if touched and all(after[axis] == wanted[axis] for axis in touched):
            effects.append((touched, change))
    for changes in islice(_covers(wrong, effects), _MOST_TRIALS):
        candidate = _with(config, changes)
        try:
            if _has_numbers(built(type(model), candidate), numbers) and is_right(candidate):
                return candidate
        except Exception:
            continue
    return None


def _changes_of_numbers(
    config: Any, full: nn.Module, numbers: Mapping[str, Mapping[str, float]]
) -> Iterator[Change]:
    """Generate new values of fields that say numbers which changed, all in the same way."""
    pairs = {
        (vars(full.get_submodule(path)).get(name), new)
        for path, attributes in numbers.items()
        for name, new in attributes.items()
    }
    if len(pairs) == 1:
        ((old, new),) = pairs
        for part, fields in _fields(config):
            yield (
                part,
                {n: new for n, v in fields.items() if type(v) is float and v == old and n.endswith("eps")},
            )


def _has_numbers(trial: nn.Module, numbers: Mapping[str, Mapping[str, float]]) -> bool:
    return all(
        vars(trial.get_submodule(path)).get(name) == number
        for path, attributes in numbers.items()
        for name, number in attributes.items()
    )


def _sizes(shapes: dict[str, tuple[int, ...]]) -> dict[Axis, int]:
    return {(name, axis): size for name, shape in shapes.items() for axis, size in enumerate(shape)}


def _fields(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Generate the fields of a config and of those of its sub-configs that there are."""
    yield "", vars(config)
    for part in getattr(config, "sub_configs", ()):
        if hasattr(found := getattr(config, part, None), "__dict__"):
            yield part, vars(found)


def _changes(config: Any, ratios: set[tuple[int, int]]) -> Iterator[Change]:
    """Generate values of fields that could be what made sizes change."""
    for part, fields in _fields(config):
        hidden = next((v for n in ("hidden_size", "d_model") if type(v := fields.get(n)) is int), 0)
        found: dict[str, set[int]] = {}
        for name, value in fields.items():
            if type(value) is int:
                found[name] = {value * new // old for old, new in ratios if value * new % old == 0}
            elif value is None and any(part_of_name in name for part_of_name in _UNSET_WIDTHS):
                found[name] = {new for _, new in ratios}
        for name, values in found.items():
            for value in sorted(values - {0, fields[name]}):
                yield part, {name: value}
                # Fewer heads would be wider ones, unless their width is said.
                if "head" in name and fields.get("head_dim") is None and fields[name]:
                    yield part, {name: value, "head_dim": hidden // fields[name]}


def _with(config: Any, changes: list[Change]) -> Any:
    config = copy.deepcopy(config)
    for part, fields in changes:
        for name, value in fields.items():
            setattr(getattr(config, part) if part else config, name, value)
    return config


def _covers(wrong: frozenset[Axis], effects: list[tuple[frozenset[Axis], Change]]) -> Iterator[list[Change]]:
    """Generate choices of changes that together touch each axis once."""
    if not wrong:
        yield []
        return
    first = min(wrong)
    for touched, change in effects:
        if first in touched and touched <= wrong:
            for rest in _covers(wrong - touched, effects):
                yield [change, *rest]
