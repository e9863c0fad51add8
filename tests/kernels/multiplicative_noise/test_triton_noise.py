"""The kernels that multiply noise against θ and its derivatives at the published uniforms, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from kernel_device import DEVICE, RUNS_KERNELS
from numerics import TOLERANCES
from scipy import stats

from bmrs_kernels import multiply_noise, philox_uniform, sample_noise
from bmrs_kernels.dispatch import backend, triton_launch
from bmrs_kernels.multiplicative_noise import reference
from bmrs_kernels.multiplicative_noise.call import NoiseCall

triton = pytest.importorskip("triton")
tl = triton.language
from bmrs_kernels.multiplicative_noise import triton_noise  # noqa: E402

pytestmark = RUNS_KERNELS
SEED = 1234
GRANULARITIES = ["element", "sample", "batch"]
LOWER, UPPER = -20.0, 0.0
BOUND = TOLERANCES[torch.float32]["drawn"]

# Every regime of the quantile, both ends, far outside, clamped.
POINTS = list(
    itertools.product(
        (-40.0, -20.0, -10.0, -1e-3, 0.0, 0.5, 7.0, 20.0), (-20.0, -9.0, -5.0, -1.0, 0.5, 2.0, 5.0)
    )
)


def parameters(count, dtype=torch.float32):
    """Return leaf tensors that run through the whole domain."""
    chosen = [POINTS[(5 * index) % len(POINTS)] for index in range(count)]
    return tuple(
        part.clone().to(DEVICE).requires_grad_()
        for part in torch.tensor(chosen, dtype=dtype).reshape(-1, 2).T
    )


def activation_of(shape, dtype, memory_format=None):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if memory_format is not None:
        x = x.contiguous(memory_format=memory_format)
    return x.to(DEVICE).requires_grad_()


def published_uniforms(x, dim, granularity):
    """Return the uniforms of the documentation, shaped to broadcast with x."""
    if granularity == "element":
        return philox_uniform(SEED, x.shape, device="cpu")
    kept = (0, dim) if granularity == "sample" else (dim,)
    flat = philox_uniform(SEED, [x.shape[axis] for axis in kept], device="cpu")
    return flat.reshape([size if axis in kept else 1 for axis, size in enumerate(x.shape)])


def expectation(x, mu, log_sigma, upstream, *, dim, mask, granularity, activation):
    """Return output and gradients in float64, and what bounds the rounding of each: sums of magnitudes."""
    x, mu, log_sigma, upstream = (part.detach().cpu().double() for part in (x, mu, log_sigma, upstream))
    dim %= x.dim()
    along = [x.shape[dim] if axis == dim else 1 for axis in range(x.dim())]
    uniform = published_uniforms(x, dim, granularity)
    log_theta = reference.log_noise(
        mu.reshape(along), log_sigma.reshape(along), uniform, LOWER, UPPER, with_gradients=True
    )
    theta = log_theta.value.exp() * (1.0 if mask is None else mask.cpu().double().reshape(along))
    x.requires_grad_()
    value = {None: lambda x: x, "relu": torch.relu, "tanh": torch.tanh}[activation](x)
    out = value * theta
    (grad_x,) = torch.autograd.grad(out, x, upstream)
    steepest = (upstream * theta).abs()  # tanh's slope is a difference from 1
    weight = (upstream * out).detach()
    others = [axis for axis in range(x.dim()) if axis != dim]

    def total(part, scale):
        terms = (weight * part).expand(x.shape), (weight * scale).abs().expand(x.shape)
        return [term.sum(others) if others else term for term in terms]

    grads = [total(part, part.abs().clamp(min=1.0)) for part in (log_theta.grad_mu, log_theta.grad_log_sigma)]
    return [(out.detach(), out.detach().abs()), (grad_x, steepest.expand(x.shape)), *grads]


def run(x, mu, log_sigma, upstream, **options):
    """Return output and gradients of the kernels, on the CPU."""
    out = multiply_noise(x, mu, log_sigma, seed=SEED, backend="triton", **options)
    assert out.dtype == x.dtype
    assert out.stride() == torch.empty_like(x).stride()
    gradients = torch.autograd.grad(out, (x, mu, log_sigma), upstream.to(DEVICE))
    assert [gradient.dtype for gradient in gradients] == [x.dtype, mu.dtype, mu.dtype]
    return [part.detach().cpu().double() for part in (out, *gradients)]


def assert_agrees(x, *, dim, granularity, mask=None, activation=None, parameter_dtype=torch.float32):
    mu, log_sigma = parameters(x.shape[dim], parameter_dtype)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    options = {"dim": dim, "granularity": granularity, "mask": mask, "activation": activation}
    actual = run(x, mu, log_sigma, upstream, **options)
    expected = expectation(x, mu, log_sigma, upstream, **options)
    narrowest = min(torch.finfo(x.dtype).bits, torch.finfo(parameter_dtype).bits)
    bound = 1e-11 if narrowest == 64 else BOUND
    for index, (got, (wanted, magnitude)) in enumerate(zip(actual, expected, strict=True)):
        written = x.dtype if index < 2 else parameter_dtype
        rounding = torch.finfo(written).eps
        allowed = (bound + rounding) * magnitude + torch.finfo(written).tiny
        worst = ((got - wanted).abs() - allowed).max() if got.numel() else torch.tensor(-1.0)
        assert got.isfinite().all()
        assert worst <= 0, f"result {index} exceeds its bound by {worst:.3g}"
    if mask is not None:
        dead = mask.cpu() == 0
        assert (actual[0].movedim(dim, 0)[dead] == 0).all()
        assert (actual[1].movedim(dim, 0)[dead] == 0).all()
        assert (actual[2][dead] == 0).all()
        assert (actual[3][dead] == 0).all()


SHAPES = [
    ((1, 1), 1),
    ((7, 5), 1),
    ((33, 100), -1),
    ((5, 8), 0),
    ((3, 4, 5), 1),
    ((3, 37, 12), 2),
    ((2, 6, 5, 3), 1),
    ((2, 3, 8, 8), 1),
    ((2, 6, 5, 3), 3),
    ((2, 3, 4, 5, 2), 1),
    ((2, 3, 4, 5, 2), 2),
    ((17,), 0),
]
CASES = [
    (shape, dim, granularity)
    for (shape, dim), granularity in itertools.product(SHAPES, GRANULARITIES)
    if granularity != "sample" or dim % len(shape) != 0
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("shape", "dim", "granularity"), CASES)
def test_shapes_and_granularities(shape, dim, granularity):
    mask = (torch.arange(shape[dim]) % 3 != 1).to(DEVICE)
    assert_agrees(activation_of(shape, torch.float32), dim=dim, granularity=granularity, mask=mask)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "dim"), [((33, 12), 1), ((3, 6, 4, 4), 1), ((3, 6, 3, 3), 1)])
def test_dtypes(shape, dim, granularity, dtype):
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x = activation_of(shape, dtype)
    assert_agrees(x, dim=dim, granularity=granularity, parameter_dtype=parameter_dtype)


@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype(parameter_dtype):
    for shape in ((33, 12), (3, 6, 4, 4)):
        x = activation_of(shape, torch.float32)
        assert_agrees(x, dim=1, granularity="element", parameter_dtype=parameter_dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((3, 6, 4, 4), torch.channels_last),
        ((2, 70, 3, 5), torch.channels_last),
        ((2, 3, 2, 4, 2), torch.channels_last_3d),
    ],
)
def test_channels_last_is_read_as_it_lies(shape, memory_format, granularity, monkeypatch):
    x = activation_of(shape, torch.float32, memory_format)
    monkeypatch.setattr(torch.Tensor, "contiguous", refuse_copies(torch.Tensor.contiguous))
    mask = (torch.arange(shape[1]) % 3 != 1).to(DEVICE)
    assert_agrees(x, dim=1, granularity=granularity, mask=mask)
    assert triton_noise.layout_of(x, 1).channels_last


def refuse_copies(contiguous):
    def checked(self, *arguments, **options):
        result = contiguous(self, *arguments, **options)
        assert self.dim() < 4 or result.data_ptr() == self.data_ptr()
        return result

    return checked


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(9, 12), (3, 6, 4, 5)])
def test_activations(shape, granularity, activation):
    mask = torch.tensor([1.0, 0.5, 0.0], device=DEVICE).repeat(shape[1] // 3)
    x = activation_of(shape, torch.float32)
    assert_agrees(x, dim=1, granularity=granularity, activation=activation, mask=mask)


@pytest.fixture
def other_tiles():
    """Let a test change how tensors are cut into programs, which is kept by shape."""
    kept = (
        triton_noise._rows,
        triton_noise._columns,
        triton_noise._shared_rows,
        triton_noise._shared_columns,
    )
    for starts in kept:
        starts.cache_clear()
    yield
    for starts in kept:
        starts.cache_clear()


@pytest.mark.usefixtures("other_tiles")
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_more_than_one_program_and_step(granularity, monkeypatch):
    """Blocks that are cut off at every edge, several tiles to a program, and several partial sums to add."""
    set_tiles(monkeypatch, 128)
    monkeypatch.setattr(triton_launch, "PROGRAMS_THAT_FILL_A_GPU", 2)
    monkeypatch.setattr(triton_launch, "STRUCTURES_PER_TILE", 8)
    for shape in ((77, 10), (3, 2, 9, 20), (3, 2, 7, 15)):
        assert_agrees(activation_of(shape, torch.float32), dim=1, granularity=granularity)
    for shape in ((3, 12, 6, 6), (3, 12, 3, 5)):
        x = activation_of(shape, torch.float32, torch.channels_last)
        assert_agrees(x, dim=1, granularity=granularity)


@pytest.fixture
def always_from_the_table(monkeypatch):
    """Let small activations take the structures' constants from the table, as large ones do."""
    monkeypatch.setattr(triton_noise, "LARGEST_WITHOUT_TABLE", 0)


