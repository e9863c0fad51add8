import math

import mpmath
import pytest
import torch
from torch import nn

import bmrs
import bmrs_kernels
from bmrs.noise.layer import NoiseLayer

LN2 = math.log(2.0)


@pytest.fixture
def layer() -> NoiseLayer:
    """Posteriors from surely needless to surely needed."""
    layer = NoiseLayer(6)
    with torch.no_grad():
        layer.mu.copy_(torch.tensor([-19.0, -14.0, -10.0, -4.0, -1.0, -0.1]))
        layer.log_sigma.copy_(torch.tensor([1.5, 1.5, 3.0, -1.0, 1.0, -3.0]))
    return layer


def mass(mu: float, log_sigma: float, start: float, end: float) -> mpmath.mpf:
    """Twice the mass of a normal between two points, by the tail on which both of them lie."""
    scale = mpmath.exp(mpmath.mpf(log_sigma)) * mpmath.sqrt(2)
    near, far = (start, end) if mu < end else (end, start)
    return mpmath.erfc(abs(near - mu) / scale * (-1 if start < mu < end else 1)) - mpmath.erfc(
        abs(far - mu) / scale
    )


class TestPosteriorCriteria:
    @pytest.mark.parametrize("prior_mean", [None, -19.0])
    def test_bmrs_normal(self, layer, prior_mean):
        scores, prune = bmrs.BMRSNormal(prior_mean=prior_mean, prior_std=1e-3)(layer)
        expected = bmrs_kernels.delta_f_lognormal(
            layer.mu, layer.log_sigma, prior_mean=prior_mean, prior_std=1e-3
        )
        assert torch.equal(scores, expected)
        assert torch.equal(prune, expected >= 0)
        assert prune[0]
        assert not prune[5]

    def test_bmrs_normal_defaults_are_the_papers(self, layer):
        scores, _ = bmrs.BMRSNormal()(layer)
        assert torch.equal(scores, bmrs_kernels.delta_f_lognormal(layer.mu, layer.log_sigma))

    @pytest.mark.parametrize("p1", [4, 8])
    def test_bmrs_uniform(self, layer, p1):
        scores, prune = bmrs.BMRSUniform(p1=p1)(layer)
        expected = bmrs_kernels.delta_f_loguniform(
            layer.mu, layer.log_sigma, reduced_lower=-23 * LN2, reduced_upper=-p1 * LN2
        )
        assert torch.equal(scores, expected)
        assert torch.equal(prune, expected >= 0)
        assert prune[1]
        assert not prune[5]

    def test_bmrs_uniform_from_the_lower_bound_prunes_what_the_papers_interval_misses(self, layer):
        with torch.no_grad():
            layer.log_sigma[0] = -3.0
        assert not bmrs.BMRSUniform()(layer).prune[0]
        assert bmrs.BMRSUniform(reduced_lower=None)(layer).prune[0]

    def test_tolerance_prunes_what_the_data_say_nothing_about(self):
        layer = NoiseLayer(2, initial_mu=-0.7, initial_log_sigma=4.4)
        with torch.no_grad():
            layer.log_sigma[1] = -3.0
        scores, prune = bmrs.BMRSNormal()(layer)
        assert -0.1 < scores[0] < 0
        assert not prune.any()
        assert bmrs.BMRSNormal(tolerance=0.1)(layer).prune.tolist() == [True, False]
        assert bmrs.BMRSUniform(reduced_lower=None, tolerance=0.1)(layer).prune.tolist() == [True, False]

    @pytest.mark.parametrize("threshold", [1.0, 3.0])
    def test_snr(self, layer, threshold):
        scores, prune = bmrs.SNR(threshold=threshold)(layer)
        assert torch.equal(scores, bmrs_kernels.noise_snr(layer.mu, layer.log_sigma))
        assert torch.equal(prune, scores <= threshold)
        assert prune.any()
        assert not prune[5]

    @pytest.mark.parametrize("p1", [4, 8])
    def test_odds_are_those_of_the_posterior_mass_on_either_side(self, layer, p1):
        scores, prune = bmrs.BMRSOdds(p1=p1)(layer)
        border = -p1 * LN2
        for mu, log_sigma, score in zip(layer.mu.tolist(), layer.log_sigma.tolist(), scores, strict=True):
            with mpmath.workdps(50):
                odds = mass(mu, log_sigma, border, 0.0) / mass(mu, log_sigma, -20.0, border)
                assert score.item() == pytest.approx(float(mpmath.log(odds)), rel=1.2e-7, abs=1.2e-7)
        assert torch.equal(prune, scores <= 0)
        assert prune[1]
        assert not prune[5]

    def test_odds_hardly_depend_on_the_lower_end_where_the_posterior_has_converged(self):
        """What is surely off or surely on stays so; ΔF of the same posteriors moves by nats."""
        near, far = (NoiseLayer(2, lower=lower) for lower in (-20.0, -40.0))
        with torch.no_grad():
            for layer in (near, far):
                layer.mu.copy_(torch.tensor([-12.0, -0.3]))
                layer.log_sigma.copy_(torch.tensor([2.0, -1.0]))
        assert bmrs.BMRSOdds()(near).prune.tolist() == bmrs.BMRSOdds()(far).prune.tolist() == [True, False]

    def test_odds_at_the_extremes_are_finite(self):
        layer = NoiseLayer(4)
        with torch.no_grad():
            layer.mu.copy_(torch.tensor([20.0, -40.0, -20.0, 0.0]))
            layer.log_sigma.copy_(torch.tensor([-20.0, -20.0, 5.0, 5.0]))
        scores, prune = bmrs.BMRSOdds()(layer)
        assert scores.isfinite().all()
        assert prune.tolist() == [False, True, True, True]  # a flat posterior has 72 % of its mass below 2^-8

    def test_a_border_outside_the_interval_is_named(self, layer):
        with pytest.raises(ValueError, match=r"p1=30 of BMRSOdds .* inside .*\(-20.0, 0.0\)"):
            bmrs.BMRSOdds(p1=30)(layer)
        with pytest.raises(ValueError, match="p1 must be finite and greater than 0, got 0"):
            bmrs.BMRSOdds(p1=0)
        with pytest.raises(TypeError, match="p1 must be a number"):
            bmrs.BMRSOdds(p1="8")

    def test_mean(self, layer):
        scores, prune = bmrs.Mean()(layer)
        assert torch.equal(scores, bmrs_kernels.noise_mean(layer.mu, layer.log_sigma))
        assert torch.equal(prune, scores < 0.1)
        assert prune.any()
        assert not prune[5]

    @pytest.mark.parametrize(
        ("criterion", "edge", "pruned_at_the_edge"),
        [
            (bmrs.BMRSNormal(), 0.0, True),
            (bmrs.BMRSUniform(), 0.0, True),
            (bmrs.BMRSOdds(), 0.0, True),
            (bmrs.SNR(), 1.0, True),
            (bmrs.Mean(), 0.1, False),
        ],
    )
    def test_decision_at_the_edge_and_for_nan(self, criterion, edge, pruned_at_the_edge):
        decided = criterion.decide(torch.tensor([edge, math.nan], dtype=torch.float64))
        assert decided.tolist() == [pruned_at_the_edge, False]

    @pytest.mark.parametrize(
        ("criterion", "best"),
        [
            (bmrs.BMRSNormal(), 1),
            (bmrs.BMRSUniform(), 1),
            (bmrs.BMRSOdds(), 2),
            (bmrs.SNR(), 2),
            (bmrs.L2(ratio=0.5), 2),
        ],
    )
    def test_order_of_scores(self, criterion, best):
        scores = torch.tensor([0.5, -math.inf, 1e38])
        assert criterion.best_first(scores)[0] == best
        assert criterion.best_first(torch.tensor([0.5, math.nan, 1.0]))[0] == 1

    def test_decides_without_gradient_and_follows_the_layers_interval(self):
        layer = NoiseLayer(3, lower=-30.0, upper=1.0)
        scores, _ = bmrs.Mean()(layer)
        assert not scores.requires_grad
        torch.testing.assert_close(
            scores, bmrs_kernels.noise_mean(layer.mu, layer.log_sigma, lower=-30.0, upper=1.0).detach()
        )


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in transformers, by which it is known: its name and its weight."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))


