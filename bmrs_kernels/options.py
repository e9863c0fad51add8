"""The choices that functions take by name."""

from __future__ import annotations

from typing import Literal, TypeAlias

Backend: TypeAlias = Literal["auto", "torch", "triton", "numba"]
Granularity: TypeAlias = Literal["element", "sample", "batch"]
Activation: TypeAlias = Literal["relu", "tanh"]
