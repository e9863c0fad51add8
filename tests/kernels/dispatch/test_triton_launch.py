"""How a tensor is cut into programs."""

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
