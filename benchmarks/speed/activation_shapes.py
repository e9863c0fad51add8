"""Shapes of activations that timings and the GPU check share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ActivationShape(NamedTuple):
    """A shape with its structures' axis and memory format."""

    shape: tuple[int, ...]
    dim: int = 1
    channels_last: bool = False

    @property
    def structures(self) -> int:
        """Number of structures."""
        return self.shape[self.dim]

    @property
    def name(self) -> str:
        """A name for people."""
        layout = "channels_last" if self.channels_last else f"dim {self.dim}" if self.dim != 1 else ""
        return " ".join(filter(None, ["x".join(map(str, self.shape)), layout]))

    def laid_out(self, values: Tensor) -> Tensor:
        """Return values of the shape in the memory format."""
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values


LARGE = ActivationShape((64, 64, 112, 112))
CHANNELS_LAST = ActivationShape((256, 64, 56, 56), channels_last=True)
LINEAR = ActivationShape((65536, 768))
TOKENS = ActivationShape((64, 197, 768), dim=2)
