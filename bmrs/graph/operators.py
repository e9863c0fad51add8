"""Families of operators that more than one file looks for, by their names in `bmrs.graph.rules.registry.Call`."""

from __future__ import annotations

import torch

LINEAR = ("linear", "addmm")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED_CONVOLUTIONS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
NEW_FILLS = ("new_zeros", "new_ones", "new_full")
FILLS = ("zeros", "ones", "full", *NEW_FILLS)
RESHAPINGS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze")

SCATTERS = (
    "index_add",
    "index_copy",
    "index_fill",
    "index_reduce",
    "scatter",
    "scatter_add",
    "scatter_reduce",
)
"""They put entries into a tensor, or sum them into it, at indices along one dimension."""

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""The recurrent layers, each with the number of blocks that the rows of its weights consist of, one for each gate."""

CELLS = {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}
"""One step of these, likewise."""


def plain_name(name: str) -> str:
    """Return an operator's name without the underscore of operations in place."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def shares_memory(target: torch._ops.OpOverload) -> bool:
    """Return whether what an operator returns lies in the memory of what it takes: views, and operations in place."""
    returns = target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def is_view(target: torch._ops.OpOverload) -> bool:
    """Return whether an operator returns memory of what it takes, and writes nothing."""
    return shares_memory(target) and not target._schema.is_mutable
