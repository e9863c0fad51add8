"""Adding noise to the layers of an existing model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any, Literal, TypeAlias, TypeGuard, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from bmrs.checks import check_choice, check_integer, check_module
from bmrs.noise.added import note_what_was_added
from bmrs.noise.hooks import add_noise_hook, added_noise, forget_compiled_code
from bmrs.noise.layer import INITIAL_LOG_SIGMA, INITIAL_MU, NoiseLayer, NoisePosition
from bmrs.noise.recomputation import RECOMPUTED, can_recompute
from bmrs.noise.recurrent import HiddenNoise, hidden_parts
from bmrs.noise.tensor_parallel import mesh_of, replicate
from bmrs.noise.wrappers import data_parallel_part, inside_wrappers
from bmrs_kernels.constants import LOWER, UPPER
from bmrs_kernels.options import Activation, Backend, Granularity

Structures: TypeAlias = Literal["features", "heads", "hidden"]
Where: TypeAlias = (
    "type[nn.Module] | tuple[type[nn.Module], ...] | str | Collection[str] | Callable[[str, nn.Module], bool]"
)
ModelT = TypeVar("ModelT", bound=nn.Module)


def add_noise(
    model: ModelT,
    *,
    where: Where,
    structures: Structures = "features",
    num_heads: int | None = None,
    num_structures: int | None = None,
    dim: int | None = None,
    granularity: Granularity = "element",
    activation: Activation | None = None,
    lower: float = LOWER,
    upper: float = UPPER,
    initial_mu: float = INITIAL_MU,
    initial_log_sigma: float = INITIAL_LOG_SIGMA,
    backend: Backend = "auto",
    same_on_all_ranks: bool = False,
    generator: torch.Generator | None = None,
    recompute: bool = False,
) -> ModelT:
    """Put a noise layer behind chosen layers of a model, in place.

    Each chosen layer gets a child module ``noise`` that a forward hook applies to its output, or to the first tensor of
    a tuple, as recurrent layers return; with ``structures="hidden"`` hooks apply it within the layer. The layer keeps
    its place, type and state_dict names, so that weights saved without noise still load with ``strict=False``. Between
    a layer and a following ReLU the noise acts as if behind the ReLU, because θ is positive. Build the optimizer
    afterwards, so that it sees the new parameters, and compile or wrap the model afterwards; what torch has compiled so
    far is compiled anew. Tensor parallelism goes first: call ``parallelize_module``, then this function in every
    process.

    Args:
        model: any module; it may itself be a chosen layer.
        where: the layers to choose: a module type or tuple of types, a glob pattern on qualified names
            (``"features.*.conv?"``, case-sensitive) or a list of such patterns, each of which has to match, or a
            function of (qualified name, module).
        structures: ``"features"``, every entry of a layer's output; ``"heads"``, the attention heads that a chosen
            output projection reads: the noise then multiplies the input of that layer, one θ for each head; or
            ``"hidden"``, the hidden units of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: θ multiplies a unit's state
            wherever it is read, in the recurrence, the next of stacked layers, the output and the last state, and the
            initial state as well. The child ``noise`` then holds a noise layer for each layer and direction, such as
            ``noise.l0`` and ``noise.l0_reverse``. Of an LSTM with projections the units are those of the cell.
        num_heads: for ``"heads"``, their number.
        num_structures: structures of each chosen layer's output; needed, with ``dim``, only where they cannot
            be inferred. They can for linear, convolution, normalisation, embedding and recurrent layers.
        dim: dimension along which the structures lie; given exactly when ``num_structures`` is.
        granularity: see `NoiseLayer`, as for all further arguments. Hidden units take ``"batch"`` alone, one θ for
            each call of the layer: its kernels have one weight for all examples and times.
        activation: applied to the layer's output before the noise, in addition to the model's own; none for hidden
            units.
        lower: lower bound of log θ, in nats.
        upper: upper bound of log θ, in nats.
        initial_mu: value that ``mu`` starts from.
        initial_log_sigma: value that ``log_sigma`` starts from.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"numba"``.
        same_on_all_ranks: whether processes that have seeded torch alike draw the same noise.
        generator: what all these layers draw their noise from; torch's own if None.
        recompute: whether chosen layers compute their output again in backward, from their input, so that noise keeps
            nothing in memory that would not be kept without it. For normalisations and for the activations of which
            autograd keeps the input: one more forward pass of these layers a step. It changes nothing where something
            else decides what is kept: torch.compile, activation checkpointing, torch.func.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module, or an option is of the wrong type.
        ValueError: nothing matches, or a matching layer has noise already, is never called, or its structures
            cannot be inferred; hidden units are asked for with another granularity than ``"batch"``, an activation or
            ``num_structures``, or of a layer that is not recurrent or whose weights a parametrization computes;
            ``num_heads`` is missing or does not divide a layer's input; ``recompute`` is asked for behind another
            layer than those; the model is wrapped for data parallelism, where new parameters would not be synchronised;
            or a chosen layer of a model in tensor parallelism has no part in that. The model is then unchanged.
    """
    check_module(model)
    check_choice("structures", structures, get_args(Structures))
    if (structures == "heads") != (num_heads is not None):
        raise ValueError(f'num_heads must be given with structures="heads" and only then, got {num_heads}')
    if wrapper := data_parallel_part(model):
        raise ValueError(
            f"add_noise needs the model before {wrapper} wraps it or a part of it, so that the new parameters are "
            "synchronised: add noise to the plain model and wrap it afterwards"
        )
    if (num_structures is None) != (dim is None):
        raise ValueError(
            f"num_structures and dim must be given together, got {num_structures} and {dim}; "
            "leave both out to infer them"
        )
    if structures == "hidden":
        _check_options_of_hidden_units(granularity, activation, num_structures)
    options: dict[str, Any] = {
        "granularity": granularity,
        "activation": activation,
        "lower": lower,
        "upper": upper,
        "initial_mu": initial_mu,
        "initial_log_sigma": initial_log_sigma,
        "backend": backend,
        "same_on_all_ranks": same_on_all_ranks,
        "generator": generator,
    }
    given = None if num_structures is None or dim is None else (num_structures, dim)
    fallback = next(model.parameters(), torch.empty(0))
    additions: list[tuple[nn.Module, nn.Module]] = []
    warned = False
    for name, layer in _chosen_by_any(model, where).items():
        _check_can_get_noise(name, layer)
        if recompute:
            _check_can_recompute(name, layer, structures)
        if granularity == "sample" and not warned:
            warned = _warn_of_times_first(model, name, layer)
        count, axis, size = _structures_of(name, layer, structures, num_heads, given)
        tensors = chain(layer.parameters(), layer.buffers())
        like = next((t for t in tensors if t.is_floating_point()), fallback)
        options |= {"structure_size": size, "device": like.device, "dtype": like.dtype}
        new_layer = partial(NoiseLayer, count, dim=axis, **options)
        noise: nn.Module
        with torch.inference_mode(False):  # in which parameters could not be trained
            if structures == "hidden":
                assert isinstance(layer, nn.RNNBase)
                noise = HiddenNoise({part: new_layer() for part in hidden_parts(layer)})
            else:
                noise = new_layer()
        mesh = mesh_of(model, name, layer, plain_is_right=same_on_all_ranks, generator=generator)
        for part in noise.modules():
            if isinstance(part, NoiseLayer):
                part.place, part.recompute = name, recompute
                if mesh:
                    replicate(part, mesh)
        additions.append((layer, noise.train(layer.training)))
    positions: dict[Structures, NoisePosition] = {"features": "output", "heads": "input", "hidden": "hidden"}
    for layer, noise in additions:
        add_noise_hook(layer, noise, positions[structures])
    note_what_was_added(inside_wrappers(model))
    forget_compiled_code()
    return model


def _warn_of_times_first(model: nn.Module, name: str, layer: nn.Module) -> bool:
    """Warn where examples lie along the second dimension of what noise for each example multiplies, and say if so."""
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase | _ConvNd | _BatchNorm | _InstanceNorm | nn.GroupNorm):
        return False  # whose first dimension are examples, or whose hook knows
    parts = dict(inside_wrappers(model).named_modules())
    path = name
    while path:
        path = path.rpartition(".")[0]
        attention = getattr(parts.get(path), "self_attn", parts.get(path))
        if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
            place = f"{path!r} ({type(parts[path]).__name__})" if path else type(model).__name__
            warnings.warn(
                f'granularity="sample" draws one θ for each entry of dimension 0, and in {place} these are times, as '
                f"it was made with batch_first=False: all examples share the noise of a time at {name!r}. Make "
                'it with batch_first=True, or take granularity "batch" or "element"',
                stacklevel=3,
            )
            return True
    return False


def _chosen_by_any(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """Return the chosen layers by the model's own names, or else by those that torch.compile gives it."""
    chosen: dict[str, nn.Module] = {}
    for each in list(where) if _are_patterns(where) else [where]:
        found = chosen_layers(inside_wrappers(model), each) or chosen_layers(model, each)
        if not found:
            raise ValueError(f"where={each!r} matches no layer of the model ({type(model).__name__})")
        chosen |= found
    return chosen


