"""The authors' functions of a whole network, and the way from their layers to the library's."""

import copy

import pytest
import torch
from torch import nn

import bmrs
import bmrs_kernels
from bmrs import compat

N = compat.LogUniformApproximateDiracBMRPruningLayer


class Subclassed(compat.LogUniformPruningLayer):
    pass


def prunes(model, *masks):
    for layer, mask in zip(compat.gather_pruning_layers(model), masks, strict=True):
        layer.mask.copy_(torch.tensor(mask, dtype=layer.mask.dtype).view(layer.mask.shape))
    return model


def chain():
    """A convolution, its noise, pooling, flattening, and linear layers: 2 × 2 pixels reach the first of these."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), N([4, 4, 4], axis=0), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), Subclassed(6), nn.Linear(6, 3)),
    )


IMAGES = (torch.randn(2, 2, 4, 4),)
MASKS = [1, 0, 1, 0], [0, 1, 1, 1, 1, 0]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.noise = nn.Linear(4, 4), nn.Linear(4, 4), N(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x + self.noise(torch.relu(self.second(x))))


def test_layers_are_found_in_order_and_once_subclasses_too():
    model = chain()
    assert [type(layer) for layer in compat.gather_pruning_layers(model)] == [N, Subclassed]
    shared = N(4)
    assert compat.gather_pruning_layers(nn.Sequential(shared, nn.ReLU(), shared)) == [shared]
    assert compat.gather_pruning_layers(nn.ReLU()) == []


class TestKL:
    def test_sum_and_mean(self):
        model = prunes(chain(), *MASKS)
        layers = compat.gather_pruning_layers(model)
        for given in (model, layers):
            total = compat.calculate_model_kl(given)
            torch.testing.assert_close(total, sum(layer.kl() for layer in layers))
            mean = compat.calculate_model_kl(given, "mean")
            torch.testing.assert_close(mean, sum(layer.kl("mean") for layer in layers) / 2)

    def test_it_is_that_of_the_library(self):
        model = prunes(chain(), *MASKS)
        upgraded = compat.upgrade(copy.deepcopy(model))
        for averaging, weight in (("mean", "mean"), ("sum", 1.0)):
            expected = bmrs.kl_divergence(upgraded, weight=weight)
            torch.testing.assert_close(compat.calculate_model_kl(model, averaging), expected)

    def test_one_call_for_all_layers(self, monkeypatch):
        calls = []
        kernel = bmrs_kernels.kl_divergence
        monkeypatch.setattr(
            bmrs_kernels, "kl_divergence", lambda *args, **kw: calls.append(1) or kernel(*args, **kw)
        )
        compat.calculate_model_kl(chain()).backward()
        assert len(calls) == 1

    def test_the_layers_own_averaging_counts(self):
        model = chain()
        layers = compat.gather_pruning_layers(model)
        for layer in layers:
            layer.kl_averaging = "mean"
        assert compat.calculate_model_kl(model) == compat.calculate_model_kl(model, "mean")
        layers[0].kl_averaging = "sum"
        with pytest.raises(ValueError, match="kl_averaging are mean and sum: give averaging"):
            compat.calculate_model_kl(model)

    def test_what_is_disabled_adds_nothing(self):
        model = chain()
        enabled = compat.calculate_model_kl(model)
        compat.disable(model)
        assert compat.calculate_model_kl(model) == 0
        x = IMAGES[0]
        assert torch.equal(model(x), model(x))
        compat.enable(model)
        assert compat.calculate_model_kl(model) == enabled

    @pytest.mark.parametrize(
        "call",
        [
            compat.calculate_model_kl,
            compat.compress,
            compat.usable_neuron_pct,
            compat.get_true_parameter_compression_percent,
            compat.upgrade,
        ],
    )
    def test_no_pruning_layer_is_an_error(self, call):
        with pytest.raises(ValueError, match="the model has no pruning layer"):
            call(nn.Linear(2, 2))


def test_layers_of_another_kind_are_named():
    with pytest.raises(TypeError, match=r"must be pruning layers of bmrs.compat, got Linear"):
        compat.calculate_model_kl([nn.Linear(1, 1)])


@pytest.mark.parametrize(
    "call",
    [
        lambda model: bmrs.prune(model, bmrs.SNR()),
        lambda model: bmrs.compact(model, IMAGES),
        lambda model: bmrs.kl_divergence(model, weight="mean"),
        bmrs.fold,
    ],
    ids=["prune", "compact", "kl_divergence", "fold"],
)
def test_the_library_does_not_pass_these_layers_over(call):
    with pytest.raises(
        ValueError, match=r"'3', '8' is that of bmrs.compat: call bmrs.compat.upgrade\(model\) first"
    ):
        call(prunes(chain(), *MASKS))


class TestCompress:
    def test_all_layers(self):
        model = chain()
        with torch.no_grad():
            model[3].mu[1], model[3].logsigma[1] = -10.0, 4.0
            model[8].mu[2], model[8].logsigma[2] = -10.0, 4.0
        masks = compat.compress(model, set_mask=False)
        assert compat.usable_neuron_pct(model) == 100
        assert [mask.flatten().tolist() for mask in masks] == [[1, 0, 1, 1], [1, 1, 0, 1, 1, 1]]
        compat.compress(model)
        assert compat.usable_neuron_pct(model) == pytest.approx(80)

    def test_by_norms(self):
        model = nn.Sequential(
            nn.ConvTranspose2d(2, 4, 1, groups=2), compat.LogUniformL2NormPruningLayer([4, 1, 1], axis=0)
        )
        with torch.no_grad():
            # Inputs 0 and 1 are a group each, with two outputs.
            model[0].weight.copy_(torch.tensor([[3.0, 0.01], [2.0, 5.0]]).view(2, 2, 1, 1))
        (norms,) = compat.get_weight_l2(model)
        torch.testing.assert_close(norms, torch.tensor([3.0, 0.01, 2.0, 5.0]))
        for given in ([norms], {"1": norms}):
            (mask,) = compat.compress(model, l2_norm=given)
            assert mask.flatten().tolist() == [1, 0, 1, 1]
        with pytest.raises(ValueError, match=r"norms of 1 pruning layers, .* got 2"):
            compat.compress(model, l2_norm=[norms, norms])
        with pytest.raises(ValueError, match=r"must name the pruning layers \['1'\], got \['0'\]"):
            compat.compress(model, l2_norm={"0": norms})

    def test_norms_are_of_the_layer_that_makes_the_structures(self):
        model = chain()
        compat.disable(model)
        assert [len(norms) for norms in compat.get_weight_l2(model)] == [4, 6]
        # Wherever it stands: the noise is registered last here, behind a layer of its width.
        model = Residual()
        model.last = nn.Linear(4, 4)
        model.noise, noise = nn.Identity(), model.noise
        del model.noise
        model.noise = noise
        for example in (None, torch.ones(1, 4)):
            (norms,) = compat.get_weight_l2(model, example)
            torch.testing.assert_close(norms, model.second.weight.detach().norm(dim=1))

    def test_norms_need_such_a_layer(self):
        with pytest.raises(
            ValueError, match=r"'2' must follow a .* with 8 output channels.*got Linear with 4"
        ):
            compat.get_weight_l2(nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)), N([2, 4])))
        with pytest.raises(ValueError, match=r"'0' must follow .* 4 output.*got none: give example_inputs"):
            compat.get_weight_l2(nn.Sequential(N(4)))

    def test_errors_and_warnings_name_the_layer_and_change_nothing(self):
        model = chain()
        with torch.no_grad():
            model[3].mu[1], model[3].logsigma[1] = -10.0, 4.0
            model[8].mu[0] = torch.nan
        with pytest.raises(ValueError, match="1 of 6 structures of pruning layer '8'; nothing was pruned"):
            compat.compress(model)
        assert compat.usable_neuron_pct(model) == 100
        with pytest.raises(ValueError, match=r"mu_p_tilde of BMRS_N.*\(pruning layer '3'\)"):
            compat.compress(model, mu_p_tilde=4)
        with pytest.warns(UserWarning, match="every structure of pruning layer '0'") as warned:
            compat.compress(nn.Sequential(N(4)), thresh=-1e9)
        assert warned[0].filename == __file__


class TestCounting:
    def test_trained_parameters(self):
        model = chain()
        total = compat.total_parameters(model)
        assert total == (2 * 9 + 1 + 2) * 4 + 8 + (16 + 1) * 6 + 12 + (6 + 1) * 3
        model[0].weight.requires_grad_(False)
        assert compat.total_parameters(model) == total - 72

    def test_a_chain_as_compaction_leaves_it(self):
        model = prunes(chain(), *MASKS).eval()
        before = copy.deepcopy(model.state_dict())
        counted = compat.get_true_parameter_compression_percent(model)
        exact = compat.get_true_parameter_compression_percent(model, IMAGES)
        total = compat.total_parameters(model)
        # Compaction takes μ and log σ of the kept structures too.
        assert exact - counted == pytest.approx(100 * 2 * 6 / total)
        left = (2 * 9 + 1 + 2) * 2 + (8 + 1) * 4 + (4 + 1) * 3
        assert exact == pytest.approx(100 * (1 - left / total))
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    def test_nothing_pruned_nothing_gone_and_zeros_are_not_counted(self):
        model = chain()
        with torch.no_grad():
            model[0].weight.zero_()
        assert compat.get_true_parameter_compression_percent(model) == 0

    def test_a_residual_connection_keeps_what_it_feeds(self):
        model = prunes(Residual(), [1, 0, 0, 1]).eval()
        x = torch.randn(3, 4)
        before = model(x)
        total = compat.total_parameters(model)
        exact = compat.get_true_parameter_compression_percent(model, x)
        # Its channels are added to others, which keeps them: μ and log σ alone go.
        assert exact == pytest.approx(100 * 8 / total)
        assert compat.get_true_parameter_compression_percent(model) > exact
        assert torch.equal(model(x), before)

    def test_transposed_convolutions_have_their_outputs_second(self):
        layers = nn.ConvTranspose2d(4, 4, 1), N([4, 1, 1], axis=0), nn.ConvTranspose2d(4, 4, 1, bias=False)
        model = prunes(nn.Sequential(*layers), [0, 1, 1, 1])
        with torch.no_grad():
            model[2].weight.copy_(model[0].weight)
            model[2].weight = model[0].weight  # shared: its outputs and its inputs overlap in one entry
        total = 16 + 4 + 8
        percent = compat.get_true_parameter_compression_percent(model)
        assert percent == pytest.approx(100 * (7 + 1 + 2) / total)


class TestUpgrade:
    def test_outputs_in_evaluation_stay_bitwise_and_the_rest_works(self):
        model = prunes(chain(), *MASKS).eval()
        with torch.no_grad():
            model[3].mu[0], model[8].mu[2] = -0.3, -0.7
        before = model(IMAGES[0])
        upgraded = compat.upgrade(model)
        assert upgraded is model
        assert [type(model[i]) for i in (3, 8)] == [bmrs.NoiseLayer, bmrs.NoiseLayer]
        assert torch.equal(model(IMAGES[0]), before)
        with torch.no_grad():
            model[8].mu[2], model[8].log_sigma[2] = -10.0, 4.0
        assert bmrs.prune(model, bmrs.BMRSOdds()).after == 5
        small = bmrs.compact(model, IMAGES)
        assert [layer.out_features for layer in small if isinstance(layer, nn.Linear)] == [3, 3]
        torch.testing.assert_close(small(IMAGES[0]), model(IMAGES[0]))

    @pytest.mark.parametrize(
        ("d", "axis", "shape"), [((5, 4), -1, (2, 5, 4)), ((5, 4), 1, (2, 3, 4))], ids=str
    )
    def test_other_shapes(self, d, axis, shape):
        layer = N(d, axis=axis, a=-18.0, b=1.0).eval()
        torch.nn.init.uniform_(layer.mu, -3, 1)
        layer.mask.view(-1)[1] = 0
        x = torch.randn(shape)
        upgraded = compat.upgrade(layer)
        assert torch.equal(upgraded(x), layer(x))
        (noise,) = (module for module in upgraded.modules() if isinstance(module, bmrs.NoiseLayer))
        assert (noise.lower, noise.upper, noise.granularity) == (-18.0, 1.0, "element")

    def test_in_training_the_same_noise_is_drawn(self):
        layer = N([5, 2], axis=0)
        x = torch.randn(3, 5, 2)
        torch.manual_seed(2)
        before = layer(x)
        torch.manual_seed(2)
        assert torch.equal(compat.upgrade(layer)(x), before)

    def test_shared_and_frozen_and_disabled_layers(self):
        shared = N(4).double()
        shared.mu.requires_grad_(False)
        model = nn.Sequential(shared, nn.Sequential(shared), N(4, enabled=False)).eval()
        compat.upgrade(model)
        assert model[0] is model[1][0]
        assert not model[0].mu.requires_grad
        assert model[0].log_sigma.requires_grad
        assert model[0].mu.dtype == torch.float64
        assert not model[0].training
        assert isinstance(model[2], nn.Identity)


def test_posteriors_as_functions():
    mu, logsigma = torch.tensor([-3.0, 0.2, -25.0]), torch.tensor([0.0, -2.0, 1.0])
    assert torch.equal(compat.kldiv(mu, logsigma), bmrs_kernels.kl_divergence(mu, logsigma))
    assert torch.equal(
        compat.SNR(mu, logsigma, -21, 1), bmrs_kernels.noise_snr(mu, logsigma, lower=-21, upper=1)
    )
    assert torch.equal(compat.Etheta(mu, logsigma), bmrs_kernels.noise_mean(mu, logsigma))
    u = torch.tensor([[0.1], [0.5], [0.9999]])
    # The distribution function leads back to the uniforms, also from beyond both ends.
    theta = compat.reparameterize(mu, logsigma, u)
    assert theta.shape == (3, 3)
    found = compat.LogN_cdf(theta, mu, logsigma)
    torch.testing.assert_close(found, u.double().expand(3, 3), rtol=1e-4, atol=0)
    # No draw is clamped to the inner part of the uniforms.
    outer = compat.reparameterize(mu[:1], logsigma[:1], torch.tensor([1e-5, 1e-7])).log()
    assert (outer - torch.tensor([-7.2649, -8.1993])).abs().max() < 1e-3
    ends = torch.tensor([-20.0, 0.0, -30.0, 3.0]).exp()
    assert compat.LogN_cdf(ends, mu[:1], logsigma[:1]).tolist() == pytest.approx([0, 1, 0, 1])
    assert compat.LogU_cdf(torch.tensor([-20.0, -5.0, 0.0, 1.0]).exp()).tolist() == pytest.approx(
        [0, 0.75, 1, 1]
    )
    x = torch.tensor([-13.0, -1.0, 0.0, 2.0])
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(compat.phi(x), normal.log_prob(x).exp())
    torch.testing.assert_close(compat.Phi(x).double(), torch.special.ndtr(x.double()), rtol=1e-5, atol=0)
