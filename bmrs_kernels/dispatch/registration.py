"""Registration of per-structure operations with torch.library.

Such an operation returns its value and, if asked, its derivatives in μ and log σ from the same pass; autograd
then only multiplies, backward and forward. Second derivatives are not defined, and asking for them raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bmrs_kernels.dispatch.backend import running_backend
from bmrs_kernels.dispatch.shards import PLAIN_TYPES, is_sharded, on_shards_elementwise

StructureFunction = Callable[..., tuple[Tensor, Tensor, Tensor]]


def dispatcher_is_needed(*tensors: Tensor | None) -> bool:
    """Return whether torch has to meet operators by name: while it traces, under modes and transforms, for subclasses.

    On the meta device too, where only operators know the shapes of what they would return.

    Otherwise a plain ``torch.autograd.Function`` around the same computation does, and costs a fifth of the dispatch,
    which for small layers is more than the computation.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or is_transformed()
        or any(
            type(tensor) not in PLAIN_TYPES
            or (tensor is not None and (tensor.is_meta or _is_batched(tensor)))
            for tensor in tensors
        )
    )


def has_tangent(*tensors: Tensor | None) -> bool:
    """Return whether forward-mode derivatives are asked for by torch.autograd.forward_ad, outside torch.func.

    Raises:
        NotImplementedError: torch.compile traces them; it would take those of the operators for 0. Unless it must not
            break graphs, it takes what it cannot trace out of the graph.
    """
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "bmrs_kernels has no forward-mode derivatives (torch.func.jvp, jacfwd) inside torch.compile: compile "
            "without fullgraph=True, or take the derivatives outside"
        )
    return any(
        tensor is not None and forward_ad.unpack_dual(tensor, level=0).tangent is not None
        for tensor in tensors
    )


def is_transformed() -> bool:
    """Return whether a transform of torch.func is at work, which takes functions in the form with ``setup_context``."""
    # While torch.compile traces, it takes the operators by name, whatever is around them.
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _refuse_second_derivatives(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "bmrs_kernels has no second derivatives, by mu and log_sigma in no mode: take first ones, or for those by "
        "inputs and weights put the noise layers into evaluation mode"
    )


def once_differentiable_form(operator: torch.library.CustomOpDef) -> Callable[..., Any]:
    """Return a first derivative's operator in the form that torch.func takes; a derivative of either raises."""
    operator.register_autograd(_refuse_second_derivatives)

    class OnceDifferentiable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> Any:
            _refuse_second_derivatives()

        @staticmethod
        def jvp(ctx: Any, *_: Tensor | None) -> Any:
            _refuse_second_derivatives()

    def call(*inputs: Any) -> Any:
        # torch.compile may trace what autograd calls, and would call such a ``forward`` with one argument too many.
        return (operator if torch.compiler.is_compiling() else OnceDifferentiable.apply)(*inputs)

    return call


def register_vmap_by_example(operator: Any) -> None:
    """Let an operator be mapped by torch.func.vmap: one example after another, each exactly as it would be alone."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            operator(
                *(
                    argument if dim is None else argument.select(dim, example)
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for example in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    operator.register_vmap(rule)


# What autograd hands to backward for is_grads_batched=True; its type is Tensor all the same.
_is_batched = torch._C._functorch.is_legacy_batchedtensor


@torch.library.custom_op("bmrs_kernels::multiply_derivatives", mutates_args=())
def multiply_derivatives(grad: Tensor, grad_mu: Tensor, grad_log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chain rule's products.

    An operator, so that a second derivative raises, where a plain product would silently leave out the derivatives of
    ``grad_mu`` and ``grad_log_sigma``.
    """
    return grad * grad_mu, grad * grad_log_sigma


register_vmap_by_example(multiply_derivatives)
transformable_product = once_differentiable_form(multiply_derivatives)


@multiply_derivatives.register_fake
def _(grad: Tensor, grad_mu: Tensor, grad_log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_mu), torch.empty_like(grad_log_sigma)


@torch.library.custom_op("bmrs_kernels::combine_tangents", mutates_args=())
def _combine_tangents(
    grad_mu: Tensor, grad_log_sigma: Tensor, mu_tangent: Tensor | None, log_sigma_tangent: Tensor | None
) -> Tensor:
    """Return the tangent of a value; None stands for 0."""
    tangent = torch.zeros_like(grad_mu)
    for derivative, of_parameter in ((grad_mu, mu_tangent), (grad_log_sigma, log_sigma_tangent)):
        if of_parameter is not None:
            tangent += derivative * of_parameter
    return tangent


