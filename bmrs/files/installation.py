"""A network of the user's class at its full size becomes the compacted one of a file."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bmrs.checks import one_line
from bmrs.compaction.constant_layer import ConstantLayer, PassingLayer, make_constant, make_passing
from bmrs.compaction.surgery import replace_noise, set_attributes, set_sizes
from bmrs.files.layer_arguments import check_arguments
from bmrs.graph.capture import MarkedNoise
from bmrs.graph.copies import copied, materialise_weights
from bmrs.graph.stock_layers import build_layer
from bmrs.noise.activations import ACTIVATION_LAYERS
from bmrs.noise.added import note_what_was_added
from bmrs.noise.channel_scale import ChannelScale
from bmrs.noise.hooks import add_noise_hook, noise_position
from bmrs.noise.layer import NoiseLayer, NoisePosition, stored_arguments
from bmrs.noise.lookup import noise_layers
from bmrs.noise.placement import is_transposed_linear
from bmrs.noise.recurrent import HiddenNoise

_CODES: dict[NoisePosition, Any] = {"output": False, "input": True, "hidden": "hidden"}
"""How a file says what of a layer is multiplied."""

_TENSORS_OF_NOISE = ("mu", "log_sigma", "mask", "pruned")


def describe_changes(model: nn.Module) -> dict[str, Any]:
    """Return what a compacted network has that its tensors do not tell, ready for JSON.

    Returns:
        Names of parameters that are ``"frozen"``; by qualified name, ``"groups"`` of convolutions, ``"scales"``,
        factors that could not be folded (dimension, activation before them, and what of the layer they multiply),
        ``"activations"`` that noise had and that hooks go on applying (name, and again to what), and ``"noise"`` that
        was kept (its first name, constructor arguments, and that again). What of a layer is multiplied is false for
        what it returns, true for what it takes, and ``"hidden"`` for the hidden units of a recurrent one;
        ``"constant"`` layers without weights, with their channels, and ``"passing"`` ones, which return what they take.
    """
    hosts = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_modules() if name}
    return {
        "frozen": [n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad],
        "groups": {n: m.groups for n, m in model.named_modules() if isinstance(m, _ConvNd)},
        "scales": {
            n: [m.dim, m.activation, _CODES[noise_position(hosts[n])]]
            for n, m in model.named_modules()
            if isinstance(m, ChannelScale)
        },
        "activations": {
            n: [kind, _CODES[noise_position(hosts[n])]]
            for n, m in model.named_modules()
            for kind, layer in ACTIVATION_LAYERS.items()
            if n.rpartition(".")[2] == "noise" and type(m) is layer
        },
        "noise": _describe_noise(model),
        "constant": {n: m.channels for n, m in model.named_modules() if isinstance(m, ConstantLayer)},
        "passing": [n for n, m in model.named_modules() if isinstance(m, PassingLayer)],
    }


def _describe_noise(model: nn.Module) -> dict[str, Any]:
    first = {layer: name for name, layer in noise_layers(model).items()}
    return {
        name: [first[module], stored_arguments(module), _CODES[module.hooked or "output"]]
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, NoiseLayer)
    }


def install(model: nn.Module, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Make a network at its full size the compacted one that a file describes, in place.

    Args:
        model: the network, with or without noise layers, which it loses.
        description: see `describe_changes`; and ``"sizes"``, by qualified name of a module integer attributes that
            became smaller, and ``"numbers"``, such as ε, that became larger.
        tensors: parameters and buffers by qualified name.

    Raises:
        ValueError: the file is not of such a network; the first thing that does not fit is named. The network is left
            as it was.
    """
    trial = copied(model, share=True)
    for module in trial.modules():
        materialise_weights(module)
    for key in ("groups", "scales", "sizes", "numbers", "activations", "noise", "constant"):
        if not isinstance(description.get(key, {}), dict):
            raise ValueError(f"its {key} are not a mapping")
    name_of_class = type(model).__name__
    _empty_layers(trial, tensors, description, name_of_class)
    _set_tensors(trial, tensors, description, name_of_class)
    _set_groups(trial, description.get("groups", {}), name_of_class)
    for module in trial.modules():
        set_sizes(module)
    set_attributes(trial, _checked_sizes(trial, description.get("sizes", {}), name_of_class))
    set_attributes(trial, _checked_numbers(trial, description.get("numbers", {}), name_of_class))
    _set_noise(trial, tensors, description, name_of_class)
    # Only now, so that the network is untouched by whatever is wrong before.
    model.__class__ = type(trial)
    model.__dict__.clear()
    model.__dict__.update(vars(trial))


