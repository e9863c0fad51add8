"""The counter-based generator Philox4x32-10 in pure torch, and the uniforms drawn from it.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Uniform number e of a seed is lane e mod 4
of counter e div 4, so the stream depends on the seed and on e alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bmrs_kernels.dispatch.backend import resolve_backend
from bmrs_kernels.dispatch.registration import dispatcher_is_needed

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD, HALF = 0xFFFFFFFF, 32
LANES = 4

# The 23 leading bits and half a step: both y and 1 - y are exact in float32, and neither is 0 or 1.
UNIFORM_BITS = 23

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


def seed_tensor(seed: Tensor | int, device: torch.device) -> Tensor:
    """Return a seed as an int64 scalar tensor on a device.

    Raises:
        TypeError: ``seed`` is neither an int nor an int64 tensor.
        ValueError: ``seed`` has more than one element, more than 64 bits, or is on another device.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got a tensor of {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element, got shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed must be on the device of the noise ({device}), got {seed.device}")
        return seed.reshape(())
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


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


def philox_uniform(seed: Tensor | int, shape: Sequence[int], *, device: torch.device | str) -> Tensor:
    """Return the uniforms that ``multiply_noise`` draws for a seed.

    The element with row-major index e is number e of the seed's stream. ``multiply_noise`` draws them for the shape
    of x with granularity "element", for (batch size, number of structures) with "sample" and for
    (number of structures,) with "batch".

    Args:
        seed: a Python int of at most 64 bits or an int64 tensor with one element.
        shape: shape of the result.
        device: device of the result.

    Returns:
        float32 tensor in [2⁻²⁴, 1 - 2⁻²⁴], on a grid of 2⁻²³, symmetric about ½.

    Raises:
        TypeError: ``seed`` is neither an int nor an int64 tensor.
        ValueError: ``seed`` does not fit into 64 bits, has several elements or is on another device.
    """
    # An empty tensor resolves "cuda" to the device that it stands for at present.
    seed = seed_tensor(seed, torch.empty(0, device=device).device)
    count = math.prod(shape)
    if not dispatcher_is_needed(seed) and resolve_backend("auto", seed) == "numba":
        from bmrs_kernels.multiplicative_noise import numba_noise

        return numba_noise.uniform_stream(seed, count).reshape(tuple(shape))
    return uniform_stream(seed, count).reshape(tuple(shape))
