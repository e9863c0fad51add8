"""Philox4x32-10 in pure torch: the definition that the other backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from bmrs_kernels.uniform.philox import KEY_INCREMENTS, LANES, MULTIPLIERS, ROUNDS, UNIFORM_BITS

WORD, HALF = 0xFFFFFFFF, 32

# Counters a pass: on a CPU the working set of the rounds stays in a core's cache, elsewhere launches are few.
COUNTERS_PER_TILE, COUNTERS_PER_LARGE_TILE = 1 << 14, 1 << 22


def round_keys(seed: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the pair of 32-bit keys of every round, as int64 scalar tensors; ``seed`` is an int64 scalar tensor."""
    rounds = torch.arange(ROUNDS, dtype=torch.int64, device=seed.device)
    low, high = (
        ((part & WORD) + rounds * increment) & WORD
        for part, increment in zip((seed, seed >> HALF), KEY_INCREMENTS, strict=True)
    )
    return tuple(zip(low.unbind(), high.unbind(), strict=True))


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], keys: tuple[tuple[Tensor, Tensor], ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of Philox4x32-10.

    Args:
        counter: four int64 tensors of one shape that hold unsigned 32-bit words; overwritten.
        keys: the rounds' keys.

    Returns:
        Four int64 tensors in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    for k0, k1 in keys:
        # Products of 32-bit words wrap around in int64 without harm: the high halves are masked before the next
        # product, and the low halves only after the last, since nothing else reads their upper bits.
        torch.mul(c0, MULTIPLIERS[0], out=product0)
        torch.mul(c2, MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, HALF, out=c0)
        torch.bitwise_right_shift(product0, HALF, out=c2)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, product1 = product1, c1
        c3, product0 = product0, c3
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def uniform_stream(seed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` uniforms of a seed as a float32 vector; ``seed`` is an int64 scalar tensor."""
    keys = round_keys(seed)
    num_counters = -(-count // LANES)
    uniforms = torch.empty(num_counters, LANES, dtype=torch.float32, device=seed.device)
    tile = COUNTERS_PER_TILE if seed.device.type == "cpu" else COUNTERS_PER_LARGE_TILE
    for start in range(0, num_counters, tile):
        stop = min(start + tile, num_counters)
        index = torch.arange(start, stop, dtype=torch.int64, device=seed.device)
        words = philox_4x32(
            (index & WORD, index >> HALF, torch.zeros_like(index), torch.zeros_like(index)), keys
        )
        for lane, word in enumerate(words):
            uniforms[start:stop, lane] = word >> (32 - UNIFORM_BITS)
    return uniforms.reshape(-1)[:count].add_(0.5).mul_(2.0**-UNIFORM_BITS)