def _empty_layers(
    model: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any], name_of_class: str
) -> None:
    """Turn layers into those without weights."""
    modules = dict(model.named_modules())
    for name, channels in description.get("constant", {}).items():
        layer = modules.get(name)
        fits = isinstance(layer, nn.Linear | _ConvNd) or (layer is not None and is_transposed_linear(layer))
        if not fits or type(channels) is not int or channels < 1:
            raise ValueError(
                f"its layer {name[:100]!r} without weights is not one of model ({name_of_class})"
            )
        make_constant(modules[name], channels, bias=f"{name}.bias" in tensors)
    passing = description.get("passing", [])
    if not isinstance(passing, list) or not all(isinstance(n, str) and n in modules for n in passing):
        raise ValueError(
            f"its layers {str(passing)[:100]} that do nothing are not those of model ({name_of_class})"
        )
    for name in passing:
        make_passing(modules[name])


def _set_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any], name_of_class: str
) -> None:
    noise = set(noise_layers(model))
    own = {
        name: tensor
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
        if name.rpartition(".")[0] not in noise
    }
    cells = {n for n, module in model.named_modules() if isinstance(module, nn.RNNCellBase)}
    for name in sorted(name for name in model.state_dict(keep_vars=True) if name in own):
        if name not in tensors:
            raise ValueError(f"it has no {name!r}, which model ({name_of_class}) has")
        # Their kernels take the rows of their weights, one for each gate and unit, on trust.
        rows = name.rpartition(".")[0] in cells and tensors[name].shape[:1] != own[name].shape[:1]
        if rows or not _fits(tensors[name].shape, own[name].shape):
            raise ValueError(
                f"its {name!r} of shape {tuple(tensors[name].shape)} does not come from one of shape "
                f"{tuple(own[name].shape)}, as model ({name_of_class}) has it"
            )
        if tensors[name].dtype != own[name].dtype and not (
            tensors[name].is_floating_point() and own[name].is_floating_point()
        ):
            raise ValueError(
                f"its {name!r} is {tensors[name].dtype}, and model ({name_of_class}) has it as {own[name].dtype}"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            _check_recurrent(name, module, tensors, name_of_class)
    modules = dict(model.named_modules())
    scaled = {f"{name}.factors" for name in description.get("scales", {})}
    scaled |= {f"{name}.{key}" for name in description.get("noise", {}) for key in _TENSORS_OF_NOISE}
    for name in tensors:
        if name in scaled:
            continue
        path, _, last = name.rpartition(".")
        module = modules.get(path)
        # A buffer may be filled when the module is called; a bias is added where compaction needed one.
        missing = module is not None and (
            last in module._buffers or (last == "bias" and last in module._parameters)
        )
        if not (name in own or name.startswith("constants.") or missing):
            raise ValueError(f"its {name!r} is not a part of model ({name_of_class})")
        if missing and module is not None and name not in own and last == "bias":
            module._parameters["bias"] = nn.Parameter(tensors[name].clone())
    new: dict[int, Tensor] = {}
    for name, tensor in own.items():
        if name in tensors and id(tensor) not in new:
            clone = tensors[name].clone()
            trained = isinstance(tensor, nn.Parameter)
            new[id(tensor)] = (
                nn.Parameter(clone, requires_grad=clone.is_floating_point()) if trained else clone
            )
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            for key, held in holder.items():
                holder[key] = new.get(id(held), held)
    frozen = description.get("frozen", [])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _check_recurrent(path: str, layer: nn.RNNBase, tensors: Mapping[str, Tensor], name_of_class: str) -> None:
    """Raise ValueError unless the weights of a recurrent layer, whose kernels take sizes on trust, fit each other."""
    own = {
        name: tensors[f"{path}.{name}".lstrip(".")].shape
        for name, _ in layer.named_parameters(recurse=False)
        if name.startswith(("weight", "bias"))
    }
    gates = len(layer.get_parameter("weight_ih_l0")) // layer.hidden_size
    rows = own["weight_ih_l0"][0]
    hidden = rows // gates
    state = layer.proj_size or hidden
    for name, shape in own.items():
        if name.startswith("weight_hr"):
            expected: tuple[int, ...] = (state, hidden)
        elif name.startswith("bias"):
            expected = (rows,)
        elif name.startswith("weight_hh"):
            expected = (rows, state)
        elif name.startswith("weight_ih_l0"):
            expected = (rows, own["weight_ih_l0"][1])
        else:
            expected = (rows, state * (1 + layer.bidirectional))
        if tuple(shape) != expected or rows % gates or hidden <= layer.proj_size:
            full_name = f"{path}.{name}".lstrip(".")
            raise ValueError(
                f"its {full_name!r} of shape {tuple(shape)} does not fit the other weights of this recurrent layer of "
                f"model ({name_of_class}), with which it has to have {expected}"
            )


def _set_groups(model: nn.Module, groups: Mapping[str, Any], name_of_class: str) -> None:
    modules = dict(model.named_modules())
    for name, number in groups.items():
        module = modules.get(name)
        fits = isinstance(module, _ConvNd) and type(number) is int and 0 < number <= module.groups
        if not fits or len(module.weight) % number:  # type: ignore[union-attr]
            raise ValueError(
                f"its groups {str(number)[:50]} of {name[:100]!r} are not those of model ({name_of_class})"
            )
        module.groups = number  # type: ignore[union-attr]


def _checked_sizes(
    model: nn.Module, sizes: Mapping[str, Any], name_of_class: str
) -> Mapping[str, Mapping[str, int]]:
    modules = dict(model.named_modules())
    for path, attributes in sizes.items():
        if not isinstance(attributes, dict) or path not in modules:
            raise ValueError(f"its sizes of {path[:100]!r} are not those of model ({name_of_class})")
        for name, size in attributes.items():
            value = vars(modules[path]).get(name)
            if type(value) is not int or type(size) is not int or not 0 < size <= value:
                raise ValueError(f"its size {name[:100]!r} of {path!r} is not one of model ({name_of_class})")
    return sizes


def _checked_numbers(
    model: nn.Module, numbers: Mapping[str, Any], name_of_class: str
) -> Mapping[str, Mapping[str, float]]:
    modules = dict(model.named_modules())
    for path, attributes in numbers.items():
        if not isinstance(attributes, dict) or path not in modules:
            raise ValueError(f"its numbers of {path[:100]!r} are not those of model ({name_of_class})")
        for name, number in attributes.items():
            # Of torch's own layer ε may be None.
            old = vars(modules[path]).get(name, "")
            fits = type(old) is float or (old is None and isinstance(modules[path], nn.RMSNorm))
            if not fits or type(number) is not float or not 0 <= number < math.inf:
                raise ValueError(
                    f"its number {name[:100]!r} of {path!r} is not one of model ({name_of_class})"
                )
    return numbers


def _set_noise(
    model: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any], name_of_class: str
) -> None:
    scales = {name: _scale(name, options, tensors) for name, options in description.get("scales", {}).items()}
    scales |= _kept_noise(description.get("noise", {}), tensors)
    for path, module in list(model.named_modules()):
        for key, child in list(module._modules.items()):
            name = f"{path}.{key}" if path else key
            if isinstance(child, NoiseLayer):
                # In its place, as the order counts in containers.
                new = scales.pop(name)[0] if name in scales else MarkedNoise(child, name, child.mask)
                if isinstance(new, NoiseLayer):
                    new.hooked, new.backend, new.generator = child.hooked, child.backend, child.generator
                module._modules[key] = new
    replace_noise(model, {})
    hooked = dict(scales)
    for name, options in description.get("activations", {}).items():
        kind, code = options if isinstance(options, list) and len(options) == 2 else (None, None)
        if kind not in ACTIVATION_LAYERS:
            raise ValueError(f"its activation at {name[:100]!r} is unknown")
        hooked[name] = (ACTIVATION_LAYERS[kind](), _position(code, name))
    modules = dict(model.named_modules())
    hidden: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for name, (layer, position) in hooked.items():
        path, _, key = name.rpartition(".")
        if name in modules and type(modules[name]) is type(layer):
            continue
        if isinstance(layer, NoiseLayer) and path in modules and modules[path]._modules.get(key) is layer:
            continue  # a layer that goes by several names
        if position == "hidden":
            path, _, child = path.rpartition(".")
            hidden[path][key] = layer
            key = child
        if path not in modules or key != "noise" or hasattr(modules[path], "noise"):
            raise ValueError(f"it has noise at {name[:100]!r}, where model ({name_of_class}) has none")
        if position != "hidden":
            add_noise_hook(modules[path], layer, position)
    for path, parts in hidden.items():
        add_noise_hook(modules[path], HiddenNoise(parts), "hidden")
    if noise := description.get("noise"):
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0] in noise:
                parameter.requires_grad_(name not in description.get("frozen", []))
        note_what_was_added(model)


