"""The per-structure kernels against their torch twins: interpreted on CPU tensors, compiled where there is a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from kernel_device import DEVICE, RUNS_KERNELS
from numerics import LOWER, UPPER, assert_within, columns, grid, random_points, single

import bmrs_kernels
from bmrs_kernels.dispatch import backend
from bmrs_kernels.truncated_normal import torch_special

triton = pytest.importorskip("triton")
tl = triton.language
from bmrs_kernels.truncated_normal import triton_quadrature, triton_special  # noqa: E402

pytestmark = RUNS_KERNELS


class Quantity(NamedTuple):
    """A function and the bounds on the kernel's distance from its twin, as the contract scales them."""

    function: Callable[..., torch.Tensor]
    scale: float  # 1: errors count relative to max(1, |value|), 0: relative to |value|
    grad_mu_bound: float = 1e-12
    differentiable: bool = True


# The gradients in μ that the contract leaves out are differences over σ, of which float64 keeps 7 digits at e⁻²⁰.
QUANTITIES = {
    "kl_divergence": Quantity(bmrs_kernels.kl_divergence, 1),
    "delta_f_lognormal": Quantity(bmrs_kernels.delta_f_lognormal, 1, grad_mu_bound=1e-6),
    "delta_f_loguniform": Quantity(bmrs_kernels.delta_f_loguniform, 1),
    "noise_mean": Quantity(bmrs_kernels.noise_mean, 0, grad_mu_bound=1e-6),
    "noise_snr": Quantity(bmrs_kernels.noise_snr, 0, differentiable=False),
}
DIFFERENTIABLE = [name for name, quantity in QUANTITIES.items() if quantity.differentiable]
POINTS = grid() + random_points(100)
FEW = [(-1.0, -1.0), (-10.0, 1.0), (0.3, -0.5), (-19.5, 0.0), (-21.0, -0.5), (4.0, 2.0)]
OPTIONS = {
    "kl_divergence": (LOWER, UPPER),
    "delta_f_lognormal": (LOWER, 1e-2, LOWER, UPPER),
    "delta_f_loguniform": (-15.0, -5.0, LOWER, UPPER),
    "noise_mean": (LOWER, UPPER),
}


