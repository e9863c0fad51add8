"""Time of every function, forward and backward: ``python -m pytest benchmarks --benchmark-only``.

Each group holds the project's function, the plain formulas and, where x is read and written, a copy of x as the floor.
"""

from __future__ import annotations

import pytest
import torch

import bmrs_kernels
from benchmarks import plain

# Activations of the paper's networks: MLP, LeNet-5's first and second convolution.
SHAPES = {"mlp": (128, 100), "lenet5-conv1": (64, 6, 28, 28), "lenet5-conv2": (64, 16, 10, 10)}
STRUCTURES = 800
NOISE = {"project": bmrs_kernels.multiply_noise, "plain": plain.multiply_noise}
KL = {"project": bmrs_kernels.kl_divergence, "plain": plain.kl_divergence}


def parameters(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return leaf tensors inside the interval, where the plain formulas hold too."""
    mu = torch.linspace(-3.0, -1.0, count).requires_grad_()
    return mu, torch.full((count,), -1.0).requires_grad_()


@pytest.mark.parametrize("implementation", NOISE)
@pytest.mark.parametrize("granularity", ["element", "sample", "batch"])
@pytest.mark.parametrize("network", SHAPES)
def test_multiply_noise(benchmark, network, granularity, implementation):
    shape = SHAPES[network]
    benchmark.group = f"multiply_noise {network} {granularity}"
    x = torch.ones(shape, requires_grad=True)
    mu, log_sigma = parameters(shape[1])
    function = NOISE[implementation]
    noise = function(x.detach(), mu, log_sigma, granularity=granularity)
    expected = bmrs_kernels.noise_mean(mu, log_sigma).mean()
    assert (noise > 0).all()
    assert (noise <= 1).all()
    assert abs(noise.mean() - expected) < expected

    def step():
        function(x, mu, log_sigma, granularity=granularity).sum().backward()

    benchmark(step)


@pytest.mark.parametrize("network", SHAPES)
def test_copy(benchmark, network):
    x = torch.ones(SHAPES[network])
    target = torch.empty_like(x)
    benchmark.group = f"multiply_noise {network} element"
    benchmark(target.copy_, x)
    assert torch.equal(target, x)


@pytest.mark.parametrize("implementation", KL)
def test_kl_divergence(benchmark, implementation):
    benchmark.group = f"kl_divergence {STRUCTURES}"
    mu, log_sigma = parameters(STRUCTURES)
    torch.testing.assert_close(
        KL[implementation](mu, log_sigma), bmrs_kernels.kl_divergence(mu, log_sigma), rtol=1e-4, atol=1e-4
    )

    def step():
        KL[implementation](mu, log_sigma).sum().backward()

    benchmark(step)
