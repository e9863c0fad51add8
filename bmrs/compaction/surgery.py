"""The user's own network with narrower layers: parameters cut, sizes set right, noise layers gone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bmrs.compaction.folding import Folding
from bmrs.graph.analysis import Analysis, layer_of
from bmrs.graph.capture import MarkedNoise
from bmrs.graph.channels import varying_axes, without_repetition
from bmrs.graph.copies import copied
from bmrs.graph.operators import FILLS, GATES, LINEAR
from bmrs.graph.rules import Call
from bmrs.graph.rules.contraction import uniform
from bmrs.graph.values import Value
from bmrs.noise.activations import ACTIVATION_LAYERS
from bmrs.noise.channel_scale import ChannelScale
from bmrs.noise.hooks import remove_noise_hook
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.recurrent import HiddenNoise


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
    """

    tensors: dict[str, Tensor]
    selections: dict[str, Selection]


def shifts(analysis: Analysis) -> dict[fx.Node, Tensor]:
    """Return what leaving constant channels add to each output of the operations that read them; float64."""
    found = {}
    for node, call in analysis.calls.items():
        if call.operator in LINEAR or call.operator.startswith("conv"):
            shift = _shift(analysis, call)
            if shift is not None and bool(shift.any()):
                found[node] = shift
    return found


def _shift(analysis: Analysis, call: Call) -> Tensor | None:
    constant = leaving_constants(analysis, call)
    if constant is None or not constant.any():
        return None
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
    names = {}
    for node in found:
        call = analysis.calls[node]
        if call.operator != "addmm" and call["bias"] is None:
            names[node] = call["weight"].parameter.rpartition(".")[0] + ".bias"
    return {node: name.lstrip(".") for node, name in names.items()}


def cut(
    analysis: Analysis, folding: Folding, found_shifts: Mapping[fx.Node, Tensor], names: Mapping[fx.Node, str]
) -> Cut:
    """Compute the tensors of the smaller network, in float64 where they change in value."""
    changed: dict[str, Tensor] = {}

    def changing(name: str) -> Tensor:
        if name not in changed:
            tensor = analysis.parameters[name].tensor
            assert tensor is not None
            # Even a tensor that is double already is changed in a copy.
            changed[name] = tensor.detach().double().clone()
        return changed[name]

    dtypes = {
        name: value.tensor.dtype for name, value in analysis.parameters.items() if value.tensor is not None
    }
    for node, shift in found_shifts.items():
        call = analysis.calls[node]
        weight = call["mat2"] if call.operator == "addmm" else call["weight"]
        bias = call["self"] if call.operator == "addmm" else call["bias"]
        if bias is None:
            changed[names[node]] = shift.to(weight.tensor.device)
            dtypes[names[node]] = weight.tensor.dtype
        else:
            changing(bias.parameter).add_(shift.to(bias.tensor.device))
    for edit in folding.edits:
        for name in edit.parameters:
            if name not in changed:
                changing(name)
        edit.apply(changed)
    tensors, selections = {}, {}
    for name, value in analysis.parameters.items():
        assert value.tensor is not None
        # By the name of its first use, where it has several.
        tensor = changed.get(value.parameter or name, value.tensor.detach())
        selections[name] = selection(analysis, value)
        tensors[name] = selections[name].of(tensor).to(dtypes[name])
    for node, name in names.items():
        weight = analysis.calls[node]["weight"]
        transposed = "transpose" in analysis.calls[node].operator
        rows = selections[weight.parameter].axes.get(1 if transposed else 0)
        bias = changed[name]
        tensors[name] = (bias if rows is None else bias[rows.to(bias.device)]).to(dtypes[name])
    return Cut(tensors, selections)


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


