"""The compiled loops: against the torch path in float64 on the same noise, and what is particular to them."""

from __future__ import annotations

import pytest
import torch
from numerics import TOLERANCES

from bmrs_kernels import multiply_noise, sample_noise
from bmrs_kernels.multiplicative_noise import reference, torch_noise
from bmrs_kernels.uniform import numba_philox, torch_philox

SEED = 77
# (shape, axis of the structures), one for each way through the numba_loops.
SHAPES = {
    "one gathered tile": ((9, 5), 1),
    "several gathered tiles in both directions": ((130, 300), 1),
    "gathered strips of five": ((70, 7, 5), 1),
    "strips of one vector": ((2, 6, 4, 4), 1),
    "strips longer than a tile": ((2, 3, 37, 31), 1),
    "several structures in a tile": ((1, 100, 17), 1),
    "structures first": ((6, 40), 0),
    "structures last": ((4, 11, 33), 2),
}
MU = (-3.0, -25.0, 0.02, 7.0, -10.0, -20.5, 3.0)
LOG_SIGMA = (-1.0, 1.0, -5.0, 2.5, 3.0, -2.0, 0.5)


def posterior(count):
    """Return μ and log σ of every regime, in turn."""
    chosen = torch.arange(count) % len(MU)
    return tuple(torch.tensor(part)[chosen].requires_grad_() for part in (MU, LOG_SIGMA))


def results(x, mu, log_sigma, upstream, **options):
    """Return output and gradients."""
    out = multiply_noise(x, mu, log_sigma, seed=SEED, **options)
    return out.detach(), *torch.autograd.grad(out, (x, mu, log_sigma), upstream)


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize("granularity", ["element", "sample", "batch"])
@pytest.mark.parametrize("case", SHAPES)
def test_agrees_with_the_torch_path(case, granularity, activation):
    shape, dim = SHAPES[case]
    if granularity == "sample" and dim == 0:
        pytest.skip("axis 0 counts the examples")
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator) for _ in range(2))
    mu, log_sigma = posterior(shape[dim])
    mask = (torch.arange(shape[dim]) % 5 != 3).float()
    options = {"dim": dim, "granularity": granularity, "activation": activation, "mask": mask}
    leaves = [part.detach().requires_grad_() for part in (x, mu, log_sigma)]
    actual = results(*leaves, upstream, backend="numba", **options)
    wide = [part.detach().double().requires_grad_() for part in (x, mu, log_sigma)]
    expected = results(*wide, upstream.double(), backend="torch", **options)
    bound = TOLERANCES[torch.float32]["drawn"] + torch.finfo(torch.float32).eps
    assert ((actual[0] - expected[0]).abs() <= bound * expected[0].abs() + 1e-30).all()
    # The slope of tanh is a difference from 1.
    steepest = (upstream * expected[0] / (torch.tanh(x) if activation == "tanh" else x)).abs()
    assert ((actual[1] - expected[1]).abs() <= bound * steepest + 1e-30).all()
    others = [axis for axis in range(len(shape)) if axis != dim]
    terms = (upstream * expected[0]).abs().sum(others)
    # What log σ does to log θ is up to its distance from μ.
    for got, wanted, size in zip(actual[2:], expected[2:], (1.0, 25.0), strict=True):
        assert ((got - wanted).abs() <= bound * size * terms + 1e-30).all()
        assert (got[mask == 0] == 0).all()


@pytest.mark.parametrize("granularity", ["element", "sample"])
@pytest.mark.parametrize("case", ["several gathered tiles in both directions", "strips longer than a tile"])
def test_the_number_of_threads_changes_no_bit(case, granularity, monkeypatch):
    monkeypatch.setattr("bmrs_kernels.dispatch.numba_threads.WORTH_A_THREAD", 1e-12)
    shape, dim = SHAPES[case]
    x, upstream = torch.randn(shape, requires_grad=True), torch.randn(shape)
    mu, log_sigma = posterior(shape[dim])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(
                results(x, mu, log_sigma, upstream, dim=dim, granularity=granularity, backend="numba")
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3, 2**63 - 1, -1])
def test_uniforms_are_those_of_the_torch_path(seed):
    seed = torch.tensor(seed)
    for count in (0, 1, 5, 1023, 1024, 1025, 70_001):
        assert torch.equal(numba_philox.uniform_stream(seed, count), torch_philox.uniform_stream(seed, count))


@pytest.mark.parametrize("shape", [(40, 4), (3, 4, 20)])
def test_a_structure_whose_parameters_are_nan_is_nan_and_no_other(shape):
    x = torch.randn(shape, requires_grad=True)
    for position, name in ((1, "mu"), (2, "log_sigma")):
        parameters = {"mu": torch.full((4,), -1.0), "log_sigma": torch.zeros(4)}
        parameters[name][position] = torch.nan
        leaves = [part.requires_grad_() for part in parameters.values()]
        found = results(x, *leaves, torch.ones(shape), backend="numba")
        for result, axis in zip(found, (1, 1, 0, 0), strict=True):
            spoiled = result.isnan().movedim(axis, 0)
            assert spoiled[position].all()
            assert not spoiled[[index for index in range(4) if index != position]].any()