def _structures_of(
    name: str,
    layer: nn.Module,
    structures: Structures,
    num_heads: int | None,
    given: tuple[int, int] | None,
) -> tuple[int, int, int]:
    """Return how many structures of a layer get noise, the dimension that they lie along, and the entries of each."""
    if num_heads is not None:
        return num_heads, -1, _head_size(name, layer, num_heads)
    if structures == "hidden":
        return _hidden_size(name, layer), -1, 1
    return *(given or output_structures(name, layer)), 1


def chosen_layers(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """Return the layers of a model that ``where`` of `add_noise` chooses, by name; a shared one by its first name."""
    chosen: Callable[[str, nn.Module], bool]
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if isinstance(where, str):
        pattern = where
        chosen = lambda name, module: _matches(name, pattern, names)  # noqa: E731
    elif _are_patterns(where):
        patterns = where
        chosen = lambda name, module: any(_matches(name, each, names) for each in patterns)  # noqa: E731
    elif isinstance(where, type | tuple):
        types = where
        chosen = lambda name, module: isinstance(module, types)  # noqa: E731
    elif callable(where):
        chosen = where
    else:
        raise TypeError(
            f"where must be a module type, a tuple of them, a name pattern, a list of them or a function, got {where!r}"
        )
    layers: dict[nn.Module, str] = {}
    # With duplicates, so that a pattern can name a shared layer by any of its names.
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in layers and not isinstance(module, NoiseLayer) and chosen(name, module):
            layers[module] = name
    return {name: module for module, name in layers.items()}


def _matches(name: str, pattern: str, names: Collection[str]) -> bool:
    """Return whether a pattern means a layer; one that is the name of a layer means that alone."""
    return name == pattern if pattern in names else fnmatchcase(name, pattern)


def _are_patterns(where: object) -> TypeGuard[Collection[str]]:
    """Return whether several name patterns are given."""
    if isinstance(where, str | type) or not isinstance(where, Collection):
        return False
    return len(where) > 0 and all(isinstance(each, str) for each in where)


def _check_can_get_noise(name: str, layer: nn.Module) -> None:
    if isinstance(layer, torch.jit.ScriptModule):
        raise ValueError(
            f"layer {name!r} ({type(layer).__name__}) is TorchScript, which takes no noise any more: call add_noise "
            "before torch.jit.script or torch.jit.trace"
        )
    if hasattr(layer, "noise"):
        has = added_noise(layer) or isinstance(layer.noise, HiddenNoise)
        what = "already has a noise layer" if has else "already has an attribute 'noise'"
        raise ValueError(f"layer {name!r} ({type(layer).__name__}) {what}")
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"layer {name!r} is read by its MultiheadAttention without being called, so that noise "
            "behind it would never act; exclude it from where"
        )


