"""Starting Triton kernels: how a tensor is cut into programs, and on which device they run."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of a program, 16 to a thread: enough independent work to hide latencies, few enough for the registers.
ELEMENTS_PER_PROGRAM = 2048
NUM_WARPS = 4
# Accesses are 16 bytes wide where rows allow it; four numbers share a counter of the noise.
WIDEST_BLOCK, NARROWEST_BLOCK = 1024, 16
# A narrower block of a row is taken only if it leaves this much fewer lanes idle.
WORTHWHILE_SAVING = 1.02
# What a program sets up for its structures should serve many rows, and the programs still fill a GPU.
STRUCTURES_PER_PROGRAM = 64
PROGRAMS_THAT_FILL_A_GPU = 1024
MOST_STEPS = 16


class RowsConfig(NamedTuple):
    """A program's tile [rows, inner] of one structure."""

    block_rows: int
    block_inner: int

    def programs(self, num_rows: int, inner: int) -> int:
        """Return how many programs a structure takes."""
        return math.ceil(num_rows / self.block_rows) * math.ceil(inner / self.block_inner)


class ColumnsConfig(NamedTuple):
    """A program's tiles [rows, structures], ``num_steps`` of them below each other."""

    block_rows: int
    block_structures: int
    num_steps: int


def power_of_two_at_least(number: int) -> int:
    """Return the smallest power of two that is not less than a positive number."""
    return 1 << (number - 1).bit_length()


def rows_config(num_rows: int, inner: int) -> RowsConfig:
    """Return the tile for rows of ``inner`` neighbouring elements: few idle lanes first, then long accesses."""
    blocks = [1 << power for power in range(NARROWEST_BLOCK.bit_length() - 1, WIDEST_BLOCK.bit_length())]
    lanes = {block: math.ceil(inner / block) * block for block in blocks}
    fewest = min(lanes.values())
    block_inner = max(block for block in blocks if lanes[block] <= WORTHWHILE_SAVING * fewest)
    block_rows = min(power_of_two_at_least(num_rows), max(1, ELEMENTS_PER_PROGRAM // block_inner))
    return RowsConfig(block_rows, block_inner)


def columns_config(num_rows: int, num_structures: int, *, row_stride: int = 1) -> ColumnsConfig:
    """Return the tiles for structures that are neighbours in memory; a tile's rows are ``row_stride`` apart."""
    block_structures = min(power_of_two_at_least(max(num_structures, 4)), STRUCTURES_PER_PROGRAM)
    block_rows = min(
        power_of_two_at_least(math.ceil(num_rows / row_stride)),
        ELEMENTS_PER_PROGRAM // block_structures // row_stride,
    )
    tiles = math.ceil(num_rows / (block_rows * row_stride)) * math.ceil(num_structures / block_structures)
    num_steps = max(1, min(MOST_STEPS, tiles // PROGRAMS_THAT_FILL_A_GPU))
    return ColumnsConfig(block_rows, block_structures, num_steps)


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument; nothing is started for an empty grid.

    Args:
        kernel: the jitted function.
        grid: number of programs along each axis.
        first: the kernel's first argument, a tensor.
        arguments: the others that are not constexpr.
        options: constexpr arguments and launch options such as ``num_warps``.
    """
    if 0 in grid:
        return
    # Fusing multiplications with additions is Triton's default up to 3.9 and has to be asked for after it.
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True, **options}
    if first.device.type == "cpu" or first.device.index == torch.accelerator.current_device_index():
        kernel[grid](first, *arguments, **options)
        return
    with torch.accelerator.device_index(first.device.index):
        kernel[grid](first, *arguments, **options)
