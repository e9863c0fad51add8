"""Per-structure functions as registered operators: autograd, opcheck, compile, tiling."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from scipy import stats

import bmrs_kernels
from benchmarks.accuracy import oracle
from bmrs_kernels import delta_f_lognormal, delta_f_loguniform, kl_divergence, noise_mean, sample_noise
from bmrs_kernels.truncated_normal.torch_quadrature import STRUCTURES_PER_TILE

POINTS = torch.tensor(
    [[-1.0, -1.0], [-10.0, 1.0], [0.3, -0.5], [-19.5, 0.0], [-21.0, -0.5], [4.0, 2.0]], dtype=torch.float64
)
FUNCTIONS = [kl_divergence, delta_f_lognormal, delta_f_loguniform, noise_mean]
DIFFERENTIABLE = [
    pytest.param(partial(function, backend=backend), id=f"{function.__name__}-{backend}")
    for function in FUNCTIONS
    for backend in ("numba", "torch")
]
INTERVAL = (-20.0, 0.0, "torch")
OPERATORS = {
    "kl_divergence": INTERVAL,
    "delta_f_lognormal": (-20.0, 1e-2, *INTERVAL),
    "delta_f_loguniform": (-15.0, -5.0, *INTERVAL),
    "noise_mean": INTERVAL,
}


def leaves():
    mu, log_sigma = POINTS.T
    return mu.clone().requires_grad_(), log_sigma.clone().requires_grad_()


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_gradcheck(function):
    assert torch.autograd.gradcheck(function, leaves())


def test_gradcheck_sample():
    uniform = torch.rand(4, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda *inputs: sample_noise(*inputs, uniform), leaves())


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator = getattr(torch.ops.bmrs_kernels, name).default
    torch.library.opcheck(operator, (*leaves(), *OPERATORS[name], True))
    detached = tuple(leaf.detach() for leaf in leaves())
    torch.library.opcheck(operator, (*detached, *OPERATORS[name], False))


def test_opcheck_of_operators_without_options():
    mu, log_sigma = leaves()
    torch.library.opcheck(
        torch.ops.bmrs_kernels.noise_snr.default, (mu.detach(), log_sigma.detach(), *INTERVAL)
    )
    uniform = torch.rand(3, 6, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.bmrs_kernels.sample_noise.default, (mu, log_sigma, uniform, *INTERVAL, True)
    )


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_compiles_without_graph_breaks(function):
    mu, log_sigma = leaves()
    compiled = torch.compile(lambda m, s: function(m, s).sum(), fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(mu, log_sigma), (mu, log_sigma))
    expected = torch.autograd.grad(function(mu, log_sigma).sum(), (mu, log_sigma))
    assert all(torch.equal(got, wanted) for got, wanted in zip(actual, expected, strict=True))


@pytest.mark.parametrize("function", [*DIFFERENTIABLE, bmrs_kernels.noise_snr])
def test_tiles_do_not_change_results(function):
    count = 3 * (STRUCTURES_PER_TILE // 3 + 2)
    mu, log_sigma = torch.linspace(-25, 5, count), torch.linspace(-8, 3, count)
    together = function(mu, log_sigma)
    assert torch.equal(together[-6:], function(mu[-6:], log_sigma[-6:]))
    transposed = function(mu.reshape(3, -1).T, log_sigma.reshape(3, -1).T)
    assert torch.equal(transposed, together.reshape(3, -1).T)


def test_without_gradients_none_are_computed():
    mu, log_sigma = leaves()
    with torch.no_grad():
        assert not kl_divergence(mu, log_sigma).requires_grad
    operator = torch.ops.bmrs_kernels.kl_divergence
    _, grad_mu, _ = operator(mu.detach(), log_sigma.detach(), *INTERVAL, False)
    assert grad_mu.numel() == 0


def test_agrees_with_scipy_where_scipy_is_good():
    mu, log_sigma = torch.tensor([[-8.0, 0.5], [-1.0, 0.0], [-15.0, 1.0]], dtype=torch.float64).T
    sigma = log_sigma.exp()
    exact = stats.truncnorm(
        ((-20 - mu) / sigma).numpy(), (-mu / sigma).numpy(), loc=mu.numpy(), scale=sigma.numpy()
    )
    entropy = torch.tensor([stats.truncnorm.entropy(*a) for a in zip(*exact.args, strict=True)]) + log_sigma
    torch.testing.assert_close(
        kl_divergence(mu, log_sigma), torch.log(torch.tensor(20.0)).double() - entropy, rtol=1e-7, atol=1e-7
    )
    for y in (0.01, 0.5, 0.99):
        uniform = torch.tensor(y, dtype=torch.float64)
        quantile = torch.from_numpy(exact.ppf(y))
        torch.testing.assert_close(sample_noise(mu, log_sigma, uniform).log(), quantile, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_compiles_for_numbers_that_vary(function):
    torch.compiler.reset()  # the cases share one code object, and its number of compilations is limited
    mu, log_sigma = leaves()
    compiled = torch.compile(
        lambda m, s, lower: function(m, s, lower=lower), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for lower in (-20.0, -19.5, -18.0):
        assert torch.equal(compiled(mu, log_sigma, lower), function(mu, log_sigma, lower=lower))


@pytest.mark.parametrize("function", [*DIFFERENTIABLE, lambda m, s: sample_noise(m, s, torch.tensor(0.3))])
def test_second_derivatives_raise(function):
    mu = torch.tensor([-3.0], requires_grad=True)
    (first,) = torch.autograd.grad(function(mu, torch.ones(1)).sum(), mu, create_graph=True)
    with pytest.raises(NotImplementedError, match="bmrs_kernels has no second derivatives"):
        torch.autograd.grad(first.sum(), mu)


@pytest.mark.parametrize("function", [*DIFFERENTIABLE, lambda m, s: sample_noise(m, s, torch.tensor(0.3))])
def test_shapes_and_layouts(function):
    for mu in (torch.zeros(0, 3), torch.full((3, 4), -1.0).t(), torch.full((2, 3, 4, 2), -30.0)):
        layout = mu.contiguous(memory_format=torch.channels_last) if mu.dim() == 4 else mu
        layout = layout.detach().requires_grad_()
        value = function(layout, torch.zeros_like(layout))
        value.sum().backward()
        assert value.shape == layout.grad.shape == mu.shape
        assert torch.equal(value, function(mu.contiguous(), torch.zeros(mu.shape)))


def test_ends_are_exact_in_float64():
    mu, log_sigma = torch.tensor([[-30.0, 9.0], [-2.0, -2.0]], dtype=torch.float64)
    uniform = torch.tensor(0.5, dtype=torch.float64)
    ends = torch.tensor([-20.1, 0.1], dtype=torch.float64)
    distance = (sample_noise(mu, log_sigma, uniform, lower=-20.1, upper=0.1).log() - ends).abs()
    exact = torch.tensor(
        [
            abs(float(oracle.sample(m, -2.0, 0.5, -20.1, 0.1).log_theta - e))
            for m, e in ((-30.0, -20.1), (9.0, 0.1))
        ]
    )
    torch.testing.assert_close(distance, exact.double(), rtol=1e-6, atol=1e-13)
