"""Printing where a terminal or file cannot show every letter, and where nobody reads any more."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from rich.console import Console

_SPELLED_OUT = {
    "×": "x",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "·": "*",
    "…": "...",
    "–": "-",
    "−": "-",
    "μ": "mu",
    "σ": "sigma",
    "θ": "theta",
    "π": "pi",
    "Δ": "Delta ",
    "Φ": "Phi",
    "²": "^2",
}
_HANDLER = "bmrs.spelled_out"


class Output(Console):
    """Standard output; where its reader has gone, that is an error like others, not an exit without a word."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise BrokenPipeError; what is printed from now on is lost."""
        with suppress(SystemExit, OSError):  # an output that is no file has no number
            super().on_broken_pipe()
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE), "standard output")


@contextmanager
def any_encoding() -> Iterator[None]:
    """Have standard output and standard error spell letters out that their encoding lacks, instead of raising."""
    codecs.register_error(_HANDLER, _spelled_out)
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def _spelled_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_SPELLED_OUT.get(letter, "?") for letter in letters), error.end
