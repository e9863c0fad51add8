"""Philox4x32-10 in numba: the uniforms of a seed, alone or inside of loops that draw noise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bmrs_kernels.dispatch.numba_compile import compiled, loop
from bmrs_kernels.dispatch.numba_threads import in_threads
from bmrs_kernels.uniform import philox

ROUNDS = philox.ROUNDS
MULTIPLIER_0, MULTIPLIER_1 = (np.uint64(part) for part in philox.MULTIPLIERS)
INCREMENT_0, INCREMENT_1 = (np.uint32(part) for part in philox.KEY_INCREMENTS)
UNUSED_BITS = np.uint32(32 - philox.UNIFORM_BITS)
HALF_WORD = np.uint64(32)
LANES = philox.LANES
UNIFORM_STEP = np.float32(2.0**-philox.UNIFORM_BITS)
HALF = np.float32(0.5)

# Drawn at a time, into memory that stays in a core's cache. Whole counters are drawn: they need some room beyond.
UNIFORMS_PER_TILE, SLACK = 1024, 2 * LANES
SECONDS_PER_UNIFORM = 1e-9


def uniform_stream(seed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` uniforms of a seed as a float32 vector; ``seed`` is an int64 scalar tensor."""
    out = torch.empty(count, dtype=torch.float32, device="cpu")
    number, array = int(seed), out.numpy()

    def call(first: int, last: int) -> None:
        uniform_loop(number, array, first, last)

    in_threads(call, count, seconds=count * SECONDS_PER_UNIFORM)
    return out


@loop
def uniform_loop(seed, out, first, last):
    """Write the uniforms number ``first`` to ``last - 1`` of a seed to their places."""
    memory = np.empty(UNIFORMS_PER_TILE + SLACK, np.float32)
    for start in range(first, last, UNIFORMS_PER_TILE):
        count = min(UNIFORMS_PER_TILE, last - start)
        skipped = fill_uniform(seed, start, count, memory)
        out[start : start + count] = memory[skipped : skipped + count]


@compiled
def fill_uniform(seed, start, count, out):
    """Write the uniforms number ``start`` and following of a seed; return where in ``out`` the first one lies.

    Whole counters are written: ``out`` needs room for ``count`` and 2 · LANES more.
    """
    first = start // LANES
    skipped = start - first * LANES
    low, high = np.uint32(seed), np.uint32(np.uint64(seed) >> HALF_WORD)
    for step in range((skipped + count + LANES - 1) // LANES):
        counter = np.uint64(first + step)
        c0, c1 = np.uint32(counter), np.uint32(counter >> HALF_WORD)
        c2, c3 = np.uint32(0), np.uint32(0)
        key_0, key_1 = low, high
        for _ in range(ROUNDS):
            product_0, product_1 = np.uint64(c0) * MULTIPLIER_0, np.uint64(c2) * MULTIPLIER_1
            c0 = np.uint32(product_1 >> HALF_WORD) ^ c1 ^ key_0
            c2 = np.uint32(product_0 >> HALF_WORD) ^ c3 ^ key_1
            c1, c3 = np.uint32(product_1), np.uint32(product_0)
            key_0, key_1 = np.uint32(key_0 + INCREMENT_0), np.uint32(key_1 + INCREMENT_1)
        out[LANES * step] = uniform_from_word(c0)
        out[LANES * step + 1] = uniform_from_word(c1)
        out[LANES * step + 2] = uniform_from_word(c2)
        out[LANES * step + 3] = uniform_from_word(c3)
    return skipped


@compiled
def uniform_from_word(word):
    """Return (⌊word / 2⁹⌋ + ½) 2⁻²³ in float32, exactly, for a uint32 word."""
    return (np.float32(np.int32(word >> UNUSED_BITS)) + HALF) * UNIFORM_STEP
