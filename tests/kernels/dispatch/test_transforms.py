"""First-order transforms of torch.func, and tensors without data."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vjp, vmap

import bmrs_kernels
from bmrs_kernels import multiply_noise, sample_noise

MU = torch.tensor([-3.0, -25.0, 0.02, 7.0], dtype=torch.float64)
LOG_SIGMA = torch.tensor([-1.0, 1.0, -5.0, 2.5], dtype=torch.float64)
UNIFORM = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FUNCTIONS = {
    "kl_divergence": bmrs_kernels.kl_divergence,
    "delta_f_lognormal": bmrs_kernels.delta_f_lognormal,
    "delta_f_loguniform": bmrs_kernels.delta_f_loguniform,
    "noise_mean": bmrs_kernels.noise_mean,
    "sample_noise": lambda mu, log_sigma, **options: sample_noise(mu, log_sigma, UNIFORM, **options),
    "multiply_noise": lambda mu, log_sigma, **options: multiply_noise(X, mu, log_sigma, seed=3, **options),
}
BACKENDS = ["torch", "numba"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_autograd(name, backend):
    def total(mu, log_sigma):
        return FUNCTIONS[name](mu, log_sigma, backend=backend).sum()

    leaves = MU.clone().requires_grad_(), LOG_SIGMA.clone().requires_grad_()
    expected = torch.autograd.grad(total(*leaves), leaves)
    transformed = grad(total, argnums=(0, 1))(MU, LOG_SIGMA)
    _, pull = vjp(total, MU, LOG_SIGMA)
    for wanted, got, pulled in zip(expected, transformed, pull(torch.ones((), dtype=MU.dtype)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pulled, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_posteriors_can_be_mapped_over(name, backend):
    def total(mu, log_sigma):
        return FUNCTIONS[name](mu, log_sigma, backend=backend).sum()

    many = torch.stack([MU, MU + 1, MU - 2])
    values = vmap(total, (0, None))(many, LOG_SIGMA)
    gradients = vmap(grad(total, argnums=(0, 1)), (0, None))(many, LOG_SIGMA)
    for index, mu in enumerate(many):
        torch.testing.assert_close(values[index], total(mu, LOG_SIGMA), rtol=1e-12, atol=1e-12)
        alone = grad(total, argnums=(0, 1))(mu, LOG_SIGMA)
        for batch, single in zip(gradients, alone, strict=True):
            torch.testing.assert_close(batch[index], single, rtol=1e-12, atol=1e-12)


def test_the_snr_can_be_mapped_over():
    many = torch.stack([MU, MU + 1])
    expected = torch.stack([bmrs_kernels.noise_snr(mu, LOG_SIGMA) for mu in many])
    torch.testing.assert_close(vmap(bmrs_kernels.noise_snr, (0, None))(many, LOG_SIGMA), expected)


def test_jacobian_of_the_noise():
    jacobian = jacrev(lambda mu: multiply_noise(X, mu, LOG_SIGMA, seed=3))(MU)
    assert jacobian.shape == (3, 4, 4)
    mu = MU.clone().requires_grad_()
    out = multiply_noise(X, mu, LOG_SIGMA, seed=3)
    row = torch.autograd.grad(out[1, 2], mu)[0]
    torch.testing.assert_close(jacobian[1, 2], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_gradients_of_each_example_of_a_layer(randomness):
    bmrs = pytest.importorskip("bmrs")
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), bmrs.NoiseLayer(4, initial_log_sigma=0.0))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    x = torch.randn(3).expand(6, 3)
    found = vmap(grad(loss), (None, 0), randomness=randomness)(parameters, x)
    assert all(value.shape == (6, *parameters[name].shape) for name, value in found.items())
    assert all(value.isfinite().all() for value in found.values())
    # Equal examples differ by their noise alone.
    alike = [torch.equal(found["1.mu"][0], other) for other in found["1.mu"][1:]]
    assert all(alike) if randomness == "same" else not any(alike)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_say_that_they_are_not_defined(name):
    def total(mu):
        return FUNCTIONS[name](mu, LOG_SIGMA).sum()

    with pytest.raises(NotImplementedError, match="bmrs_kernels has no second derivatives"):
        grad(lambda mu: grad(total)(mu).square().sum())(MU)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensors_without_data_have_shapes(name, monkeypatch):
    mu, log_sigma = torch.empty(2, 4, device="meta")
    monkeypatch.setitem(globals(), "X", X.to("meta"))
    monkeypatch.setitem(globals(), "UNIFORM", UNIFORM.to("meta"))
    out = FUNCTIONS[name](mu.requires_grad_(), log_sigma)
    assert out.is_meta
    assert out.shape == ((3, 4) if name == "multiply_noise" else (4,))
    assert torch.autograd.grad(out.sum(), mu)[0].shape == (4,)