def _check_can_recompute(name: str, layer: nn.Module, structures: Structures) -> None:
    if structures != "features":
        raise ValueError(f'recompute=True is for structures="features", got {structures!r}')
    if not can_recompute(layer):
        in_place = ", in place" if getattr(layer, "inplace", False) else ""
        raise ValueError(
            f"recompute=True is for {', '.join(RECOMPUTED)}, which take little time, and layer {name!r} is a "
            f"{type(layer).__name__}{in_place}: call add_noise twice, for the layers of these kinds and for the others"
        )


def can_get_noise(layer: nn.Module) -> bool:
    """Return whether `add_noise` takes a layer without being told its structures."""
    try:
        _check_can_get_noise("", layer)
        return output_structures("", layer)[0] > 1
    except ValueError:
        return False


def output_structures(name: str, layer: nn.Module) -> tuple[int, int]:
    """Return the number of structures in a layer's output and the dimension that they lie along."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, -1
    if isinstance(layer, _ConvNd):
        # From the end, as the dimension of the batch may be missing.
        return layer.out_channels, -1 - len(layer.kernel_size)
    if isinstance(layer, _InstanceNorm):
        return layer.num_features, -1 - int(type(layer).__name__[-2])
    if isinstance(layer, _BatchNorm):
        return layer.num_features, 1
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels, 1
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and len(layer.normalized_shape) == 1:
        return layer.normalized_shape[0], _dimension_of_norm(layer)
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, -1
    if isinstance(layer, nn.RNNBase):
        return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1), -1
    if isinstance(layer, nn.RNNCellBase):
        return layer.hidden_size, -1
    if is_transposed_linear(layer):
        assert isinstance(layer.weight, Tensor)
        return layer.weight.shape[1], -1
    if (hidden := _hidden_units_of_experts(layer)) is not None:
        raise ValueError(
            f"layer {name!r} ({type(layer).__name__}) is experts, whose hidden units get noise behind the activation: "
            f"where={name + '.act_fn'!r}, num_structures={hidden}, dim=-1"
        )
    kind = type(layer)
    if kind.__module__.partition(".")[0] == "torch":
        what = f"{kind.__name__}) cannot be inferred: choose"
    else:  # It may have the name of one of torch's, as that of layers of peft.
        full_name = f"{kind.__module__}.{kind.__qualname__}"
        what = f"{full_name}) cannot be inferred, as it is none of torch.nn's: choose torch.nn's"
    raise ValueError(
        f"the structures of layer {name!r} ({what} linear, convolution, normalisation, embedding or recurrent layers, "
        "or give num_structures, how many its output has, and dim, the dimension that they lie along"
    )


def _dimension_of_norm(layer: nn.Module) -> int:
    """Return the last dimension, but for classes of feature maps, as LayerNorm2d of torchvision and timm is one."""
    own_forward = type(layer).forward not in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    spatial = re.search("([123])d$", type(layer).__name__)
    return -1 - int(spatial[1]) if own_forward and spatial else -1


def _hidden_units_of_experts(layer: nn.Module) -> int | None:
    """Return the hidden units of each expert of a layer that has the matrices of all as one, as in transformers."""
    first, last = (getattr(layer, name, None) for name in ("gate_up_proj", "down_proj"))
    if (
        not isinstance(first, nn.Parameter)
        or not isinstance(last, nn.Parameter)
        or (first.dim(), last.dim()) != (3, 3)
    ):
        return None
    hidden = [size for size in last.shape[1:] if 2 * size in first.shape[1:]]
    return hidden[-1] if hidden and isinstance(getattr(layer, "act_fn", None), nn.Module) else None


def is_transposed_linear(layer: nn.Module) -> bool:
    """Return whether this is the linear layer of GPT-2 in transformers, whose weight is (inputs, outputs)."""
    return type(layer).__name__ == "Conv1D" and isinstance(getattr(layer, "weight", None), Tensor)


def _check_options_of_hidden_units(
    granularity: Granularity, activation: Activation | None, num_structures: int | None
) -> None:
    if granularity != "batch":
        raise ValueError(
            f'structures="hidden" takes granularity="batch", got {granularity!r}: a recurrent layer has one weight for '
            "all examples and times, so that one θ multiplies a hidden unit in all of them"
        )
    if activation is not None:
        raise ValueError(
            f'structures="hidden" takes no activation, which a recurrent layer has inside, got {activation!r}'
        )
    if num_structures is not None:
        raise ValueError(
            f'structures="hidden" takes no num_structures and dim, as layers know their own, got {num_structures}'
        )


def _hidden_size(name: str, layer: nn.Module) -> int:
    if not isinstance(layer, nn.RNNBase):
        raise ValueError(
            f'structures="hidden" needs recurrent layers, nn.LSTM, nn.GRU or nn.RNN, and {name!r} is a '
            f"{type(layer).__name__}"
        )
    if is_parametrized(layer):
        raise ValueError(
            f"the weights of layer {name!r} ({type(layer).__name__}) are computed by a parametrization, so that noise "
            "on its hidden units cannot act: call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    return layer.hidden_size


def _head_size(name: str, layer: nn.Module, num_heads: int) -> int:
    check_integer("num_heads", num_heads)
    if isinstance(layer, nn.Linear):
        features = layer.in_features
    elif is_transposed_linear(layer):
        assert isinstance(layer.weight, Tensor)
        features = layer.weight.shape[0]
    else:
        raise ValueError(
            f'structures="heads" needs the linear layers that read the heads, and {name!r} is a {type(layer).__name__}'
        )
    if num_heads < 1 or features % num_heads:
        raise ValueError(f"num_heads must divide the {features} inputs of layer {name!r}, got {num_heads}")
    return features // num_heads
