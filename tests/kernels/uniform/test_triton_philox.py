"""Philox inside kernels: bit for bit that of the torch path."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_device import DEVICE, RUNS_KERNELS

from bmrs_kernels import philox_uniform
from bmrs_kernels.uniform import torch_philox

triton = pytest.importorskip("triton")
tl = triton.language
from bmrs_kernels.uniform import triton_philox  # noqa: E402

pytestmark = RUNS_KERNELS


@triton.jit
def philox_kernel(low_ptr, high_ptr, seed_ptr, out_ptr, uniform_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    words = triton_philox.philox_4x32(tl.load(low_ptr + index), tl.load(high_ptr + index), tl.load(seed_ptr))
    for lane in tl.static_range(4):
        tl.store(out_ptr + lane * BLOCK + index, words[lane].to(tl.int64))
        tl.store(uniform_ptr + lane * BLOCK + index, triton_philox.uniform_from_word(words[lane]))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x243F6A8885A308D3])
def test_philox_equals_its_twin_bit_for_bit(seed):
    low = torch.tensor([0, 1, 2**31, 2**32 - 1, 12345, 7, 8, 9])
    high = torch.tensor([0, 0, 0, 2**32 - 1, 1, 2**31, 3, 4])
    seed = torch.tensor(seed)
    zero = torch.zeros_like(low)
    expected = torch.stack(
        torch_philox.philox_4x32(
            (low.clone(), high.clone(), zero, zero.clone()), torch_philox.round_keys(seed)
        )
    )
    actual = torch.empty(4, 8, dtype=torch.int64, device=DEVICE)
    uniform = torch.empty(4, 8, device=DEVICE)
    philox_kernel[(1,)](low.to(DEVICE), high.to(DEVICE), seed.to(DEVICE), actual, uniform, BLOCK=8)
    assert torch.equal(actual.cpu(), expected)
    exact = ((expected >> 9).double() + 0.5) * 2.0**-23
    assert torch.equal(uniform.cpu().double(), exact)


def test_ends_of_the_uniforms():
    words = torch.tensor([0, 2**9 - 1, 2**9, 2**31, 2**32 - 1])

    assert torch.equal(
        on_words(words), torch.tensor([2.0**-24, 2.0**-24, 3 * 2.0**-24, 0.5 + 2.0**-24, 1 - 2.0**-24])
    )


@triton.jit
def word_kernel(word_ptr, out_ptr, num_words, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    valid = index < num_words
    word = tl.load(word_ptr + index, mask=valid, other=0).to(tl.uint32)
    tl.store(out_ptr + index, triton_philox.uniform_from_word(word), mask=valid)


def on_words(words):
    out = torch.full(words.shape, math.nan, device=DEVICE)
    word_kernel[(1,)](words.to(DEVICE), out, words.numel(), BLOCK=8)
    return out.cpu()


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 7, 100)])
def test_the_public_function_runs_the_kernel(shape, monkeypatch):
    launches, launch = [], triton_philox.launch
    monkeypatch.setattr(
        triton_philox,
        "launch",
        lambda kernel, *rest, **options: (launches.append(kernel), launch(kernel, *rest, **options)),
    )
    uniform = philox_uniform(11, shape, device=DEVICE, backend="triton")
    assert launches == [triton_philox.uniform_kernel]
    assert torch.equal(uniform.cpu(), philox_uniform(11, shape, device="cpu", backend="torch"))
