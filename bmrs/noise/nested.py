"""Nested tensors, whose examples differ in length."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def for_each_example(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's result for a nested tensor, one example after another: few operators know such tensors."""
    examples = [layer(example.unsqueeze(0)).squeeze(0) for example in x.unbind()]
    return torch.nested.as_nested_tensor(examples, layout=x.layout)
