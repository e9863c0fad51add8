"""How a noise layer acts behind or in front of a layer that it was added to."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bmrs.noise.added import lost_noise, note_what_was_added
from bmrs.noise.layer import NoiseLayer, NoisePosition
from bmrs.noise.recomputation import input_recomputed
from bmrs.noise.recurrent import HiddenNoise, hidden_parts, scale_states, scale_weights
from bmrs.noise.wrappers import inside_wrappers, is_sharded

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def added_noise(layer: nn.Module) -> NoiseLayer | None:
    """Return the noise layer that `add_noise` put behind a layer, or None."""
    return layer.noise if _multiply_output in layer._forward_hooks.values() else None  # type: ignore[return-value]


def add_noise_hook(layer: nn.Module, noise: nn.Module, position: NoisePosition = "output") -> None:
    """Make a module, as its child ``noise``, multiply what a layer returns, what it takes, or its hidden units.

    Raises:
        ValueError: the layer has not the hidden units that a `HiddenNoise` multiplies.
    """
    if position == "hidden":
        _check_hidden_units(layer, noise)
    layer.register_module("noise", noise)
    for part in noise.modules():
        if isinstance(part, NoiseLayer):
            part.hooked = position
    if position == "hidden":
        layer.register_forward_pre_hook(scale_weights)
        layer.register_forward_hook(scale_states, always_call=True)
    elif position == "input":
        layer.register_forward_pre_hook(_multiply_input)
    else:
        # In tensor parallelism in front of the hook that turns a layer's DTensors into what the next one takes.
        in_front = any(map(is_sharded, layer.parameters(recurse=False)))
        layer.register_forward_hook(_multiply_output, prepend=in_front)


def _check_hidden_units(layer: nn.Module, noise: nn.Module) -> None:
    if not isinstance(layer, nn.RNNBase) or not isinstance(noise, HiddenNoise):
        raise ValueError(f"{type(layer).__name__} has no hidden units that noise can multiply")
    for name, part in noise.named_children():
        sizes = {len(tensor) for tensor in (*part.parameters(), *part.buffers())}
        if name not in hidden_parts(layer) or sizes != {layer.hidden_size} or part.dim != -1:
            raise ValueError(
                f"noise {name!r} of {sorted(sizes)} hidden units does not fit a {type(layer).__name__} of "
                f"{layer.hidden_size} in {hidden_parts(layer)}"
            )


def without_hook(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return those of a model's modules that hold noise of `add_noise` but have lost the hook that applies it."""
    found = {}
    for name, layer in modules.items():
        wanted = {hook for _, hook in hooks_of_noise(layer)}
        if wanted and not wanted <= {*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()}:
            found[name] = layer
    return found