@pytest.mark.parametrize("granularity", ["element", "sample"])
def test_nan_in_an_activation_stays_behind_relu_and_tanh(granularity):
    x = torch.randn(2, 3, 17)
    x[0, 1, 5] = torch.nan
    for activation in ("relu", "tanh"):
        options = {"activation": activation, "granularity": granularity, "backend": "numba"}
        out = multiply_noise(x, *posterior(3), **options)
        assert torch.equal(out.isnan(), x.isnan())


def test_a_pruned_structure_takes_no_part_even_where_it_is_infinite():
    x = torch.full((40, 2), torch.inf, requires_grad=True)
    mu, log_sigma = posterior(2)
    mask = torch.tensor([True, False])
    _, _, grad_mu, grad_log_sigma = results(x, mu, log_sigma, torch.ones(40, 2), mask=mask, backend="numba")
    assert grad_mu[1] == grad_log_sigma[1] == 0


def test_intervals_beyond_the_range_of_float32s_exponent():
    mu, log_sigma = torch.tensor([-110.0, -95.0, 0.0, 95.0]), torch.full((4,), 0.5)
    options = {"lower": -120.0, "upper": 100.0, "seed": SEED}
    actual = multiply_noise(torch.ones(300, 4), mu, log_sigma, backend="numba", **options)
    exact = multiply_noise(
        torch.ones(300, 4, dtype=torch.float64), mu.double(), log_sigma.double(), backend="torch", **options
    )
    smallest = torch.finfo(torch.float32).smallest_normal
    normal = (exact >= smallest) & (exact < torch.finfo(torch.float32).max)
    # The float32 logarithm of θ, up to 100 in magnitude, is all that its exponential can know.
    torch.testing.assert_close(actual.double()[normal], exact[normal], rtol=2e-5, atol=0)
    assert (actual[exact > 3.5e38] == torch.inf).all()
    assert (actual[exact < smallest] <= 2 * smallest).all()
    assert normal[:, 2].all()
    assert not normal[:, 0].any()


def test_backward_can_be_repeated_and_notices_a_change_of_parameters():
    x = torch.randn(8, 3, requires_grad=True)
    mu, log_sigma = posterior(3)
    out = multiply_noise(x, mu, log_sigma, backend="numba")
    first, second = (torch.autograd.grad(out.sum(), (x, mu), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        mu.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), (x, mu))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_16_bits_give_gradients_of_16_bits(dtype):
    mu, log_sigma = (part.detach().to(dtype).requires_grad_() for part in posterior(3))
    x = torch.randn(8, 3, requires_grad=True)
    found = results(x, mu, log_sigma, torch.ones(8, 3), backend="numba")
    assert [part.dtype for part in found] == [torch.float32, torch.float32, dtype, dtype]
    theta = sample_noise(mu, log_sigma, torch.full((8, 3), 0.5), backend="numba")
    assert theta.dtype == dtype


