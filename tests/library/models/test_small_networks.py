import pytest
import torch
from torch import nn

from bmrs.models import MLP, LeNet5
from bmrs.noise.lookup import noise_layers

BUILDERS = {
    "mlp": lambda **options: MLP(in_features=48, num_blocks=2, hidden=11, **options),
    "lenet": lambda **options: LeNet5(in_channels=1, **options),
}
SHAPES = {"mlp": (4, 3, 4, 4), "lenet": (4, 1, 32, 32)}


@pytest.mark.parametrize("name", BUILDERS)
class TestBoth:
    def test_dense_network_has_the_same_initial_weights(self, name):
        torch.manual_seed(5)
        noisy = BUILDERS[name]()
        torch.manual_seed(5)
        dense = BUILDERS[name](noise=False)
        assert not noise_layers(dense)
        noisy_weights = noisy.state_dict()
        for key, value in dense.state_dict().items():
            assert torch.equal(value, noisy_weights[key])

    def test_noise_near_one_gives_the_dense_networks_outputs(self, name):
        torch.manual_seed(5)
        noisy, dense = BUILDERS[name]().eval(), BUILDERS[name](noise=False).eval()
        dense.load_state_dict({k: v for k, v in noisy.state_dict().items() if k in dense.state_dict()})
        with torch.no_grad():
            for layer in noise_layers(noisy).values():
                layer.mu.fill_(-1e-4)
                layer.log_sigma.fill_(-14.0)
        x = torch.randn(SHAPES[name])
        torch.testing.assert_close(noisy(x), dense(x), rtol=1e-2, atol=1e-3)

    def test_trains_and_passes_options_on(self, name):
        model = BUILDERS[name](num_classes=7, granularity="batch", backend="torch")
        y = model(torch.randn(SHAPES[name]))
        assert y.shape == (4, 7)
        y.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        for layer in noise_layers(model).values():
            assert (layer.granularity, layer.backend) == ("batch", "torch")


def test_mlp_follows_the_paper():
    model = MLP(in_features=1024, num_blocks=7, hidden=100)
    widths = [(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)]
    assert widths == [(1024, 100)] + 7 * [(100, 100)] + [(100, 10)]
    assert [layer.num_structures for layer in noise_layers(model).values()] == 8 * [100]
    assert {layer.activation for layer in noise_layers(model).values()} == {"tanh"}


def test_mlp_without_blocks_has_one_hidden_layer():
    model = MLP(in_features=4, num_blocks=0, hidden=3)
    assert len(noise_layers(model)) == 1
    with pytest.raises(ValueError, match="num_blocks must be at least 0, got -1"):
        MLP(in_features=4, num_blocks=-1, hidden=3)


@pytest.mark.parametrize("channels", [1, 3])
def test_lenet_follows_the_paper(channels):
    model = LeNet5(in_channels=channels)
    structures = [layer.num_structures for layer in noise_layers(model).values()]
    assert structures == [6 * channels, 16 * channels, 120 * channels, 84 * channels]
    assert {layer.activation for layer in noise_layers(model).values()} == {"relu"}
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size for m in convolutions] == [(5, 5), (5, 5)]
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 10)