def _position(code: Any, name: str) -> NoisePosition:
    for position, its_code in _CODES.items():
        if code == its_code and type(code) is type(its_code):
            return position
    raise ValueError(f"what its noise at {name[:100]!r} multiplies is unknown: {str(code)[:50]}")


def _scale(name: str, options: Any, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, NoisePosition]:
    dim, activation, code = options if isinstance(options, list) and len(options) == 3 else (None, None, None)
    factors = tensors.get(f"{name}.factors")
    known = activation is None or activation in ACTIVATION_LAYERS
    if (
        type(dim) is not int
        or not known
        or factors is None
        or factors.dim() != 1
        or not factors.is_floating_point()
    ):
        raise ValueError(f"its factors at {name[:100]!r} are not whole")
    return ChannelScale(factors.clone(), dim=dim, activation=activation), _position(code, name)


def _kept_noise(
    noise: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[nn.Module, NoisePosition]]:
    """Return noise layers by each of their names, and what of a layer they multiply."""
    layers: dict[str, NoiseLayer] = {}
    found: dict[str, tuple[nn.Module, NoisePosition]] = {}
    for name, options in noise.items():
        first, arguments, code = (
            options if isinstance(options, list) and len(options) == 3 else (None, None, None)
        )
        if not isinstance(first, str) or not isinstance(arguments, dict):
            raise ValueError(f"its noise at {name[:100]!r} is not whole")
        if first not in layers:
            own = {k: tensors[f"{first}.{k}"].clone() for k in _TENSORS_OF_NOISE if f"{first}.{k}" in tensors}
            try:
                check_arguments(NoiseLayer, arguments)
                layer = build_layer(NoiseLayer, arguments, own)
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"its noise at {name[:100]!r} cannot be built: {one_line(error)}") from error
            assert isinstance(layer, NoiseLayer)
            layer.compacted, layers[first] = True, layer
        found[name] = layers[first], _position(code, name)
    return found


def _fits(shape: torch.Size, full: torch.Size) -> bool:
    return len(shape) == len(full) and all(a <= b for a, b in zip(shape, full, strict=True))
