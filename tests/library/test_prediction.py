import copy

import pytest
import torch
from compaction_cases import randomise
from torch import nn

import bmrs

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Everything(nn.Module):
    """Batch norm, dropout and noise of which the moments are known."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.noise = bmrs.NoiseLayer(4, granularity="sample")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.noise(self.dropout(self.norm(x)))


@pytest.fixture
def model():
    model = Everything()
    with torch.no_grad():
        model.noise.mu.copy_(torch.tensor([-1.0, -2.0, 0.5, -3.0]))
        model.noise.log_sigma.copy_(torch.tensor([-1.0, 0.0, -2.0, 0.5]))
    model.noise.set_kept(torch.tensor([True, True, True, False]))
    return model


def test_moments_are_those_of_theta(model):
    draws = 4000
    mean, std = bmrs.predict(model, X, of="outputs", draws=draws)
    factors = model.noise.expected_noise()
    snr = bmrs.SNR()(model.noise).scores
    with torch.no_grad():
        normed = model.norm.eval()(X)
    spread = normed.abs() * factors / snr
    torch.testing.assert_close(std, spread, rtol=0.1, atol=1e-6)
    assert ((mean - normed * factors).abs() <= 5 * spread / draws**0.5 + 1e-6).all()
    assert not std[:, 3].any()
    assert not mean[:, 3].any()


def test_probabilities_are_averaged_after_the_softmax(model):
    prediction = bmrs.predict(model, X, draws=3)
    assert isinstance(prediction, bmrs.Prediction)
    assert prediction.mean.shape == prediction.std.shape == (5, 4)
    torch.testing.assert_close(prediction.mean.sum(dim=1), torch.ones(5))
    generator = torch.Generator().manual_seed(0)
    model.eval()
    model.noise.train()
    model.noise.generator = generator
    with torch.no_grad():
        each = torch.stack([model(X).softmax(dim=1) for _ in range(3)])
    torch.testing.assert_close(prediction.mean, each.mean(dim=0))
    torch.testing.assert_close(prediction.std, each.std(dim=0))


def test_everything_is_left_as_it_was(model):
    model.norm.eval()
    own = model.noise.generator = torch.Generator().manual_seed(5)
    state = copy.deepcopy(model.state_dict())
    modes, random_state = [module.training for module in model.modules()], torch.get_rng_state()
    first = bmrs.predict(model, X)
    assert torch.equal(bmrs.predict(model, X).mean, first.mean)
    other = torch.Generator().manual_seed(1)
    assert not torch.equal(bmrs.predict(model, X, generator=other).mean, first.mean)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.noise.generator is own
    assert torch.equal(own.get_state(), torch.Generator().manual_seed(5).get_state())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(RuntimeError):
        bmrs.predict(model, torch.ones(5, 3))
    assert [module.training for module in model.modules()] == modes
    assert model.noise.generator is own


def test_a_compacted_network_with_its_noise_predicts_as_the_masked_one_does():
    masked = bmrs.models.MLP(in_features=4, num_blocks=1, hidden=8, num_classes=3)
    masked = randomise(masked, pruned=0.4)
    small = bmrs.compact(masked, X, keep_noise=True)
    (expected, spread), found = (
        bmrs.predict(network, X, of="outputs", draws=1000) for network in (masked, small)
    )
    assert ((found.mean - expected).abs() < 8 * spread / 1000**0.5 + 1e-6).all()
    torch.testing.assert_close(found.std, spread, rtol=0.25, atol=1e-6)


class Two(Everything):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (Everything, {"draws": 1}, ValueError, "draws must be at least 2, got 1"),
        (Everything, {"draws": 2.0}, TypeError, r"draws must be an int, got 2\.0"),
        (
            Everything,
            {"of": "logits"},
            ValueError,
            "of must be one of 'probabilities', 'outputs', got 'logits'",
        ),
        (Everything, {"generator": 3}, TypeError, r"generator must be a torch\.Generator or None, got int"),
        (Two, {}, TypeError, "returns one floating tensor, and Two returned tuple"),
        (lambda: nn.Linear(4, 2), {}, ValueError, r"\(Linear\) has no noise layer .*keep_noise=True"),
        (lambda: "model", {}, TypeError, r"model must be a torch\.nn\.Module"),
    ],
)
def test_what_cannot_be_predicted(make, options, error, message):
    with pytest.raises(error, match=message):
        bmrs.predict(make(), X, **options)
