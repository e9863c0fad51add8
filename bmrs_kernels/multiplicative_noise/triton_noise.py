"""Noise multiplied onto an activation by Triton kernels: how x lies in memory, and which kernels run."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmrs_kernels.dispatch.triton_launch import (
    HEAVY_TILE,
    LIGHT_TILE,
    MEDIUM_TILE,
    ceil_div,
    columns_config,
    launch,
    power_of_two_at_least,
    rows_config,
)
from bmrs_kernels.multiplicative_noise import triton_element_kernels, triton_shared_kernels
from bmrs_kernels.multiplicative_noise.call import NoiseCall
from bmrs_kernels.multiplicative_noise.triton_constants import BLOCK_STRIDE, TABLE_BLOCK
from bmrs_kernels.options import Activation

# Beyond this many elements indices need 64 bits; below, with room for the lanes of a last block.
NARROW_INDEX_LIMIT = 2**31 - 2**16
LARGEST_ALIGNMENT = 16
# Up to this many elements of x in columns a launch less is worth more than the constants that each program computes.
LARGEST_WITHOUT_TABLE = 2**20


# In columns a thread has four rows of one structure, or of two where numbers have 16 bits, so that its accesses are 4
# bytes wide: were it more, the structures' constants would fill its registers, and too few warps be left to wait for
# memory.
COLUMNS_TILE, NARROW_COLUMNS_TILE = 128, 256
# In channels_last the compiler would take a few registers more backward, and 12 warps would fit instead of 16. In
# linear layers it would have to spill.
CHANNELS_LAST_BACKWARD_REGISTERS = 128

# Kernels that only scale keep little for an element: 16 to a thread.
SCALING_TILE, SCALING_BACKWARD_TILE = 2048, 1024

STRUCTURES_PER_CONSTANTS_PROGRAM = 32
# Partial sums are added up in as few steps as can be, each of which waits for memory: 16 numbers to a thread.
MOST_PARTIALS_PER_STEP, STRUCTURES_PER_SUM, PARTIALS_PER_WARP = 512, 16, 32
ELEMENTS_PER_SAMPLE_PROGRAM = 128

KEPT_STARTS = 1024  # of the shapes met last


class Layout(NamedTuple):
    """A dense activation as [rows, structures, inner] in the order in which it lies in memory."""

    num_rows: int
    num_structures: int
    inner: int
    channels_last: bool
    spatial: int  # rows of an example, if channels_last

    @property
    def in_columns(self) -> bool:
        """Whether structures are neighbours in memory."""
        return self.inner == 1

    @property
    def wide_index(self) -> bool:
        """Whether indices need 64 bits."""
        return self.num_rows * self.num_structures * self.inner > NARROW_INDEX_LIMIT

    @property
    def alignment(self) -> int:
        """The largest power of two, up to 16, that divides inner."""
        return math.gcd(self.inner, LARGEST_ALIGNMENT)

    @property
    def lanes(self) -> str:
        """Where the four numbers of a counter lie; see ``columns_words``."""
        if self.channels_last:
            return "rows" if self.spatial % 4 == 0 else "scattered"
        return "structures" if self.num_structures % 4 == 0 else "scattered"


def dense_layout(shape: Sequence[int], dim: int) -> Layout:
    """Return how a contiguous tensor lies in memory; ``dim`` is non-negative."""
    num_rows, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    return Layout(num_rows, shape[dim], inner, channels_last=False, spatial=1)


def layout_of(x: Tensor, dim: int) -> Layout | None:
    """Return how x lies in memory, or None if the kernels cannot read it as it lies; ``dim`` is non-negative."""
    if x.is_contiguous():
        return dense_layout(x.shape, dim)
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if dim == 1 and channels_last is not None and x.is_contiguous(memory_format=channels_last):
        spatial = math.prod(x.shape[2:])
        return Layout(x.shape[0] * spatial, x.shape[1], 1, channels_last=True, spatial=spatial)
    return None


def with_strides_of(value: Tensor, pattern: Tensor) -> Tensor:
    """Return ``value`` in the memory layout of ``pattern``, copied only if it differs."""
    if value.stride() == pattern.stride():
        return value
    return torch.empty_like(pattern, dtype=value.dtype).copy_(value)


class TritonNoise(NamedTuple):
    """What kernels take of a call besides the activation."""

    layout: Layout
    copied: bool  # whether x has to be made contiguous first
    groups: int | None  # draws of a structure that several elements share; None if each element has its own
    mu: Tensor
    log_sigma: Tensor
    table: Tensor | None  # of the structures' constants, where kernels read them
    mask: Tensor | None
    seed: Tensor
    activation: Activation | None
    interval: dict[str, Any]  # constexpr arguments that every kernel with noise takes

    @property
    def posterior(self) -> tuple[Tensor | None, ...]:
        """What a kernel with noise at every element takes of the noise, in order."""
        parameters = (self.mu, self.log_sigma) if self.layout.in_columns else ()
        return *parameters, self.table, self.mask, self.seed

    @property
    def options(self) -> dict[str, Any]:
        """Constexpr arguments that every kernel takes which reads x."""
        wide_index, exact = self.layout.wide_index, self.interval["EXACT"]
        return {"ACTIVATION": self.activation, "WIDE_INDEX": wide_index, "EXACT": exact}


def prepare(call: NoiseCall) -> TritonNoise:
    """Return how x lies in memory, and the constants of the structures where kernels read them from a table."""
    x, mu, log_sigma = call.x, call.mu.contiguous(), call.log_sigma.contiguous()
    layout = layout_of(x, call.dim)
    copied = layout is None
    if layout is None:
        layout = dense_layout(x.shape, call.dim)
    groups = num_groups(x, call.dim, call.granularity)
    # Such programs compute the constants that they need.
    few = layout.in_columns and layout.num_rows * layout.num_structures <= LARGEST_WITHOUT_TABLE
    needs_table = x.numel() > 0 and groups is None and not few
    return TritonNoise(
        layout,
        copied,
        groups,
        mu,
        log_sigma,
        constants(mu, log_sigma, call.lower, call.upper) if needs_table else None,
        None if call.mask is None else call.mask.contiguous(),
        call.seed,
        call.activation,
        {"LOWER": call.lower, "UPPER": call.upper, "EXACT": x.dtype == torch.float64},
    )


def multiply_noise(call: NoiseCall, noise: TritonNoise) -> Tensor:
    """Return activation(x) · θ · mask in x's memory layout."""
    x = call.x.contiguous() if noise.copied else call.x
    out = torch.empty_like(x)
    if x.numel() > 0:
        if noise.groups is None:
            _multiply(x, out, noise)
        else:
            _multiply_shared(x, out, noise, noise.groups)
    return torch.empty_like(call.x).copy_(out) if noise.copied else out


