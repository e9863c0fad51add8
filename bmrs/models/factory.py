"""Networks of the user's own code by name."""

from __future__ import annotations

import importlib
import inspect
from operator import attrgetter
from typing import Any

from torch import nn

from bmrs.checks import one_line, shown


def network_from(spec: str, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Return what a function or class of the user's own code makes.

    Args:
        spec: ``"package.module:factory"``. The module is imported, with whatever its code does then, and has to be
            where Python looks for modules. Those of the further arguments that the factory names among its own are
            passed to it.
        num_classes: number of outputs (logits).
        in_channels: channels of the images.
        image_size: their height and width in pixels.

    Raises:
        ValueError: ``spec`` is not of that form; there is no such module or factory; importing or calling it raises;
            or what it returns is not a module.
    """
    place, _, attribute = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if not place or not attribute:
        raise ValueError(f'a network must be given as "package.module:factory", got {shown(spec)}')
    factory = _imported(spec, place, attribute)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ValueError(
            f"network {spec!r} must name a function or class that makes a network, and is a value of type "
            f"{type(factory).__name__}"
        )
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    try:
        network = factory(**{name: given[name] for name in _taken_by(factory) if name in given})
    except Exception as error:
        raise ValueError(f"network {spec!r} {_raised(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"network {spec!r} must return a torch.nn.Module, got {shown(network)}")
    return network


def _imported(spec: str, place: str, attribute: str) -> Any:
    try:
        module = importlib.import_module(place)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{place}.".startswith(f"{absent}."):
            raise ValueError(
                f"network {spec!r}: there is no module {absent!r} where Python looks for modules; add its folder to "
                "PYTHONPATH"
            ) from error
        raise ValueError(f"network {spec!r}: importing {place!r} {_raised(error)}") from error
    try:
        return attrgetter(attribute)(module)
    except AttributeError as error:
        raise ValueError(f"network {spec!r}: module {place!r} has no {attribute!r}") from error


def _taken_by(factory: Any) -> list[str]:
    """Return the names of arguments that a factory takes by keyword."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # of some that are written in C
        return []
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in by_keyword]


def _raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {one_line(error)}"
