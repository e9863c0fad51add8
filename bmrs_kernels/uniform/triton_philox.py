"""Philox4x32-10 in Triton: the uniforms of a seed, alone or inside of kernels that draw noise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmrs_kernels.dispatch.triton_launch import ceil_div, launch
from bmrs_kernels.uniform import philox

ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(philox.MULTIPLIERS[0]), tl.constexpr(philox.MULTIPLIERS[1])
INCREMENT_0, INCREMENT_1 = tl.constexpr(philox.KEY_INCREMENTS[0]), tl.constexpr(philox.KEY_INCREMENTS[1])
UNUSED_BITS = tl.constexpr(32 - philox.UNIFORM_BITS)
ONE_BITS = tl.constexpr(0x3F800000)
ONE_LESS_HALF_STEP = tl.constexpr(1.0 - 2.0 ** -(philox.UNIFORM_BITS + 1))

COUNTERS_PER_PROGRAM = 128


def uniform_stream(seed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` uniforms of a seed as a float32 vector; ``seed`` is an int64 scalar tensor."""
    out = torch.empty(count, dtype=torch.float32, device=seed.device)
    grid = (ceil_div(ceil_div(count, philox.LANES), COUNTERS_PER_PROGRAM),)
    launch(uniform_kernel, grid, out, seed, count, BLOCK=COUNTERS_PER_PROGRAM)
    return out


@triton.jit
def uniform_kernel(out_ptr, seed_ptr, num_elements, BLOCK: tl.constexpr):
    """Write a seed's uniforms; a program owns BLOCK counters."""
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = uniform_from_word(words_of_counters(counter[None, :], tl.load(seed_ptr), True))
    element = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + element[None, :], y, mask=(element < num_elements)[None, :])


@triton.jit
def philox_4x32(counter_low, counter_high, seed):
    """Return the four uint32 words of Philox4x32-10 for 64-bit counters in two halves; ``seed`` is int64."""
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = counter_low.to(tl.uint32), counter_high.to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(ROUNDS):
        # One widening multiplication gives both halves of the product.
        product_0 = c0.to(tl.uint64) * MULTIPLIER_0
        product_1 = c2.to(tl.uint64) * MULTIPLIER_1
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ key_0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ key_1
        c1, c3 = product_1.to(tl.uint32), product_0.to(tl.uint32)
        key_0 += INCREMENT_0
        key_1 += INCREMENT_1
    return c0, c1, c2, c3


@triton.jit
def uniform_from_word(word):
    """Return (⌊word / 2⁹⌋ + ½) 2⁻²³ in float32, exactly, for a uint32 word."""
    # The bits become the fraction of a number in [1, 2).
    above_one = ((word >> UNUSED_BITS) | ONE_BITS).to(tl.float32, bitcast=True)
    return above_one - ONE_LESS_HALF_STEP


@triton.jit
def interleave(first, second, third, fourth):
    """Return the four values of each entry of a tile one after the other along the last axis."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, [first.shape[0], 4 * first.shape[1]])


@triton.jit
def halves(index, WIDE_INDEX: tl.constexpr):
    """Return the low and the high 32 bits of a non-negative index."""
    low = index.to(tl.uint32)
    if WIDE_INDEX:
        high = (index >> 32).to(tl.uint32)
    else:
        high = tl.zeros_like(low)
    return low, high


@triton.jit
def words_of_counters(counter, seed, WIDE_INDEX: tl.constexpr):
    """Return the words of neighbouring counters, four each, one after the other along the last axis."""
    low, high = halves(counter, WIDE_INDEX)
    first, second, third, fourth = philox_4x32(low, high, seed)
    return interleave(first, second, third, fourth)


@triton.jit
def word_at(index, seed, WIDE_INDEX: tl.constexpr):
    """Return the noise's words of any numbers, each with a counter of its own: four times the arithmetic."""
    low, high = halves(index >> 2, WIDE_INDEX)
    first, second, third, fourth = philox_4x32(low, high, seed)
    lane = index & 3
    return tl.where(lane < 2, tl.where(lane == 0, first, second), tl.where(lane == 2, third, fourth))
