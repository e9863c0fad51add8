"""Multiplicative noise on the structures of a network, as a module and as an addition to existing models."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence

import bmrs_kernels

Granularity: TypeAlias = Literal["element", "sample", "batch"]
Activation: TypeAlias = Literal["relu", "tanh"]
Backend: TypeAlias = Literal["auto", "torch", "triton", "numba"]
Structures: TypeAlias = Literal["features", "heads"]
Where: TypeAlias = "type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}

ACTIVATION_LAYERS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
"""The layers that do what a noise layer's ``activation`` does."""

ModelT = TypeVar("ModelT", bound=nn.Module)


class NoiseLayer(nn.Module):
    """Multiplies each structure of its input by a learned noise variable θ in [e^lower, e^upper].

    log θ has a uniform prior on [lower, upper] and, as posterior, Normal(mu, exp(log_sigma)²) truncated to
    that interval (arXiv 1705.07283). In training mode the layer returns ``activation(x) · θ · mask`` with
    fresh θ; in evaluation mode ``activation(x) · E[θ] · mask``.

    Args:
        num_structures: number of structures (neurons, filters, channels, attention heads).
        dim: dimension of x along which the structures lie; may be negative.
        structure_size: successive entries along ``dim`` that a structure takes, such as the width of an attention
            head; x has ``num_structures · structure_size`` of them.
        granularity: ``"element"`` draws θ at every element of x, ``"sample"`` once per example and structure
            (Eq. 1 of arXiv 2406.01345), ``"batch"`` once per structure and minibatch.
        activation: ``"relu"`` or ``"tanh"``, applied to x before the noise in the same pass; None for none.
        lower: lower bound of log θ, in nats.
        upper: upper bound of log θ, in nats.
        initial_mu: value that ``mu`` starts from.
        initial_log_sigma: value that ``log_sigma`` starts from.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"numba"``; see ``bmrs_kernels``.
        device: device of the parameters and the mask.
        dtype: dtype of the parameters; 16-bit dtypes give float32 ones.

    Attributes:
        mu: parameter of shape (num_structures,), float32 or float64. ``half()`` and ``bfloat16()`` leave it
            float32: 16 bits do not resolve the posterior.
        log_sigma: parameter of the same shape and dtype.
        mask: bool buffer of shape (num_structures,); False marks a pruned structure.
    """

    mu: nn.Parameter
    log_sigma: nn.Parameter
    mask: Tensor

    def __init__(
        self,
        num_structures: int,
        *,
        dim: int = 1,
        structure_size: int = 1,
        granularity: Granularity = "element",
        activation: Activation | None = None,
        lower: float = -20.0,
        upper: float = 0.0,
        initial_mu: float = 0.0,
        initial_log_sigma: float = -5.0,
        backend: Backend = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_integer("num_structures", num_structures)
        if num_structures < 1:
            raise ValueError(f"num_structures must be at least 1, was {num_structures}")
        _check_integer("dim", dim)
        _check_integer("structure_size", structure_size)
        if structure_size < 1:
            raise ValueError(f"structure_size must be at least 1, was {structure_size}")
        _check_choice("granularity", granularity, get_args(Granularity))
        _check_choice("activation", activation, (None, *get_args(Activation)))
        _check_choice("backend", backend, get_args(Backend))
        numbers = {
            "lower": lower,
            "upper": upper,
            "initial_mu": initial_mu,
            "initial_log_sigma": initial_log_sigma,
        }
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, was {value}")
        if lower >= upper:
            raise ValueError(f"lower must be less than upper, were {lower} and {upper}")
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating dtype, was {dtype}")

        self.num_structures = num_structures
        self.dim = dim
        self.structure_size = structure_size
        self.granularity: Granularity = granularity
        self.activation: Activation | None = activation
        self.lower = lower
        self.upper = upper
        self.initial_mu = initial_mu
        self.initial_log_sigma = initial_log_sigma
        self.backend: Backend = backend
        dtype = _at_least_float32(dtype)
        self.mu = nn.Parameter(torch.empty(num_structures, device=device, dtype=dtype))
        self.log_sigma = nn.Parameter(torch.empty(num_structures, device=device, dtype=dtype))
        self.register_buffer("mask", torch.empty(num_structures, device=device, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set ``mu`` and ``log_sigma`` to their initial values and keep every structure."""
        with torch.no_grad():
            self.mu.fill_(self.initial_mu)
            self.log_sigma.fill_(self.initial_log_sigma)
            self.mask.fill_(True)

    def expected_noise(self) -> Tensor:
        """E[θ] · mask of shape (num_structures,), the factors of evaluation mode."""
        mean = bmrs_kernels.noise_mean(
            self.mu, self.log_sigma, lower=self.lower, upper=self.upper, backend=self.backend
        )
        return mean * self.mask

    def spread(self, values: Tensor) -> Tensor:
        """Values of the structures, of shape (num_structures,), for the entries along ``dim``."""
        return values if self.structure_size == 1 else values.repeat_interleave(self.structure_size)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x by the noise, or in evaluation mode by its expectation.

        Args:
            x: floating tensor of at least one dimension, with ``num_structures · structure_size`` entries along
                ``dim``; nested tensors too.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            TypeError: x is not a floating tensor.
            ValueError: x lacks dimension ``dim``, has another size along it, or lies on another device.
        """
        if isinstance(x, Tensor) and x.is_nested:
            return _for_each_example(self, x)
        self._check_input(x)
        if not self.training:
            shape = [1] * x.dim()
            shape[self.dim] = -1
            factors = self.spread(self.expected_noise()).to(x.dtype).view(shape)
            return (x if self.activation is None else ACTIVATIONS[self.activation](x)) * factors
        if self.structure_size == 1:
            return self._noisy(x, self.dim)
        dim = self.dim % x.dim()
        return self._noisy(x.unflatten(dim, (self.num_structures, self.structure_size)), dim).flatten(
            dim, dim + 1
        )

    def _noisy(self, x: Tensor, dim: int) -> Tensor:
        return bmrs_kernels.multiply_noise(
            x,
            self.mu,
            self.log_sigma,
            dim=dim,
            mask=self.mask,
            granularity=self.granularity,
            activation=self.activation,
            lower=self.lower,
            upper=self.upper,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Constructor arguments, as ``print(model)`` shows them."""
        size = "" if self.structure_size == 1 else f", structure_size={self.structure_size}"
        text = f"{self.num_structures}, dim={self.dim}{size}, granularity={self.granularity!r}"
        text += f", activation={self.activation!r}, lower={self.lower}, upper={self.upper}"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, was {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must have a floating dtype, was {x.dtype}")
        if not -x.dim() <= self.dim < x.dim():
            raise ValueError(f"x has no dimension {self.dim}: its shape is {tuple(x.shape)}")
        if x.shape[self.dim] != self.num_structures * self.structure_size:
            size = "" if self.structure_size == 1 else f" · structure_size={self.structure_size}"
            raise ValueError(
                f"x must have num_structures={self.num_structures}{size} entries along dim={self.dim}, "
                f"was of shape {tuple(x.shape)}"
            )
        if x.device != self.mu.device:
            raise ValueError(f"x must be on the noise layer's device {self.mu.device}, was on {x.device}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseLayer:
        """Follow conversions, but keep the mask bool and the parameters at 32 bits or more."""

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            dtype = torch.bool if tensor.dtype == torch.bool else _at_least_float32(converted.dtype)
            # From the unconverted tensor, which still has all its digits.
            return converted if converted.dtype == dtype else tensor.to(converted.device, dtype)

        return super()._apply(convert, recurse)


class ChannelScale(nn.Module):
    """A fixed factor for each entry along a dimension: noise in evaluation mode that no other layer could take up.

    Args:
        factors: the factors.
        dim: the dimension.
        activation: what is applied before, as in `NoiseLayer`.
    """

    factors: Tensor

    def __init__(self, factors: Tensor, *, dim: int, activation: str | None = None) -> None:
        super().__init__()
        self.dim, self.activation = dim, activation
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(x) · factors."""
        if x.is_nested:
            return _for_each_example(self, x)
        return self.scaled(x if self.activation is None else ACTIVATIONS[self.activation](x))

    def scaled(self, x: Tensor) -> Tensor:
        """Return x · factors."""
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return x * self.factors.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{len(self.factors)}, dim={self.dim}, activation={self.activation!r}"


def _for_each_example(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's result for a nested tensor, one example after another: few operators know such tensors."""
    examples = [layer(example.unsqueeze(0)).squeeze(0) for example in x.unbind()]
    return torch.nested.as_nested_tensor(examples, layout=x.layout)


def noise_layers(model: nn.Module) -> dict[str, NoiseLayer]:
    """All noise layers of a model by qualified name, in module order; a shared layer appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NoiseLayer)}


def required_noise_layers(model: nn.Module) -> dict[str, NoiseLayer]:
    """Like `noise_layers`, but a model without any is a ValueError."""
    layers = noise_layers(model)
    if not layers:
        raise ValueError(
            f"the model ({type(model).__name__}) has no noise layer: add bmrs.NoiseLayer modules "
            "or call bmrs.add_noise"
        )
    return layers


def layers_of_one_kind(layers: Iterable[NoiseLayer]) -> list[list[NoiseLayer]]:
    """Group layers whose posteriors can be concatenated: equal bounds, dtype, device and backend."""
    groups: dict[tuple[Any, ...], list[NoiseLayer]] = {}
    for layer in layers:
        key = (layer.lower, layer.upper, layer.mu.dtype, layer.mu.device, layer.backend)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


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
    lower: float = -20.0,
    upper: float = 0.0,
    initial_mu: float = 0.0,
    initial_log_sigma: float = -5.0,
    backend: Backend = "auto",
) -> ModelT:
    """Put a noise layer behind chosen layers of a model, in place.

    Each chosen layer gets a child module ``noise`` that a forward hook applies to its output, or to the first tensor of
    a tuple, as recurrent layers return. The layer keeps its place, type and state_dict names, so that weights saved
    without noise still load with ``strict=False``. Between a layer and a following ReLU the noise acts as if behind the
    ReLU, because θ is positive. Build the optimizer afterwards, so that it sees the new parameters, and compile or wrap
    the model afterwards; what torch has compiled so far is compiled anew.

    Args:
        model: any module; it may itself be a chosen layer.
        where: the layers to choose: a module type or tuple of types, a glob pattern on qualified names
            (``"features.*.conv?"``, case-sensitive), or a function of (qualified name, module).
        structures: ``"features"``, every entry of a layer's output; or ``"heads"``, the attention heads that a chosen
            output projection reads: the noise then multiplies the input of that layer, one θ for each head.
        num_heads: for ``"heads"``, their number.
        num_structures: structures of each chosen layer's output; needed, with ``dim``, only where they cannot
            be inferred. They can for linear, convolution, normalisation, embedding and recurrent layers.
        dim: dimension along which the structures lie; given exactly when ``num_structures`` is.
        granularity: see `NoiseLayer`, as for all further arguments.
        activation: applied to the layer's output before the noise, in addition to the model's own.
        lower: lower bound of log θ, in nats.
        upper: upper bound of log θ, in nats.
        initial_mu: value that ``mu`` starts from.
        initial_log_sigma: value that ``log_sigma`` starts from.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"numba"``.

    Returns:
        The same model.

    Raises:
        ValueError: nothing matches, or a matching layer has noise already, is never called, or its structures
            cannot be inferred; ``num_heads`` is missing or does not divide a layer's input; or the model is wrapped
            for distributed training, where new parameters would not be synchronised. The model is then unchanged.
    """
    if structures not in get_args(Structures):
        raise ValueError(
            f"structures must be one of {', '.join(map(repr, get_args(Structures)))}, was {structures!r}"
        )
    if (structures == "heads") != (num_heads is not None):
        raise ValueError(f'num_heads must be given with structures="heads" and only then, was {num_heads}')
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "add_noise needs the model before DistributedDataParallel wraps it, so that the new parameters are "
            "synchronised: call it on the .module and wrap that afterwards"
        )
    if (num_structures is None) != (dim is None):
        raise ValueError(
            f"num_structures and dim must be given together, were {num_structures} and {dim}; "
            "leave both out to infer them"
        )
    chosen = _chosen_layers(model, where)
    if not chosen:
        raise ValueError(f"where={where!r} matches no layer of the model ({type(model).__name__})")
    fallback = next(model.parameters(), torch.empty(0))
    additions = []
    for name, layer in chosen.items():
        _check_can_get_noise(name, layer)
        size = 1
        if num_heads is not None:
            count, axis, size = num_heads, -1, _head_size(name, layer, num_heads)
        elif num_structures is None or dim is None:
            count, axis = _output_structures(name, layer)
        else:
            count, axis = num_structures, dim
        tensors = chain(layer.parameters(), layer.buffers())
        like = next((t for t in tensors if t.is_floating_point()), fallback)
        noise = NoiseLayer(
            count,
            dim=axis,
            structure_size=size,
            granularity=granularity,
            activation=activation,
            lower=lower,
            upper=upper,
            initial_mu=initial_mu,
            initial_log_sigma=initial_log_sigma,
            backend=backend,
            device=like.device,
            dtype=like.dtype,
        )
        additions.append((layer, noise.train(layer.training)))
    for layer, noise in additions:
        add_noise_hook(layer, noise, at_input=num_heads is not None)
    _forget_compiled_code()
    return model


def _forget_compiled_code() -> None:
    """Have torch compile models anew, which does not look whether a layer has got a hook since."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and compiler.cached_backends:
        torch._dynamo.reset()


def added_noise(layer: nn.Module) -> NoiseLayer | None:
    """The noise layer that `add_noise` put behind a layer, or None."""
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
    """True if `add_noise` put noise in front of a layer."""
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


def _chosen_layers(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    chosen: Callable[[str, nn.Module], bool]
    if isinstance(where, str):
        pattern = where
        chosen = lambda name, module: fnmatchcase(name, pattern)  # noqa: E731
    elif isinstance(where, type | tuple):
        types = where
        chosen = lambda name, module: isinstance(module, types)  # noqa: E731
    elif callable(where):
        chosen = where
    else:
        raise TypeError(
            f"where must be a module type, a tuple of them, a name pattern or a function, was {where!r}"
        )
    layers: dict[nn.Module, str] = {}
    # With duplicates, so that a pattern can name a shared layer by any of its names.
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in layers and not isinstance(module, NoiseLayer) and chosen(name, module):
            layers[module] = name
    return {name: module for module, name in layers.items()}


def _check_can_get_noise(name: str, layer: nn.Module) -> None:
    if hasattr(layer, "noise"):
        what = "already has a noise layer" if added_noise(layer) else "already has an attribute 'noise'"
        raise ValueError(f"layer {name!r} ({type(layer).__name__}) {what}")
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"layer {name!r} is read by its MultiheadAttention without being called, so that noise "
            "behind it would never act; exclude it from where"
        )


def can_get_noise(layer: nn.Module) -> bool:
    """True for a layer that `add_noise` takes without being told its structures."""
    try:
        _check_can_get_noise("", layer)
        return _output_structures("", layer)[0] > 1
    except ValueError:
        return False


def _output_structures(name: str, layer: nn.Module) -> tuple[int, int]:
    """Number of structures in a layer's output and the dimension that they lie along."""
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
        return layer.normalized_shape[0], -1
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, -1
    if isinstance(layer, nn.RNNBase):
        return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1), -1
    if _is_transposed_linear(layer):
        assert isinstance(layer.weight, Tensor)
        return layer.weight.shape[1], -1
    raise ValueError(
        f"the structures of layer {name!r} ({type(layer).__name__}) cannot be inferred: choose linear, convolution, "
        "normalisation, embedding or recurrent layers, or give num_structures and dim"
    )


def _is_transposed_linear(layer: nn.Module) -> bool:
    """True for the linear layer of GPT-2 in transformers, whose weight is (inputs, outputs)."""
    return type(layer).__name__ == "Conv1D" and isinstance(getattr(layer, "weight", None), Tensor)


def _head_size(name: str, layer: nn.Module, num_heads: int) -> int:
    _check_integer("num_heads", num_heads)
    if isinstance(layer, nn.Linear):
        features = layer.in_features
    elif _is_transposed_linear(layer):
        assert isinstance(layer.weight, Tensor)
        features = layer.weight.shape[0]
    else:
        raise ValueError(
            f'structures="heads" needs the linear layers that read the heads, and {name!r} is a {type(layer).__name__}'
        )
    if num_heads < 1 or features % num_heads:
        raise ValueError(f"num_heads must divide the {features} inputs of layer {name!r}, was {num_heads}")
    return features // num_heads


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, was {value!r}")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, was {value!r}")
