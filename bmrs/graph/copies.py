"""Copies of models: without wrappers, in evaluation mode, with weights as layers use them."""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from bmrs.noise.hooks import own_noise
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.wrappers import inside_wrappers, is_sharded


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`, DistributedDataParallel and the like.

    Raises:
        TypeError: it is not a module.
        ValueError: its parameters are sharded, so that it has to be gathered first.
    """
    model = inside_wrappers(model)
    if "FullyShardedDataParallel" in type(model).__name__ or any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"the parameters of the model ({type(model).__name__}) are sharded: gather a full state_dict "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) and load it into "
            "an unsharded copy of the model first"
        )
    return model


def copied(model: nn.Module, *, share: bool | Literal["parameters"]) -> nn.Module:
    """Return a copy of a model.

    Args:
        model: any module, also one of which a layer holds a computed tensor, which `copy.deepcopy` refuses.
        share: whether parameters and buffers, or parameters alone, are shared with the original; never those of
            embeddings with ``max_norm``, whose forward changes them.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for holder in (module.__dict__, module._buffers, module._parameters):
            for tensor in holder.values():
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            weight = module._parameters.get("weight")  # none where it is computed
            if weight is not None:
                memo[id(weight)] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in memo:
            continue
        if tensor.is_inference():
            # Such a tensor can neither be trained nor traced.
            clone = tensor.clone()
            trained = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(clone, requires_grad=tensor.requires_grad) if trained else clone
        elif share is True or (share == "parameters" and isinstance(tensor, nn.Parameter)):
            memo[id(tensor)] = tensor
    try:
        copy_of_model = copy.deepcopy(model, dict(memo))
    except Exception:
        copy_of_model = copy.deepcopy(model, {**memo, **_what_cannot_be_copied(model, memo)})
    _remove_wrappers(copy_of_model)
    return unwrapped(copy_of_model)


def _what_cannot_be_copied(model: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """Return attributes that a copy has to share, such as locks, open files and tensors of an old computation."""
    shared = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, nn.Module | Tensor) or value is None:
                continue
            try:
                copy.deepcopy(value, {**memo, **{id(m): m for m in model.modules()}})
            except Exception:
                shared[id(value)] = value
    return shared


def _check_forwards(model: nn.Module) -> None:
    """Refuse a forward that was replaced by one that holds the module: its copy would compute with the original."""
    modules = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
            continue  # which a copy goes without
        forward = vars(module).get("forward")
        own = isinstance(forward, types.MethodType) and forward.__self__ is module
        if forward is not None and not own and _holds(forward, modules, depth=4):
            raise ValueError(
                f"the forward of layer {name!r} ({type(module).__name__}) was replaced by {forward!r}, which holds the "
                "module, so that a copy would compute with the original: set the class's own forward back first "
                "(del layer.forward)"
            )


def _holds(value: Any, modules: set[int], depth: int) -> bool:
    """Return whether a function refers to one of some modules."""
    if depth == 0 or value is None:
        return False
    if id(value) in modules:
        return True
    inside: list[Any] = []
    for attribute in ("__self__", "__func__", "__wrapped__", "func", "_torchdynamo_orig_callable"):
        inside.append(getattr(value, attribute, None))
    inside += [*getattr(value, "args", ()), *(getattr(value, "keywords", None) or {}).values()]
    inside += getattr(value, "__defaults__", None) or ()
    inside += (getattr(value, "__kwdefaults__", None) or {}).values()
    inside += [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _is_filled(cell)]
    return any(_holds(item, modules, depth - 1) for item in inside)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


@contextmanager
def refusing_noise_of(original: nn.Module) -> Iterator[None]:
    """Refuse, at the end, what a copy was seen to compute in the block if it called layers with noise of the original.

    It does so where an attribute is a function that holds a layer: functions are not copied.

    Raises:
        ValueError: it called one; the attribute is named, where it is found.
    """
    noisy = {
        id(module): (name, module)
        for name, module in unwrapped(original).named_modules()
        if isinstance(module, NoiseLayer) or own_noise(module) is not None
    }
    called: list[tuple[str, nn.Module]] = []
    thread = threading.get_ident()  # another one may well call the original

    def note(module: nn.Module, inputs: Any) -> None:
        if id(module) in noisy and threading.get_ident() == thread:
            called.append(noisy[id(module)])

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()
        if called:
            name, layer = called[0]
            holder = _what_holds(unwrapped(original), layer)
            raise ValueError(
                f"{holder} calls layer {name!r} ({type(layer).__name__}), and in a copy that of the original, with its "
                "noise, as functions are not copied: make the function a method of the class"
            )


def _what_holds(model: nn.Module, layer: nn.Module) -> str:
    """Return which attribute is a function that refers to a layer or to what it is in, as the start of a sentence."""
    around = {id(module) for module in model.modules() if any(part is layer for part in module.modules())}
    own_of_torch = vars(nn.Module()).keys()
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in own_of_torch and any(
                _holds(f, around, depth=4) for f in _functions_in(value, depth=3)
            ):
                place = f"layer {name!r}" if name else "the model"
                return f"the attribute {attribute!r} of {place} ({type(module).__name__})"
    return f"something in the forward of the model ({type(model).__name__})"


def _functions_in(value: Any, depth: int) -> Iterator[Any]:
    """Iterate over the functions in an attribute that a copy of it shares."""
    parts: list[Any] = []
    if isinstance(value, types.FunctionType | functools._lru_cache_wrapper):
        yield value
    elif isinstance(value, types.MethodType):
        parts = [value.__func__]  # its object is copied
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, list | tuple | dict):
        parts = list(value.values() if isinstance(value, dict) else value)
    for part in parts if depth else ():
        yield from _functions_in(part, depth - 1)


def _remove_wrappers(model: nn.Module) -> None:
    for module in list(model.modules()):
        # Not None instead, which torch.jit.script would read as an attribute of the layer's own.
        vars(module).pop("_compiled_call_impl", None)
        for name, child in list(module._modules.items()):
            if isinstance(child, torch._dynamo.eval_frame.OptimizedModule):
                module._modules[name] = unwrapped(child)


def evaluation_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode that shares its tensors, with weights as layers use them.

    Parametrizations and the older hooks, such as those of weight normalisation, are replaced by the weights that they
    compute.

    Raises:
        TypeError, ValueError: see `unwrapped`; or a tensor is on the meta device, or a forward was replaced by one that
            holds the original.
    """
    model = unwrapped(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values: load the weights first")
    _check_forwards(model)
    result = copied(model, share=not _computes_weights(model)).eval()
    for module in result.modules():
        materialise_weights(module)
    return result


def _computes_weights(model: nn.Module) -> bool:
    return any(parametrize.is_parametrized(m) or _weight_hooks(m) for m in model.modules())


def _weight_hooks(module: nn.Module) -> list[Any]:
    kinds = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kinds)]


def materialise_weights(module: nn.Module) -> None:
    """Replace what computes weights of a layer, such as weight normalisation, by the weights, in place."""
    if parametrize.is_parametrized(module):
        _remove_parametrizations(module)
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm | SpectralNorm):
            hook.remove(module)
            del module._forward_pre_hooks[key]
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)


def _remove_parametrizations(module: nn.Module) -> None:
    """Replace parametrizations by values; torch's function would change the class, which the original has too."""
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    values = {name: getattr(module, name).detach().clone() for name in parametrizations}
    trained = {name: any(p.requires_grad for p in its.parameters()) for name, its in parametrizations.items()}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=trained[name]))
