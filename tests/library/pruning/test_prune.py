import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bmrs
import bmrs_kernels
from bmrs.criteria import PosteriorCriterion
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers
from bmrs.pruning.report import LayerReport, PruneReport

NEEDLESS, NEEDED = -19.5, -0.5


def set_posterior(layer: NoiseLayer, mu: list[float]) -> None:
    """Wide where needless, narrow where needed."""
    with torch.no_grad():
        layer.mu.copy_(torch.tensor(mu))
        layer.log_sigma.copy_(torch.where(layer.mu < -10, 1.0, -3.0))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), NoiseLayer(5, activation="relu"), nn.Linear(5, 3), NoiseLayer(3), nn.Linear(3, 2)
    )
    set_posterior(model[1], [NEEDED, NEEDLESS, NEEDED, NEEDLESS, NEEDED])
    set_posterior(model[3], [NEEDED, NEEDED, NEEDED])
    return model


class TestPrune:
    def test_masks_what_the_criterion_asks_for(self, model):
        report = bmrs.prune(model, bmrs.BMRSNormal())
        assert model[1].mask.tolist() == [True, False, True, False, True]
        assert model[3].mask.all()
        scores = bmrs.BMRSNormal()(model[1]).scores
        first, second = report.layers
        assert first == LayerReport("1", 5, 5, 3, float(scores.min()), float(scores.max()), best_kept=False)
        assert (second.name, second.before, second.after) == ("3", 3, 3)
        assert (report.before, report.after) == (8, 6)

    def test_pruned_structures_stay_pruned_whatever_their_posterior(self, model):
        bmrs.prune(model, bmrs.BMRSNormal())
        set_posterior(model[1], [NEEDED, NEEDED, NEEDLESS, NEEDED, NEEDED])
        report = bmrs.prune(model, bmrs.BMRSNormal())
        assert model[1].mask.tolist() == [True, False, False, False, True]
        assert (report.layers[0].before, report.layers[0].after) == (3, 2)

    def test_scores_of_pruned_structures_are_not_reported(self, model):
        model[1].mask[1] = model[1].mask[3] = False
        report = bmrs.prune(model, bmrs.BMRSNormal())
        assert report.layers[0].highest_score < 0

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize(
        "criterion",
        [bmrs.BMRSNormal(), bmrs.BMRSUniform(), bmrs.SNR(), bmrs.Mean()],
        ids=lambda c: type(c).__name__,
    )
    def test_masks_only_ever_shrink_and_agree_with_the_criterion(self, criterion, seed):
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(*(NoiseLayer(n) for n in (1, 7, 30)), NoiseLayer(4, lower=-18.0))
        for _ in range(3):
            before = {name: layer.mask.clone() for name, layer in noise_layers(model).items()}
            with torch.no_grad():
                for layer in model:
                    layer.mu.uniform_(-22.0, 1.0, generator=generator)
                    layer.log_sigma.uniform_(-5.0, 3.0, generator=generator)
            report = bmrs.prune(model, criterion)
            for (name, layer), entry in zip(noise_layers(model).items(), report.layers, strict=True):
                asked = criterion(layer).prune
                expected = before[name] & ~asked
                assert entry.best_kept == (not expected.any())
                assert entry.after == int(layer.mask.sum()) == max(1, int(expected.sum()))
                assert not (layer.mask & ~before[name]).any()
                if expected.any():
                    assert torch.equal(layer.mask, expected)

    @pytest.mark.parametrize(
        ("criterion", "best"),
        [
            (bmrs.BMRSNormal(), lambda scores: scores.argmin()),
            (bmrs.SNR(threshold=1e9), lambda scores: scores.argmax()),
        ],
    )
    def test_emptied_layer_keeps_its_best_structure(self, model, criterion, best):
        set_posterior(model[3], [-19.9, -17.0, -19.0])
        model[3].mask[1] = False
        kept = [0, 2][best(criterion(model[3]).scores[[0, 2]])]
        report = bmrs.prune(model, criterion)
        assert model[3].mask.nonzero().flatten().tolist() == [kept]
        assert report.layers[1].best_kept
        assert "3: the criterion asked for every structure; the best one was kept" in str(report)
        assert bmrs.prune(model, criterion).layers[1].after == 1

    def test_nan_scores_never_prune(self, model):
        class Undefined(PosteriorCriterion):
            score_name = "nothing"

            def scores(self, mu, log_sigma, *, lower, upper, backend):
                return torch.full_like(mu, math.nan)

            def decide(self, scores):
                return scores <= 0

        report = bmrs.prune(model, Undefined())
        assert model[1].mask.all()
        assert report.to_dict()["layers"][0]["lowest_score"] is None

    def test_evaluation_and_training_ignore_pruned_structures(self, model):
        bmrs.prune(model, bmrs.BMRSNormal())
        x = torch.randn(6, 4)
        with torch.no_grad():
            before = model.eval()(x)
            model[0].weight[[1, 3]] += 100.0
            assert torch.equal(model(x), before)
        model.train()(x).sum().backward()
        assert not model[0].weight.grad[[1, 3]].any()
        assert model[0].weight.grad[[0, 2, 4]].any()

    def test_layers_of_one_kind_are_scored_in_one_call(self, monkeypatch):
        calls = []

        def counted(*args, **options):
            calls.append(args)
            return original(*args, **options)

        original = bmrs_kernels.delta_f_lognormal
        monkeypatch.setattr(bmrs_kernels, "delta_f_lognormal", counted)
        bmrs.prune(nn.Sequential(*(NoiseLayer(3) for _ in range(20))), bmrs.BMRSNormal())
        assert len(calls) == 1


