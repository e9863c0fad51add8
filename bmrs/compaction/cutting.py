"""What is left of every tensor of a network: its entries, with the changes of value that make up for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor, fx

from bmrs.compaction.edits import Tensors
from bmrs.compaction.folding import Folding
from bmrs.graph.analysis import Analysis, NormChange
from bmrs.graph.channels import varying_axes, without_repetition
from bmrs.graph.emptied import NOTHING, Emptied, layer_name, weight_of
from bmrs.graph.operators import LINEAR
from bmrs.graph.rules import Call
from bmrs.graph.rules.contraction import uniform
from bmrs.graph.values import Value

_Change: TypeAlias = "tuple[tuple[str, ...], Callable[[Tensors], None]]"
"""Names of tensors, and what changes them in place."""


@dataclass(frozen=True)
class Selection:
    """What stays of a tensor.

    Attributes:
        axes: for every dimension that becomes smaller, the entries that stay, int64.
        columns: for grouped convolutions, of which each group keeps other columns, those of each row that stays.
    """

    axes: dict[int, Tensor]
    columns: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return what stays of a tensor of the full shape."""
        for axis, entries in self.axes.items():
            tensor = tensor.index_select(axis, entries.to(tensor.device))
        if self.columns is not None:
            index = self.columns.to(tensor.device)
            index = index.view(*index.shape, *[1] * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])
            tensor = tensor.gather(1, index)
        return tensor


@dataclass(frozen=True)
class Cut:
    """The tensors of a smaller network.

    Attributes:
        tensors: by qualified name of a parameter or buffer of the masked network; biases that are new too.
        selections: by qualified name, what of the full tensor they are.
        constant: names of layers that lose their weights, with the channels of their outputs.
        passing: names of layers that are to return what they take.
        gone: names of tensors that nothing is left of.
        numbers: by qualified name of a module, attributes that change with the sizes, as ε.
    """

    tensors: dict[str, Tensor]
    selections: dict[str, Selection]
    constant: dict[str, int] = field(default_factory=dict)
    passing: tuple[str, ...] = ()
    gone: frozenset[str] = frozenset()
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)


def shifts(analysis: Analysis, emptied: Emptied = NOTHING) -> dict[fx.Node, Tensor]:
    """Return what constant channels that are no longer read add to each output of an operation; float64.

    Those of a layer that nothing is left of are all no longer read.
    """
    found = {}
    for node, call in analysis.calls.items():
        if node in emptied.unread or not (call.operator in LINEAR or call.operator.startswith("conv")):
            continue
        constant = emptied.constant.get(node)
        constant = leaving_constants(analysis, call) if constant is None else constant
        if constant is not None and constant.any():
            shift = _shift(call, constant)
            if bool(shift.any()):
                found[node] = shift
    return found