def hooks_of_noise(layer: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return the hooks by which a layer's child ``noise`` of `add_noise` acts, with the attribute that holds each."""
    position = _position_of(own_noise(layer))
    return () if position is None else _hooks_at(position)


def own_noise(layer: nn.Module) -> nn.Module | None:
    """Return a layer's own child ``noise``, None if it has none.

    Its attribute may be another's: wrappers, as of torch.compile, hand on what the layer in them has.
    """
    children = layer._modules
    return children["noise"] if "noise" in children else None  # noqa: SIM401 - those of TorchScript have no get


def _position_of(noise: nn.Module | None) -> NoisePosition | None:
    """Return what of its layer a child ``noise`` of `add_noise` multiplies, None for another module."""
    if isinstance(noise, HiddenNoise):
        return "hidden"
    return noise.hooked if isinstance(noise, NoiseLayer) else None


def _hooks_at(position: NoisePosition) -> tuple[tuple[str, Any], ...]:
    """Return the hooks of noise at a position, each with the attribute of a layer that holds it."""
    behind, in_front = _HOOKS
    return {
        "output": ((behind, _multiply_output),),
        "input": ((in_front, _multiply_input),),
        "hidden": ((in_front, scale_weights), (behind, scale_states)),
    }[position]


def check_noise_acts(model: nn.Module) -> None:
    """Raise ValueError where noise of `add_noise` no longer acts, or of `bmrs.compat` would be passed over.

    Nothing else would show it. Not while torch compiles, which cannot follow hooks being looked for.
    """
    if torch.compiler.is_compiling():
        return
    model = inside_wrappers(model)
    modules = dict(model.named_modules())
    if waiting := [name for name, module in modules.items() if getattr(type(module), "needs_upgrade", False)]:
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
        position = _position_of(noise)
        assert noise is not None
        assert position is not None
        remove_noise_hook(layer)
        add_noise_hook(layer, noise, position)
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
    """Take the hooks that `add_noise` registered off a layer; False if it has none."""
    found = False
    for position in get_args(NoisePosition):
        for holder, function in _hooks_at(position):
            hooks = getattr(layer, holder)
            for key in [key for key, hook in hooks.items() if hook is function]:
                del hooks[key]
                layer._forward_hooks_always_called.pop(key, None)
                found = True
    return found


def noise_position(layer: nn.Module) -> NoisePosition:
    """Return what of a layer, or of the one whose hidden units it multiplies, `add_noise` multiplies."""
    if isinstance(layer, HiddenNoise):
        return "hidden"
    return "input" if _multiply_input in layer._forward_pre_hooks.values() else "output"


# Functions of the module, not closures, so that the hooks survive deepcopy and pickle.
def _multiply_output(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    noise = _noise_of(layer)
    if isinstance(output, PackedSequence):
        return output._replace(data=_packed(noise, output))
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor | PackedSequence):
        return (_multiply_output(layer, inputs, output[0]), *output[1:])
    if not isinstance(output, Tensor):
        raise TypeError(
            f"a layer with noise must return a tensor or a tuple that begins with one; {layer} "
            f"returned {type(output).__name__}"
        )
    if isinstance(layer, nn.RNNBase) and _shares_noise_of_examples(noise):
        if output.dim() == 2:  # one example, whose times these are
            return noise(output[None])[0]
        return noise(output) if layer.batch_first else noise(output.transpose(0, 1)).transpose(0, 1)
    if getattr(noise, "recompute", False) and next(iter(layer._forward_hooks.values())) is _multiply_output:
        with input_recomputed(layer, inputs, output):
            return noise(output)
    return noise(output)


def _shares_noise_of_examples(noise: nn.Module) -> bool:
    return noise.training and getattr(noise, "granularity", "") == "sample"


def _packed(noise: nn.Module, sequences: PackedSequence) -> Tensor:
    """Return packed sequences times noise, of which an example has one value at all its times where it should."""
    data, sizes = sequences.data, sequences.batch_sizes.to(sequences.data.device)
    if not _shares_noise_of_examples(noise):
        return noise(data)
    times = torch.arange(len(sizes), device=data.device).repeat_interleave(sizes)
    examples = torch.arange(len(data), device=data.device) - (sizes.cumsum(0) - sizes)[times]
    padded = data.new_zeros(int(sizes[0]), len(sizes), *data.shape[1:])
    scaled: Tensor = noise(padded.index_put((examples, times), data))
    return scaled[examples, times]


def _multiply_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    if not inputs:
        place = getattr(_noise_of(layer), "place", "")
        raise TypeError(
            f"layer {place!r} has noise on its input, and was called with that by name: give it as the first argument, "
            "without a name"
        )
    return (_noise_of(layer)(inputs[0]), *inputs[1:])


def _noise_of(layer: nn.Module) -> nn.Module:
    noise = layer._modules.get("noise")
    if noise is None:
        raise RuntimeError(
            f"{type(layer).__name__} has the hook that applies noise but lost its child 'noise': a conversion after "
            "add_noise made a new layer without it; convert the model before add_noise"
        )
    return noise