class TestBadInput:
    @pytest.mark.parametrize("parameter", ["mu", "log_sigma"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_non_finite_parameters_prune_nothing(self, model, parameter, value):
        with torch.no_grad():
            getattr(model[3], parameter)[[0, 2]] = value
        message = (
            r"mu or log_sigma is NaN or infinite in noise layer '3' \(2 of 3 structures\); nothing was pruned"
        )
        with pytest.raises(ValueError, match=message):
            bmrs.prune(model, bmrs.BMRSNormal())
        assert model[1].mask.all()

    def test_all_broken_layers_are_named(self, model):
        with torch.no_grad():
            model[1].mu[0] = model[3].log_sigma[0] = math.nan
        with pytest.raises(ValueError, match=r"'1' \(1 of 5 structures\), '3' \(1 of 3 structures\)"):
            bmrs.prune(model, bmrs.SNR())

    def test_criterion_that_does_not_fit_a_layer_prunes_nothing(self, model):
        model.append(NoiseLayer(2, lower=-8.0))
        with pytest.raises(
            ValueError, match=r"must lie within .* \[-8.0, 0.0\] \(noise layer '5'\); nothing was pruned"
        ):
            bmrs.prune(model, bmrs.BMRSUniform())
        assert model[1].mask.all()

    def test_model_without_noise(self):
        with pytest.raises(ValueError, match="has no noise layer"):
            bmrs.prune(nn.Linear(2, 2), bmrs.BMRSNormal())


class Residual(nn.Module):
    """Two convolutions whose sum is noisy, registered in the reverse of the order of use."""

    def __init__(self):
        super().__init__()
        self.noise = NoiseLayer(4)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        self.first = nn.Conv2d(2, 4, 1)
        self.sum_noise = NoiseLayer(4)

    def forward(self, x):
        x = self.first(x)
        y = self.second(self.noise(F.relu(self.norm(x))))
        return self.sum_noise(x + y)


class TestProducers:
    def test_norm_criteria_look_at_the_layer_that_feeds_the_noise(self):
        model = bmrs.models.LeNet5()
        report = bmrs.prune(model, bmrs.L2(ratio=0.5))
        assert [layer.after for layer in report.layers] == [3, 8, 60, 42]
        norms = model.conv2.weight.flatten(1).norm(dim=1)
        assert norms[model.conv2_relu.mask].min() > norms[~model.conv2_relu.mask].max()
        assert bmrs.prune(model, bmrs.L2(ratio=0.5)).layers[0].after == 2

    def test_through_operations_and_in_the_order_of_use(self):
        model = Residual()
        model.sum_noise = nn.Identity()
        bmrs.prune(model, bmrs.L2(ratio=0.5))
        norms = model.first.weight.flatten(1).norm(dim=1)
        assert norms[model.noise.mask].min() > norms[~model.noise.mask].max()

    def test_added_noise_belongs_to_its_layer(self):
        model = bmrs.add_noise(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), where="0")
        model(torch.randn(5, 3)).sum().backward()
        bmrs.prune(model, bmrs.GradientNorm(ratio=0.5))
        norms = model[0].weight.grad.norm(dim=1)
        assert norms[model[0].noise.mask].min() >= norms[~model[0].noise.mask].max()

    def test_noise_behind_a_sum_has_no_single_producer(self):
        model = Residual()
        with pytest.raises(ValueError, match=r"L2 needs the layer .* got None \(noise layer 'sum_noise'\)"):
            bmrs.prune(model, bmrs.L2(ratio=0.5))
        assert model.noise.mask.all()

    def test_with_an_example_models_are_followed_that_look_at_their_input(self):
        class Checked(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)

            def forward(self, x):
                if x.shape[1] != 3:
                    raise ValueError("RGB please")
                return self.last(self.norm(self.conv(x)).relu().mean((2, 3)))

        model = bmrs.add_noise(Checked(), where="norm")
        with pytest.raises(ValueError, match=r"Give example_inputs, so that torch\.export can be used"):
            bmrs.prune(model, bmrs.L2(ratio=0.5))
        x = torch.randn(2, 3, 6, 6)
        assert bmrs.prune(model, bmrs.L2(ratio=0.5), example_inputs=x).layers[0].after == 4
        norms = model.conv.weight.flatten(1).norm(dim=1)
        assert norms[model.norm.noise.mask].min() > norms[~model.norm.noise.mask].max()

    def test_model_that_cannot_be_traced(self):
        class Dynamic(nn.Module):
            def __init__(self):
                super().__init__()
                self.noise = NoiseLayer(3)

            def forward(self, x):
                return self.noise(x) if x.sum() > 0 else x

        with pytest.raises(ValueError, match=r"L2 follows the model with torch\.fx, which failed on Dynamic"):
            bmrs.prune(Dynamic(), bmrs.L2(ratio=0.5))


class TestReport:
    REPORT = PruneReport(
        criterion="SNR(threshold=1.0)",
        score_name="SNR",
        layers=(
            LayerReport("conv1", 6, 6, 4, 0.25, 123.456, best_kept=False),
            LayerReport("", 120, 60, 1, math.nan, math.inf, best_kept=True),
        ),
    )

    def test_text_is_an_aligned_table(self):
        assert str(self.REPORT).splitlines() == [
            "pruned by SNR(threshold=1.0)",
            "layer    structures  before  after  lowest SNR  highest SNR",
            "conv1             6       6      4        0.25        123.5",
            "(model)         120      60      1         nan          inf",
            "total           126      66      5",
            "(model): the criterion asked for every structure; the best one was kept",
        ]

    def test_dict_is_strict_json(self):
        found = json.loads(json.dumps(self.REPORT.to_dict(), allow_nan=False))
        assert found["before"] == 66
        assert found["after"] == 5
        assert found["layers"][0] == {
            "name": "conv1",
            "structures": 6,
            "before": 6,
            "after": 4,
            "lowest_score": 0.25,
            "highest_score": 123.456,
            "best_kept": False,
            "emptied": False,
        }
        assert found["layers"][1]["highest_score"] is None


class TestPosteriorsThatHaveHardlyMoved:
    def trained(self, steps, lr=0.05):
        torch.manual_seed(0)
        model = nn.Sequential(NoiseLayer(20), nn.Linear(20, 2))
        optimizer = torch.optim.Adam(model[0].parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            bmrs.kl_divergence(model, weight=1.0).backward()
            optimizer.step()
        return model

    @pytest.mark.parametrize("criterion", [bmrs.SNR(), bmrs.BMRSNormal(tolerance=0.919), bmrs.BMRSOdds()])
    def test_the_report_says_how_much_longer_it_takes(self, criterion):
        steps = 20
        report = bmrs.prune(self.trained(steps), criterion)
        assert report.after == report.before == 20
        assert "nothing went, because the posteriors are still near their start" in str(report)
        assert report.to_dict()["times_longer"] == report.times_longer
        # What it says is what happens.
        needed = round(steps * report.times_longer)
        assert bmrs.prune(self.trained(round(0.8 * needed)), criterion).after == 20
        late = bmrs.prune(self.trained(round(1.2 * needed)), criterion)
        assert late.after == 1
        assert late.times_longer is None

    def test_the_report_asks_for_the_optimizer_where_nothing_moved(self):
        report = bmrs.prune(self.trained(0), bmrs.SNR())
        assert "no posterior has left its start: are μ and log σ in the optimizer" in str(report)
        assert report.times_longer == math.inf
        assert report.to_dict()["times_longer"] is None

    def test_nothing_is_said_where_that_is_not_the_reason(self):
        settled = self.trained(0)
        with torch.no_grad():  # as the data can hold them: far from the start and narrow
            settled[0].mu.fill_(-9.0)
            settled[0].log_sigma.fill_(-4.0)
        moved = bmrs.prune(settled, bmrs.SNR())
        by_norm = bmrs.prune(bmrs.add_noise(nn.Sequential(nn.Linear(2, 3)), where="0"), bmrs.L2(ratio=0.0))
        for report in (moved, by_norm):
            assert report.after == report.before
            assert report.times_longer is None
            assert "nothing went" not in str(report)
