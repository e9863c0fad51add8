"""Forward-mode derivatives: of torch.func, and of torch.autograd.forward_ad by itself."""

from __future__ import annotations

import pytest
import torch
from test_transforms import BACKENDS, FUNCTIONS, LOG_SIGMA, MU
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vjp, vmap

import bmrs_kernels
from bmrs_kernels import multiply_noise

# What torch.func itself uses of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Attempted to insert a get_attr")
DIRECTIONS = torch.tensor([0.3, -1.2, 0.7, 2.0]).double(), torch.tensor([-0.4, 0.9, 1.5, -0.6]).double()
STEP = 1e-6


def slope(function, points, directions):
    """Return the derivative along directions by central differences."""
    ahead, behind = (
        function(
            *(point + sign * STEP * direction for point, direction in zip(points, directions, strict=True))
        )
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * STEP)


def by_dual_numbers(function, points, directions):
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(*pair) for pair in zip(points, directions, strict=True))
        return forward_ad.unpack_dual(function(*duals)).tangent


def by_jvp(function, points, directions):
    return jvp(function, points, directions)[1]


def by_linearize(function, points, directions):
    return linearize(function, *points)[1](*directions)


def second_jvp(function):
    return jvp(lambda mu: jvp(function, (mu,), DIRECTIONS[:1])[1], (MU,), DIRECTIONS[:1])


def forward_over_reverse(function):
    return jvp(grad(lambda mu: function(mu).sum()), (MU,), DIRECTIONS[:1])


def reverse_over_forward(function):
    return grad(lambda mu: jvp(function, (mu,), DIRECTIONS[:1])[1].sum())(MU)


def reverse_over_dual_numbers(function):
    mu = MU.clone().requires_grad_()
    return torch.autograd.grad(by_dual_numbers(function, (mu,), DIRECTIONS[:1]).sum(), mu)


def dual_numbers_over_reverse(function):
    mu = MU.clone().requires_grad_()
    with forward_ad.dual_level():
        return torch.autograd.grad(function(forward_ad.make_dual(mu, DIRECTIONS[0])).sum(), mu)


