"""The version of the distribution, which pyproject.toml states and installing it writes down."""

from __future__ import annotations

import functools

DISTRIBUTION = "bmrs-kernels"
UNKNOWN = "0+unknown"
"""What stands for the version of a source tree that is not installed."""


@functools.cache
def installed_version() -> str:
    """Return the version of the installed distribution, `UNKNOWN` if there is none."""
    # Imported only for those who ask.
    from importlib import metadata

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return UNKNOWN