@_combine_tangents.register_fake
def _(grad_mu: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(grad_mu)


register_vmap_by_example(_combine_tangents)
_transformable_tangent = once_differentiable_form(_combine_tangents)


def save_derivatives(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the derivatives, which an operation returns beside its value, for both modes; as ``setup_context``."""
    ctx.save_for_backward(*output[1:])
    ctx.save_for_forward(*output[1:])
    ctx.num_arguments = len(inputs)
    ctx.shape = inputs[0].shape


def tangents_of_outputs(
    ctx: Any, mu_tangent: Tensor | None, log_sigma_tangent: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the tangents of a value and of its derivatives, as ``jvp`` of what `save_derivatives` set up.

    Those of the derivatives are not known. A number stands for them, and not None, so that second derivatives meet
    the refusal of what takes it up instead of a zero.
    """
    derivatives = ctx.saved_tensors
    tangent = _transformable_tangent(*derivatives, mu_tangent, log_sigma_tangent)
    return (tangent, *(torch.zeros_like(derivative) for derivative in derivatives))


def structure_op(
    name: str, implementation: Callable[[str], StructureFunction], *, options: str
) -> Callable[..., Tensor]:
    """Register an operation of structures and return its differentiable form.

    Args:
        name: name of the operator in the ``bmrs_kernels`` namespace.
        implementation: returns a backend's function of (mu, log_sigma, *options, with_gradients=), which returns the
            value in μ's dtype, and both derivatives likewise or empty.
        options: schema of the options, for instance ``"float lower, float upper"``.

    Returns:
        A function of (mu, log_sigma, *options, backend).
    """
    schema = f"(Tensor mu, Tensor log_sigma, {options}, str backend, bool with_gradients) -> (Tensor, Tensor, Tensor)"

    def body(mu: Tensor, log_sigma: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *values, backend, with_gradients = arguments
        results = implementation(backend)(mu, log_sigma, *values, with_gradients=with_gradients)
        value, *gradients = (result.reshape(mu.shape) for result in results[: 3 if with_gradients else 1])
        grad_mu, grad_log_sigma = gradients or (mu.new_empty(0), mu.new_empty(0))
        return value, grad_mu, grad_log_sigma

    def fake(mu: Tensor, log_sigma: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        shape = mu.shape if arguments[-1] else (0,)
        return mu.new_empty(mu.shape), mu.new_empty(shape), mu.new_empty(shape)

    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_mu, grad_log_sigma = ctx.saved_tensors
        product = transformable_product if has_tangent(grad) else multiply_derivatives
        return (*product(grad, grad_mu, grad_log_sigma), *[None] * (ctx.num_arguments - 2))

    def operate(mu: Tensor, log_sigma: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *values, backend, with_gradients = arguments
        return body(mu, log_sigma, *values, running_backend(backend, mu), with_gradients)

    operator = torch.library.custom_op(f"bmrs_kernels::{name}", operate, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=save_derivatives)
    register_vmap_by_example(operator)

    class Transformable(torch.autograd.Function):
        """The operator in the form that torch.func.grad and its kind take."""

        generate_vmap_rule = True

        @staticmethod
        def forward(mu: Tensor, log_sigma: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            value, grad_mu, grad_log_sigma = operator(mu, log_sigma, *arguments, True)
            return value, grad_mu, grad_log_sigma

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            # Differentiable on paper, so that a second derivative meets the product's refusal instead of a zero.
            save_derivatives(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
            return (*transformable_product(grad, *ctx.saved_tensors), *[None] * (ctx.num_arguments - 2))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
            return tangents_of_outputs(ctx, *tangents[:2])

    class Direct(torch.autograd.Function):
        """The operation as a plain autograd function, without the dispatcher's overhead."""

        @staticmethod
        def forward(ctx: Any, mu: Tensor, log_sigma: Tensor, *arguments: Any) -> Tensor:
            value, *gradients = body(mu, log_sigma, *arguments, True)
            ctx.save_for_backward(mu, log_sigma, *gradients)
            ctx.arguments = arguments
            return value

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            mu, log_sigma, grad_mu, grad_log_sigma = ctx.saved_tensors
            nothing = [None] * len(ctx.arguments)
            # With create_graph=True the result may be differentiated again: that raises there, where plain products
            # would leave terms out.
            if torch.is_grad_enabled():
                _, *gradients = operator(mu, log_sigma, *ctx.arguments, True)
                return *multiply_derivatives(grad, *gradients), *nothing
            return grad * grad_mu, grad * grad_log_sigma, *nothing

    def call(mu: Tensor, log_sigma: Tensor, *arguments: Any) -> Tensor:
        if is_sharded(mu) or is_sharded(log_sigma):
            return on_shards_elementwise(lambda *local: call(*local, *arguments), mu=mu, log_sigma=log_sigma)
        with_gradients = torch.is_grad_enabled() and (mu.requires_grad or log_sigma.requires_grad)
        value: Tensor
        if is_transformed() or has_tangent(mu, log_sigma):
            value = Transformable.apply(mu, log_sigma, *arguments)[0]
        elif dispatcher_is_needed(mu, log_sigma):
            # torch.jit.trace runs once without gradients, to check, and what it returns may be asked for them.
            value = operator(mu, log_sigma, *arguments, with_gradients or torch.jit.is_tracing())[0]
        elif with_gradients:
            value = Direct.apply(mu, log_sigma, *arguments)
        else:
            value = body(mu, log_sigma, *arguments, False)[0]
        return value

    return call
