"""Packages that load what they offer when it is first asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def loaded_when_asked(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose public names are those of its module ``public``.

    Torch takes seconds to load, and help, versions and errors in options need none of it. Operators of `bmrs_kernels`,
    which saved programs name, are registered by importing that package, which loads everything at once.
    """

    def load(name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # what tools ask every module for
            raise _missing(package, name)
        if find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        public = import_module(f"{package}.public")
        offered = {each: getattr(public, each) for each in public.__all__} | {"__all__": public.__all__}
        vars(sys.modules[package]).update(offered)
        if name not in offered:
            raise _missing(package, name)
        return offered[name]

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *import_module(f"{package}.public").__all__})

    return load, names


def _missing(package: str, name: str) -> AttributeError:
    return AttributeError(f"module {package!r} has no attribute {name!r}")