def _multiply(x: Tensor, out: Tensor, noise: TritonNoise) -> None:
    """Write activation(x) · θ · mask with a draw at every element."""
    if noise.layout.in_columns:
        kernel: Any = triton_element_kernels.multiply_columns_forward_kernel
        start = _columns(x.dtype, noise.layout)
    else:
        kernel = triton_element_kernels.multiply_rows_forward_kernel
        start = _rows(x.dtype, noise.layout, backward=False)
    options = noise.options | noise.interval | start.tile
    launch(kernel, start.grid, x, out, *noise.posterior, *start.sizes, **options)


def _multiply_shared(x: Tensor, out: Tensor, noise: TritonNoise, groups: int) -> None:
    """Write activation(x) · θ · mask with draws that elements share."""
    theta = _draw(x, noise, groups, with_gradients=False)[0]
    if noise.layout.in_columns:
        kernel: Any = triton_shared_kernels.scale_columns_forward_kernel
        start = _shared_columns(noise.layout, groups, backward=False)
    else:
        kernel = triton_shared_kernels.scale_rows_forward_kernel
        start = _shared_rows(noise.layout, groups)
    launch(kernel, start.grid, x, out, theta, *start.sizes, **noise.options, **start.tile)


def multiply_noise_backward(
    call: NoiseCall, noise: TritonNoise, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``multiply_noise`` in x, μ and log σ; bitwise the same on every run."""
    x = call.x.contiguous() if noise.copied else call.x
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        gradients = torch.zeros_like(call.mu), torch.zeros_like(call.log_sigma)
    elif noise.groups is None:
        gradients = _gradients(with_strides_of(grad, x), x, grad_x, noise)
    else:
        gradients = _shared_gradients(with_strides_of(grad, x), x, grad_x, noise, noise.groups)
    return torch.empty_like(call.x).copy_(grad_x) if noise.copied else grad_x, *gradients


def _gradients(grad: Tensor, x: Tensor, grad_x: Tensor, noise: TritonNoise) -> tuple[Tensor, Tensor]:
    """Write the gradient in x and return those in μ and log σ, with a draw at every element."""
    layout = noise.layout
    if layout.in_columns:
        kernel: Any = triton_element_kernels.multiply_columns_backward_kernel
        start = _columns(x.dtype, layout)
        num_partials = start.grid[1]
        limited = layout.lanes == "rows" and noise.table is not None and x.dtype == torch.float32
        limit = {"maxnreg": CHANNELS_LAST_BACKWARD_REGISTERS} if limited else {}
    else:
        kernel = triton_element_kernels.multiply_rows_backward_kernel
        start = _rows(x.dtype, layout, backward=True)
        num_partials = start.grid[0] // layout.num_structures * start.grid[1]
        limit = {}
    # One program's sums are the gradients themselves.
    arithmetic = torch.float64 if noise.interval["EXACT"] else torch.float32
    dtype = noise.mu.dtype if num_partials == 1 else arithmetic
    partials = [
        torch.empty(num_partials, layout.num_structures, dtype=dtype, device=x.device) for _ in range(2)
    ]
    options = noise.options | noise.interval | start.tile | limit
    launch(kernel, start.grid, grad, x, grad_x, *partials, *noise.posterior, *start.sizes, **options)
    if num_partials == 1:
        return partials[0].view(-1), partials[1].view(-1)
    return _sum(partials[0], partials[1], noise.mu, noise.log_sigma)


def _shared_gradients(
    grad: Tensor, x: Tensor, grad_x: Tensor, noise: TritonNoise, groups: int
) -> tuple[Tensor, Tensor]:
    """Write the gradient in x and return those in μ and log σ, with draws that elements share."""
    layout = noise.layout
    theta, *weights = _draw(x, noise, groups, with_gradients=True)
    if layout.in_columns:
        kernel: Any = triton_shared_kernels.scale_columns_backward_kernel
        start = _shared_columns(layout, groups, backward=True)
        num_partials = start.grid[0]
    else:
        kernel = triton_shared_kernels.scale_rows_backward_kernel
        start = _shared_rows(layout, groups)
        num_partials = layout.num_rows * math.ceil(layout.inner / start.tile["BLOCK_INNER"])
    partial = theta.new_empty(num_partials, layout.num_structures)
    launch(kernel, start.grid, grad, x, grad_x, partial, theta, *start.sizes, **noise.options, **start.tile)
    return _sum(partial, partial, noise.mu, noise.log_sigma, weights)


def sample_noise(
    mu: Tensor, log_sigma: Tensor, uniform: Tensor, lower: float, upper: float, *, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return θ at given uniforms and its derivatives in μ and log σ, in the broadcast shape and μ's dtype."""
    shape = torch.broadcast_shapes(mu.shape, uniform.shape)
    inputs = [part.expand(shape).contiguous() for part in (mu, log_sigma, uniform)]
    outputs = [torch.empty(shape, dtype=mu.dtype, device=mu.device)]
    for _ in range(2):
        outputs.append(torch.empty_like(outputs[0]) if with_gradients else mu.new_empty(0))
    grid = (ceil_div(outputs[0].numel(), ELEMENTS_PER_SAMPLE_PROGRAM),)
    launch(
        triton_element_kernels.sample_kernel,
        grid,
        *inputs,
        *outputs,
        outputs[0].numel(),
        LOWER=lower,
        UPPER=upper,
        WITH_GRADIENTS=with_gradients,
        BLOCK=ELEMENTS_PER_SAMPLE_PROGRAM,
    )
    return outputs[0], outputs[1], outputs[2]


def num_groups(x: Tensor, dim: int, granularity: str) -> int | None:
    """Return how many draws a structure takes that several elements share; None if each element has its own."""
    if granularity == "batch":
        return 1
    draws_are_elements = dim == 1 and x.dim() == 2
    return x.shape[0] if granularity == "sample" and not draws_are_elements else None


def constants(
    mu: Tensor,
    log_sigma: Tensor,
    lower: float,
    upper: float,
    *,
    structures_per_program: int = STRUCTURES_PER_CONSTANTS_PROGRAM,
) -> Tensor:
    """Return the table of the structures' constants, filled by programs that own a power of two of structures each."""
    filled_at_once = max(structures_per_program, TABLE_BLOCK.value)
    columns = ceil_div(mu.numel(), filled_at_once) * filled_at_once
    size = columns // TABLE_BLOCK.value * BLOCK_STRIDE.value
    table = torch.empty(size, dtype=torch.float64, device=mu.device)
    launch(
        triton_element_kernels.constants_kernel,
        (columns // structures_per_program,),
        mu,
        log_sigma,
        table,
        mu.numel(),
        LOWER=lower,
        UPPER=upper,
        BLOCK=structures_per_program,
        num_warps=1,
    )
    return table


def _draw(
    x: Tensor, noise: TritonNoise, groups: int, *, with_gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the tables θ · mask and, if asked for, its products with the derivatives of log θ."""
    num_structures = noise.layout.num_structures
    shape = (3 if with_gradients else 1, groups, num_structures)
    dtype = torch.float64 if noise.interval["EXACT"] else torch.float32
    theta, *weights = torch.empty(shape, dtype=dtype, device=x.device).unbind()
    weight_mu, weight_log_sigma = weights or (None, None)
    tile = min(MEDIUM_TILE, _noise_tile(dtype, backward=with_gradients))
    config = columns_config(groups, num_structures, tile=tile)
    grid = (ceil_div(groups, config.block_rows), config.column_programs(num_structures))
    launch(
        triton_shared_kernels.draw_kernel,
        grid,
        theta,
        weight_mu,
        weight_log_sigma,
        noise.mu,
        noise.log_sigma,
        noise.mask,
        noise.seed,
        groups,
        num_structures,
        LANES="structures" if num_structures % 4 == 0 else "scattered",
        BLOCK_ROWS=config.block_rows,
        BLOCK_STRUCTURES=config.block_columns,
        WITH_GRADIENTS=with_gradients,
        **noise.interval,
    )
    return theta, weight_mu, weight_log_sigma


class Start(NamedTuple):
    """How a kernel is started."""

    grid: tuple[int, ...]
    sizes: tuple[int, ...]  # its arguments that are sizes, in order
    tile: dict[str, Any]  # its constexpr arguments that are about a program's tile


@functools.lru_cache(maxsize=KEPT_STARTS)
def _rows(dtype: torch.dtype, layout: Layout, *, backward: bool) -> Start:
    aligned = layout.alignment % 4 == 0
    padded = layout.inner if aligned else layout.inner + 3
    tile = _noise_tile(dtype, backward=backward) if aligned else HEAVY_TILE
    config = rows_config(layout.num_rows, padded, tile=tile, parallel=layout.num_structures)
    inner_blocks = config.column_programs(padded)
    grid = (layout.num_structures * inner_blocks, config.row_programs(layout.num_rows))
    inner_units = layout.inner // layout.alignment
    sizes = (layout.num_rows, layout.num_structures, inner_units, inner_blocks, config.num_steps)
    blocks = {"BLOCK_ROWS": config.block_rows, "BLOCK_INNER": config.block_columns}
    return Start(grid, sizes, {"ALIGNMENT": layout.alignment, **blocks})


@functools.lru_cache(maxsize=KEPT_STARTS)
def _columns(dtype: torch.dtype, layout: Layout) -> Start:
    tile = NARROW_COLUMNS_TILE if dtype.itemsize < 4 else COLUMNS_TILE
    config = columns_config(layout.num_rows, layout.num_structures, tile=tile, row_stride=4)
    grid = (
        config.column_programs(layout.num_structures),
        config.row_programs(ceil_div(layout.num_rows, 4)),
    )
    sizes = (layout.num_rows, layout.num_structures, layout.spatial, config.num_steps)
    blocks = {"BLOCK_ROWS": config.block_rows, "BLOCK_STRUCTURES": config.block_columns}
    order = {
        "LANES": layout.lanes,
        "CHANNELS_LAST": layout.channels_last,
        "SHORT_EXAMPLES": layout.spatial // 4 < config.block_rows,
    }
    return Start(grid, sizes, order | blocks)


def _noise_tile(dtype: torch.dtype, *, backward: bool) -> int:
    """Return how many elements a tile of a kernel with noise has: few enough for registers, 16 bytes a thread."""
    if dtype == torch.float64:
        return HEAVY_TILE
    return LIGHT_TILE if dtype.itemsize < 4 or not backward else MEDIUM_TILE


@functools.lru_cache(maxsize=KEPT_STARTS)
def _shared_rows(layout: Layout, groups: int) -> Start:
    num_rows = layout.num_rows * layout.num_structures
    config = rows_config(num_rows, layout.inner, tile=SCALING_TILE)
    grid = (config.column_programs(layout.inner) * ceil_div(num_rows, config.block_rows),)
    inner_units = layout.inner // layout.alignment
    sizes = (num_rows, layout.num_structures, layout.num_rows // groups, inner_units)
    blocks = {"BLOCK_ROWS": config.block_rows, "BLOCK_INNER": config.block_columns}
    return Start(grid, sizes, {"ALIGNMENT": layout.alignment, **blocks})


@functools.lru_cache(maxsize=KEPT_STARTS)
def _shared_columns(layout: Layout, groups: int, *, backward: bool) -> Start:
    rows_per_group = layout.num_rows // groups
    tile = SCALING_BACKWARD_TILE if backward else SCALING_TILE
    config = columns_config(rows_per_group, layout.num_structures, tile=tile, parallel=groups)
    blocks = {"BLOCK_ROWS": config.block_rows, "BLOCK_STRUCTURES": config.block_columns}
    if not backward:
        config = config._replace(num_steps=1)
    grid = (groups * config.row_programs(rows_per_group), config.column_programs(layout.num_structures))
    # Only programs that sum over rows gain by owning many.
    sizes = (rows_per_group, layout.num_structures, *((config.num_steps,) if backward else ()))
    return Start(grid, sizes, blocks)


def _sum(
    partial_mu: Tensor,
    partial_log_sigma: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    weights: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Return the sums over the partial sums of each structure, weighted by group if there are weights."""
    num_partials, num_structures = partial_mu.shape
    grad_mu, grad_log_sigma = torch.empty_like(mu), torch.empty_like(log_sigma)
    per_step = min(power_of_two_at_least(num_partials), MOST_PARTIALS_PER_STEP)
    groups = num_partials if weights[0] is None else weights[0].shape[0]
    launch(
        triton_element_kernels.sum_partials_kernel,
        (ceil_div(num_structures, STRUCTURES_PER_SUM),),
        partial_mu,
        partial_log_sigma,
        *weights,
        grad_mu,
        grad_log_sigma,
        num_partials,
        num_partials // groups,
        num_structures,
        WEIGHTED=weights[0] is not None,
        BLOCK_PARTIALS=per_step,
        BLOCK_STRUCTURES=STRUCTURES_PER_SUM,
        num_warps=max(1, per_step // PARTIALS_PER_WARP),
    )
    return grad_mu, grad_log_sigma
