"""Networks as plain data: the operations of a captured graph in their order.

`bmrs.compaction.describing` makes a `Description` of a captured model, `bmrs.compaction.graph_network` makes a network
of it, and `bmrs.files.graphs` writes it into files and reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bmrs.graph.operators import plain_name
from bmrs.graph.rules import RULES

SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (
        "add",
        "sub",
        "mul",
        "floordiv",
        "truediv",
        "mod",
        "neg",
        "pow",
        "eq",
        "lt",
        "le",
        "gt",
        "ge",
    )
} | {
    "sym_min": torch.sym_min,
    "sym_max": torch.sym_max,
    "sym_float": torch.sym_float,
    "sym_not": torch.sym_not,
}
"""What is computed with sizes."""

NOISE = "NoiseLayer"
"""The type of a layer that is noise."""


# Pure operators that have no rule of their own: channels that reach them stay.
# fmt: off
_WITHOUT_RULE = frozenset((
    "arange", "full", "zeros", "ones", "scalar_tensor", "sym_size", "new_empty", "empty", "eye", "linspace",
    "tril", "triu", "item", "_local_scalar_dense", "one_hot", "searchsorted", "bucketize", "histc", "isin",
    "nonzero", "count_nonzero", "slice_scatter", "masked_scatter", "diff", "outer", "tensordot",
    "chain_matmul", "cross", "cdist", "pairwise_distance", "addmv", "addbmm", "bilinear", "embedding_bag",
    "affine_grid_generator", "cummax", "cummin", "imag", "complex", "polar", "cross_entropy_loss",
    "nll_loss", "nll_loss_nd", "mse_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits", "kl_div",
    "median", "kthvalue", "mode", "frac", "trace", "tril_indices", "triu_indices", "hann_window",
    "hamming_window", "fill_diagonal", "quantile", "nanquantile", "aminmax", "diag_embed", "nansum",
    "nanmean", "inner", "stft", "istft", "linalg_inv", "linalg_det", "linalg_solve", "inverse", "det",
    "logdet", "atleast_2d", "atleast_3d", "huber_loss", "l1_loss", "soft_margin_loss",
))
# fmt: on


@dataclass(frozen=True)
class Operation:
    """One operation of a description.

    Attributes:
        name: of its result.
        kind: ``"input"`` (with what it has to be, see `check_inputs`), ``"tensor"`` (a parameter, buffer or constant),
            ``"call"`` (an operator), ``"scalar"`` (a function of sizes), ``"item"`` (a part of a list), ``"layer"`` (a
            stock layer) or ``"scale"``.
        target: name of the tensor, operator, function or type of layer; "" otherwise.
        args: arguments, with `Reference` for results of other operations.
        kwargs: of operators, and of stock layers those of their constructor.
    """

    name: str
    kind: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """The result of an operation, by its name."""

    name: str


@dataclass(frozen=True)
class Description:
    """A whole network.

    Attributes:
        operations: in an order of execution.
        outputs: arguments with references, in the tree that the model returns.
        in_tree: how (args, kwargs) are nested: lists, tuples and dicts with None at the leaves.
        constants: tensors that are not the model's, by name.
    """

    operations: tuple[Operation, ...]
    outputs: Any
    in_tree: Any
    constants: Mapping[str, Tensor] = field(default_factory=dict)


class UnsupportedError(ValueError):
    """A graph holds what a description cannot."""


def references(tree: Any) -> list[Reference]:
    """Return all references in a tree of arguments."""
    leaves = pytree.tree_flatten(tree, is_leaf=lambda x: isinstance(x, Reference))[0]
    return [leaf for leaf in leaves if isinstance(leaf, Reference)]


def check_operator(name: str, place: str) -> torch._ops.OpOverload:
    """Return the operator of a name, if a description may hold it.

    Raises:
        UnsupportedError: it may not.
    """
    namespace, _, rest = name.partition(".")
    operator_name, _, overload = rest.rpartition(".")
    plain = plain_name(operator_name)
    if namespace != "aten" or not (plain in RULES or plain in _WITHOUT_RULE):
        raise UnsupportedError(f"a network cannot be described with {place!r}, a call of {name}")
    packet = getattr(torch.ops.aten, operator_name, None)
    found = getattr(packet, overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise UnsupportedError(f"there is no operator {name} in this version of torch, at {place!r}")
    return found
