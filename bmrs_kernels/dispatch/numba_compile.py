"""Compiling with numba: the arithmetic that is allowed, and code kept on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

# Sums and products may be regrouped, so that loops vectorise; NaN and infinity keep their meaning.
REGROUPING = {"contract", "nsz", "reassoc"}
ROUNDING_AS_WRITTEN = {"contract"}


def compiled(
    function: Callable[..., Any], *, inline: bool = True, fastmath: set[str] = ROUNDING_AS_WRITTEN
) -> Callable[..., Any]:
    """Compile a function that loops call.

    Args:
        function: to be compiled.
        inline: whether it becomes a part of each caller, without which a loop that calls it is not vectorised.
        fastmath: what LLVM may do with its arithmetic.
    """
    made: Callable[..., Any] = numba.njit(
        function, fastmath=fastmath, error_model="numpy", forceinline=inline
    )
    return made


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that Python calls; the interpreter's lock is free while it runs, its code is kept on disk."""
    made: Any = numba.njit(function, fastmath=ROUNDING_AS_WRITTEN, error_model="numpy", nogil=True)
    # Where no folder can be written, every process compiles anew.
    with contextlib.suppress(RuntimeError):
        made._cache = _Cache(function)
    kept: Callable[..., Any] = made
    return kept


class _Cache(FunctionCache):
    """numba's cache on disk, which would not notice a change in a function that a loop calls.

    A disk that is full or damaged costs the time to compile anew, not the run.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling damaged bytes can raise almost anything
            self._warn("read", error)
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            self._warn("written", error)

    def _warn(self, done: str, error: Exception) -> None:
        # The same words for every loop, so that Python shows them once.
        reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        warnings.warn(
            f"compiled loops in {self.cache_path} cannot be {done} ({reason}) and are compiled anew; "
            "make room on the disk or delete that folder",
            RuntimeWarning,
            stacklevel=2,
        )

    def _index_key(self, signature: Any, code_generator: Any) -> tuple[Any, ...]:
        return (*super()._index_key(signature, code_generator), _fingerprint())


@functools.cache
def _fingerprint() -> str:
    """Return a hash of the package: loops hold the numbers and functions that they were compiled with."""
    folder = Path(__file__).parents[1]
    sources = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def polynomial(coefficients: Sequence[float], real: type) -> Callable[..., Any]:
    """Return the function that evaluates a polynomial by Horner's rule, highest power first, in a dtype."""
    # One expression: numba does not unroll a loop over a tuple, and what is not unrolled is not vectorised.
    names = {f"c{power}": real(coefficient) for power, coefficient in enumerate(coefficients)}
    first, *others = names
    expression = "(" * len(others) + first + "".join(f" * x + {name})" for name in others)
    return compiled(eval(f"lambda x: {expression}", names))