def test_long_rows_that_share_a_draw_lose_no_terms():
    x = torch.full((2, 1, 3_000_000), 0.1, requires_grad=True)
    mu, log_sigma = torch.tensor([-1.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    narrow = results(x, mu, log_sigma, torch.ones_like(x), granularity="batch", backend="numba")
    wide = [part.detach().double().requires_grad_() for part in (x, mu, log_sigma)]
    exact = results(*wide, torch.ones_like(wide[0]), granularity="batch", backend="torch")
    for got, wanted in zip(narrow[2:], exact[2:], strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)


def test_float64_masks_keep_their_digits():
    leaves = [
        part.double().requires_grad_() for part in (torch.randn(4, 2), *map(torch.detach, posterior(2)))
    ]
    mask = torch.tensor([0.1, 1e-50], dtype=torch.float64)
    found, expected = (
        results(*leaves, torch.ones(4, 2).double(), mask=mask, backend=backend)
        for backend in ("numba", "torch")
    )
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("granularity", ["element", "sample", "batch"])
def test_tensors_stay_on_the_cpu_whatever_the_default_device(granularity):
    x = torch.randn(4, 3, 17, requires_grad=True)
    mu, log_sigma = posterior(3)
    expected = results(x, mu, log_sigma, torch.ones_like(x), granularity=granularity, backend="numba")
    seed, upstream = torch.tensor(SEED), torch.ones_like(x)
    with torch.device("meta"):
        out = multiply_noise(x, mu, log_sigma, seed=seed, granularity=granularity, backend="numba")
        actual = out.detach(), *torch.autograd.grad(out, (x, mu, log_sigma), upstream)
        theta = sample_noise(mu, log_sigma, mu.detach().sigmoid())
    assert all(torch.equal(got, wanted) for got, wanted in zip(actual, expected, strict=True))
    assert theta.device.type == "cpu"


def test_gradients_of_a_batch_of_upstream_gradients():
    x = torch.randn(4, 3, requires_grad=True)
    mu, log_sigma = posterior(3)
    out = multiply_noise(x, mu, log_sigma, seed=SEED, backend="numba")
    upstream = torch.randn(5, 4, 3)
    together = torch.autograd.grad(out, (x, mu), upstream, is_grads_batched=True, retain_graph=True)
    for index, one in enumerate(upstream):
        alone = torch.autograd.grad(out, (x, mu), one, retain_graph=True)
        assert all(torch.equal(batch[index], single) for batch, single in zip(together, alone, strict=True))


def test_gradients_lie_in_memory_as_their_activation_does():
    x = torch.randn(8, 16, 3, 3, requires_grad=True)
    upstream = torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last)
    for granularity in ("element", "batch"):
        _, grad_x, _, _ = results(x, *posterior(16), upstream, granularity=granularity, backend="numba")
        assert grad_x.stride() == x.stride()


@pytest.fixture
def no_torch_path(monkeypatch):
    """The torch path must not serve a call that names numba."""

    def called(*arguments, **options):
        raise AssertionError("the torch path ran")

    for name in ("prepare", "multiply_noise", "multiply_noise_backward", "sample_noise"):
        monkeypatch.setattr(torch_noise, name, called)
    monkeypatch.setattr(reference, "log_noise", called)


@pytest.mark.usefixtures("no_torch_path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_names_numba_runs_numba(dtype):
    x = torch.randn(4, 3, 5).to(dtype).requires_grad_()
    mu, log_sigma = posterior(3)
    for granularity in ("element", "sample", "batch"):
        found = results(x, mu, log_sigma, torch.ones_like(x), granularity=granularity, backend="numba")
        assert all(part.isfinite().all() for part in found)
    theta = sample_noise(mu, log_sigma, torch.rand(4, 3), backend="numba")
    torch.autograd.grad(theta.sum(), (mu, log_sigma))


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize("granularity", ["element", "sample", "batch"])
@pytest.mark.parametrize("case", SHAPES)
def test_float64_agrees_with_the_torch_path_to_its_last_digits(case, granularity, activation):
    shape, dim = SHAPES[case]
    if granularity == "sample" and dim == 0:
        pytest.skip("axis 0 counts the examples")
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mu, log_sigma = posterior(shape[dim])
    mask = (torch.arange(shape[dim]) % 5 != 3).double()
    options = {"dim": dim, "granularity": granularity, "activation": activation, "mask": mask}
    leaves = [part.detach().double().requires_grad_() for part in (x, mu, log_sigma)]
    actual, expected = (
        results(*leaves, upstream, backend=backend, **options) for backend in ("numba", "torch")
    )
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


SAMPLED = {
    "uniforms behind the structures": ((3, 1), (3, 2000)),
    "structures last": ((7,), (5, 4, 7)),
    "structures in the middle": ((7, 1), (5, 7, 4)),
    "a structure for each uniform": ((4, 5), (4, 5)),
    "one uniform for all structures": ((4, 5), ()),
    "one structure": ((), (2, 3)),
    "structures along two axes": ((2, 1, 3), (4, 2, 5, 3)),
    "none": ((3, 1), (3, 0)),
}


@pytest.mark.parametrize("case", SAMPLED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_samples_agree_with_the_torch_path(case, dtype):
    shape, drawn = SAMPLED[case]
    generator = torch.Generator().manual_seed(1)
    count = torch.Size(shape).numel()
    mu, log_sigma = (part.detach().view(shape).to(dtype).requires_grad_() for part in posterior(count))
    uniform = torch.rand(drawn, generator=generator, dtype=torch.float64)
    found = []
    for backend in ("numba", "torch"):
        theta = sample_noise(mu, log_sigma, uniform, backend=backend)
        assert theta.is_contiguous()
        upstream = torch.ones_like(theta)
        found.append((theta.detach(), *torch.autograd.grad(theta, (mu, log_sigma), upstream)))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=max(1e-11, 2 * torch.finfo(dtype).eps), atol=1e-11)


def test_samples_at_the_ends_of_the_uniforms_are_those_of_the_interval():
    mu, log_sigma = (part.detach()[:, None] for part in posterior(len(MU)))
    theta = sample_noise(mu, log_sigma, torch.tensor([0.0, 1.0]), backend="numba")
    expected = torch.tensor([-20.0, 0.0]).exp().expand(len(MU), 2)
    torch.testing.assert_close(theta, expected, rtol=2e-7, atol=0)


def test_uniforms_far_below_those_that_are_drawn():
    """Where the fits of the quantile end, and more steps are taken."""
    mu, log_sigma = torch.tensor([-10.0]).double(), torch.tensor([-0.5]).double()
    uniform = torch.tensor([1e-300, 1e-100, 1e-30, 1e-12, 0.3, 1 - 1e-15]).double()
    options = {"lower": -200.0, "upper": 100.0}
    got, wanted = (
        sample_noise(mu, log_sigma, uniform, backend=backend, **options) for backend in ("numba", "torch")
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_structures_whose_parameters_are_nan_give_nan_samples():
    mu = torch.tensor([[-1.0], [torch.nan]])
    theta = sample_noise(mu, torch.zeros(2, 1), torch.rand(2, 30), backend="numba")
    assert theta[0].isfinite().all()
    assert theta[1].isnan().all()
