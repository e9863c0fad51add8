"""Normalisations by the root mean square, from which channels that are zero can leave.

With S the sum of squares over N channels of which N - n are zero, x / sqrt(S/N + ε) is
sqrt(N/n) · x / sqrt(S/n + ε·N/n).
So a layer with n channels does the same if its weight is multiplied by sqrt(N/n), and its ε by N/n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from bmrs.graph.capture import Captured

aten = torch.ops.aten


@dataclass(frozen=True)
class RmsNorm:
    """A layer that divides by the root mean square along its last dimension.

    Attributes:
        layer: its qualified name.
        weight: qualified name of what it multiplies by then, which nothing else uses.
        attribute: of the layer, where it takes ε from.
        eps: ε.
        adds_eps: the operation that adds ε; None where it is an argument of the normalisation.
    """

    layer: str
    weight: str
    attribute: str
    eps: float
    adds_eps: fx.Node | None = None


def rms_norms(captured: Captured, path_of: dict[fx.Node, str]) -> dict[fx.Node, RmsNorm]:
    """Return such layers by the operation that takes the mean square.

    Args:
        captured: the model.
        path_of: of each operation, the layer that it belongs to.
    """
    found = {}
    layers = dict(captured.model.named_modules())
    for node, path in path_of.items():
        norm = None
        if node.target is aten.rms_norm.default and isinstance(layer := layers.get(path), nn.RMSNorm):
            norm = _stock(captured, node, path, layer)
        elif node.target is aten.mean.dim and path in layers:
            norm = _by_hand(captured, node, path)
        if norm is not None:
            found[node] = norm
    return found


def _stock(captured: Captured, node: fx.Node, path: str, layer: nn.RMSNorm) -> RmsNorm | None:
    weight = _own_weight(captured, node.args[2] if len(node.args) > 2 else node.kwargs.get("weight"), path)
    if type(layer).forward is not nn.RMSNorm.forward or weight is None:
        return None
    eps = torch.finfo(layer.weight.dtype).eps if layer.eps is None else layer.eps
    return RmsNorm(path, weight, "eps", float(eps))


def _by_hand(captured: Captured, node: fx.Node, path: str) -> RmsNorm | None:
    """Return what x · rsqrt(mean(x²) + ε) · weight is, each step read by the next one alone."""
    square, dims = node.args[0], node.args[1]
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    rank = node.meta["val"].dim()
    if not keeps or not isinstance(square, fx.Node) or [d % rank for d in dims] != [rank - 1]:  # type: ignore
        return None
    x = _squared(square)
    adds = _only_user(node, aten.add.Tensor)
    root = _only_user(adds, aten.rsqrt.default)
    scaled = _only_user(root, aten.mul.Tensor)
    if x is None or len(_readers(square)) != 1 or adds is None or scaled is None or x not in scaled.args:
        return None
    eps = adds.args[1]
    result: fx.Node | None = scaled
    while (cast := _only_user(result, aten.to.dtype)) is not None:
        result = cast
    weighted = _only_user(result, aten.mul.Tensor)
    if weighted is None or not isinstance(eps, float) or adds.kwargs:
        return None
    (other,) = [a for a in weighted.args if a is not result]
    while isinstance(other, fx.Node) and other.target is aten.to.dtype and len(_readers(other)) == 1:
        other = other.args[0]
    weight = _own_weight(captured, other, path)
    values = vars(captured.model.get_submodule(path))
    names = [name for name, value in values.items() if type(value) is float and value == eps]
    return RmsNorm(path, weight, names[0], eps, adds) if weight is not None and len(names) == 1 else None


def _squared(node: fx.Node) -> fx.Node | None:
    """Return what an operation is the square of."""
    x = node.args[0] if node.args else None
    squares = (
        node.target is aten.square.default
        or (node.target is aten.pow.Tensor_Scalar and node.args[1] in (2, 2.0))
        or (node.target is aten.mul.Tensor and node.args[1] is x)
    )
    return x if squares and isinstance(x, fx.Node) else None


def _only_user(node: fx.Node | None, target: object) -> fx.Node | None:
    """Return the only operation that reads another, if it is of a kind."""
    users = [] if node is None else _readers(node)
    return users[0] if len(users) == 1 and users[0].target is target else None


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the operations that read another, but for checks of its dtype."""
    return [user for user in node.users if user.target is not aten._assert_tensor_metadata.default]


def _own_weight(captured: Captured, node: object, path: str) -> str | None:
    """Return the name of a parameter of a layer that only one operation reads."""
    if not isinstance(node, fx.Node) or len(_readers(node)) != 1:
        return None
    name = captured.names.get(node.name)
    aliases = [p for p, tensor in captured.tensors.items() if tensor is captured.tensors.get(node.name)]
    own = name is not None and name.rpartition(".")[0] == path and len(aliases) == 1
    return name if own and captured.tensors[node.name].dim() == 1 else None