def narrowed(
    analysis: Analysis,
    the_cut: Cut,
    remaining: Mapping[str, str],
    noise: Mapping[str, NoiseLayer] | None = None,
) -> nn.Module:
    """Return a copy of the captured model with the smaller tensors.

    Args:
        analysis: the network.
        the_cut: its smaller tensors.
        remaining: names of the noise layers that are not folded; they become `ChannelScale`.
        noise: by name, noise layers that take their places instead.
    """
    model = copied(analysis.captured.model, share=True)
    old = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    new: dict[int, Tensor] = {}
    for name, tensor in old.items():
        if id(tensor) not in new:
            new[id(tensor)] = _like(the_cut.tensors.get(name, tensor.detach()), tensor)
    for path, module in model.named_modules(remove_duplicate=False):
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None and id(tensor) in new:
                    holder[name] = new[id(tensor)]
        bias = f"{path}.bias" if path else "bias"
        if bias in the_cut.tensors and bias not in old:
            weight = module.get_parameter("weight")
            module._parameters["bias"] = nn.Parameter(
                the_cut.tensors[bias], requires_grad=weight.requires_grad
            )
    _set_groups(analysis, model)
    for module in model.modules():
        set_sizes(module)
    replace_noise(model, remaining, noise)
    return model.eval()


def _like(tensor: Tensor, old: Tensor) -> Tensor:
    """Return a copy of a tensor with the flags and the memory format of another."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if old.dim() in (4, 5) and not old.is_contiguous():
        channels_last = torch.channels_last if old.dim() == 4 else torch.channels_last_3d
        if old.is_contiguous(memory_format=channels_last):
            tensor = tensor.contiguous(memory_format=channels_last)
    return nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor


def set_sizes(module: nn.Module) -> None:
    """Make the sizes that a stock layer states those of its tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        shape = weight.shape
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif isinstance(module, _ConvNd):
            _set_convolution(module, shape)
        elif isinstance(module, _NormBase):
            module.num_features = shape[0]
        elif isinstance(module, nn.GroupNorm):
            size = module.num_channels // module.num_groups
            module.num_channels, module.num_groups = shape[0], shape[0] // size
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.normalized_shape = tuple(shape)
        elif isinstance(module, nn.PReLU):
            module.num_parameters = shape[0]
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = shape
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            # The linear layer of GPT-2 in transformers, whose weight is transposed.
            vars(module).update(nx=shape[0], nf=shape[1])
    elif isinstance(module, _NormBase) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.RNNBase):
        first: Tensor = module.get_parameter("weight_ih_l0")
        gates = GATES[module.mode.lower()]
        module.hidden_size, module.input_size = len(first) // gates, first.shape[1]
        module._init_flat_weights()


def _set_convolution(module: _ConvNd, shape: torch.Size) -> None:
    rows, columns = shape[0], shape[1] * module.groups
    transposed = isinstance(module, _ConvTransposeNd)
    module.in_channels, module.out_channels = (rows, columns) if transposed else (columns, rows)


def _set_groups(analysis: Analysis, model: nn.Module) -> None:
    """Make the groups of convolutions those that are left; sizes alone do not tell their number."""
    for call in analysis.calls.values():
        groups = call["groups"] if call.operator.startswith("conv") else 1
        if groups > 1 and (name := call["weight"].parameter):
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, _ConvNd):
                module.groups = groups_left(analysis, call)


def groups_left(analysis: Analysis, call: Call) -> int:
    """Return the number of groups of a convolution of which something stays."""
    rows = call["weight"].channels_along(0)
    if rows is None:
        return int(call["groups"])
    return int(analysis.stays(rows).view(call["groups"], -1).any(dim=1).sum())


_TAKE_SIZES = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand"), ("size", "shape")),
    **dict.fromkeys(FILLS, ("size",)),
    "unflatten": ("sizes",),
    "split": ("split_size",),
    "split_with_sizes": ("split_sizes",),
}


# Which layer of its model a layer is, in transformers.
_NUMBERS_OF_LAYERS = ("layer_idx", "layer_id", "layer_index")
_QUERIES_OF_A_GROUP = "num_key_value_groups"


