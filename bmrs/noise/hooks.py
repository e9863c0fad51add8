"""How a noise layer acts behind or in front of a layer that it was added to."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bmrs.noise.layer import NoiseLayer


def added_noise(layer: nn.Module) -> NoiseLayer | None:
    """Return the noise layer that `add_noise` put behind a layer, or None."""
    return layer.noise if _multiply_output in layer._forward_hooks.values() else None  # type: ignore[return-value]


def add_noise_hook(layer: nn.Module, noise: nn.Module, *, at_input: bool = False) -> None:
    """Make a module, as its child ``noise``, multiply what a layer returns, or what it takes."""
    layer.register_module("noise", noise)
    if at_input:
        layer.register_forward_pre_hook(_multiply_input)
    else:
        layer.register_forward_hook(_multiply_output)


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
    if isinstance(output, PackedSequence):
        return output._replace(data=layer.noise(output.data))  # type: ignore[operator]
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor | PackedSequence):
        return (_multiply_output(layer, inputs, output[0]), *output[1:])
    if not isinstance(output, Tensor):
        raise TypeError(
            f"a layer with noise must return a tensor or a tuple that begins with one; {layer} "
            f"returned {type(output).__name__}"
        )
    return layer.noise(output)  # type: ignore[operator]


def _multiply_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.noise(inputs[0]), *inputs[1:])  # type: ignore[operator]