@pytest.mark.usefixtures("poisoned_memory", "always_from_the_table")
@pytest.mark.parametrize(
    ("shape", "memory_format", "dtype"),
    [
        ((9, 12), None, torch.float32),
        ((9, 132), None, torch.bfloat16),
        ((5, 70), None, torch.float32),
        ((2, 68, 2, 2), torch.channels_last, torch.float32),
        ((2, 6, 3, 3), torch.channels_last, torch.float32),
        ((9, 12), None, torch.float64),
    ],
)
def test_constants_from_the_table(shape, memory_format, dtype):
    """Several blocks of the table, one that is not full, and every regime."""
    mask = (torch.arange(shape[1]) % 3 != 1).to(DEVICE)
    x = activation_of(shape, dtype, memory_format)
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert_agrees(x, dim=1, granularity="element", mask=mask, parameter_dtype=parameter_dtype)


def test_fewer_than_four_positions_in_channels_last(recwarn):
    x = activation_of((3, 5, 2, 1), torch.float32, torch.channels_last)
    assert_agrees(x, dim=1, granularity="element")
    assert not [str(each.message) for each in recwarn if "divide by zero" in str(each.message)]


@pytest.mark.usefixtures("always_from_the_table")
@pytest.mark.parametrize("kind", [*itertools.product((False, True), repeat=3)])
def test_regimes_of_a_tile(kind):
    """Every set of regimes that structures of one tile can be in, beside one that is inside."""
    wide, tail, wide_tail = kind
    points = [(-3.0, -2.0)] + wide * [(-3.0, 4.0)] + tail * [(4.0, 0.0)] + wide_tail * [(-1e3, 4.0)]
    mu, log_sigma = (part.clone().to(DEVICE).requires_grad_() for part in torch.tensor(points).T)
    x = activation_of((32, len(points)), torch.float32)
    upstream = torch.ones_like(x, device="cpu")
    options = {"dim": 1, "granularity": "element", "mask": None, "activation": None}
    actual = run(x, mu, log_sigma, upstream, **options)
    expected = expectation(x, mu, log_sigma, upstream, **options)
    for got, (wanted, magnitude) in zip(actual, expected, strict=True):
        assert (got - wanted).abs().le(2 * BOUND * magnitude).all()


def test_more_draws_than_a_grids_second_axis_is_long(monkeypatch):
    started = []
    monkeypatch.setattr(
        triton_noise, "launch", lambda _kernel, grid, *_tensors, **_options: started.append(grid)
    )
    examples = 64 * triton_launch.LONGEST_SECOND_AXIS
    x = torch.empty((examples, 1, 1), device="meta").expand(examples, 64, 2)
    call = NoiseCall(x, *torch.empty(2, 64), None, torch.tensor(0), 1, "sample", None, -20.0, 0.0)
    noise = triton_noise.prepare(call)
    assert noise.groups == examples
    triton_noise._draw(x, noise, examples, with_gradients=False)
    assert started[0][1] <= triton_launch.LONGEST_SECOND_AXIS


def set_tiles(monkeypatch, elements):
    for name in ("LIGHT_TILE", "MEDIUM_TILE", "HEAVY_TILE", "SCALING_TILE"):
        monkeypatch.setattr(triton_noise, name, elements)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_indices_of_64_bits(granularity, monkeypatch):
    monkeypatch.setattr(triton_noise, "NARROW_INDEX_LIMIT", 0)
    for shape, memory_format in (((7, 12), None), ((2, 6, 3, 3), None), ((2, 8, 2, 2), torch.channels_last)):
        assert_agrees(activation_of(shape, torch.float32, memory_format), dim=1, granularity=granularity)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (2, 3, 0, 4)])
def test_zero_size(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    mu, log_sigma = parameters(shape[1])
    out = multiply_noise(x, mu, log_sigma, backend="triton")
    out.sum().backward()
    assert out.shape == x.grad.shape == shape
    assert (mu.grad == 0).all()
    assert (log_sigma.grad == 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strided_activations_and_expanded_gradients(granularity):
    mu, log_sigma = parameters(6)
    strided = activation_of((4, 12, 5, 7), torch.float32).detach()[:, ::2].requires_grad_()
    options = {"granularity": granularity, "seed": SEED, "backend": "triton"}
    dense = strided.detach().contiguous().requires_grad_()
    results = []
    for x in (strided, dense):
        out = multiply_noise(x, mu, log_sigma, **options)
        results.append((out, *torch.autograd.grad(out.sum(), (x, mu, log_sigma))))
    assert all(torch.equal(got, wanted) for got, wanted in zip(*results, strict=True))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_results_are_the_same_on_every_run(granularity):
    x, (mu, log_sigma) = activation_of((9, 6, 7, 5), torch.float32), parameters(6)
    first, second = (
        torch.autograd.grad(
            multiply_noise(x, mu, log_sigma, seed=SEED, granularity=granularity, backend="triton")
            .square()
            .sum(),
            (x, mu, log_sigma),
        )
        for _ in range(2)
    )
    assert all(torch.equal(got, wanted) for got, wanted in zip(first, second, strict=True))


def test_infinities_behind_relu_and_in_pruned_structures():
    mu, log_sigma = parameters(4)
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    for shape in ((2, 4), (2, 4, 3, 3)):
        for granularity in GRANULARITIES:
            x = torch.full(shape, -math.inf, device=DEVICE)
            x[:, 1] = math.inf
            x[:, 2] = 1.0
            x.requires_grad_()
            out = multiply_noise(
                x, mu, log_sigma, mask=mask, activation="relu", granularity=granularity, backend="triton"
            )
            out.sum().backward()
            assert out.isfinite().all()
            for gradient in (x.grad, mu.grad, log_sigma.grad):
                assert gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_is_not_hidden():
    mu = torch.tensor([math.nan, -1.0], device=DEVICE)
    for shape in ((3, 2), (3, 2, 4)):
        out = multiply_noise(torch.ones(shape, device=DEVICE), mu, torch.zeros_like(mu), backend="triton")
        assert out.movedim(1, 0)[0].isnan().all()
        assert out.movedim(1, 0)[1].isfinite().all()


def test_sample_noise_broadcasts_and_takes_any_uniform():
    mu, log_sigma = parameters(6, torch.float64)
    uniform = torch.rand(4, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours = sample_noise(mu, log_sigma, uniform, backend="triton")
    torch.testing.assert_close(
        ours, sample_noise(mu, log_sigma, uniform, backend="torch"), rtol=1e-12, atol=0
    )
    ends = torch.tensor([[0.0], [1.0], [1e-300]], dtype=torch.float64, device=DEVICE)
    theta = sample_noise(mu, log_sigma, ends, backend="triton")
    assert ((theta >= math.exp(-20) * (1 - 1e-12)) & (theta <= 1)).all()
    assert torch.equal(theta[1], torch.ones_like(theta[1]))


@pytest.mark.parametrize("count", [1, 3, 4, 1021, 3000])
def test_uniforms_are_the_published_ones(count):
    for seed in (0, -7, 2**62 + 11):
        ours = philox_uniform(seed, (count,), device=DEVICE, backend="triton")
        assert torch.equal(ours.cpu(), philox_uniform(seed, (count,), device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_is_drawn_from_the_published_uniforms_bit_for_bit(dtype):
    """At σ = e⁵ log θ is nearly linear in the uniform, so that each of its 2²³ values is seen in θ."""
    x = torch.ones(3, 8, 5, 5, dtype=torch.float64, device=DEVICE)
    mu, log_sigma = torch.full((8,), -10.0, device=DEVICE), torch.full((8,), 5.0, device=DEVICE)
    out = multiply_noise(x, mu, log_sigma, seed=SEED, backend="triton")
    q = stats.truncnorm(-10 / math.exp(5), 10 / math.exp(5))
    y = torch.from_numpy(q.cdf(((out.log() + 10) / math.exp(5)).cpu().numpy()))
    recovered = (y * 2**23 - 0.5).round()
    published = philox_uniform(SEED, x.shape, device="cpu").double() * 2**23 - 0.5
    assert torch.equal(recovered, published)


@pytest.mark.usefixtures("other_tiles")
@pytest.mark.parametrize(
    ("mu", "log_sigma"),
    [(-5.0, -1.0), (0.0, -5.0), (3.0, -2.0), (2.0, 0.0), (-30.0, 1.0), (-10.0, 2.0), (5.0, 4.0)],
)
def test_a_million_draws_follow_the_truncated_normal(mu, log_sigma, monkeypatch):
    if backend.INTERPRETING:  # an interpreted program takes as long for many elements as for few
        set_tiles(monkeypatch, 1 << 17)
    noise = multiply_noise(
        torch.ones(1000, 1, 1000, dtype=torch.float32, device=DEVICE),
        torch.tensor([mu], device=DEVICE),
        torch.tensor([log_sigma], device=DEVICE),
        seed=17,
        backend="triton",
    )
    sigma = math.exp(log_sigma)
    exact = stats.truncnorm((-20 - mu) / sigma, -mu / sigma, loc=mu, scale=sigma)
    log_theta = noise.cpu().double().log().flatten().numpy()
    # Near 1 float32 holds θ to 6e-8, which is all of log θ's spread for the narrowest of these.
    assert stats.kstest(log_theta, exact.cdf).pvalue > 1e-4


def test_gradcheck():
    points = torch.tensor([[-1.0, 0.5, -21.0], [-1.0, 0.5, 1.8]], dtype=torch.float64)
    mu, log_sigma = (part.clone().to(DEVICE).requires_grad_() for part in points)
    cases = (((2, 3), "element"), ((2, 3, 4), "element"), ((2, 3, 4), "sample"), ((2, 3, 4), "batch"))
    for shape, granularity in cases:
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        x.requires_grad_()

        def function(x, mu, log_sigma, granularity=granularity):
            return multiply_noise(x, mu, log_sigma, seed=SEED, granularity=granularity, backend="triton")

        assert torch.autograd.gradcheck(function, (x, mu, log_sigma), fast_mode=True)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck(granularity):
    x, (mu, log_sigma) = activation_of((2, 4, 3, 3), torch.float32), parameters(4)
    mask = torch.tensor([True, True, False, True], device=DEVICE)
    seed = torch.tensor(SEED, device=DEVICE)
    options = (seed, 1, granularity, "relu", -20.0, 0.0, "triton")
    torch.library.opcheck(torch.ops.bmrs_kernels.multiply_noise.default, (x, mu, log_sigma, mask, *options))
    uniform = torch.rand(3, 4, device=DEVICE)
    torch.library.opcheck(
        torch.ops.bmrs_kernels.sample_noise.default, (mu, log_sigma, uniform, -20.0, 0.0, "triton", True)
    )


def test_compiles_without_graph_breaks_and_checkpoints():
    x, (mu, log_sigma) = activation_of((5, 6), torch.float32), parameters(6)

    def loss(x, mu, log_sigma):
        return multiply_noise(torch.sin(x), mu, log_sigma, seed=SEED, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x, mu, log_sigma), (x, mu, log_sigma))
    actual = torch.autograd.grad(compiled(x, mu, log_sigma), (x, mu, log_sigma))
    assert all(torch.equal(got, wanted) for got, wanted in zip(actual, expected, strict=True))

    def block(x):
        return multiply_noise(torch.sin(x), mu, log_sigma, backend="triton").square()

    torch.manual_seed(0)
    expected = torch.autograd.grad(block(x).sum(), (x, mu, log_sigma))
    torch.manual_seed(0)
    value = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(value.sum(), (x, mu, log_sigma)), expected, strict=True):
        assert torch.equal(got, wanted)


def test_autocast_keeps_parameters_in_float32():
    mu, log_sigma = parameters(6)
    x, weight = torch.randn(5, 6, device=DEVICE), torch.randn(6, 6, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = multiply_noise(x @ weight, mu, log_sigma, backend="triton")
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert mu.grad.dtype == torch.float32
    assert mu.grad.isfinite().all()
