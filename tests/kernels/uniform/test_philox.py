"""The random stream: published vectors, the exact grid of uniforms, uniformity and independence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from bmrs_kernels import philox_uniform
from bmrs_kernels.dispatch.validation import seed_tensor
from bmrs_kernels.uniform.torch_philox import (
    COUNTERS_PER_TILE,
    LANES,
    philox_4x32,
    round_keys,
    uniform_stream,
)

CPU = torch.device("cpu")

# Known-answer vectors of the generator's authors (Random123).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(counter, key, expected):
    words = philox_4x32(
        tuple(torch.tensor([word]) for word in counter), round_keys(seed_tensor(key[0] + (key[1] << 32), CPU))
    )
    assert tuple(word.item() for word in words) == expected


def test_uniforms_are_exact_midpoints_of_a_symmetric_grid():
    uniform = philox_uniform(5, (100_000,), device="cpu")
    assert uniform.dtype == torch.float32
    steps = uniform.double() * 2**23 - 0.5
    assert torch.equal(steps, steps.round())
    assert uniform.min() >= 2.0**-24
    assert uniform.max() <= 1 - 2.0**-24
    assert torch.equal((1 - uniform).double(), 1 - uniform.double())


def test_element_depends_on_its_index_alone():
    count = COUNTERS_PER_TILE * LANES + 7
    flat = philox_uniform(11, (count,), device="cpu")
    assert torch.equal(philox_uniform(11, (13,), device="cpu"), flat[:13])
    assert torch.equal(philox_uniform(11, (3, 5, 7), device="cpu").flatten(), flat[: 3 * 5 * 7])
    first_word = philox_4x32(
        (torch.tensor([COUNTERS_PER_TILE]), *(torch.tensor([0]) for _ in range(3))),
        round_keys(torch.tensor(11)),
    )[0]
    assert flat[COUNTERS_PER_TILE * LANES] == ((first_word >> 9) + 0.5) * 2.0**-23


def test_other_devices_than_a_cpu_get_few_large_operations():
    def operations(device, count):
        names = []

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                names.append(function)
                return function(*args, **(kwargs or {}))

        seed = torch.zeros((), dtype=torch.int64, device=device)
        with Count():
            assert uniform_stream(seed, count).shape == (count,)
        return len(names)

    count = 8 * COUNTERS_PER_TILE * LANES
    assert operations("meta", count) == operations("meta", 1)
    assert operations("cpu", count) > 4 * operations("cpu", 1)


def test_seed_is_a_whole_64_bit_key():
    streams = {
        tuple(philox_uniform(seed, (4,), device="cpu").tolist())
        for seed in (0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 2, -3)
    }
    assert len(streams) == 7
    as_signed = torch.tensor(-1, dtype=torch.int64)
    assert torch.equal(
        philox_uniform(2**64 - 1, (4,), device="cpu"), philox_uniform(as_signed, (4,), device="cpu")
    )


def test_shapes():
    assert philox_uniform(0, (), device="cpu").shape == ()
    assert philox_uniform(0, (0, 3), device="cpu").shape == (0, 3)
    assert philox_uniform(0, torch.Size([2, 3]), device=torch.device("cpu")).shape == (2, 3)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_uniformity_and_serial_independence(seed):
    uniform = philox_uniform(seed, (1_000_000,), device="cpu").double().numpy()
    counts = np.bincount((uniform * 1000).astype(int), minlength=1000)
    assert stats.chisquare(counts).pvalue > 1e-4
    pairs = (uniform[::2] * 32).astype(int) * 32 + (uniform[1::2] * 32).astype(int)
    assert stats.chisquare(np.bincount(pairs, minlength=1024)).pvalue > 1e-4
    for lag in (1, 2, 3, 4, 8, 128):
        correlation = np.corrcoef(uniform[:-lag], uniform[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(uniform.size)


def test_neighbouring_seeds_are_independent():
    first, second = (philox_uniform(seed, (1_000_000,), device="cpu").double().numpy() for seed in (7, 8))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(first.size)
    across = np.stack([philox_uniform(seed, (4,), device="cpu").double().numpy() for seed in range(4000)])
    counts = np.bincount((across.ravel() * 64).astype(int), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (1.5, TypeError, "seed must be an int or an int64 tensor, got float"),
        (True, TypeError, "got bool"),
        (torch.tensor(1.0), TypeError, r"got a tensor of torch.float32"),
        (torch.tensor([1, 2]), ValueError, r"seed must have one element, got shape \(2,\)"),
        (2**64, ValueError, "seed must fit into 64 bits"),
        (
            torch.tensor(1, device="meta"),
            ValueError,
            r"seed must be on the device of the noise \(cpu\), got meta",
        ),
    ],
)
def test_bad_seeds(seed, error, message):
    with pytest.raises(error, match=message):
        philox_uniform(seed, (3,), device="cpu")