def sizes_in_code(analysis: Analysis, model: nn.Module) -> list[dict[str, dict[str, int]]]:
    """Return guesses at attributes from which modules' own code takes sizes, such as a number of heads; the best first.

    Where the sizes that an operation is given change, integer attributes of the module around it that are equal to
    the old size may have to become the new one. The comparison of outputs tells a right guess.

    Args:
        analysis: the network.
        model: the smaller one, which is left as it is.

    Returns:
        Guesses: by qualified name of a module the new sizes by name of an attribute.
    """
    sizes: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for node, call in analysis.calls.items():
        for old, new in _sizes_given(analysis, node, call):
            sizes[layer_of(node)][old].add(new)

    def guess(*, though_others_stay: bool) -> dict[str, dict[str, int]]:
        changed: dict[str, dict[str, int]] = {}
        for path, new_sizes in sizes.items():
            module = model.get_submodule(path)
            if isinstance(module, nn.RNNBase):
                continue  # which knows its own
            for name, value in vars(module).items():
                if type(value) is not int or name.startswith("_") or name in _NUMBERS_OF_LAYERS:
                    continue
                known = new_sizes.get(value, set()) - ({value} if though_others_stay else set())
                if len(known) == 1 and known != {value}:
                    (size,) = known
                    changed.setdefault(path, {})[name] = size
        return changed

    most = guess(though_others_stay=True)
    names = dict.fromkeys(name for attributes in most.values() for name in attributes)
    singly = [{path: {n: s[n]} for path, s in most.items() if n in s} for n in names]
    return [g for g in (guess(though_others_stay=False), most, *singly) if g]


def queries_of_a_group(analysis: Analysis, model: nn.Module) -> dict[str, dict[str, int]]:
    """Return how many queries share a key in the attention of transformers, by name of a module, where that changes.

    Its code reads it on one of its ways only, so that the outputs of another would not tell.
    """
    changed: dict[str, dict[str, int]] = {}
    for node, call in analysis.calls.items():
        if call.operator == "scaled_dot_product_attention" and call["enable_gqa"]:
            q, k = call["query"], call["key"]
            old = q.shape[-3] // k.shape[-3]
            new = analysis.kept_shape(q)[-3] // analysis.kept_shape(k)[-3]
        elif (places := analysis.findings.repetitions_in(value := analysis.values[node])) is not None:
            axis = varying_axes(places)[0]
            old, new = value.shape[axis], analysis.kept_shape(value)[axis]
        else:
            continue
        path = layer_of(node)
        if old != new and vars(model.get_submodule(path)).get(_QUERIES_OF_A_GROUP) == old:
            changed[path] = {_QUERIES_OF_A_GROUP: new}
    return changed


def set_attributes(model: nn.Module, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Set attributes of modules, by qualified name."""
    for path, attributes in sizes.items():
        for name, size in attributes.items():
            setattr(model.get_submodule(path), name, size)


def _sizes_given(analysis: Analysis, node: fx.Node, call: Call) -> list[tuple[int, int]]:
    """Return the sizes that an operation is given as numbers, each with what it has to be in the smaller network."""
    names = _TAKE_SIZES.get(call.operator, ())
    given = next((call[name] for name in names if call[name] is not None), None)
    results = analysis.values.get(node)
    if given is None or results is None:
        return []
    if call.operator.startswith("split"):
        axis = call["dim"] % len(results[0].shape)
        new = [analysis.kept_shape(result)[axis] for result in results]
        return list(zip(given, new, strict=True)) if isinstance(given, list | tuple) else [(given, new[0])]
    kept, full = analysis.kept_shape(results), results.shape
    return [
        (old, new) for old, new in zip(full[-len(given) :], kept[-len(given) :], strict=True) if old in given
    ]


def replace_noise(
    model: nn.Module, remaining: Mapping[str, str], noise: Mapping[str, NoiseLayer] | None = None
) -> None:
    """Take marked noise layers out of a model, in place; those that remain become `ChannelScale` or noise again."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if not isinstance(child, MarkedNoise):
                continue
            if noise is not None and child.name in noise:
                module._modules[name] = noise[child.name]
            elif child.name in remaining:
                module._modules[name] = ChannelScale(
                    child.factors, dim=child.dim, activation=child.activation
                )
            elif child.activation is not None:
                # A hook, if there is one, goes on applying it.
                module._modules[name] = ACTIVATION_LAYERS[child.activation]()
            elif (
                isinstance(module, HiddenNoise)
                or remove_noise_hook(module)
                or (type(module) is nn.Sequential and len(module) > 1)
            ):
                del module._modules[name]
            else:
                module._modules[name] = nn.Identity()
    for module in list(model.modules()):
        rest = module._modules.get("noise")
        if isinstance(rest, HiddenNoise) and not rest._modules and remove_noise_hook(module):
            del module._modules["noise"]
