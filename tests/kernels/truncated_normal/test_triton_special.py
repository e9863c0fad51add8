"""Special functions inside kernels: against 40 digits over their whole range, and against their torch twins."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from kernel_device import DEVICE, RUNS_KERNELS
from numerics import assert_within

from benchmarks.accuracy import oracle
from bmrs_kernels.truncated_normal import polynomials, torch_special

triton = pytest.importorskip("triton")
tl = triton.language
from bmrs_kernels.truncated_normal import triton_special  # noqa: E402

pytestmark = RUNS_KERNELS


@triton.jit
def apply_kernel(x_ptr, out_ptr, num_elements, function: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < num_elements
    tl.store(out_ptr + index, function(tl.load(x_ptr + index, mask=valid, other=1.0)), mask=valid)


def on_device(function, x, dtype=None):
    """Apply a device function to a vector."""
    out = torch.full(x.shape, math.nan, dtype=dtype or x.dtype, device=DEVICE)
    apply_kernel[(triton.cdiv(x.numel(), 1024),)](x.to(DEVICE), out, x.numel(), function, BLOCK=1024)
    return out.cpu()


def exactly(function, x):
    """Apply a function of mpmath to each number of a vector."""
    with mp.workdps(40):
        return [function(mp.mpf(value)) for value in x.tolist()]


def assert_exact(actual, function, x, tolerance, *, scale=0.0):
    assert_within(actual, exactly(function, x), [(value,) for value in x.tolist()], tolerance, scale=scale)


def test_log2():
    x = torch.cat([torch.logspace(-37.9, 38.5, 1501), torch.linspace(0.5, 2, 500)]).float()
    actual = on_device(triton_special.log2, x)
    error = (actual.double() - x.double().log2()).abs()
    assert (error <= 1.2e-7 + 6e-8 * x.double().log2().abs()).all()
    torch.testing.assert_close(actual, torch.log2(x), rtol=3e-7, atol=2e-7)


def test_float64_roots_and_reciprocals_without_branches():
    x = torch.logspace(-30, 30, 2001, dtype=torch.float64)
    torch.testing.assert_close(on_device(triton_special.float64_sqrt, x), x.sqrt(), rtol=1e-14, atol=0)
    torch.testing.assert_close(on_device(triton_special.float64_reciprocal, x), 1 / x, rtol=3e-14, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-15)])
def test_tanh(dtype, tolerance):
    magnitude = torch.cat([torch.logspace(-30, 1.5, 1000), torch.tensor([0.25, math.nextafter(0.25, 0)])])
    x = torch.cat([-magnitude, magnitude]).to(dtype)
    actual = on_device(triton_special.tanh, x)
    assert_exact(actual, mp.tanh, x, tolerance)
    torch.testing.assert_close(actual, torch.tanh(x), rtol=2 * tolerance, atol=0)
    limits = torch.tensor([0.0, math.inf, -math.inf, math.nan], dtype=dtype)
    assert torch.equal(
        on_device(triton_special.tanh, limits)[:3], torch.tensor([0.0, 1.0, -1.0], dtype=dtype)
    )
    assert on_device(triton_special.tanh, limits)[3].isnan()


@pytest.mark.parametrize("name", ["quantile_ratio", "inverse_density_ratio"])
def test_quantile_polynomials(name):
    level = torch.cat(
        [torch.logspace(-6, 0, 200), torch.linspace(1, polynomials.QUANTILE_LIMIT, 800)]
    ).double()

    def exact(level):
        product = mp.mpf(2) ** -level
        difference = mp.sqrt(1 - product)
        smaller = product / (2 * (1 + difference))
        z = oracle.inverse_survival(smaller)
        return z / (2 * difference) if name == "quantile_ratio" else product / oracle.density(z)

    variable = (level + polynomials.QUANTILE_SHIFT).sqrt() - polynomials.QUANTILE_CENTRE
    expected, points = exactly(exact, level), [(value,) for value in level.tolist()]
    function = getattr(triton_special, name)
    assert_within(on_device(function, variable), expected, points, 3e-8, scale=0)
    assert_within(on_device(function, variable.float()), expected, points, 4e-7, scale=0)
    twin = getattr(torch_special, name)(variable.float())
    torch.testing.assert_close(on_device(function, variable.float()), twin, rtol=4e-7, atol=0)


def test_quantile_variable():
    product = torch.logspace(-8.8, 0, 2000).float()
    actual = on_device(triton_special.quantile_variable, product)
    exact = (4 - product.double().log2()).sqrt() - 3.5
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=6e-7)
    torch.testing.assert_close(actual, torch_special.quantile_variable(product), rtol=0, atol=9e-7)


def test_mills_ratio():
    t = torch.cat([torch.zeros(1), torch.logspace(-12, 12, 1500)]).double()
    actual = on_device(triton_special.mills_ratio, t)

    def exact(t):
        if t > 40:
            return sum((-1) ** k * mp.fac2(2 * k - 1) / t ** (2 * k + 1) for k in range(1, 13)) + 1 / t
        return oracle.survival(t) / oracle.density(t)

    assert_exact(actual, exact, t, 1e-15)
    torch.testing.assert_close(actual, torch_special.mills_ratio(t), rtol=3e-15, atol=0)


def test_normal_cdf_and_density():
    z = torch.linspace(-37, 37, 1481, dtype=torch.float64)
    cdf = on_device(triton_special.normal_cdf, z)
    # exp(-z²/2) carries half a unit of its argument into the value.
    assert_exact(cdf, mp.ncdf, z, 2e-13)
    assert_exact(on_device(triton_special.normal_density, z), oracle.density, z, 2e-13)
    torch.testing.assert_close(cdf, torch_special.normal_cdf(z), rtol=4e-13, atol=0)


@triton.jit
def mass_kernel(alpha_ptr, beta_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    alpha, beta = tl.load(alpha_ptr + index), tl.load(beta_ptr + index)
    tl.store(out_ptr + index, triton_special.normal_mass(alpha, beta))


def test_normal_mass():
    ends = [
        (-1.0, 1.0),
        (-30.0, 2.0),
        (3.0, 5.0),
        (-5.0, -3.0),
        (0.0, 0.125),
        (-0.25, 0.0),
        (20.0, 21.0),
        (-1e9, 1e9),
    ]
    alpha, beta = torch.tensor(ends, dtype=torch.float64, device=DEVICE).T.contiguous()
    out = torch.full_like(alpha, math.nan)
    mass_kernel[(1,)](alpha, beta, out, BLOCK=len(ends))
    with mp.workdps(60):
        expected = [oracle.mass(mp.mpf(a), mp.mpf(b)) for a, b in ends]
    assert_within(out.cpu(), expected, ends, 2e-13, scale=0)
    torch.testing.assert_close(out, torch_special.normal_mass(alpha, beta), rtol=4e-13, atol=0)