class TestNorms:
    @pytest.fixture
    def producer(self) -> nn.Conv1d:
        producer = nn.Conv1d(2, 6, 3)
        with torch.no_grad():
            producer.weight.copy_(
                torch.tensor([3.0, 1.0, 6.0, 2.0, 5.0, 4.0])[:, None, None].expand_as(producer.weight)
            )
        return producer

    @pytest.mark.parametrize(
        ("ratio", "expected"),
        [(0.0, []), (0.16, []), (0.34, [1, 3]), (0.5, [0, 1, 3]), (0.99, [0, 1, 3, 4, 5])],
    )
    def test_l2_prunes_the_lowest_rounded_down(self, layer, producer, ratio, expected):
        scores, prune = bmrs.L2(ratio=ratio)(layer, producer)
        torch.testing.assert_close(scores, producer.weight.flatten(1).norm(dim=1))
        assert prune.nonzero().flatten().tolist() == expected

    def test_ratio_counts_kept_structures_only(self, layer, producer):
        layer.mask[1] = layer.mask[3] = False
        assert bmrs.L2(ratio=0.5)(layer, producer).prune.nonzero().flatten().tolist() == [0, 5]

    def test_nan_is_never_pruned(self, layer, producer):
        with torch.no_grad():
            producer.weight[1] = math.nan
        scores, prune = bmrs.L2(ratio=0.99)(layer, producer)
        assert scores[1].isnan()
        assert prune.nonzero().flatten().tolist() == [0, 2, 3, 4, 5]

    def test_gradient_norm_reads_the_last_backward(self, layer, producer):
        producer.weight.grad = producer.weight.detach().flip(0)
        scores, prune = bmrs.GradientNorm(ratio=0.34)(layer, producer)
        torch.testing.assert_close(scores, producer.weight.detach().flatten(1).norm(dim=1).flip(0))
        assert prune.nonzero().flatten().tolist() == [2, 4]

    def test_gradient_norm_without_gradient_is_an_error(self, layer, producer):
        with pytest.raises(ValueError, match="call backward first"):
            bmrs.GradientNorm(ratio=0.5)(layer, producer)

    @pytest.mark.parametrize(
        ("producer", "axes"),
        [
            (nn.ConvTranspose2d(6, 6, 3), (0, 2, 3)),  # the weight is (inputs, outputs, ...)
            (nn.ConvTranspose1d(4, 6, 3), (0, 2)),
            (Conv1D(6, 4), (0,)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_norms_are_those_of_outputs_wherever_the_weight_has_them(self, layer, producer, axes):
        with torch.no_grad():
            producer.weight.copy_(
                torch.randn(producer.weight.shape, generator=torch.Generator().manual_seed(0))
            )
        expected = producer.weight.square().sum(dim=axes).sqrt()
        torch.testing.assert_close(bmrs.L2(ratio=0.5)(layer, producer).scores, expected)

    def test_norms_of_transposed_convolutions_in_groups(self, layer):
        producer = nn.ConvTranspose2d(4, 6, 3, groups=2)
        expected = [producer.weight[2 * g : 2 * g + 2, o].norm() for g in range(2) for o in range(3)]
        torch.testing.assert_close(bmrs.L2(ratio=0.5)(layer, producer).scores, torch.stack(expected))

    def test_missing_or_unfitting_producer_is_an_error(self, layer):
        with pytest.raises(ValueError, match="L2 needs the layer that produces the structures, got None"):
            bmrs.L2(ratio=0.5)(layer)
        with pytest.raises(ValueError, match="needs a producer with 6 output channels, got Linear with 5"):
            bmrs.L2(ratio=0.5)(layer, nn.Linear(2, 5))


class TestArguments:
    def test_criteria_are_values(self):
        assert bmrs.BMRSUniform(p1=4) == bmrs.BMRSUniform(p1=4) != bmrs.BMRSUniform()
        assert repr(bmrs.SNR()) == "SNR(threshold=1.0)"
        with pytest.raises(AttributeError):
            bmrs.SNR().threshold = 2.0

    @pytest.mark.parametrize(
        ("build", "error", "message"),
        [
            (
                lambda: bmrs.BMRSNormal(prior_std=0.0),
                ValueError,
                "prior_std must be finite and greater than 0, got 0.0",
            ),
            (lambda: bmrs.BMRSNormal(prior_mean=math.nan), ValueError, "prior_mean must be finite, got nan"),
            (lambda: bmrs.BMRSNormal(tolerance=-0.5), ValueError, "tolerance must be finite and at least 0"),
            (
                lambda: bmrs.BMRSUniform(tolerance=math.nan),
                ValueError,
                "tolerance must be finite and at least 0",
            ),
            (lambda: bmrs.BMRSUniform(p1="8"), TypeError, "p1 must be a number, got '8'"),
            (lambda: bmrs.BMRSUniform(p1=23), ValueError, "reduced_lower must be less than -p1·ln 2"),
            (
                lambda: bmrs.SNR(threshold=-1.0),
                ValueError,
                "threshold must be finite and at least 0, got -1.0",
            ),
            (lambda: bmrs.Mean(threshold=math.inf), ValueError, "threshold must be finite and at least 0"),
            (lambda: bmrs.L2(ratio=1.0), ValueError, "ratio must be less than 1, got 1.0"),
            (
                lambda: bmrs.GradientNorm(ratio=-0.1),
                ValueError,
                "ratio must be finite and at least 0, got -0.1",
            ),
            (lambda: bmrs.L2(ratio=True), TypeError, "ratio must be a number, got True"),
        ],
    )
    def test_constructor_errors(self, build, error, message):
        with pytest.raises(error, match=message):
            build()

    @pytest.mark.parametrize(
        ("criterion", "message"),
        [
            (
                bmrs.BMRSUniform(),
                r"the reduced interval \[-15.94, -5.545\] of BMRSUniform must .* \[-10.0, 0.0\]",
            ),
            (bmrs.BMRSUniform(p1=20, reduced_lower=None), r"the reduced interval \[-10, -13.86\]"),
            (bmrs.BMRSNormal(prior_mean=-11.0), r"interval \[-10.0, 0.0\], got -11.0"),
        ],
    )
    def test_interval_outside_the_layers(self, criterion, message):
        with pytest.raises(ValueError, match=message):
            criterion(NoiseLayer(3, lower=-10.0))
