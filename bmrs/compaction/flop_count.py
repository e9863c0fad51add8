"""Counting floating-point operations, as torch's `FlopCounterMode` does, on kernels too that it has no formula for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from bmrs.compaction.comparison import without_fast_path
from bmrs.graph.inputs import Inputs, map_tensors


def forward_flops(model: nn.Module, inputs: Inputs) -> int:
    """Return the floating-point operations of a forward pass, two for each multiply-add."""
    args, kwargs = map_tensors(torch.clone, inputs)
    with flop_counter() as counter, without_fast_path():
        model(*args, **kwargs)
    return int(counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """Return a counter that sees products in attention and recurrent layers, whatever kernel torch takes for them."""
    aten = torch.ops.aten
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten.mkldnn_rnn_layer: _recurrent_layer,
            aten._cudnn_rnn: _recurrent_layers,
            aten.miopen_rnn: _recurrent_layers,
        },
    )
    counter.mod_tracker = _NoModules()
    return counter


# Formulas are given the shapes of an operator's tensors.
def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    rows = math.prod(query[:-1])
    return 2 * rows * key[-2] * (query[-1] + value[-1])


def _recurrent_layer(x: Sequence[int], *weights_first: Any, **_: Any) -> int:
    return _recurrent_layers(x, weights_first[:2])


def _recurrent_layers(x: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    places = math.prod(x[:-1])
    return 2 * places * sum(math.prod(shape) for shape in weights if len(shape) == 2)


class _NoModules(ModuleTracker):
    """Tracks no modules, as the hook for that cannot take a view of a parameter without gradients.

    Tokens and queries that are expanded, as those of CaiT and Perceiver, are such views.
    """

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass
