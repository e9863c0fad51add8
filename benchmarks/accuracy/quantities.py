"""Every public quantity and gradient: as the project computes it, as the plain formulas do, and as it truly is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bmrs_kernels
from benchmarks.accuracy import oracle
from benchmarks.accuracy.contract import LOWER, UPPER
from benchmarks.rivals import plain
from bmrs_kernels.multiplicative_noise import torch_noise
from bmrs_kernels.multiplicative_noise.call import NoiseCall

LN2 = math.log(2.0)
VALUE, GRAD_MU, GRAD_LOG_SIGMA = "value", "d/dμ", "d/dlog σ"
WITH_GRADIENTS = (VALUE, GRAD_MU, GRAD_LOG_SIGMA)
REDUCED_LOWER = -23.0 * LN2

# Tensors of one shape in, a tensor per output: (μ, log σ) or (μ, log σ, uniform).
Evaluation = Callable[..., Sequence[Tensor]]


class DecisionRule(NamedTuple):
    """Where a value prunes its structure: above the border or below it, the border included."""

    border: float
    above: bool

    def margin(self, value: Any) -> Any:
        """Return how far values, an array or a number, lie beyond the border; negative where they do not prune."""
        return value - self.border if self.above else self.border - value


class Quantity(NamedTuple):
    """One public function at one set of options."""

    name: str
    outputs: tuple[str, ...]
    bounds: tuple[str, ...]  # of the value and of the gradients: keys of the contract's table
    project: Callable[[str], Evaluation]  # takes the backend
    plain: Evaluation
    reference: Callable[..., Sequence[Any]]  # mpmath numbers from Python numbers
    decision: DecisionRule | None = None
    at_uniforms: bool = False

    def bound_of(self, output: str) -> str:
        """Return the name of the bound that applies to an output."""
        return self.bounds[output != VALUE]


def differentiated(function: Callable[..., Tensor]) -> Evaluation:
    """Return value and gradients in μ and log σ of a per-structure function."""

    def evaluate(mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, ...]:
        leaves = (mu.clone().requires_grad_(), log_sigma.clone().requires_grad_())
        value = function(*leaves)
        return (value.detach(), *torch.autograd.grad(value.sum(), leaves))

    return evaluate


def undifferentiated(function: Callable[..., Tensor]) -> Evaluation:
    """Return a value alone."""
    return lambda mu, log_sigma: (function(mu, log_sigma).detach(),)


def log_differentiated(function: Callable[..., Tensor]) -> Evaluation:
    """Return a positive value and the gradients of its logarithm, which are those of the value divided by it."""

    def evaluate(mu: Tensor, log_sigma: Tensor, *uniform: Tensor) -> tuple[Tensor, ...]:
        leaves = (mu.clone().requires_grad_(), log_sigma.clone().requires_grad_())
        theta = function(*leaves, *uniform)
        gradients = torch.autograd.grad(theta.sum(), leaves)
        theta = theta.detach()
        return (theta, *(gradient.double() / theta.double() for gradient in gradients))

    return evaluate


def inside_multiply_noise(backend: str) -> Evaluation:
    """Return the noise that ``multiply_noise`` draws, at uniforms of our choice instead of Philox's."""
    if backend == "triton":
        from benchmarks.accuracy import noise_kernels

        # One tensor, whose rows are the outputs.
        return lambda *inputs: noise_kernels.noise(*inputs).unbind()
    if backend == "numba":
        from benchmarks.accuracy import noise_loops

        return noise_loops.noise

    def evaluate(mu: Tensor, log_sigma: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
        x = torch.ones(1, len(mu), dtype=mu.dtype, device=mu.device)
        seed = torch.zeros((), dtype=torch.int64, device=mu.device)  # not read
        call = NoiseCall(x, mu, log_sigma, None, seed, 1, "element", None, LOWER, UPPER)
        noise = torch_noise.prepare(call)
        theta = torch_noise.multiply_noise_at(call, noise, uniform[None])[0]
        _, *gradients = torch_noise.multiply_noise_at_backward(call, noise, x, uniform[None])
        return (theta, *(gradient.double() / theta.double() for gradient in gradients))

    return evaluate


def _public(
    function: Callable[..., Tensor], wrap: Callable[..., Evaluation], **options: float
) -> Callable[[str], Evaluation]:
    return lambda backend: wrap(partial(function, backend=backend, **options))


def _loguniform(p1: int) -> Quantity:
    reduced_upper = -p1 * LN2
    return Quantity(
        f"delta_f_loguniform, p1 = {p1}",
        WITH_GRADIENTS,
        ("log evidence", "gradient of ΔF"),
        _public(
            bmrs_kernels.delta_f_loguniform,
            differentiated,
            reduced_lower=REDUCED_LOWER,
            reduced_upper=reduced_upper,
        ),
        differentiated(
            partial(plain.delta_f_loguniform, reduced_lower=REDUCED_LOWER, reduced_upper=reduced_upper)
        ),
        lambda mu, log_sigma: oracle.delta_f_loguniform(mu, log_sigma, REDUCED_LOWER, reduced_upper),
        DecisionRule(0.0, above=True),
    )


def _mean_reference(mu: float, log_sigma: float) -> tuple[Any, ...]:
    _, _, _, mean, grad_mu, grad_log_sigma, _ = oracle.quantities(mu, log_sigma)
    return mean, oracle.quotient(grad_mu, mean), oracle.quotient(grad_log_sigma, mean)


def _sample_reference(mu: float, log_sigma: float, y: float) -> tuple[Any, ...]:
    sample = oracle.sample(mu, log_sigma, y)
    return oracle.exponential(sample.log_theta), sample.grad_mu, sample.grad_log_sigma


QUANTITIES = (
    Quantity(
        "kl_divergence",
        WITH_GRADIENTS,
        ("log evidence", "gradient of KL"),
        _public(bmrs_kernels.kl_divergence, differentiated),
        differentiated(plain.kl_divergence),
        lambda mu, log_sigma: oracle.quantities(mu, log_sigma)[:3],
    ),
    Quantity(
        "delta_f_lognormal",
        WITH_GRADIENTS,
        ("log evidence", "gradient of ΔF"),
        _public(bmrs_kernels.delta_f_lognormal, differentiated),
        differentiated(plain.delta_f_lognormal),
        oracle.delta_f_lognormal,
        DecisionRule(0.0, above=True),
    ),
    _loguniform(8),
    _loguniform(4),
    Quantity(
        "noise_mean",
        WITH_GRADIENTS,
        ("factor", "gradient of log E[θ]"),
        _public(bmrs_kernels.noise_mean, log_differentiated),
        log_differentiated(plain.noise_mean),
        _mean_reference,
    ),
    Quantity(
        "noise_snr",
        (VALUE,),
        ("factor",),
        _public(bmrs_kernels.noise_snr, undifferentiated),
        undifferentiated(plain.noise_snr),
        lambda mu, log_sigma: oracle.quantities(mu, log_sigma)[6:],
        DecisionRule(1.0, above=False),
    ),
    Quantity(
        "sample_noise",
        WITH_GRADIENTS,
        ("factor", "gradient of log θ"),
        _public(bmrs_kernels.sample_noise, log_differentiated),
        log_differentiated(plain.sample_noise),
        _sample_reference,
        at_uniforms=True,
    ),
    Quantity(
        "multiply_noise",
        WITH_GRADIENTS,
        ("drawn factor", "gradient of log drawn θ"),
        inside_multiply_noise,
        log_differentiated(plain.sample_noise),
        _sample_reference,
        at_uniforms=True,
    ),
)