@pytest.fixture
def one_program(monkeypatch):
    """One program for everything: an interpreted program takes tens of milliseconds, whatever its size."""
    if backend.INTERPRETING:
        monkeypatch.setattr(triton_quadrature, "STRUCTURES_PER_PROGRAM", 1024)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched."""
    names = []

    def launch(kernel, *arguments, **options):
        names.append(kernel.__name__)
        original(kernel, *arguments, **options)

    original = triton_quadrature.launch
    monkeypatch.setattr(triton_quadrature, "launch", launch)
    return names


def leaves(points, dtype=torch.float64):
    """Return the points on the device as leaf tensors μ and log σ that require gradients."""
    return tuple(leaf.detach().to(DEVICE).requires_grad_() for leaf in columns(points, dtype))


def on_triton(function, *tensors, **options):
    return function(*(tensor.to(DEVICE) for tensor in tensors), backend="triton", **options).cpu()


def on_torch(function, *tensors, **options):
    return function(*tensors, backend="torch", **options)


def assert_agrees(name, points, **options):
    """Assert that kernel and twin give one value and, where there are any, one pair of gradients."""
    quantity = QUANTITIES[name]
    results = []
    for run in (on_triton, on_torch):
        parameters = columns(points, torch.float64)
        value = run(quantity.function, *parameters, **options)
        gradients = torch.autograd.grad(value.sum(), parameters) if quantity.differentiable else ()
        results.append((value, *gradients))
    bounds = ((1e-12, quantity.scale), (quantity.grad_mu_bound, 1), (1e-12, 1))
    for actual, expected, (bound, scale) in zip(*results, bounds[: len(results[0])], strict=True):
        assert_within(actual, expected.tolist(), points, bound, scale=scale)


NUM_ARGUMENTS = tl.constexpr(2048)


@triton.jit
def elementary_functions_kernel(x_ptr, expm1_ptr, hypot_ptr, sigma_ptr, in_range_ptr, y: tl.constexpr):
    index = tl.arange(0, NUM_ARGUMENTS)
    x = tl.load(x_ptr + index)
    tl.store(expm1_ptr + index, triton_quadrature.expm1(x))
    tl.store(hypot_ptr + index, triton_quadrature.hypot(tl.abs(x), triton_quadrature.full_like(x, y)))
    tl.store(sigma_ptr + index, triton_special.sigma_from_log(x))
    tl.store(in_range_ptr + index, triton_special.log_sigma_in_range(x))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("y", [0.3, 1e200, 1e-200])
def test_elementary_functions(y):
    """The device functions that PyTorch has ready-made, also where the first two change their formula."""
    magnitudes = torch.logspace(-18, math.log10(80), 1000, dtype=torch.float64)
    borders = torch.tensor([0.5, 20.0, 5.0, 1e300, math.inf], dtype=torch.float64)
    borders = torch.cat([borders, *(borders.nextafter(borders * factor) for factor in (0, 2))])
    magnitudes = torch.cat([magnitudes, borders, torch.full((9,), math.nan, dtype=torch.float64)])
    x = torch.cat([magnitudes, -magnitudes]).to(DEVICE)
    assert x.numel() == NUM_ARGUMENTS.value
    results = torch.full((4, x.numel()), math.nan, dtype=torch.float64, device=DEVICE)
    elementary_functions_kernel[(1,)](x, *results, y=y)
    x, results = x.cpu(), results.cpu()
    expected = (
        torch.expm1(x),
        torch.hypot(x, torch.tensor(y, dtype=torch.float64)),
        torch_special.sigma_from_log(x),
        torch_special.log_sigma_in_range(x),
    )
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("name", QUANTITIES)
def test_the_whole_domain(name):
    assert_agrees(name, POINTS)


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(("lower", "upper"), [(-8.0, 2.0), (-1.1, 0.1), (3.0, 3.5)])
@pytest.mark.parametrize("name", QUANTITIES)
def test_other_intervals(name, lower, upper):
    width = upper - lower
    points = [
        (single(lower + share * width), log_sigma)
        for share in (-3.0, -0.5, 0.0, 0.3, 0.5, 0.9, 1.0, 2.0)
        for log_sigma in (-12.0, -5.0, -1.0, 0.5, 3.0)
    ]
    options = {"lower": lower, "upper": upper}
    if name == "delta_f_loguniform":
        options |= {"reduced_lower": lower + 0.1 * width, "reduced_upper": lower + 0.4 * width}
    assert_agrees(name, points, **options)


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(
    ("prior_mean", "prior_std"),
    [(None, 1e-4), (None, 1.0), (-15.1, 0.5), (-3.0, 1e-3), (-30.0, 1e-6), (4.0, 0.1), (-5.0, 1e200)],
)
def test_reduced_normals(prior_mean, prior_std):
    assert_agrees("delta_f_lognormal", random_points(60, seed=1), prior_mean=prior_mean, prior_std=prior_std)


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("reduced", [(-23 * math.log(2), -4 * math.log(2)), (LOWER, -5.5), (-1e-3, UPPER)])
def test_reduced_intervals(reduced):
    points = random_points(60, seed=1)
    assert_agrees("delta_f_loguniform", points, reduced_lower=reduced[0], reduced_upper=reduced[1])


@pytest.mark.usefixtures("one_program")
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
def test_narrow_dtypes_hold_the_rounded_result(dtype, unit, name):
    quantity = QUANTITIES[name]
    parameters = columns(POINTS, dtype)
    with torch.no_grad():
        narrow = on_triton(quantity.function, *parameters)
        wide = on_triton(quantity.function, *(parameter.double() for parameter in parameters))
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow, wide.to(dtype), rtol=1.01 * unit, atol=0)
    if quantity.differentiable:
        gradients = torch.autograd.grad(on_triton(quantity.function, *parameters).sum(), parameters)
        assert all(gradient.dtype == dtype and not gradient.isnan().any() for gradient in gradients)


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_log_sigma_is_clamped_with_zero_gradient_outside(name):
    points = [(-1.0, log_sigma) for log_sigma in (-30.0, -20.0, 5.0, 9.0)]
    assert_agrees(name, points)
    mu, log_sigma = columns(points, torch.float64)
    (gradient,) = torch.autograd.grad(on_triton(QUANTITIES[name].function, mu, log_sigma).sum(), log_sigma)
    assert gradient[0] == gradient[3] == 0
    assert gradient[2] != 0


@pytest.mark.usefixtures("one_program")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", QUANTITIES)
def test_nan_is_not_hidden(name):
    nan, inf = math.nan, math.inf
    points = [(nan, 0.0), (-1.0, nan), (nan, nan), (inf, 0.0), (-inf, 0.0), (-1.0, inf), (-1.0, -inf)]
    parameters = torch.tensor(points, dtype=torch.float64).T
    function = QUANTITIES[name].function
    expected = function(*parameters, backend="torch")
    assert expected[:3].isnan().all()
    torch.testing.assert_close(
        on_triton(function, *parameters), expected, rtol=1e-12, atol=1e-12, equal_nan=True
    )


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_counts_that_blocks_do_not_divide(name, count, launches):
    function = QUANTITIES[name].function
    mu, log_sigma = torch.linspace(-21, 1, count), torch.linspace(-6, 3, count)
    expected = function(mu, log_sigma, backend="torch")
    torch.testing.assert_close(on_triton(function, mu, log_sigma), expected, rtol=1.2e-7, atol=1e-15)
    assert launches == [f"{name}_kernel"]


@pytest.mark.parametrize("name", QUANTITIES)
def test_shapes_and_layouts(name):
    function = QUANTITIES[name].function
    mu, log_sigma = torch.linspace(-21, 1, 6).reshape(2, 3), torch.linspace(-6, 3, 6).reshape(2, 3)
    together = on_triton(function, mu, log_sigma)
    assert torch.equal(on_triton(function, mu.T, log_sigma.T.contiguous()), together.T)
    assert torch.equal(on_triton(function, mu[:, 1], log_sigma[:, 1]), together[:, 1])
    expanded = mu[:1, :1].expand(2, 3)
    assert torch.equal(
        on_triton(function, expanded, log_sigma), on_triton(function, expanded.contiguous(), log_sigma)
    )
    scalar = on_triton(function, mu[1, 2], log_sigma[1, 2])
    assert scalar.shape == ()
    assert scalar == together[1, 2]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", QUANTITIES)
def test_every_result_is_written(name):
    quantity = QUANTITIES[name]
    parameters = columns(FEW, torch.float32)
    value = on_triton(quantity.function, *parameters)
    assert value.isfinite().all()
    if quantity.differentiable:
        gradients = torch.autograd.grad(value.sum(), parameters)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_without_gradients_none_are_computed(name):
    operator = getattr(torch.ops.bmrs_kernels, name)
    parameters = [leaf.detach() for leaf in leaves(FEW[:1])]
    _, grad_mu, grad_log_sigma = operator(*parameters, *OPTIONS[name], "triton", False)
    assert grad_mu.numel() == grad_log_sigma.numel() == 0


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name):
    function = partial(QUANTITIES[name].function, backend="triton")
    assert torch.autograd.gradcheck(function, leaves(FEW))


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck(name):
    operator = getattr(torch.ops.bmrs_kernels, name).default
    torch.library.opcheck(operator, (*leaves(FEW), *OPTIONS[name], "triton", True))
    detached = tuple(leaf.detach() for leaf in leaves(FEW))
    torch.library.opcheck(operator, (*detached, *OPTIONS[name], "triton", False))


@pytest.mark.usefixtures("one_program")
def test_opcheck_of_operators_without_gradients():
    mu, log_sigma = (leaf.detach() for leaf in leaves(FEW))
    operators = torch.ops.bmrs_kernels
    torch.library.opcheck(operators.noise_snr.default, (mu, log_sigma, LOWER, UPPER, "triton"))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiles_without_graph_breaks(name, launches):
    function = QUANTITIES[name].function
    parameters = leaves(FEW)
    compiled = torch.compile(
        lambda mu, log_sigma: function(mu, log_sigma, backend="triton").sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    actual = torch.autograd.grad(compiled(*parameters), parameters)
    assert launches == [f"{name}_kernel"]
    expected = torch.autograd.grad(function(*parameters, backend="triton").sum(), parameters)
    assert all(torch.equal(got, wanted) for got, wanted in zip(actual, expected, strict=True))
