"""One call of ``multiply_noise``, and what a backend does for it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from bmrs_kernels.options import Activation, Granularity


class NoiseCall(NamedTuple):
    """The arguments of ``multiply_noise``, checked; the operators' schemas list them in this order."""

    x: Tensor
    mu: Tensor
    log_sigma: Tensor
    mask: Tensor | None
    seed: Tensor  # int64 scalar on x's device
    dim: int  # axis of the structures, non-negative
    granularity: Granularity
    activation: Activation | None
    lower: float
    upper: float

    @property
    def draw_shape(self) -> tuple[int, ...]:
        """Shape of the uniforms, which broadcasts with x: row-major, as their numbers count."""
        return draw_shape(tuple(self.x.shape), self.dim, self.granularity)


NUM_TENSORS = 5
"""How many fields of a call come first and are tensors."""


def draw_shape(shape: tuple[int, ...], dim: int, granularity: str) -> tuple[int, ...]:
    """Return the shape of the uniforms for x of a shape; ``dim`` is non-negative."""
    drawn = drawn_axes(len(shape), dim, granularity)
    return tuple(size if axis in drawn else 1 for axis, size in enumerate(shape))


def drawn_axes(num_axes: int, dim: int, granularity: str) -> set[int]:
    """Return the axes of x along which the noise varies; ``dim`` is non-negative."""
    if granularity == "element":
        return set(range(num_axes))
    return {dim} if granularity == "batch" else {0, dim}


class NoiseBackend(Protocol):
    """What a backend implements: a module with these functions."""

    def prepare(self, call: NoiseCall) -> Any:
        """Return what forward and backward both need: constants of the structures, nothing of x's size."""

    def multiply_noise(self, call: NoiseCall, prepared: Any) -> Tensor:
        """Return activation(x) · θ · mask in x's dtype and memory layout."""

    def multiply_noise_backward(
        self, call: NoiseCall, prepared: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ``multiply_noise`` in x, μ and log σ; bitwise the same on every run."""

    def sample_noise(
        self,
        mu: Tensor,
        log_sigma: Tensor,
        uniform: Tensor,
        lower: float,
        upper: float,
        *,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return θ at given uniforms and its derivatives in μ and log σ, in the broadcast shape and μ's dtype.

        The derivatives are empty unless asked for.
        """
