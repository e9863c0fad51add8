"""What compiled loops do to a strip, the elements of one structure in a tile: noise, activation, sums.

Functions are compiled for the dtype of their arrays, float32 or float64.
"""

from __future__ import annotations

import math

import numpy as np
from numba.extending import overload

from bmrs_kernels.dispatch.numba_compile import REGROUPING, compiled
from bmrs_kernels.dispatch.numba_memory import INLINED, dtype_of, use_widest_vectors
from bmrs_kernels.multiplicative_noise.numba_exact_noise import exact_strip_noise
from bmrs_kernels.multiplicative_noise.numba_log_noise import strip_noise
from bmrs_kernels.truncated_normal.numba_special import ONE, tanh

# Activations by number.
IDENTITY, RELU, TANH = range(3)
ZERO = np.float32(0.0)


def typed_tanh(x: float) -> float:
    """Return tanh x in the precision of x; in compiled code only."""
    raise NotImplementedError("typed_tanh is compiled by numba and cannot be called from Python")


@overload(typed_tanh, jit_options=INLINED)
def _(x):
    if dtype_of(x) is np.float32:
        return lambda x: tanh(x)
    return lambda x: math.tanh(x)


def typed_strip_noise(y, row, lower, upper, noise, with_gradients):
    """Write θ and the derivatives of log θ at a strip of uniforms, as precise as the arrays ``noise`` can hold."""
    raise NotImplementedError("typed_strip_noise is compiled by numba and cannot be called from Python")


@overload(typed_strip_noise, jit_options=INLINED)
def _(y, row, lower, upper, noise, with_gradients):
    function = strip_noise if dtype_of(noise[0].dtype) is np.float32 else exact_strip_noise
    return lambda y, row, lower, upper, noise, with_gradients: function(
        y, row, lower, upper, noise, with_gradients
    )


def _forward_strip(x, out, theta, factor, activation):
    """Write activation(x) · θ · factor of a strip; θ need not be known where the factor is 0."""
    use_widest_vectors()
    if factor == ZERO:
        theta[: x.size] = ONE
    if activation == RELU:
        for i in range(x.size):
            # A NaN stays.
            value = ZERO if x[i] <= ZERO else x[i]
            out[i] = value * (theta[i] * factor)
    elif activation == TANH:
        for i in range(x.size):
            out[i] = typed_tanh(x[i]) * (theta[i] * factor)
    else:
        for i in range(x.size):
            out[i] = x[i] * (theta[i] * factor)


def _backward_strip(grad, x, grad_x, theta, factor, activation):
    """Write the gradient in x of a strip, and in place of θ the products grad · activation(x) · θ · factor."""
    use_widest_vectors()
    if factor == ZERO:
        theta[: grad.size] = ONE
    if activation == RELU:
        for i in range(grad.size):
            value, upstream, scale = x[i], grad[i], theta[i] * factor
            # Chosen and not multiplied, since 0 times infinity is not 0.
            dead = value <= ZERO
            grad_x[i] = ZERO if dead else upstream * scale
            theta[i] = ZERO if dead else upstream * value * scale
    elif activation == TANH:
        for i in range(grad.size):
            value, upstream, scale = typed_tanh(x[i]), grad[i], theta[i] * factor
            grad_x[i] = upstream * (ONE - value * value) * scale
            theta[i] = upstream * value * scale
    else:
        for i in range(grad.size):
            value, upstream, scale = x[i], grad[i], theta[i] * factor
            grad_x[i] = upstream * scale
            theta[i] = upstream * value * scale


def _scale_strip(x, out, factor, activation):
    """Write activation(x) · factor."""
    use_widest_vectors()
    if activation == RELU:
        for i in range(x.size):
            value = ZERO if x[i] <= ZERO else x[i]
            out[i] = value * factor
    elif activation == TANH:
        for i in range(x.size):
            out[i] = typed_tanh(x[i]) * factor
    else:
        for i in range(x.size):
            out[i] = x[i] * factor


def _unscale_strip(grad, x, grad_x, factor, activation):
    """Write the gradient in x of activation(x) · factor, and return the sum of grad · activation(x)."""
    use_widest_vectors()
    total = ZERO
    if activation == RELU:
        for i in range(grad.size):
            dead = x[i] <= ZERO
            grad_x[i] = ZERO if dead else grad[i] * factor
            total += ZERO if dead else grad[i] * x[i]
    elif activation == TANH:
        for i in range(grad.size):
            value = typed_tanh(x[i])
            grad_x[i] = grad[i] * (ONE - value * value) * factor
            total += grad[i] * value
    else:
        for i in range(grad.size):
            grad_x[i] = grad[i] * factor
            total += grad[i] * x[i]
    return np.float64(total)


def _dot(first, second):
    """Return the sum of products over the length of ``first``; the order of float32 additions depends on it alone."""
    use_widest_vectors()
    total = ZERO
    for i in range(first.size):
        total += first[i] * second[i]
    return np.float64(total)


forward_strip, backward_strip = (
    compiled(_forward_strip, inline=False),
    compiled(_backward_strip, inline=False),
)
dot = compiled(_dot, inline=False, fastmath=REGROUPING)
scale_strip = compiled(_scale_strip, inline=False)
unscale_strip = compiled(_unscale_strip, inline=False, fastmath=REGROUPING)
