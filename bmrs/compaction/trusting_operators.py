"""Operators of which the kernels take sizes on trust, and with others read or write beside their memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmrs.graph.operators import GATES

_OF_LAYERS = (
    "input",
    "hx",
    "params",
    "has_biases",
    "num_layers",
    "dropout",
    "train",
    "bidirectional",
    "batch_first",
)
_OF_CELLS = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")


_BATCH_NORMS = ("_native_batch_norm_legit_no_training", "cudnn_batch_norm")


def takes_sizes_on_trust(operator: str) -> bool:
    """Return whether an operator, such as ``aten.lstm.input``, is one that `check_sizes` knows."""
    name = operator.split(".")[1]
    return name.removesuffix("_cell") in GATES or name in _BATCH_NORMS


def check_sizes(*args: Any, operator: str, **kwargs: Any) -> Tensor:
    """Return the input of such an operator, if what it is given with it has the sizes that belong together.

    Args:
        args: what the operator is given.
        operator: its name.
        kwargs: what it is given by name.

    Raises:
        ValueError: they have not.
    """
    if operator.split(".")[1] in _BATCH_NORMS:
        return _check_batch_norm(operator, *args, **kwargs)
    return _check_recurrent(operator, *args, **kwargs)


def _check_batch_norm(operator: str, x: Tensor, *others: Any, **more: Any) -> Tensor:
    channels = x.shape[1] if x.dim() > 1 else None
    for tensor in (*others, *more.values()):
        if isinstance(tensor, Tensor) and tuple(tensor.shape) != (channels,):
            raise ValueError(
                f"{operator} must have tensors of shape ({channels},) beside its input, got {tuple(tensor.shape)}"
            )
    return x


def _check_recurrent(operator: str, *args: Any, **kwargs: Any) -> Tensor:
    kind, overload = operator.split(".")[1:]
    if overload == "data":
        raise ValueError(f"{operator} of packed sequences cannot be run from a file")
    cell = kind.endswith("_cell")
    given = {**dict(zip(_OF_CELLS if cell else _OF_LAYERS, args, strict=False)), **kwargs}
    x, hx = given["input"], given["hx"]
    states = list(hx) if isinstance(hx, list | tuple) else [hx]
    weights = (
        [given[key] for key in _OF_CELLS[2:] if given.get(key) is not None] if cell else list(given["params"])
    )
    layers, directions = (1, 1) if cell else (given["num_layers"], 2 if given["bidirectional"] else 1)
    biases = len(weights) == 4 if cell else bool(given["has_biases"])
    rank = 2 if cell else 3
    expected_states = 2 if kind.startswith("lstm") else 1
    if x.dim() != rank or len(states) != expected_states or any(state.dim() != rank for state in states):
        raise ValueError(f"{operator} must have an input and {expected_states} states of {rank} dimensions")
    batch = x.shape[0] if cell or given["batch_first"] else x.shape[1]
    outside, inside = states[0].shape[-1], states[-1].shape[-1]  # with and without projection
    rows = GATES[kind.removesuffix("_cell")] * inside
    projected = outside != inside
    first = (batch,) if cell else (layers * directions, batch)
    expected = []
    for layer in range(layers):
        read = x.shape[-1] if layer == 0 else directions * outside
        one = [(rows, read), (rows, outside), *([(rows,), (rows,)] if biases else [])]
        expected += directions * [*one, *([(outside, inside)] if projected else [])]
    found = [tuple(tensor.shape) for tensor in (*states, *weights)]
    wanted = [(*first, outside), *([(*first, inside)] if len(states) == 2 else []), *expected]
    # Autocast makes them one dtype by itself.
    one_dtype = (
        torch.is_autocast_enabled(x.device.type) or len({t.dtype for t in (x, *states, *weights)}) == 1
    )
    if found != wanted or not one_dtype:
        raise ValueError(
            f"{operator} must have states and weights of shapes {wanted} and one dtype, got {found}"
        )
    checked: Tensor = x
    return checked
