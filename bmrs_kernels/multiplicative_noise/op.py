"""Public functions that draw noise: at given uniforms, or inside and multiplied onto an activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from bmrs_kernels.constants import LOWER, UPPER
from bmrs_kernels.dispatch.backend import resolve_backend, running_backend
from bmrs_kernels.dispatch.recomputation import check_drawing, check_saved_seed, kept_seed
from bmrs_kernels.dispatch.registration import (
    dispatcher_is_needed,
    has_tangent,
    is_transformed,
    multiply_derivatives,
    once_differentiable_form,
    register_vmap_by_example,
    save_derivatives,
    tangents_of_outputs,
    transformable_product,
)
from bmrs_kernels.dispatch.shards import is_sharded, on_shards_elementwise, on_shards_of_activations
from bmrs_kernels.dispatch.validation import (
    check_device,
    check_interval,
    check_parameters,
    check_uniform,
    seed_tensor,
)
from bmrs_kernels.multiplicative_noise.call import NUM_TENSORS, NoiseBackend, NoiseCall, drawn_axes
from bmrs_kernels.multiplicative_noise.tangent import multiply_noise_tangent
from bmrs_kernels.options import Activation, Backend, Granularity
from bmrs_kernels.uniform.op import philox_uniform


def _implementation(backend: str) -> NoiseBackend:
    # Imported where they are used: Triton and numba may be missing.
    if backend == "triton":
        from bmrs_kernels.multiplicative_noise import triton_noise

        return triton_noise
    if backend == "numba":
        from bmrs_kernels.multiplicative_noise import numba_noise

        return numba_noise
    from bmrs_kernels.multiplicative_noise import torch_noise

    return torch_noise


@torch.library.custom_op("bmrs_kernels::sample_noise", mutates_args=())
def _sample_noise(
    mu: Tensor,
    log_sigma: Tensor,
    uniform: Tensor,
    lower: float,
    upper: float,
    backend: str,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(running_backend(backend, mu)).sample_noise(
        mu, log_sigma, uniform, lower, upper, with_gradients=with_gradients
    )


@_sample_noise.register_fake
def _(
    mu: Tensor,
    log_sigma: Tensor,
    uniform: Tensor,
    lower: float,
    upper: float,
    backend: str,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = torch.broadcast_shapes(mu.shape, uniform.shape)
    grad_shape = shape if with_gradients else (0,)
    return mu.new_empty(shape), mu.new_empty(grad_shape), mu.new_empty(grad_shape)


def _sample_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_mu, grad_log_sigma = ctx.saved_tensors
    product_of = transformable_product if has_tangent(grad) else multiply_derivatives
    products = product_of(grad, grad_mu, grad_log_sigma)
    return (*(product.sum_to_size(ctx.shape) for product in products), *[None] * 5)


_sample_noise.register_autograd(_sample_backward, setup_context=save_derivatives)
register_vmap_by_example(_sample_noise)


class _TransformableSample(torch.autograd.Function):
    """``_sample_noise`` in the form that torch.func.grad and its kind take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        theta, grad_mu, grad_log_sigma = _sample_noise(*inputs)
        return theta, grad_mu, grad_log_sigma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # Differentiable on paper, so that a second derivative meets the product's refusal instead of a zero.
        save_derivatives(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        products = transformable_product(grad, *ctx.saved_tensors)
        return (*(product.sum_to_size(ctx.shape) for product in products), *[None] * 5)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return tangents_of_outputs(ctx, *tangents[:2])


@torch.library.custom_op("bmrs_kernels::multiply_noise", mutates_args=())
def _multiply_noise(
    x: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    dim: int,
    granularity: str,
    activation: str | None,
    lower: float,
    upper: float,
    backend: str,
) -> Tensor:
    call = NoiseCall(x, mu, log_sigma, mask, seed, dim, granularity, activation, lower, upper)  # type: ignore[arg-type]
    implementation = _implementation(running_backend(backend, x))
    return implementation.multiply_noise(call, implementation.prepare(call))


@_multiply_noise.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("bmrs_kernels::multiply_noise_backward", mutates_args=())
def _multiply_noise_backward(
    grad: Tensor,
    x: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    dim: int,
    granularity: str,
    activation: str | None,
    lower: float,
    upper: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    call = NoiseCall(x, mu, log_sigma, mask, seed, dim, granularity, activation, lower, upper)  # type: ignore[arg-type]
    implementation = _implementation(running_backend(backend, x))
    return implementation.multiply_noise_backward(call, implementation.prepare(call), grad)


@_multiply_noise_backward.register_fake
def _(grad: Tensor, x: Tensor, mu: Tensor, log_sigma: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(mu), torch.empty_like(log_sigma)


@torch.library.custom_op("bmrs_kernels::multiply_noise_tangent", mutates_args=())
def _multiply_noise_tangent(
    x_tangent: Tensor | None,
    mu_tangent: Tensor | None,
    log_sigma_tangent: Tensor | None,
    x: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    dim: int,
    granularity: str,
    activation: str | None,
    lower: float,
    upper: float,
    backend: str,
) -> Tensor:
    call = NoiseCall(x, mu, log_sigma, mask, seed, dim, granularity, activation, lower, upper)  # type: ignore[arg-type]
    uniform = philox_uniform(seed, call.draw_shape, device=x.device, backend=backend)  # type: ignore[arg-type]
    sample = _implementation(running_backend(backend, x)).sample_noise
    return multiply_noise_tangent(call, sample, uniform, x_tangent, mu_tangent, log_sigma_tangent)


@_multiply_noise_tangent.register_fake
def _(
    x_tangent: Tensor | None,
    mu_tangent: Tensor | None,
    log_sigma_tangent: Tensor | None,
    x: Tensor,
    *_: Any,
) -> Tensor:
    return torch.empty_like(x)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:NUM_TENSORS])
    ctx.options = inputs[NUM_TENSORS:]


def _gradients(grad: Tensor, tensors: Sequence[Tensor], options: Sequence[Any]) -> tuple[Tensor | None, ...]:
    compute = _transformable_backward if has_tangent(grad) else _multiply_noise_backward
    grads = compute(grad, *tensors, *options)
    # The mask, the seed and the options have no gradient.
    return (*grads, *[None] * (NUM_TENSORS - len(grads) + len(options)))


def _multiply_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(grad, ctx.saved_tensors, ctx.options)


_multiply_noise.register_autograd(_multiply_backward, setup_context=_save_inputs)
register_vmap_by_example(_multiply_noise)
register_vmap_by_example(_multiply_noise_backward)
register_vmap_by_example(_multiply_noise_tangent)
_transformable_backward = once_differentiable_form(_multiply_noise_backward)
_transformable_tangent = once_differentiable_form(_multiply_noise_tangent)


class _TransformableMultiply(torch.autograd.Function):
    """``_multiply_noise`` in the form that torch.func.grad and its kind take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        result: Tensor = _multiply_noise(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_inputs(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:NUM_TENSORS])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _transformable_backward(grad, *ctx.saved_tensors, *ctx.options)
        return (*grads, *[None] * (NUM_TENSORS - len(grads) + len(ctx.options)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        tangent: Tensor = _transformable_tangent(*tangents[:3], *ctx.saved_tensors, *ctx.options)
        return tangent


class _MultiplyNoise(torch.autograd.Function):
    """``_multiply_noise`` as a plain autograd function, without the dispatcher's overhead."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_inputs(ctx, inputs, inputs[0])
        *arguments, backend = inputs
        call, implementation = NoiseCall(*arguments), _implementation(backend)
        ctx.seed = call.seed
        ctx.prepared = implementation.prepare(call)
        return implementation.multiply_noise(call, ctx.prepared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With create_graph=True the result may be differentiated again: the operator raises there, where this function
        # would leave terms out. It also knows gradients that are no plain tensors.
        tensors = ctx.saved_tensors
        check_saved_seed(tensors[-1], ctx.seed)
        if torch.is_grad_enabled() or dispatcher_is_needed(grad) or has_tangent(grad):
            return _gradients(grad, tensors, ctx.options)
        *options, backend = ctx.options
        call = NoiseCall(*tensors, *options)
        grads = _implementation(backend).multiply_noise_backward(call, ctx.prepared, grad)
        return (*grads, *[None] * (NUM_TENSORS - len(grads) + len(ctx.options)))


def sample_noise(
    mu: Tensor,
    log_sigma: Tensor,
    uniform: Tensor,
    *,
    lower: float = LOWER,
    upper: float = UPPER,
    backend: Backend = "auto",
) -> Tensor:
    """Return θ at given uniforms by inverting the posterior's distribution function.

    log θ = μ + σ Φ⁻¹(Φ(α) + y (Φ(β) - Φ(α))) with α = (lower - μ)/σ and β = (upper - μ)/σ. Differentiable in μ and
    log σ at fixed y (the reparameterisation gradient); the uniforms get none.

    Args:
        mu: location μ of log θ, any shape, floating point.
        log_sigma: log σ, shape and dtype of ``mu``; clamped to [-20, 5], with zero gradient outside.
        uniform: y in (0, 1), floating point, broadcasts with ``mu``.
        lower: a, lower end of log θ.
        upper: b, upper end of log θ.
        backend: "auto", "torch", "triton" or "numba".

    Returns:
        Tensor of the broadcast shape and the dtype of ``mu``, in [e^lower, e^upper].

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes of ``mu`` and ``log_sigma`` differ.
        ValueError: shapes do not fit, devices differ, or not lower < upper.
    """
    check_parameters(mu, log_sigma)
    check_interval(lower, upper)
    check_uniform(uniform, mu)
    if is_sharded(mu) or is_sharded(log_sigma) or is_sharded(uniform):
        return on_shards_elementwise(
            lambda *local: sample_noise(*local, lower=lower, upper=upper, backend=backend),
            mu=mu,
            log_sigma=log_sigma,
            uniform=uniform,
        )
    with_gradients = torch.is_grad_enabled() and (mu.requires_grad or log_sigma.requires_grad)
    inputs = (mu, log_sigma, uniform.detach(), lower, upper, resolve_backend(backend, mu))
    theta: Tensor
    if is_transformed() or has_tangent(mu, log_sigma):
        theta = _TransformableSample.apply(*inputs, True)[0]
    else:
        theta = _sample_noise(*inputs, with_gradients or torch.jit.is_tracing())[0]
    return theta


def multiply_noise(
    x: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    *,
    dim: int = 1,
    mask: Tensor | None = None,
    granularity: Granularity = "element",
    activation: Activation | None = None,
    seed: Tensor | int | None = None,
    lower: float = LOWER,
    upper: float = UPPER,
    backend: Backend = "auto",
) -> Tensor:
    """Return ``activation(x) * θ * mask`` with θ drawn from each structure's posterior (Eq. 1).

    Differentiable in x, μ and log σ. The uniforms are those of ``philox_uniform(seed, ...)``, so that a seed fixes
    the noise whatever the memory format; backward draws them again, and of x's size only x is kept.

    Args:
        x: activations of 1 or more dimensions, floating point; narrow dtypes are widened for the arithmetic.
        mu: location μ of log θ, shape (structures,).
        log_sigma: log σ, shape and dtype of ``mu``; clamped to [-20, 5], with zero gradient outside.
        dim: the axis of x along which the structures lie.
        mask: factor per structure, shape (structures,), bool or floating point: where x is finite, 0 removes the
            structure from the output and from every gradient.
        granularity: "element" draws at every element of x, "sample" once per example (axis 0) and structure,
            "batch" once per structure.
        activation: None, "relu" or "tanh", applied to x first.
        seed: int or int64 tensor with one element; by default drawn from torch's generator on x's device.
        lower: a, lower end of log θ.
        upper: b, upper end of log θ.
        backend: "auto", "torch", "triton" or "numba".

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: a tensor has an unsuitable dtype.
        ValueError: shapes or devices do not fit, an option is unknown, or not lower < upper.
        RuntimeError: activation checkpointing does not restore torch's generator, so that backward would meet other
            noise than forward.
    """
    check_parameters(mu, log_sigma)
    check_interval(lower, upper)
    dim = _check_activations(x, mu, dim, granularity, activation)
    if mask is not None:
        _check_mask(mask, mu)
    if seed is None:
        if not torch.compiler.is_compiling():
            check_drawing()
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=x.device)
    else:
        seed = seed_tensor(seed, x.device)
    if is_sharded(x) or is_sharded(mu) or is_sharded(log_sigma) or is_sharded(mask):
        return on_shards_of_activations(
            lambda x, mu, log_sigma, mask, seed: multiply_noise(
                x,
                mu,
                log_sigma,
                dim=dim,
                mask=mask,
                granularity=granularity,
                activation=activation,
                seed=seed,
                lower=lower,
                upper=upper,
                backend=backend,
            ),
            x,
            (mu, log_sigma, mask),
            seed,
            names=("mu", "log_sigma", "mask"),
            dim=dim,
            drawn=drawn_axes(x.dim(), dim, granularity),
            linear=activation is None,
        )
    chosen = resolve_backend(backend, x)
    call = NoiseCall(x, mu, log_sigma, mask, seed, dim, granularity, activation, lower, upper)
    result: Tensor
    if is_transformed() or has_tangent(x, mu, log_sigma):
        result = _TransformableMultiply.apply(*call, chosen)
    elif dispatcher_is_needed(x, mu, log_sigma, mask, seed):
        if torch.compiler.is_compiling() and torch.is_grad_enabled() and _has_gradient(x, mu, log_sigma):
            call = call._replace(seed=kept_seed(seed))
        result = _multiply_noise(*call, chosen)
    else:
        result = _MultiplyNoise.apply(*call, chosen)
    return result


def _has_gradient(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _check_activations(x: Tensor, mu: Tensor, dim: int, granularity: str, activation: str | None) -> int:
    """Raise unless x and the options fit the structures; return ``dim`` counted from the front."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must have a floating-point dtype, got {x.dtype}")
    check_device("x", x, "mu", mu)
    if mu.dim() != 1:
        raise ValueError(f"mu must have shape (structures,), got {tuple(mu.shape)}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be an axis of x, which has {x.dim()} dimensions, got {dim}")
    dim %= x.dim()
    if x.shape[dim] != mu.numel():
        raise ValueError(
            f"x must have {mu.numel()} structures along dim {dim}, as mu has, got shape {tuple(x.shape)}"
        )
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity must be one of {get_args(Granularity)}, got {granularity!r}")
    if granularity == "sample" and dim == 0:
        raise ValueError('dim must not be 0 with granularity "sample": axis 0 counts the examples')
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be None or one of {get_args(Activation)}, got {activation!r}")
    return dim


def _check_mask(mask: Tensor, mu: Tensor) -> None:
    """Raise unless the mask has one bool or floating-point factor per structure."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise TypeError(f"mask must have a bool or floating-point dtype, got {mask.dtype}")
    if mask.shape != mu.shape:
        raise ValueError(f"mask must have the shape of mu, {tuple(mu.shape)}, got {tuple(mask.shape)}")
    check_device("mask", mask, "mu", mu)
