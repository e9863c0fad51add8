"""Noise multiplied onto an activation: against θ at the published uniforms, and wired into PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from numerics import TOLERANCES
from scipy import stats

from bmrs_kernels import multiply_noise, philox_uniform, sample_noise

SEED = 1234
GRANULARITIES = ["element", "sample", "batch"]
SHAPES = [
    ((1, 1), 1),
    ((7, 5), 1),
    ((7, 5), -2),
    ((64, 33), -1),
    ((3, 4, 5), 1),
    ((3, 4, 5), 2),
    ((2, 6, 5, 3), 1),
    ((2, 6, 5, 3), 3),
    ((2, 3, 4, 5, 2), 1),
    ((0, 5), 1),
    ((4, 0), 1),
]
# Noise per example needs an axis of examples beside the structures.
CASES = [
    (shape, dim, granularity)
    for (shape, dim), granularity in itertools.product(SHAPES, GRANULARITIES)
    if granularity != "sample" or dim % len(shape) != 0
]
EXTREME_MU = (-40.0, -20.0, -10.0, -1e-3, 0.0, 0.5, 7.0, 20.0)
EXTREME_LOG_SIGMA = (-20.0, -9.0, -5.0, -1.0, 0.5, 2.0, 5.0)


def parameters(count, dtype=torch.float32):
    """Return leaf tensors that run through the whole domain."""
    points = list(itertools.product(EXTREME_MU, EXTREME_LOG_SIGMA))
    chosen = [points[(5 * index) % len(points)] for index in range(count)]
    mu, log_sigma = torch.tensor(chosen, dtype=dtype).reshape(-1, 2).T
    return mu.clone().requires_grad_(), log_sigma.clone().requires_grad_()


def composed(x, mu, log_sigma, *, dim, mask, granularity, activation):
    """The same result from the public pieces: uniforms, θ and plain autograd for the product."""
    dim %= x.dim()
    if granularity == "element":
        uniform = philox_uniform(SEED, x.shape, device=x.device)
    elif granularity == "sample":
        shape = [size if axis in (0, dim) else 1 for axis, size in enumerate(x.shape)]
        uniform = philox_uniform(SEED, (x.shape[0], x.shape[dim]), device=x.device).reshape(shape)
    else:
        uniform = philox_uniform(SEED, (x.shape[dim],), device=x.device)
        uniform = uniform.reshape([-1 if axis == dim else 1 for axis in range(x.dim())])
    along = [-1 if axis == dim else 1 for axis in range(x.dim())]
    if x.numel() == 0:
        along = [x.shape[dim] if axis == dim else 1 for axis in range(x.dim())]
    theta = sample_noise(mu.reshape(along), log_sigma.reshape(along), uniform.to(mu.dtype))
    if mask is not None:
        theta = theta * mask.reshape(along)
    activated = {None: lambda x: x, "relu": torch.relu, "tanh": torch.tanh}[activation](x)
    return activated * theta.to(x.dtype)


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize(("shape", "dim", "granularity"), CASES)
def test_equals_noise_at_the_published_uniforms(shape, dim, granularity, activation):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    structures = shape[dim]
    mu, log_sigma = parameters(structures, torch.float64)
    mask = torch.arange(structures) % 3 != 1
    options = {"dim": dim, "mask": mask, "granularity": granularity, "activation": activation}
    actual = multiply_noise(x, mu, log_sigma, seed=SEED, **options)
    expected = composed(x, mu, log_sigma, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert (actual.movedim(dim, 0)[~mask] == 0).all()
    if x.numel() == 0:
        actual.sum().backward()
        assert x.grad.shape == x.shape
        assert (mu.grad == 0).all()
        return
    actual_gradients = torch.autograd.grad(actual, (x, mu, log_sigma), upstream)
    expected_gradients = torch.autograd.grad(expected, (x, mu, log_sigma), upstream)
    for got, wanted in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        assert got.isfinite().all()
    assert (actual_gradients[0].movedim(dim, 0)[~mask] == 0).all()
    assert (actual_gradients[1][~mask] == 0).all()
    assert (actual_gradients[2][~mask] == 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_activations_are_computed_in_float32(dtype, granularity):
    x = torch.randn(16, 12, 3, 3, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    mu, log_sigma = parameters(12)
    options = {"granularity": granularity, "activation": "relu", "seed": SEED}
    actual = multiply_noise(x, mu, log_sigma, **options)
    wide_x = x.detach().double().requires_grad_()
    expected = multiply_noise(wide_x, mu, log_sigma, **options)
    assert actual.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).tiny
    tolerance = epsilon + TOLERANCES[torch.float32]["drawn"]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=smallest)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = torch.autograd.grad(actual, (x, mu, log_sigma), upstream)
    wanted = torch.autograd.grad(expected, (wide_x, mu, log_sigma), upstream.double())
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=tolerance, atol=smallest)
    for narrow, reference in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(narrow, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layout_does_not_change_the_noise(granularity):
    mu, log_sigma = parameters(6)
    x = torch.randn(4, 6, 5, 7)
    contiguous = multiply_noise(x, mu, log_sigma, seed=SEED, granularity=granularity)
    channels_last = multiply_noise(
        x.to(memory_format=torch.channels_last), mu, log_sigma, seed=SEED, granularity=granularity
    )
    assert torch.equal(contiguous, channels_last)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    strided = torch.randn(4, 12, 5, 7)[:, ::2]
    torch.testing.assert_close(
        multiply_noise(strided, mu, log_sigma, seed=SEED, granularity=granularity),
        multiply_noise(strided.contiguous(), mu, log_sigma, seed=SEED, granularity=granularity),
        rtol=0,
        atol=0,
    )


def test_granularities_share_their_draws_as_named():
    x = torch.ones(5, 4, 3, 2)
    mu, log_sigma = torch.full((4,), -1.0), torch.zeros(4)

    def distinct(granularity, *axes):
        noise = multiply_noise(x, mu, log_sigma, granularity=granularity)
        return noise.movedim(axes, tuple(range(len(axes)))).reshape(-1).unique().numel()

    assert distinct("element", 0) == x.numel()
    assert distinct("sample", 0, 1) == 5 * 4
    assert distinct("batch", 1) == 4
    per_sample = multiply_noise(x, mu, log_sigma, granularity="sample")
    assert torch.equal(per_sample, per_sample[:, :, :1, :1].expand_as(per_sample))


def test_seed_comes_from_torchs_generator():
    x, mu, log_sigma = torch.ones(8, 3), torch.full((3,), -1.0), torch.zeros(3)
    torch.manual_seed(3)
    first, second = multiply_noise(x, mu, log_sigma), multiply_noise(x, mu, log_sigma)
    torch.manual_seed(3)
    assert torch.equal(multiply_noise(x, mu, log_sigma), first)
    assert not torch.equal(first, second)
    fixed = multiply_noise(x, mu, log_sigma, seed=torch.tensor(9))
    assert torch.equal(fixed, multiply_noise(x, mu, log_sigma, seed=9))


def test_only_x_and_parameters_are_kept_for_backward():
    x = torch.randn(32, 8, 6, 6, requires_grad=True)
    mu, log_sigma = parameters(8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        multiply_noise(x, mu, log_sigma, mask=torch.ones(8, dtype=torch.bool), activation="relu")
    assert sum(tensor.numel() for tensor in kept) <= x.numel() + 3 * 8 + 1


def test_gradients_are_deterministic_and_accept_expanded_upstream():
    x = torch.randn(32, 8, 6, 6, requires_grad=True)
    mu, log_sigma = parameters(8)

    def gradients(reduce):
        return torch.autograd.grad(reduce(multiply_noise(x, mu, log_sigma, seed=SEED)), (x, mu, log_sigma))

    first = gradients(torch.sum)
    for repeat in (gradients(torch.sum), gradients(lambda out: (out * torch.ones_like(out)).sum())):
        assert all(torch.equal(a, b) for a, b in zip(first, repeat, strict=True))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck(granularity):
    x = torch.randn(3, 4, 2, requires_grad=True)
    mu, log_sigma = parameters(4)
    arguments = (
        x, mu, log_sigma, torch.ones(4, dtype=torch.bool), torch.tensor(5), 1, granularity, "tanh", -20.0, 0.0, "torch",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.bmrs_kernels.multiply_noise.default, arguments)
    torch.library.opcheck(
        torch.ops.bmrs_kernels.multiply_noise_backward.default,
        (torch.ones(()).expand(3, 4, 2), x.detach(), mu.detach(), log_sigma.detach(), *arguments[3:]),
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_gradcheck(granularity, activation):
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    mu = torch.tensor([-1.0, -10.0, 0.3, -19.5, -21.0], dtype=torch.float64, requires_grad=True)
    log_sigma = torch.tensor([-1.0, 1.0, -0.5, 0.0, -0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *inputs: multiply_noise(*inputs, granularity=granularity, activation=activation, seed=SEED),
        (x, mu, log_sigma),
    )


def test_compiles_without_graph_breaks():
    mu, log_sigma = parameters(6)

    def step(x, seed):
        return multiply_noise(x, mu, log_sigma, activation="relu", seed=seed) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (4, 9):
        x = torch.randn(batch, 6, 3, requires_grad=True)
        seed = torch.tensor(batch)
        actual, expected = compiled(x, seed), step(x, seed)
        assert torch.equal(actual, expected)
        for got, wanted in zip(
            torch.autograd.grad(actual.sum(), (x, mu)),
            torch.autograd.grad(expected.sum(), (x, mu)),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)
    drawn = torch.compile(lambda x: multiply_noise(x, mu, log_sigma), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6)
    assert not torch.equal(drawn(x), drawn(x))


def test_activation_checkpointing_recomputes_the_same_noise():
    mu, log_sigma = parameters(6)
    x = torch.randn(5, 6, requires_grad=True)

    def block(x):
        return multiply_noise(torch.sin(x), mu, log_sigma).square()

    torch.manual_seed(0)
    expected = torch.autograd.grad(block(x).sum(), (x, mu, log_sigma))
    torch.manual_seed(0)
    value = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(value.sum(), (x, mu, log_sigma)), expected, strict=True):
        assert torch.equal(got, wanted)


def test_autocast_keeps_parameters_in_float32():
    mu, log_sigma = parameters(6)
    x, weight = torch.randn(5, 6), torch.randn(6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = multiply_noise(x @ weight, mu, log_sigma)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert mu.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("mu", "log_sigma"),
    [(-5.0, -1.0), (0.0, -5.0), (3.0, -2.0), (2.0, 0.0), (-30.0, 1.0), (-10.0, 2.0), (5.0, 4.0)],
)
def test_a_million_draws_follow_the_truncated_normal(mu, log_sigma):
    count = 1_000_000
    noise = multiply_noise(
        torch.ones(count, 1, dtype=torch.float64),
        torch.tensor([mu], dtype=torch.float64),
        torch.tensor([log_sigma], dtype=torch.float64),
        seed=17,
    )
    sigma = torch.tensor(log_sigma, dtype=torch.float64).exp().item()
    exact = stats.truncnorm((-20 - mu) / sigma, -mu / sigma, loc=mu, scale=sigma)
    assert stats.kstest(noise.log().flatten().numpy(), exact.cdf).pvalue > 1e-4


def test_infinite_activations_behind_relu_leave_finite_gradients():
    x = torch.tensor([[-torch.inf, 1.0], [2.0, -torch.inf]], requires_grad=True)
    mu, log_sigma = torch.full((2,), -1.0, requires_grad=True), torch.zeros(2)
    multiply_noise(x, mu, log_sigma, activation="relu", seed=SEED).sum().backward()
    assert mu.grad.isfinite().all()
    assert torch.equal(x.grad == 0, x == -torch.inf)
