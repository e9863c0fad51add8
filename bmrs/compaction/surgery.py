"""The user's own network with narrower layers: parameters cut, sizes set right, noise layers gone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bmrs.compaction.constant_layer import make_constant, make_passing
from bmrs.compaction.cutting import Cut
from bmrs.graph.analysis import Analysis
from bmrs.graph.capture import MarkedNoise
from bmrs.graph.channels import varying_axes
from bmrs.graph.copies import copied
from bmrs.graph.nodes import layer_of
from bmrs.graph.operators import FILLS, GATES
from bmrs.graph.rules import Call
from bmrs.graph.values import Value
from bmrs.noise.activations import ACTIVATION_LAYERS
from bmrs.noise.channel_scale import ChannelScale
from bmrs.noise.hooks import own_noise, remove_noise_hook
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.recurrent import HiddenNoise


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
    for name, channels in the_cut.constant.items():
        make_constant(model.get_submodule(name), channels, bias=f"{name}.bias" in the_cut.tensors)
    for name in the_cut.passing:
        make_passing(model.get_submodule(name))
    old = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    new: dict[int, Tensor] = {}
    for name, tensor in old.items():
        if id(tensor) not in new:
            new[id(tensor)] = _like(the_cut.tensors.get(name, tensor), tensor)
    for path, module in model.named_modules(remove_duplicate=False):
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None and id(tensor) in new:
                    holder[name] = new[id(tensor)]
        bias = f"{path}.bias" if path else "bias"
        if bias in the_cut.tensors and bias not in old:
            weight = analysis.captured.model.get_submodule(path).get_parameter("weight")
            module._parameters["bias"] = nn.Parameter(
                the_cut.tensors[bias], requires_grad=weight.requires_grad
            )
    _set_groups(analysis, model)
    for module in model.modules():
        set_sizes(module)
    set_attributes(model, the_cut.numbers)
    replace_noise(model, remaining, noise)
    return model.eval()


def _like(tensor: Tensor, old: Tensor) -> Tensor:
    """Return a tensor with the flags and the memory format of another, in memory of its own."""
    shared = tensor.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()
    tensor = (tensor.detach().clone() if shared else tensor.detach()).contiguous()
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
    elif isinstance(module, nn.RNNCellBase):
        module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]


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

_Sizes: TypeAlias = "defaultdict[str, defaultdict[int, set[int]]]"
"""By qualified name of a module, of old sizes the new ones."""


def sizes_in_code(analysis: Analysis, model: nn.Module) -> Iterator[dict[str, dict[str, int]]]:
    """Yield guesses at attributes from which modules' own code takes sizes, such as a number of heads; the best first.

    Where the sizes that an operation is given change, integer attributes of the module around it that are equal to
    the old size may have to become the new one; likewise where what the module takes becomes narrower, which its code
    may check. The comparison of outputs tells a right guess.

    Args:
        analysis: the network.
        model: the smaller one, which is left as it is, and is so again when the next one is asked for.

    Yields:
        Guesses: by qualified name of a module the new sizes by name of an attribute.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sizes: _Sizes = defaultdict(lambda: defaultdict(set))
    for node, call in analysis.calls.items():
        for old, new in _sizes_given(analysis, node, call):
            sizes[layer_of(node)][old].add(new)

    def guess(sizes: _Sizes, *, though_others_stay: bool) -> dict[str, dict[str, int]]:
        changed: dict[str, dict[str, int]] = {}
        for path, new_sizes in sizes.items():
            module = modules.get(path)
            if module is None or isinstance(module, nn.RNNBase):
                continue  # noise that is gone, and what knows its own
            for name, value in vars(module).items():
                if type(value) is not int or name.startswith("_") or name in _NUMBERS_OF_LAYERS:
                    continue
                known = new_sizes.get(value, set()) - ({value} if though_others_stay else set())
                if len(known) == 1 and known != {value}:
                    (size,) = known
                    changed.setdefault(path, {})[name] = size
        return changed

    most = guess(sizes, though_others_stay=True)
    found: list[dict[str, dict[str, int]]] = [{}]
    for each in (guess(sizes, though_others_stay=False), most, *_by_name(most)):
        if each not in found:
            yield each
            found.append(each)
    # What a check asks for is one attribute: others that happen to have that value mean something else.
    for each in _by_name(guess(_sizes_taken(analysis, modules), though_others_stay=True)):
        if each not in found:
            yield each
            found.append(each)


def _by_name(guess: dict[str, dict[str, int]]) -> list[dict[str, dict[str, int]]]:
    names = dict.fromkeys(name for attributes in guess.values() for name in attributes)
    return [{path: {n: s[n]} for path, s in guess.items() if n in s} for n in names]


def _sizes_taken(analysis: Analysis, modules: Mapping[str, nn.Module]) -> _Sizes:
    """Return the sizes that change of what modules of the user's own take, which their code may check."""
    sizes: _Sizes = defaultdict(lambda: defaultdict(set))
    changes: dict[fx.Node, list[tuple[int, int]]] = {}
    for node in analysis.calls:
        path = layer_of(node)
        for read in node.all_input_nodes:
            value = analysis.values.get(read)
            if not isinstance(value, Value) or value.tensor is not None:
                continue
            if read not in changes:
                pairs = zip(value.shape, analysis.kept_shape(value), strict=True)
                changes[read] = [(old, new) for old, new in pairs if old != new]
            around = path
            while changes[read] and not f"{layer_of(read)}.".startswith(f"{around}.") and around:
                module = modules.get(around)
                if module is not None and not type(module).__module__.startswith("torch.nn."):
                    for old, new in changes[read]:
                        sizes[around][old].add(new)
                around = around.rpartition(".")[0]
    return sizes


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


def set_attributes(model: nn.Module, values: Mapping[str, Mapping[str, float]]) -> None:
    """Set attributes of modules, by qualified name."""
    for path, attributes in values.items():
        for name, value in attributes.items():
            setattr(model.get_submodule(path), name, value)


def _sizes_given(analysis: Analysis, node: fx.Node, call: Call) -> list[tuple[int, int]]:
    """Return the sizes that an operation is given as numbers, each with what it has to be in the smaller network."""
    if call.operator.startswith("conv") and call["groups"] > 1:
        return [(call["groups"], groups_left(analysis, call))]
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
        rest = own_noise(module)
        if isinstance(rest, HiddenNoise) and not rest._modules and remove_noise_hook(module):
            del module._modules["noise"]
