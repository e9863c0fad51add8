"""What is left of a noise layer in a compacted network where no weight can take its factors up."""

from __future__ import annotations

from torch import Tensor, nn

from bmrs.noise.activations import activated
from bmrs.noise.nested import for_each_example
from bmrs_kernels.options import Activation


class ChannelScale(nn.Module):
    """A fixed factor for each entry along a dimension: noise in evaluation mode that no other layer could take up.

    Args:
        factors: the factors.
        dim: the dimension.
        activation: what is applied before, as in `NoiseLayer`.
    """

    factors: Tensor

    def __init__(self, factors: Tensor, *, dim: int, activation: Activation | None = None) -> None:
        super().__init__()
        self.dim, self.activation = dim, activation
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(x) · factors."""
        if x.is_nested:
            return for_each_example(self, x)
        return self.scaled(activated(x, self.activation))

    def scaled(self, x: Tensor) -> Tensor:
        """Return x · factors."""
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return x * self.factors.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"{len(self.factors)}, dim={self.dim}, activation={self.activation!r}"
