"""How a noise layer acts behind or in front of a layer that it was added to."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bmrs.noise.added import lost_noise, note_what_was_added
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.wrappers import inside_wrappers, is_sharded


def added_noise(layer: nn.Module) -> NoiseLayer | None:
    """Return the noise layer that `add_noise` put behind a layer, or None."""
    return layer.noise if _multiply_output in layer._forward_hooks.values() else None  # type: ignore[return-value]


def add_noise_hook(layer: nn.Module, noise: nn.Module, *, at_input: bool = False) -> None:
    """Make a module, as its child ``noise``, multiply what a layer returns, or what it takes."""
    layer.register_module("noise", noise)
    if isinstance(noise, NoiseLayer):
        noise.hooked = "input" if at_input else "output"
    if at_input:
        layer.register_forward_pre_hook(_multiply_input)
    else:
        # In tensor parallelism in front of the hook that turns a layer's DTensors into what the next one takes.
        in_front = any(map(is_sharded, layer.parameters(recurse=False)))
        layer.register_forward_hook(_multiply_output, prepend=in_front)


def without_hook(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return those of a model's modules that hold noise of `add_noise` but have lost the hook that applies it."""
    found = {}
    for name, layer in modules.items():
        noise = layer._modules.get("noise")
        if isinstance(noise, NoiseLayer) and noise.hooked is not None:
            hooks = layer._forward_hooks if noise.hooked == "output" else layer._forward_pre_hooks
            if not any(hook in (_multiply_output, _multiply_input) for hook in hooks.values()):
                found[name] = layer
    return found


def check_noise_acts(model: nn.Module) -> None:
    """Raise ValueError where noise of `add_noise` no longer acts, or of `bmrs.compat` would be passed over.

    Nothing else would show it. Not while torch compiles, which cannot follow hooks being looked for.
    """
    if torch.compiler.is_compiling():
        return
    model = inside_wrappers(model)
    modules = dict(model.named_modules())
    if waiting := [name for name, module in modules.items() if getattr(module, "needs_upgrade", False)]:
        raise ValueError(
            f"the noise of {_listed(waiting)} is that of bmrs.compat: call bmrs.compat.upgrade(model) first"
        )
    if lost := without_hook(modules):
        raise ValueError(
            f"the noise of {_listed(list(lost))} does not act any more: the layer was replaced, or its hooks were "
            "cleared, after add_noise (nn.SyncBatchNorm.convert_sync_batchnorm does that): call "
            "bmrs.restore_noise(model), or convert the model before add_noise"
        )
    gone, folded = lost_noise(model)
    if gone:
        raise ValueError(
            f"the noise {_listed(gone)} is gone: its layer was replaced, removed or fused after add_noise; convert the "
            "model before add_noise, or, if this is meant, call bmrs.restore_noise(model), which forgets it"
        )
    if folded:
        raise ValueError(
            f"the batch normalisation {_listed(folded)} is gone, folded into a layer whose noise stood between them, "
            "so that the noise now multiplies something else: fuse layers before add_noise"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (", …" if len(names) > 5 else "")


def restore_noise(model: nn.Module) -> list[str]:
    """Make noise act again whose layers were replaced or lost their hooks since `add_noise`, in place.

    Conversions such as ``nn.SyncBatchNorm.convert_sync_batchnorm`` make new layers, to which they pass parameters and
    children, the noise among them, but not the hook that applies it. Functions of this library that meet such noise
    raise; this puts the hooks back. Parameters, masks and names stay as they are. Noise that is gone with its layer is
    forgotten: those functions no longer miss it.

    Args:
        model: a model after `add_noise` and a conversion; nothing happens to one that lost nothing.

    Returns:
        The qualified names of the layers whose noise acts again.
    """
    lost = without_hook(dict(inside_wrappers(model).named_modules()))
    for layer in lost.values():
        noise = layer._modules["noise"]
        assert isinstance(noise, NoiseLayer)
        add_noise_hook(layer, noise, at_input=noise.hooked == "input")
    if lost:
        forget_compiled_code()
    note_what_was_added(inside_wrappers(model))
    return list(lost)


def forget_compiled_code() -> None:
    """Have torch compile models anew, which does not look whether a layer has got a hook since."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and compiler.cached_backends:
        torch._dynamo.reset()


def remove_noise_hook(layer: nn.Module) -> bool:
    """Take the hook that `add_noise` registered off a layer; False if it has none."""
    found = False
    hooks: dict[int, Any]
    for hooks, function in (
        (layer._forward_hooks, _multiply_output),
        (layer._forward_pre_hooks, _multiply_input),
    ):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            found = True
    return found


def has_input_noise(layer: nn.Module) -> bool:
    """Return whether `add_noise` put noise in front of a layer."""
    return _multiply_input in layer._forward_pre_hooks.values()


# Functions of the module, not closures, so that the hooks survive deepcopy and pickle.
def _multiply_output(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    noise = _noise_of(layer)
    if isinstance(output, PackedSequence):
        return output._replace(data=noise(output.data))
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor | PackedSequence):
        return (_multiply_output(layer, inputs, output[0]), *output[1:])
    if not isinstance(output, Tensor):
        raise TypeError(
            f"a layer with noise must return a tensor or a tuple that begins with one; {layer} "
            f"returned {type(output).__name__}"
        )
    return noise(output)


def _multiply_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_noise_of(layer)(inputs[0]), *inputs[1:])


def _noise_of(layer: nn.Module) -> nn.Module:
    noise = layer._modules.get("noise")
    if noise is None:
        raise RuntimeError(
            f"{type(layer).__name__} has the hook that applies noise but lost its child 'noise': a conversion after "
            "add_noise made a new layer without it; convert the model before add_noise"
        )
    return noise