@pytest.mark.parametrize("way", [by_jvp, by_linearize, by_dual_numbers])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_are_slopes_and_the_transpose_of_gradients(name, backend, way):
    def function(mu, log_sigma):
        return FUNCTIONS[name](mu, log_sigma, backend=backend)

    tangent = way(function, (MU, LOG_SIGMA), DIRECTIONS)
    expected = slope(function, (MU, LOG_SIGMA), DIRECTIONS)
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-5)
    value, pull = vjp(function, MU, LOG_SIGMA)
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    backward = sum(
        (part * direction).sum() for part, direction in zip(pull(weights), DIRECTIONS, strict=True)
    )
    torch.testing.assert_close((weights * tangent).sum(), backward, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("argnum", [0, 1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobians_of_both_modes_agree(name, argnum):
    jacobians = (mode(FUNCTIONS[name], argnum)(MU, LOG_SIGMA) for mode in (jacfwd, jacrev))
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_can_be_mapped_over(name):
    many = torch.stack([MU, MU + 1])

    def tangent(mu, direction):
        return jvp(lambda mu: FUNCTIONS[name](mu, LOG_SIGMA), (mu,), (direction,))[1]

    for dims, directions in (((0, None), DIRECTIONS[0]), ((0, 0), torch.stack(DIRECTIONS))):
        found = vmap(tangent, dims)(many, directions)
        for index, mu in enumerate(many):
            alone = tangent(mu, directions if dims[1] is None else directions[index])
            torch.testing.assert_close(found[index], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "way",
    [
        second_jvp,
        forward_over_reverse,
        reverse_over_forward,
        reverse_over_dual_numbers,
        dual_numbers_over_reverse,
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_say_that_they_are_not_defined(name, way):
    with pytest.raises(NotImplementedError, match="bmrs_kernels has no second derivatives"):
        way(lambda mu: FUNCTIONS[name](mu, LOG_SIGMA))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_of_an_incoming_gradient_are_not_lost(name):
    mu = MU.clone().requires_grad_()
    out = FUNCTIONS[name](mu, LOG_SIGMA)
    with forward_ad.dual_level():
        weights = forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 2.0))
        if name in ("sample_noise", "multiply_noise"):
            with pytest.raises(NotImplementedError, match="bmrs_kernels has no second derivatives"):
                torch.autograd.grad(out, mu, weights)
        else:
            value, tangent = forward_ad.unpack_dual(torch.autograd.grad(out, mu, weights)[0])
            torch.testing.assert_close(tangent, 2 * value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["element", "sample", "batch"])
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize(("shape", "dim"), [((5, 4), 1), ((2, 4, 3, 3), 1), ((2, 3, 4), -1)])
def test_tangents_of_every_kind_of_call(shape, dim, activation, granularity, backend):
    generator = torch.Generator().manual_seed(1)
    x, x_direction = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    mask = torch.tensor([1.0, 0.5, 0.0, 2.0])
    points, directions = (x, MU, LOG_SIGMA), (x_direction, *DIRECTIONS)

    def function(x, mu, log_sigma):
        options = {"dim": dim, "mask": mask, "granularity": granularity, "activation": activation}
        return multiply_noise(x, mu, log_sigma, **options, seed=5, backend=backend)

    # One at a time too, where the others have no tangent.
    for only in (slice(0, 3), slice(0, 1), slice(1, 2), slice(2, 3)):

        def of_some(*some, only=only):
            whole = list(points)
            whole[only] = some
            return function(*whole)

        value, tangent = jvp(of_some, points[only], directions[only])
        assert torch.equal(value, function(*points))
        assert tangent.stride() == value.stride()
        expected = slope(of_some, points[only], directions[only])
        torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-6)


def test_structures_along_the_first_axis():
    x = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tangent = jvp(lambda mu: multiply_noise(x, mu, LOG_SIGMA, dim=0, seed=1), (MU,), DIRECTIONS[:1])[1]
    jacobian = jacrev(lambda mu: multiply_noise(x, mu, LOG_SIGMA, dim=0, seed=1))(MU)
    torch.testing.assert_close(tangent, jacobian @ DIRECTIONS[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_activations_are_widened(dtype):
    wide_x = torch.linspace(-2, 2, 12).view(3, 4).to(dtype)
    mu, log_sigma = MU.float().clamp(-5, 1), LOG_SIGMA.float()
    directions = (torch.ones(3, 4, dtype=dtype), *(direction.float() for direction in DIRECTIONS))

    def tangent(x, mu, log_sigma, *directions):
        return by_jvp(
            lambda *points: multiply_noise(*points, activation="tanh", seed=2), (x, mu, log_sigma), directions
        )

    found = tangent(wide_x, mu, log_sigma, *directions)
    assert found.dtype == dtype
    wide = [part.double() for part in (wide_x, mu, log_sigma, *directions)]
    # The exact tangent, rounded once: at most half a unit of the last place, and float32's own errors.
    torch.testing.assert_close(
        found.double(), tangent(*wide), rtol=0.51 * torch.finfo(dtype).eps + 1e-6, atol=1e-6
    )


def test_pruned_structures_have_no_tangent_wherever_x_is():
    x = torch.tensor([[1.0, torch.inf], [-2.0, torch.nan]]).double()
    mask = torch.tensor([True, False])
    points = x, MU[:2], LOG_SIGMA[:2]
    directions = torch.ones_like(x), DIRECTIONS[0][:2], DIRECTIONS[1][:2]
    tangent = by_jvp(lambda *points: multiply_noise(*points, mask=mask, seed=1), points, directions)
    assert torch.equal(tangent[:, 1], torch.zeros(2).double())
    assert (tangent[:, 0] != 0).all()


def test_a_layer_in_training_mode():
    bmrs = pytest.importorskip("bmrs")
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), bmrs.NoiseLayer(4, initial_log_sigma=0.0), torch.nn.Tanh()
    )
    parameters = {name: value.detach() for name, value in model.double().named_parameters()}
    directions = {name: torch.randn_like(value) for name, value in parameters.items()}
    x = torch.randn(6, 3).double()

    def outputs(*values):
        torch.manual_seed(7)
        return functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

    points, ways = tuple(parameters.values()), tuple(directions.values())
    expected = slope(outputs, points, ways)
    torch.testing.assert_close(jvp(outputs, points, ways)[1], expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(by_dual_numbers(outputs, points, ways), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["kl_divergence", "sample_noise", "multiply_noise"])
def test_compiled_functions(name):
    """Without fullgraph=True torch.compile leaves derivatives out of its graphs; with it, it is told so."""

    def function(mu):
        return FUNCTIONS[name](mu, LOG_SIGMA)

    def tangent(mu):
        return jvp(function, (mu,), DIRECTIONS[:1])[1]

    expected = tangent(MU)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(tangent, backend="eager")(MU), expected)
    compiled = torch.compile(function, backend="aot_eager")
    torch.testing.assert_close(jvp(compiled, (MU,), DIRECTIONS[:1])[1], expected)
    torch.testing.assert_close(by_dual_numbers(compiled, (MU,), DIRECTIONS[:1]), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="bmrs_kernels has no forward-mode derivatives"):
        torch.compile(tangent, backend="eager", fullgraph=True)(MU)


def test_the_snr_is_a_constant():
    snr, tangent = jvp(lambda mu: bmrs_kernels.noise_snr(mu, LOG_SIGMA), (MU,), DIRECTIONS[:1])
    assert torch.equal(snr, bmrs_kernels.noise_snr(MU, LOG_SIGMA))
    assert not tangent.any()
