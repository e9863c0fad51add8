"""Starting Triton kernels: how a tensor is cut into programs, and on which device they run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NUM_WARPS = 4
# Elements of a tile by what a thread must keep for each: 8, 4 or 2 to a thread of 4 warps. More would spill registers
# in the kernels that draw noise; those that only scale could hold more, and gain nothing by it.
LIGHT_TILE, MEDIUM_TILE, HEAVY_TILE = 1024, 512, 256
# Accesses are 16 bytes wide where rows allow it; four numbers share a counter of the noise.
WIDEST_BLOCK, NARROWEST_BLOCK = 1024, 16
# Of the blocks that a row can be cut into, the longest is taken that has at most this factor more lanes than needed.
WORTHWHILE_SAVING = 1.02
STRUCTURES_PER_TILE = 64
# What a program sets up should serve several tiles, as long as the programs still fill a GPU.
PROGRAMS_THAT_FILL_A_GPU = 1024
MOST_STEPS = 8
# Blocks of rows run along a grid's second axis, which is the shorter one.
LONGEST_SECOND_AXIS = 65535


class TileConfig(NamedTuple):
    """A program's tile [rows, columns], and how many such tiles it owns below each other."""

    block_rows: int
    block_columns: int
    num_steps: int

    def row_programs(self, num_rows: int) -> int:
        """Return how many programs share a column of tiles."""
        return ceil_div(num_rows, self.block_rows * self.num_steps)

    def column_programs(self, num_columns: int) -> int:
        """Return how many programs lie beside each other."""
        return ceil_div(num_columns, self.block_columns)


def ceil_div(number: int, size: int) -> int:
    """Return how many pieces of a size a number takes; Triton's own takes microseconds outside of kernels."""
    return -(-number // size)


def power_of_two_at_least(number: int) -> int:
    """Return the smallest power of two that is not less than a positive number."""
    return 1 << (number - 1).bit_length()


def rows_config(num_rows: int, inner: int, *, tile: int, parallel: int = 1) -> TileConfig:
    """Return the tiles for rows of ``inner`` neighbouring elements: few idle lanes first, then long accesses.

    Args:
        num_rows: rows of a structure.
        inner: elements of a row.
        tile: most elements of a tile.
        parallel: how many structures are cut up in this way, each by programs of its own.
    """
    blocks = [
        1 << power
        for power in range(NARROWEST_BLOCK.bit_length() - 1, WIDEST_BLOCK.bit_length())
        if 1 << power <= tile
    ]
    lanes = {block: ceil_div(inner, block) * block for block in blocks}
    fewest = min(lanes.values())
    block_inner = max(block for block in blocks if lanes[block] <= WORTHWHILE_SAVING * fewest)
    block_rows = min(power_of_two_at_least(num_rows), tile // block_inner)
    return TileConfig(
        block_rows,
        block_inner,
        _num_steps(num_rows, block_rows, parallel * lanes[block_inner] // block_inner),
    )


def columns_config(
    num_rows: int, num_structures: int, *, tile: int, row_stride: int = 1, parallel: int = 1
) -> TileConfig:
    """Return the tiles for structures that are neighbours in memory.

    Args:
        num_rows: rows.
        num_structures: elements of a row.
        tile: most elements of a tile.
        row_stride: how many tiles with rows that far apart a program takes at a time.
        parallel: how many such tensors are cut up in this way, each by programs of its own.
    """
    block_structures = min(power_of_two_at_least(max(num_structures, 4)), STRUCTURES_PER_TILE, tile)
    rows = ceil_div(num_rows, row_stride)
    block_rows = min(power_of_two_at_least(rows), tile // block_structures)
    beside = ceil_div(num_structures, block_structures)
    return TileConfig(block_rows, block_structures, _num_steps(rows, block_rows, parallel * beside))


def _num_steps(num_rows: int, block_rows: int, beside: int) -> int:
    row_blocks = ceil_div(num_rows, block_rows)
    steps = min(MOST_STEPS, row_blocks, row_blocks * beside // PROGRAMS_THAT_FILL_A_GPU)
    return max(1, steps, ceil_div(row_blocks, LONGEST_SECOND_AXIS))


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument; nothing is started for an empty grid.

    Args:
        kernel: the jitted function.
        grid: number of programs along each axis.
        first: the kernel's first argument, a tensor.
        arguments: the others that are not constexpr: tensors, None and ints.
        options: constexpr arguments and launch options such as ``num_warps``; ``maxnreg`` is for NVIDIA's GPUs alone.
    """
    if 0 in grid:
        return
    if torch.version.hip is not None:
        options.pop("maxnreg", None)
    # Fusing multiplications with additions is Triton's default up to 3.9 and has to be asked for after it.
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True, **options}
    if first.device.type == "cpu" or first.device.index == torch.accelerator.current_device_index():
        _start(kernel, grid, (first, *arguments), options)
        return
    with torch.accelerator.device_index(first.device.index):
        _start(kernel, grid, (first, *arguments), options)


class _Compiled(NamedTuple):
    kernel: Any  # triton.compiler.CompiledKernel
    constants: tuple[Any, ...]  # its constexpr arguments, which stand behind the others


# By all that Triton compiles for, and more: looking for the compiled kernel takes Triton itself several times as long
# as starting it does, and in small layers that is most of the time.
_COMPILED: dict[tuple[Any, ...], _Compiled] = {}
MOST_COMPILED = 4096  # shapes that vary without end would fill the memory
POINTER_ALIGNMENT = 16  # bytes; whether a pointer is a multiple of them is compiled in


def _start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Start a kernel on the current device, through what Triton compiled for the like of it before."""
    kinds = [
        (argument.dtype, argument.data_ptr() % POINTER_ALIGNMENT == 0)
        if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    ]
    key = (kernel.fn, arguments[0].device, *kinds, *options.items())
    found = _COMPILED.get(key)
    if found is not None:
        found.kernel[(*grid, 1, 1)[:3]](*arguments, *found.constants)
        return
    compiled = kernel[grid](*arguments, **options)
    # The interpreter compiles nothing. On ROCm what is compiled depends on the size of a tensor's storage too.
    if compiled is None or torch.version.hip is not None:
        return
    if len(_COMPILED) >= MOST_COMPILED:
        _COMPILED.clear()
    constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
    _COMPILED[key] = _Compiled(compiled, constants)
