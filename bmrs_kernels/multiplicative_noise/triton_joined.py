"""Four tiles as one, so that a thread has four rows of a structure, and keeps the structure's constants once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def joined(first, second, third, fourth):
    """Return four tiles as one of another axis, whose values a thread has that had those of the tiles."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, [first.shape[0], first.shape[1], 4])


@triton.jit
def parted(value):
    """Return the four tiles that were ``joined``."""
    even, odd = tl.split(tl.reshape(value, [value.shape[0], value.shape[1], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth
