"""The authors' layers: their arguments and attributes, what they compute, and where they differ on purpose."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import bmrs_kernels
from bmrs.compat import (
    LogUniformAllBMRPruningLayer,
    LogUniformApproximateDiracBMRPruningLayer,
    LogUniformCDFBMRPruningLayer,
    LogUniformL2NormPruningLayer,
    LogUniformPruningLayer,
    PruningLayer,
)
from bmrs_kernels.constants import HALF_LOG_2PI, LN2

SPIKES = (LogUniformApproximateDiracBMRPruningLayer, LogUniformAllBMRPruningLayer)
LAYERS = (
    LogUniformPruningLayer,
    LogUniformL2NormPruningLayer,
    LogUniformCDFBMRPruningLayer,
    *SPIKES,
)
SHAPES = {
    "vector": ([5], -1, (3, 5)),
    "feature maps": ([5, 4, 2], 0, (3, 5, 4, 2)),
    "tokens, another number of them": ([7, 5], 1, (3, 6, 5)),
    "every element": ([5, 4], -1, (3, 5, 4)),
    "one channel": ([1, 4, 4], 0, (3, 1, 4, 4)),
    "one pixel": ([5, 1, 1], 0, (3, 5, 1, 1)),
    "one feature": ([1], -1, (4, 1)),
    "one example": ([5], -1, (1, 5)),
}


def spread(layer: PruningLayer) -> PruningLayer:
    """Give every structure another posterior and prune the last one of several."""
    with torch.no_grad():
        count = layer.mu.numel()
        layer.mu.copy_(torch.linspace(-6.0, 0.3, count).view_as(layer.mu))
        layer.logsigma.copy_(torch.linspace(-3.0, 1.0, count).view_as(layer.mu))
        if count > 1:
            layer.mask.view(-1)[-1] = 0
    return layer


def with_posteriors(kind, mu, logsigma, **options):
    layer = kind([len(mu)], **options)
    with torch.no_grad():
        layer.mu.copy_(torch.tensor(mu))
        layer.logsigma.copy_(torch.tensor(logsigma))
    return layer


@pytest.mark.parametrize("kind", LAYERS)
def test_arguments_by_position(kind):
    layer = kind([5, 4], -18, 1, 1, 1e-4, "mean", 0.5, False, 0)
    assert (layer.a, layer.b, layer.n_samples, layer.eps) == (-18, 1, 1, 1e-4)
    assert (layer.kl_averaging, layer.thresh, layer.enabled, layer.axis) == ("mean", 0.5, False, 0)
    assert layer.mu.shape == layer.logsigma.shape == layer.mask.shape == (5, 1)
    assert (layer.mask == 1).all()


@pytest.mark.parametrize("kind", SPIKES)
def test_pruning_eps_comes_last(kind):
    assert kind([5]).pruning_eps == 1e-6
    assert kind([5], -20, 0, 1, 1e-5, "sum", 0.0, True, -1, 1e-4).pruning_eps == 1e-4


@pytest.mark.parametrize("d", [[5, 4], (5, 4), torch.Size([5, 4])], ids=str)
def test_sizes_are_not_changed_for_the_caller(d):
    before = list(d)
    layer = LogUniformPruningLayer(d, axis=0)
    assert list(d) == before
    assert layer(torch.ones(2, 5, 4)).shape == (2, 5, 4)


@pytest.mark.parametrize("case", SHAPES)
class TestForward:
    def test_training_draws_at_every_element(self, case):
        d, axis, shape = SHAPES[case]
        layer = spread(LogUniformPruningLayer(d, axis=axis))
        x = torch.randn(shape)
        torch.manual_seed(3)
        drawn = layer(x)
        torch.manual_seed(3)
        dim = 1 if axis == -1 else axis + 1
        flat = x.flatten(1) if axis == -1 else x
        flat_mask = layer.mask.flatten() > 0
        expected = bmrs_kernels.multiply_noise(
            flat, layer.mu.flatten(), layer.logsigma.flatten(), dim=dim, mask=flat_mask
        )
        assert drawn.shape == shape
        assert torch.equal(drawn, expected.view(shape))
        drawn.sum().backward()
        assert layer.mu.grad.isfinite().all()
        assert (layer.mu.grad[layer.mask > 0] != 0).all()
        assert (layer.mu.grad[layer.mask == 0] == 0).all()

    def test_evaluation_multiplies_by_the_masked_mean(self, case):
        d, axis, shape = SHAPES[case]
        layer = spread(LogUniformPruningLayer(d, axis=axis)).eval()
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), x * (layer.Etheta() * layer.mask))


def test_what_evaluation_multiplies_by_is_never_stale():
    layer = LogUniformPruningLayer([5]).eval()
    x = torch.ones(2, 5)
    with torch.no_grad():
        layer(x)
    layer.load_state_dict(spread(LogUniformPruningLayer([5])).state_dict())
    assert torch.equal(layer(x)[0], layer.Etheta() * layer.mask)
    layer(x).sum().backward()
    layer(x).sum().backward()  # a kept graph would raise
    assert layer.mu.grad.isfinite().all()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 1), (5,)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_another_shape_is_refused(shape, training):
    layer = LogUniformPruningLayer([5]).train(training)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 5\) for LogUniformPruningLayer.*got"):
        layer(torch.ones(shape))


@pytest.mark.parametrize("x", [None, torch.ones(2, 5, dtype=torch.int64)], ids=["none", "int64"])
@pytest.mark.parametrize("training", [True, False])
def test_another_kind_of_input_is_refused(x, training):
    with pytest.raises(
        TypeError, match=r"x must be a floating tensor for LogUniformPruningLayer, got (NoneType|.*int64)"
    ):
        LogUniformPruningLayer([5]).train(training)(x)


WRONG = {
    "n_samples": ({"n_samples": 3}, ValueError, "n_samples must be 1, got 3"),
    "interval": ({"a": 0, "b": 0}, ValueError, "a must be less than b"),
    "averaging": ({"kl_averaging": "none"}, ValueError, "kl_averaging must be one of"),
    "axis": ({"axis": 1}, ValueError, r"axis must be -1 .* d=\[5\], got 1"),
    "threshold": ({"thresh": math.nan}, ValueError, "thresh must be finite"),
    "size": ({"d": [5.0]}, TypeError, "d must be an int, got 5.0"),
    "no sizes": ({"d": []}, TypeError, r"d must be the sizes of an example, such as \[6, 28, 28\], got \[\]"),
    "sizes": ({"d": 5.5}, TypeError, "d must be the sizes of an example.*got 5.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        LogUniformPruningLayer(**{"d": [5], **options})


def test_kl_is_of_what_is_kept_and_enabled():
    layer = spread(LogUniformPruningLayer([5]))
    each = bmrs_kernels.kl_divergence(layer.mu, layer.logsigma) * layer.mask
    torch.testing.assert_close(layer.kl(), each.sum())
    torch.testing.assert_close(layer.kl("mean"), each.sum() / 5)
    layer.kl_averaging = "mean"
    torch.testing.assert_close(layer.kl(), layer.kl("mean"))
    with pytest.raises(ValueError, match="averaging must be one of 'sum', 'mean'"):
        layer.kl("max")


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_not_enabled_has_no_part(kind):
    layer = spread(kind([5], enabled=False))
    x = torch.randn(2, 5)
    assert layer(x) is x
    assert layer.kl() == 0
    before = layer.mask.clone()
    assert torch.equal(layer.compress(thresh=1e9), before)
    assert torch.equal(layer.mask, before)


# A sharp one at θ = e^-0.1, a wide one, one at the lower end, one sharp above b.
MU, LOGSIGMA = [-0.1, -10.0, -20.0, 0.1], [-5.0, 4.0, -1.0, -5.0]
KEPT = {kind: [1, 0, 0, 1] for kind in SPIKES} | {
    LogUniformPruningLayer: [1, 0, 1, 1],
    LogUniformL2NormPruningLayer: [1, 0, 0, 1],
    # Mass below 2^-23 counts as kept: the paper's choice.
    LogUniformCDFBMRPruningLayer: [1, 0, 1, 1],
}


class TestCompress:
    @pytest.mark.parametrize("kind", LAYERS)
    def test_decisions(self, kind):
        layer = with_posteriors(kind, MU, LOGSIGMA)
        found = layer.compress(set_mask=False)
        assert found.tolist() == KEPT[kind]
        assert (layer.mask == 1).all()
        assert torch.equal(layer.compress(), found)
        assert torch.equal(layer.mask, found)
        assert layer.compress().dtype == layer.mask.dtype

    def test_thresholds_are_decided_anew(self):
        layer = with_posteriors(LogUniformPruningLayer, MU, LOGSIGMA)
        assert layer.compress(thresh=200.0).tolist() == [0, 0, 0, 1]
        assert layer.compress(thresh=0.0).tolist() == [1, 1, 1, 1]

    def test_l2_norms_decide_if_they_are_given(self):
        layer = LogUniformL2NormPruningLayer([3, 2, 2], axis=0)
        assert layer.compress(l2_norm=torch.tensor([0.05, 1.0, 0.2])).flatten().tolist() == [0, 1, 1]
        assert layer.compress().flatten().tolist() == [1, 1, 1]  # by E[θ]
        with pytest.raises(ValueError, match=r"a norm for each of the 3 structures, got \(2,\)"):
            layer.compress(l2_norm=torch.ones(2))

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("name", ["mu", "logsigma"])
    def test_nan_prunes_nothing(self, kind, name):
        layer = with_posteriors(kind, MU, LOGSIGMA)
        with torch.no_grad():
            getattr(layer, name)[2] = math.nan
        with pytest.raises(
            ValueError, match=f"{name} is NaN or infinite in 1 of 4 structures of {kind.__name__}"
        ):
            layer.compress()
        assert (layer.mask == 1).all()

    def test_nan_norms_prune_nothing(self):
        with pytest.raises(ValueError, match=r"1 of 2 scores of LogUniformL2Norm.* are NaN"):
            LogUniformL2NormPruningLayer([2]).compress(l2_norm=torch.tensor([1.0, math.nan]))

    @pytest.mark.parametrize(("kind", "thresh"), [(LogUniformPruningLayer, 1e9), (SPIKES[0], -1e9)])
    def test_the_best_one_stays(self, kind, thresh):
        layer = with_posteriors(kind, MU, LOGSIGMA)
        with pytest.warns(UserWarning, match=r"asked for every structure.*the best one was kept") as warned:
            mask = layer.compress(thresh=thresh)
        assert warned[0].filename == __file__
        assert mask.tolist() == [0, 0, 0, 1]

    @pytest.mark.parametrize("kind", SPIKES)
    def test_bits_are_no_mean_of_a_spike(self, kind):
        with pytest.raises(ValueError, match=r"mu_p_tilde of BMRS_N is the mean .* in \[-20, 0\], got 4"):
            kind([3]).compress(mu_p_tilde=4)

    def test_bits_leave_an_interval(self):
        with pytest.raises(ValueError, match=r"mu_p_tilde of BMRS_U is a number of bits.*got 24"):
            LogUniformCDFBMRPruningLayer([3]).compress(mu_p_tilde=24)


class TestEvidence:
    @pytest.mark.parametrize("kind", SPIKES)
    def test_the_authors_leave_out_2_pi(self, kind):
        authors = with_posteriors(kind, MU, LOGSIGMA).bmr()
        paper = with_posteriors(kind, MU, LOGSIGMA, convention="paper").bmr()
        exact = bmrs_kernels.delta_f_lognormal(torch.tensor(MU).double(), torch.tensor(LOGSIGMA).double())
        assert authors.dtype == torch.float64
        torch.testing.assert_close(paper, exact)
        torch.testing.assert_close(authors, exact + HALF_LOG_2PI)

    def test_the_authors_clamp_the_mean(self):
        mu, logsigma = [-26.0, -3.0, 0.5], [0.0, 1.0, 0.0]
        authors = with_posteriors(LogUniformCDFBMRPruningLayer, mu, logsigma).bmr(mu_p_tilde=4)
        paper = with_posteriors(LogUniformCDFBMRPruningLayer, mu, logsigma, convention="paper").bmr(None, 4)
        for values, exact_mu in ((paper, mu), (authors, [-20.0, -3.0, 0.0])):
            expected = bmrs_kernels.delta_f_loguniform(
                torch.tensor(exact_mu).double(), torch.tensor(logsigma).double(), reduced_upper=-4 * LN2
            )
            torch.testing.assert_close(values, expected)
        assert not torch.allclose(authors, paper)

    def test_a_spike_of_ones_own(self):
        layer = with_posteriors(SPIKES[0], MU, LOGSIGMA, convention="paper", pruning_eps=1e-4)
        exact = bmrs_kernels.delta_f_lognormal(
            layer.mu.double(), layer.logsigma.double(), prior_mean=-10.0, prior_std=1e-3
        )
        torch.testing.assert_close(layer.bmr(1e-3, -10.0), exact)
        assert not torch.equal(layer.bmr(), layer.bmr(1e-3))

    def test_all_scores_of_one_posterior(self):
        layer = with_posteriors(LogUniformAllBMRPruningLayer, MU, LOGSIGMA)
        other = with_posteriors(LogUniformCDFBMRPruningLayer, MU, LOGSIGMA)
        assert torch.equal(layer.bmr_approximate(), layer.bmr())
        assert torch.equal(layer.bmr_cdf(4), other.bmr(mu_p_tilde=4))
        assert layer.bmr().shape == layer.SNR().shape == (4,)

    def test_conversions_leave_the_spike_as_it_is(self):
        layer = with_posteriors(SPIKES[0], MU, LOGSIGMA)
        before = layer.bmr()
        assert torch.equal(layer.float().bmr(), before)
        assert layer.half().mu.dtype == torch.float32
        assert torch.equal(layer.bmr(), before)


# σ = e^-5, k σ from b: E[θ], SNR and KL of 150-digit arithmetic. The authors' are 0, NaN and right; infinite, NaN, NaN.
CLIFFS = [(-20, 0.873946, 148.41, 6.57679), (8, 0.999183, 1240.97, 9.10476)]


@pytest.mark.parametrize(("k", "mean", "ratio", "divergence"), CLIFFS)
def test_numbers_where_the_authors_formulas_fail(k, mean, ratio, divergence):
    layer = with_posteriors(LogUniformPruningLayer, [k * math.exp(-5)], [-5.0])
    values = [layer.Etheta().item(), layer.SNR().item(), layer.kl().item()]
    assert values == pytest.approx([mean, ratio, divergence], rel=1e-5)


class TestCheckpoints:
    @staticmethod
    def authors_state(kind):
        """A state as their layers write it: all of these are parameters, one of them double."""
        shape = (5, 1, 1)
        state = {
            "mu": torch.linspace(-3, 0, 5).view(shape),
            "logsigma": torch.linspace(-5, 1, 5).view(shape),
            "mask": torch.tensor([1.0, 0, 1, 1, 0]).view(shape),
            "umin": torch.zeros(1),
            "umax": torch.ones(1),
        }
        if kind in SPIKES:
            state["pruning_eps"] = torch.tensor(1e-5, dtype=torch.float64)
        return {name: nn.Parameter(value) for name, value in state.items()}

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("assign", [False, True])
    def test_theirs_load_strictly(self, kind, assign):
        state = self.authors_state(kind)
        network = nn.Sequential(nn.Identity(), kind([5, 2, 2], axis=0))
        network.load_state_dict({f"1.{name}": value for name, value in state.items()}, assign=assign)
        for name in ("mu", "logsigma", "mask"):
            assert torch.equal(getattr(network[1], name), state[name])
        if kind in SPIKES:
            assert network[1].pruning_eps == pytest.approx(1e-5)
        # And back, with every name that theirs has.
        written = network.state_dict()
        assert set(written) == {f"1.{name}" for name in state}
        file = io.BytesIO()
        torch.save(written, file)
        file.seek(0)
        again = nn.Sequential(nn.Identity(), kind([5, 2, 2], axis=0))
        again.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(again[1].mask, state["mask"])
        assert torch.equal(again[1].compress(False), network[1].compress(False))

    def test_a_spike_that_is_none_is_refused(self):
        state = self.authors_state(SPIKES[0]) | {"pruning_eps": torch.tensor(0.0)}
        with pytest.raises(RuntimeError, match=r"pruning_eps must be one positive number, got tensor\(0\.\)"):
            SPIKES[0]([5, 2, 2], axis=0).load_state_dict(state)

    @pytest.mark.parametrize("name", ["mu", "mask"])
    def test_what_is_missing_is_said(self, name):
        state = self.authors_state(LogUniformPruningLayer)
        del state[name]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            LogUniformPruningLayer([5, 2, 2], axis=0).load_state_dict(state)


def test_the_mask_is_no_parameter_but_can_be_written():
    layer = LogUniformPruningLayer([3])
    assert {name for name, _ in layer.named_parameters()} == {"mu", "logsigma"}
    pruned = torch.tensor([1.0, 0.0, 1.0])
    layer.mask.data = pruned
    assert layer.eval()(torch.ones(1, 3))[0, 1] == 0
    layer = LogUniformPruningLayer([3])
    layer.mask = nn.Parameter(pruned, requires_grad=False)  # as theirs is
    assert layer.eval()(torch.ones(1, 3))[0, 1] == 0


def test_compiles_into_one_graph():
    layer = spread(LogUniformPruningLayer([5, 2, 2], axis=0))
    x = torch.randn(2, 5, 2, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    drawn = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(drawn, layer(x))
