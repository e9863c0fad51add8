"""Public function for the uniforms that noise is drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bmrs_kernels.dispatch.backend import resolve_backend, running_backend
from bmrs_kernels.dispatch.registration import dispatcher_is_needed
from bmrs_kernels.dispatch.validation import seed_tensor
from bmrs_kernels.options import Backend


class UniformBackend(Protocol):
    """What a backend implements."""

    def uniform_stream(self, seed: Tensor, count: int) -> Tensor:
        """Return the first ``count`` uniforms of a seed as a float32 vector; ``seed`` is an int64 scalar tensor."""


def _implementation(backend: str) -> UniformBackend:
    # Imported where they are used: Triton and numba may be missing.
    if backend == "triton":
        from bmrs_kernels.uniform import triton_philox

        return triton_philox
    if backend == "numba":
        from bmrs_kernels.uniform import numba_philox

        return numba_philox
    from bmrs_kernels.uniform import torch_philox

    return torch_philox


@torch.library.custom_op("bmrs_kernels::philox_uniform", mutates_args=())
def _philox_uniform(seed: Tensor, shape: Sequence[int], backend: str) -> Tensor:
    implementation = _implementation(running_backend(backend, seed))
    return implementation.uniform_stream(seed, math.prod(shape)).reshape(tuple(shape))


@_philox_uniform.register_fake
def _(seed: Tensor, shape: Sequence[int], backend: str) -> Tensor:
    return seed.new_empty(tuple(shape), dtype=torch.float32)


def philox_uniform(
    seed: Tensor | int, shape: Sequence[int], *, device: torch.device | str, backend: Backend = "auto"
) -> Tensor:
    """Return the uniforms that ``multiply_noise`` draws for a seed.

    The element with row-major index e is number e of the seed's stream. ``multiply_noise`` draws them for the shape
    of x with granularity "element", for (batch size, number of structures) with "sample" and for
    (number of structures,) with "batch".

    Args:
        seed: a Python int of at most 64 bits or an int64 tensor with one element.
        shape: shape of the result.
        device: device of the result.
        backend: "auto", "torch", "triton" or "numba"; all give the same bits.

    Returns:
        float32 tensor in [2⁻²⁴, 1 - 2⁻²⁴], on a grid of 2⁻²³, symmetric about ½.

    Raises:
        TypeError: ``seed`` is neither an int nor an int64 tensor.
        ValueError: ``seed`` does not fit into 64 bits, has several elements or is on another device; ``backend`` is
            unknown.
        RuntimeError: ``backend`` cannot serve the device.
    """
    # An empty tensor resolves "cuda" to the device that it stands for at present.
    seed = seed_tensor(seed, torch.empty(0, device=device).device)
    chosen = resolve_backend(backend, seed)
    shape = tuple(shape)
    if dispatcher_is_needed(seed):
        result: Tensor = _philox_uniform(seed, shape, chosen)
        return result
    return _implementation(chosen).uniform_stream(seed, math.prod(shape)).reshape(shape)