def _shift(call: Call, constant: Tensor) -> Tensor:
    weight = call["mat2"] if call.operator == "addmm" else call["weight"]
    matrix = (
        weight.tensor.detach().cpu().double().flatten(2).sum(2)
        if weight.tensor.dim() > 2
        else (weight.tensor.detach().cpu().double())
    )
    if call.operator == "addmm":
        return constant @ matrix
    groups = 1 if call.operator in LINEAR else call["groups"]
    per_row = constant.view(groups, -1).repeat_interleave(len(matrix) // groups, dim=0)
    return (matrix * per_row).sum(dim=1)


def leaving_constants(analysis: Analysis, call: Call) -> Tensor | None:
    """Return what each channel of the input of a linear layer or convolution is if it leaves as a constant, else 0.

    Args:
        analysis: the network.
        call: one of a linear layer or convolution.

    Returns:
        float64, one number for each channel, in their order; None if a bias behind the operation cannot take it up.
    """
    x: Value = call["mat1"] if call.operator == "addmm" else call["input"]
    weight = call["mat2"] if call.operator == "addmm" else call["weight"]
    if x.constant is None or not call.can_shift or weight.tensor is None:
        return None
    if call.operator.startswith("conv_transpose"):
        return None
    if call.operator not in LINEAR and call["groups"] > 1 and weight.shape[1] == 1:
        # Every channel of the input leaves with its own outputs.
        return None
    axis = channel_axis(call)
    layer = x.layer_along(axis)
    if layer is None or varying_axes(layer) != (axis,):
        return None
    constant = uniform(x.constant, [d for d in range(len(x.shape)) if d != axis])
    constant = constant.movedim(axis, -1).flatten().expand(x.shape[axis])
    (channels,) = without_repetition(layer)
    return constant.nan_to_num(0.0) * ~analysis.stays(channels).flatten()


def channel_axis(call: Call) -> int:
    """Return the dimension of the input of a linear layer or convolution along which its channels lie."""
    x: Value = call["mat1"] if call.operator == "addmm" else call["input"]
    return len(x.shape) - 1 if call.operator in LINEAR else len(x.shape) + 1 - len(call["weight"].shape)


def new_biases(analysis: Analysis, found: Mapping[fx.Node, Tensor]) -> dict[fx.Node, str]:
    """Return names for the biases of operations that need one and have none."""
    return {node: name for node in found if (name := analysis.calls[node].new_bias)}


def cut(
    analysis: Analysis,
    folding: Folding,
    found_shifts: Mapping[fx.Node, Tensor],
    names: Mapping[fx.Node, str],
    emptied: Emptied = NOTHING,
) -> Cut:
    """Compute the tensors of the smaller network, in float64 where they change in value.

    Those that neither change nor get smaller are the network's own.
    """
    parameters = analysis.parameters
    selections = {name: selection(analysis, value) for name, value in parameters.items()}
    new = {name: (analysis.calls[node], found_shifts[node]) for node, name in names.items()}

    def before(name: str) -> Tensor:
        if name in new:
            call, shift = new[name]
            return shift.to(_weight(call).device)
        # Even a tensor that is double already is changed in a copy.
        return _tensor(parameters[name]).detach().double().clone()

    def after(name: str, tensor: Tensor) -> Tensor:
        if name not in new:
            return selections[name].of(tensor).to(_tensor(parameters[name]).dtype)
        call, _ = new[name]
        rows = selections[call["weight"].parameter].axes.get(1 if "transpose" in call.operator else 0)
        return (tensor if rows is None else tensor[rows.to(tensor.device)]).to(_weight(call).dtype)

    changes: list[_Change] = [((name,), lambda tensors: None) for name in new]
    changes += [_shifted(analysis.calls[n], shift) for n, shift in found_shifts.items() if n not in names]
    changes += [(edit.parameters, edit.apply) for edit in folding.edits]
    # Once for each layer, as several operations can be of the same one.
    norms = {change.weight: change for change in analysis.changes().values()}
    changes += map(_of_norm, norms.values())
    numbers = {change.layer: {change.attribute: change.eps} for change in norms.values()}
    tensors: Tensors = {}
    for group in _apart(changes):
        # One after another, as float64 copies of all would take twice the memory of a network in single precision.
        changed = {name: before(name) for name in {name: None for its, _ in group for name in its}}
        for _, apply in group:
            apply(changed)
        tensors |= {name: after(name, tensor) for name, tensor in changed.items()}
    for name, value in parameters.items():
        # By the name of its first use, where it has several.
        first = value.parameter or name
        if first not in tensors:
            tensors[first] = selections[first].of(_tensor(value).detach())
        tensors[name] = tensors[first]
    constant = {}
    for node in (*emptied.constant, *emptied.unread):
        call = analysis.calls[node]
        rows = 1 if call.operator == "addmm" else 0
        constant[layer_name(call)] = analysis.kept_shape(weight_of(call))[rows]
    gone = names_gone(analysis, emptied)
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    selections = {name: chosen for name, chosen in selections.items() if name not in gone}
    return Cut(kept, selections, constant, emptied.passing, gone, numbers)


def names_gone(analysis: Analysis, emptied: Emptied) -> frozenset[str]:
    """Return names of parameters and buffers that nothing is left of."""
    gone = {f"{layer_name(analysis.calls[node])}.weight" for node in (*emptied.constant, *emptied.unread)}
    gone |= {f"{layer_name(analysis.calls[node])}.bias" for node in emptied.unread}
    for name in emptied.passing:
        layer = analysis.captured.model.get_submodule(name)
        own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        gone |= {f"{name}.{key}" for key, _ in own}
    return frozenset(gone)


def _tensor(value: Value) -> Tensor:
    assert value.tensor is not None
    return value.tensor


def _weight(call: Call) -> Tensor:
    return _tensor(weight_of(call))


def _shifted(call: Call, shift: Tensor) -> _Change:
    """Return the change that adds to the bias of an operation."""
    name = (call["self"] if call.operator == "addmm" else call["bias"]).parameter

    def apply(tensors: Tensors) -> None:
        tensors[name].add_(shift.to(tensors[name].device))

    return (name,), apply


def _of_norm(change: NormChange) -> _Change:
    """Return the change of the weight and bias of a normalisation that channels leave."""

    def apply(tensors: Tensors) -> None:
        if change.bias is not None:
            tensors[change.bias].add_(tensors[change.weight], alpha=change.shift)
        tensors[change.weight].mul_(change.gain)

    return (change.weight, *(() if change.bias is None else (change.bias,))), apply


def _apart(changes: Iterable[_Change]) -> list[list[_Change]]:
    """Return changes in groups that have no tensor in common, each in order."""
    groups: list[tuple[set[str], list[_Change]]] = []
    for change in changes:
        names, members = set(change[0]), [change]
        rest = []
        for its_names, its_members in groups:
            if names.isdisjoint(its_names):
                rest.append((its_names, its_members))
            else:
                names, members = names | its_names, its_members + members
        groups = [*rest, (names, members)]
    return [members for _, members in groups]


def selection(analysis: Analysis, value: Value) -> Selection:
    """Return what stays of a parameter or buffer."""
    joint = next((layer for layer in value.layers if len(varying_axes(layer)) > 1), None)
    axes = {}
    for axis in range(len(value.shape)):
        kept = None if joint is not None and axis == 1 else analysis.kept(value, axis)
        if kept is not None:
            axes[axis] = kept
    if joint is None:
        return Selection(axes)
    stays = analysis.stays(joint.flatten(2)[..., 0] if joint.dim() > 2 else joint)
    stays = stays[axes[0]] if 0 in axes else stays
    if stays.all():
        return Selection(axes)
    return Selection(axes, stays.nonzero()[:, 1].view(len(stays), -1))
