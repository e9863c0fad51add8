"""Layer norms that constant channels can leave, where that is asked for: what is left is close, and never the same.

Of D channels x let D' stay, and the others be zero. With mean and variance of all, m and v, and of those that stay, m'
and v', and r = D'/D,

    m = r·m',    v = r·v' + r·(1 - r)·m'².

A layer norm of the D' channels with ε/r, times 1/√r, is (x - m') / √(r·v' + ε): where m' = 0 that is what the whole one
makes of a channel that stays, (x - m) / √(v + ε), and elsewhere it is off by (m' - m) / √(v + ε), the same for all of
them, and by a factor of 1 + O(m'²/v'). No layer norm of fewer channels does better for all x, as its results do not
change with the mean of what it takes, and those of the whole one do: x - m = (x - m') + (1 - r)·m'. What a bias and a
factor can make up for is the mean of both over examples. For z, what the whole one makes of the channels that stay, and
z', what the one of ε/r makes of them,

    z ≈ gain·z' + shift,    gain = E[z·z'] / E[z'²],    shift = E[z],

which is the fit by least squares, as z' sums up to zero over channels; gain goes into the weight, and shift times the
weight into the bias. Where m' = 0 everywhere, gain is 1/√r and shift 0, exactly. It takes zeros and other constants
alike.

Behind the whole layer norm, a channel that was the constant c is (c - m) / √(v + ε) times weight plus bias, which
varies with m and v. It leaves as its mean, which is a constant that biases behind can take up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bmrs.checks import shown
from bmrs.graph.capture import Captured, Moments

LAYER_NORM = "layer_norm"

APPROXIMATIONS = (LAYER_NORM,)
"""What ``approximate`` of `bmrs.compact` may name."""


def check_approximate(names: object) -> frozenset[str]:
    """Return the names of approximations.

    Raises:
        TypeError: they are not a sequence of names.
        ValueError: there is no approximation of a name.
    """
    known = ", ".join(map(repr, APPROXIMATIONS))
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(
            f"approximate must be a sequence of names, such as ({APPROXIMATIONS[0]!r},), got {shown(names)}"
        )
    for name in names:
        if name not in APPROXIMATIONS:
            raise ValueError(f"approximate must consist of {known}, which is all there is, got {shown(name)}")
    return frozenset(names)


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """A layer that normalises its last dimension by mean and variance.

    Attributes:
        layer: its qualified name.
        weight: qualified name of what it multiplies by then, which nothing else uses.
        bias: qualified name of what it adds, None if that is nothing.
        attribute: of the layer, where it takes ε from.
        eps: ε.
        tensors: the weight, and the bias or None.
        moments: what is known of its statistics.
        dropped: whether what leaves it counts as zero behind it, as no bias of all that read it there could stand in.
    """

    layer: str
    weight: str
    bias: str | None
    attribute: str
    eps: float
    tensors: tuple[Tensor, Tensor | None]
    moments: Moments
    dropped: bool = False

    def constants_behind(self, constant: Tensor) -> Tensor:
        """Return what stands in for constants behind it, NaN for NaN; its channels are along the last dimension."""
        if self.dropped:
            return constant.masked_fill(~constant.isnan(), 0.0)
        weight, bias = self.tensors
        result = self.moments.normalised(constant) * weight.detach().cpu().double()
        return result if bias is None else result + bias.detach().cpu().double()


@dataclass(frozen=True)
class Fit:
    """What makes up for the channels that left a layer norm: see above."""

    gain: float
    shift: float


def layer_norms(captured: Captured, path_of: dict[fx.Node, str]) -> dict[fx.Node, LayerNorm]:
    """Return the layer norms that channels may leave, by their operation.

    Args:
        captured: the model.
        path_of: of each operation, the layer that it belongs to.
    """
    if LAYER_NORM not in captured.approximate:
        return {}
    found = {}
    for node, path in path_of.items():
        if node.target is torch.ops.aten.layer_norm.default and (norm := _layer_norm(captured, node, path)):
            found[node] = norm
    return found


def _layer_norm(captured: Captured, node: fx.Node, path: str) -> LayerNorm | None:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given: dict[str, Any] = {"eps": 1e-5, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    weight, bias = (_own(captured, given.get(name), path) for name in ("weight", "bias"))
    if (
        weight is None
        or (bias is None and given.get("bias") is not None)
        or len(given["normalized_shape"]) != 1
    ):
        return None
    moments = Moments() if captured.moments is None else captured.moments.get(weight)
    values = vars(captured.model.get_submodule(path))
    attributes = [name for name, value in values.items() if type(value) is float and value == given["eps"]]
    if moments is None or len(attributes) != 1:
        return None
    tensors = (
        captured.tensors[given["weight"].name],
        None if bias is None else captured.tensors[given["bias"].name],
    )
    return LayerNorm(path, weight, bias, attributes[0], given["eps"], tensors, moments)


def _own(captured: Captured, node: object, path: str) -> str | None:
    """Return the name of a parameter of a layer that nothing but layer norms reads, each as the same argument."""
    name = captured.names.get(node.name) if isinstance(node, fx.Node) else None
    if name is None or name.rpartition(".")[0] != path:
        return None
    assert isinstance(node, fx.Node)
    tensor = captured.tensors[node.name]
    same = [n for n in node.graph.nodes if captured.tensors.get(n.name) is tensor]
    readers = {user for n in same for user in n.users}
    return name if all(user.target is torch.ops.aten.layer_norm.default for user in readers) else None
