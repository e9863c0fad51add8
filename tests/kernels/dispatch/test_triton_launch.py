"""How a tensor is cut into programs, and how kernels are started."""

from __future__ import annotations

import math

import pytest
import torch

from bmrs_kernels.dispatch import triton_launch
from bmrs_kernels.dispatch.triton_launch import columns_config, power_of_two_at_least, rows_config

TILES = (triton_launch.LIGHT_TILE, triton_launch.MEDIUM_TILE, triton_launch.HEAVY_TILE)
SIZES = (1, 2, 3, 31, 32, 49, 64, 196, 784, 3136, 12544, 1_000_003)


def is_power_of_two(number):
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("inner", SIZES)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 64, 4096, 10_000_000])
def test_rows(num_rows, inner, tile):
    config = rows_config(num_rows, inner, tile=tile, parallel=64)
    assert is_power_of_two(config.block_rows)
    assert is_power_of_two(config.block_columns)
    assert config.block_rows * config.block_columns <= tile
    assert config.block_columns >= triton_launch.NARROWEST_BLOCK
    assert config.row_programs(num_rows) * config.block_rows * config.num_steps >= num_rows
    assert config.row_programs(num_rows) <= triton_launch.LONGEST_SECOND_AXIS
    assert config.column_programs(inner) * config.block_columns >= inner
    # No whole tile lies outside.
    assert (config.row_programs(num_rows) - 1) * config.block_rows * config.num_steps < num_rows


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("num_structures", SIZES)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 64, 4096, 10_000_000])
def test_columns(num_rows, num_structures, tile):
    config = columns_config(num_rows, num_structures, tile=tile)
    assert is_power_of_two(config.block_rows)
    assert is_power_of_two(config.block_columns)
    assert config.block_columns % 4 == 0
    assert config.block_rows * config.block_columns <= tile
    assert config.row_programs(num_rows) * config.block_rows * config.num_steps >= num_rows
    assert config.row_programs(num_rows) <= triton_launch.LONGEST_SECOND_AXIS
    assert config.column_programs(num_structures) * config.block_columns >= num_structures


@pytest.mark.parametrize(("inner", "block"), [(3136, 64), (12544, 256), (784, 16), (4096, 1024), (7, 16)])
def test_feature_maps_leave_no_lane_idle_where_a_block_divides_them(inner, block):
    config = rows_config(64, inner, tile=triton_launch.LIGHT_TILE)
    assert config.block_columns == block
    assert inner % block == 0 or inner < block


def test_large_tensors_fill_a_gpu_and_then_take_several_tiles_a_program():
    small = rows_config(64, 784, tile=1024, parallel=6)
    large = rows_config(256, 12544, tile=1024, parallel=64)
    assert small.num_steps == 1
    assert large.num_steps == triton_launch.MOST_STEPS
    assert (
        64 * large.row_programs(256) * large.column_programs(12544) >= triton_launch.PROGRAMS_THAT_FILL_A_GPU
    )


def test_power_of_two_at_least():
    assert [power_of_two_at_least(number) for number in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
    for number in range(1, 300):
        power = power_of_two_at_least(number)
        assert power / 2 < number <= power == 2 ** round(math.log2(power))


def test_nothing_is_started_for_an_empty_grid():
    triton_launch.launch(None, (0,), torch.empty(0))
    triton_launch.launch(None, (3, 0), torch.empty(0))


class Kernel:
    """What `launch` uses of a jitted function; writes down who was started, with which grid and arguments."""

    def __init__(self, *, compiles: bool = True) -> None:
        self.fn = object()
        self.arg_names = ["x_ptr", "mask_ptr", "count", "LOWER", "BLOCK"]
        self.compiles, self.started = compiles, []

    def __getitem__(self, grid):
        def start(*arguments, **options):
            self.started.append(("Triton", grid, arguments, options))
            return Compiled(self.started) if self.compiles else None

        return start


class Compiled:
    """What `launch` uses of a compiled kernel."""

    def __init__(self, started) -> None:
        self.started = started

    def __getitem__(self, grid):
        return lambda *arguments: self.started.append(("compiled", grid, arguments))


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(triton_launch, "_COMPILED", {})


def start(kernel, x, *, mask=None, count=7, grid=(2, 3), **options):
    options = {"LOWER": -20.0, "BLOCK": 64, **options}
    # In another order than the kernel's.
    triton_launch.launch(kernel, grid, x, mask, count, **dict(reversed(options.items())))


def test_what_was_compiled_is_started_again():
    kernel, x, other = Kernel(), torch.zeros(8), torch.ones(8)
    start(kernel, x)
    start(kernel, other, grid=(5,))
    (_, grid, arguments, options), second = kernel.started
    assert grid == (2, 3)
    assert arguments == (x, None, 7)
    assert options == {"LOWER": -20.0, "BLOCK": 64, "num_warps": 4, "enable_fp_fusion": True}
    assert second[:2] == ("compiled", (5, 1, 1))
    assert second[2][0] is other
    assert second[2][1:] == (None, 7, -20.0, 64)


def test_what_triton_compiles_anew_is_not_started_again():
    kernel, x = Kernel(), torch.zeros(16)
    changes = [
        {},
        {"x": x.double()},
        {"x": x[1:]},  # its address is no multiple of 16
        {"mask": x},
        {"mask": x.bool()},
        {"count": 8},
        {"BLOCK": 128},
        {"num_warps": 1},
    ]
    for change in changes:
        start(kernel, **{"x": x, **change})
    start(Kernel(), x)
    assert [who for who, *_ in kernel.started] == ["Triton"] * len(changes)
    for change in changes:
        start(kernel, **{"x": x, **change})
    assert [who for who, *_ in kernel.started[len(changes) :]] == ["compiled"] * len(changes)


def test_nothing_is_kept_where_nothing_is_compiled():
    kernel = Kernel(compiles=False)
    for _ in range(2):
        start(kernel, torch.zeros(8))
    assert [who for who, *_ in kernel.started] == ["Triton"] * 2


def test_nothing_is_kept_on_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernel = Kernel()
    for _ in range(2):
        start(kernel, torch.zeros(8))
    assert [who for who, *_ in kernel.started] == ["Triton"] * 2


def test_shapes_without_end_are_forgotten(monkeypatch):
    monkeypatch.setattr(triton_launch, "MOST_COMPILED", 10)
    kernel = Kernel()
    for count in range(25):
        start(kernel, torch.zeros(8), count=count)
    assert len(triton_launch._COMPILED) <= 10


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_registers_are_limited_where_the_compiler_can(hip, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    kernel = Kernel()
    start(kernel, torch.zeros(8), maxnreg=128)
    ((_, _, _, options),) = kernel.started
    assert options.get("maxnreg") == (128 if hip is None else None)
