"""The forward-mode derivative of multiplied noise, for every backend: from what its ``sample_noise`` returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bmrs_kernels.multiplicative_noise.call import NoiseCall


def multiply_noise_tangent(
    call: NoiseCall,
    sample_noise: Callable[..., tuple[Tensor, Tensor, Tensor]],
    uniform: Tensor,
    x_tangent: Tensor | None,
    mu_tangent: Tensor | None,
    log_sigma_tangent: Tensor | None,
) -> Tensor:
    """Return the tangent of activation(x) · θ · mask, in x's dtype and memory layout.

    Args:
        call: the call.
        sample_noise: θ at uniforms and its derivatives, as `NoiseBackend` has it.
        uniform: the call's uniforms, of shape ``call.draw_shape``.
        x_tangent: tangent of x, None for 0.
        mu_tangent: tangent of μ, None for 0.
        log_sigma_tangent: tangent of log σ, None for 0.
    """
    x = call.x
    wide = torch.promote_types(torch.promote_types(x.dtype, call.mu.dtype), torch.float32)

    def along(per_structure: Tensor) -> Tensor:
        return per_structure.to(wide).view([-1 if axis == call.dim else 1 for axis in range(x.dim())])

    of_posterior = mu_tangent is not None or log_sigma_tangent is not None
    theta, *derivatives = sample_noise(
        along(call.mu),
        along(call.log_sigma),
        uniform,
        call.lower,
        call.upper,
        with_gradients=of_posterior,
    )
    activated = x.to(wide)
    tangent = torch.zeros_like(activated)
    slope_tangent = None if x_tangent is None else x_tangent.to(wide)
    if call.activation == "relu":
        dead = activated <= 0  # filled and not multiplied, since 0 times infinity is not 0
        activated = activated.masked_fill(dead, 0.0)
        slope_tangent = None if slope_tangent is None else slope_tangent.masked_fill(dead, 0.0)
    elif call.activation == "tanh":
        activated = activated.tanh()
        slope_tangent = None if slope_tangent is None else slope_tangent * (1.0 - activated.square())
    if slope_tangent is not None:
        tangent += slope_tangent * theta
    for derivative, of_parameter in zip(derivatives, (mu_tangent, log_sigma_tangent), strict=True):
        if of_parameter is not None:
            tangent += activated * (derivative * along(of_parameter))
    if call.mask is not None:
        factor = along(call.mask)
        tangent = (tangent * factor).masked_fill_(factor == 0, 0.0)
    return torch.empty_like(x).copy_(tangent)
