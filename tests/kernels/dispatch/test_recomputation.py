"""Backward meets the noise of forward, or an error, where it computes the forward pass a second time."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config
from torch.utils.checkpoint import checkpoint

from bmrs_kernels import multiply_noise

# What torch.func itself uses of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PARTITIONED = "aot_eager_decomp_partition"  # joint graphs are cut as for inductor, and nothing is compiled
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()


def two_noises(x, mu, log_sigma):
    """Two draws, of which the second's input depends on the first."""
    hidden = multiply_noise(x, mu, log_sigma).tanh()
    # As a layer does on ranks other than 0.
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64) ^ 5
    return multiply_noise(hidden, mu, log_sigma, seed=seed)


def gradients(function):
    torch.manual_seed(7)
    inputs = X.clone(), torch.full((4,), -1.0).double(), torch.zeros(4).double()
    function(*(part.requires_grad_() for part in inputs)).square().sum().backward()
    return [part.grad for part in inputs]


def assert_gradients_are_those_of_eager_calls(function):
    for found, expected in zip(gradients(function), gradients(two_noises), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"activation_memory_budget": budget} for budget in (0.5, 0.1, 1e-9)]
    + [{"aggressive_recomputation": True}],
    ids=str,
)
def test_compiled_backward_does_not_draw_again(options):
    torch._dynamo.reset()
    with torch._functorch.config.patch(options):
        assert_gradients_are_those_of_eager_calls(
            torch.compile(two_noises, backend=PARTITIONED, fullgraph=True)
        )


def test_a_budget_of_nothing_is_refused():
    torch._dynamo.reset()
    compiled = torch.compile(two_noises, backend=PARTITIONED)
    with (
        torch._functorch.config.patch(activation_memory_budget=0),
        pytest.raises(Exception, match="activation_memory_budget must be above 0 for noise, got 0"),
    ):
        gradients(compiled)


@pytest.mark.parametrize("reentrant", [False, True])
class TestCheckpointing:
    def test_backward_draws_the_same_noise(self, reentrant):
        assert_gradients_are_those_of_eager_calls(
            lambda *inputs: checkpoint(two_noises, *inputs, use_reentrant=reentrant)
        )

    @pytest.mark.parametrize("preserve_rng_state", [True, False])
    def test_backward_draws_the_same_noise_in_compiled_models(self, reentrant, preserve_rng_state):
        def checkpointed(*inputs):
            options = {"use_reentrant": reentrant, "preserve_rng_state": preserve_rng_state}
            return checkpoint(two_noises, *inputs, **options)

        torch._dynamo.reset()
        assert_gradients_are_those_of_eager_calls(torch.compile(checkpointed, backend=PARTITIONED))

    def test_a_generator_that_is_not_restored_is_noticed(self, reentrant):
        def noise(*inputs):
            return multiply_noise(*inputs).tanh()

        options = {"use_reentrant": reentrant, "preserve_rng_state": False}
        with pytest.raises(RuntimeError, match="preserve_rng_state=False draws other noise in backward"):
            gradients(lambda *inputs: checkpoint(noise, *inputs, **options))
        # A seed makes it right.
        gradients(
            lambda *inputs: checkpoint(lambda *parts: multiply_noise(*parts, seed=1), *inputs, **options)
        )


def test_saved_tensors_may_be_copied():
    with torch.autograd.graph.save_on_cpu():
        assert_gradients_are_those_of_eager_calls(two_noises)


def test_compiled_calls_can_be_mapped_over():
    mu, log_sigma = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda many: torch.vmap(lambda x: multiply_noise(x, mu, log_sigma), randomness="different")(many),
        backend=PARTITIONED,
    )
    out = compiled(torch.ones(2, 5, 4))
    assert out.shape == (2, 5, 4)
    assert not torch.equal(out[0], out[1])
