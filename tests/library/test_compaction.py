import copy

import pytest
import torch
import torch.nn.functional as F
from compaction_cases import Chain, assert_compacts, parameter_shapes, prune_structures, randomise
from torch import nn

import bmrs
from bmrs.compaction.stock_layers import WEIGHT_LAYERS
from bmrs.noise_layer import NoiseLayer, noise_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(40))
def test_random_chains(seed, dtype):
    torch.manual_seed(seed)
    chain = Chain(seed)
    model = randomise(chain.model, seed, pruned=[0.0, 0.3, 0.6, 1.0][seed % 4]).to(dtype).train()
    compacted = assert_compacts(model, torch.randn(chain.example_shape, dtype=dtype))
    kept = sum(p.numel() for p in compacted.parameters())
    noise = sum(2 * layer.num_structures for layer in noise_layers(model).values())
    # Folding may add a bias where there was none.
    biases = sum(len(m.weight) for m in model if isinstance(m, WEIGHT_LAYERS) and m.bias is None)
    norms = sum(2 * m.num_features for m in model if getattr(m, "affine", None) is False)
    assert kept <= sum(p.numel() for p in model.parameters()) - noise + biases + norms


class Functional(nn.Module):
    """The same kinds of layers by function and method calls, with every way to flatten."""

    def __init__(self, flatten):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.conv = nn.Conv2d(6, 5, 3)
        self.noise = NoiseLayer(6)
        self.hidden = nn.Linear(20, 8)
        self.classes = nn.Linear(8, 3)
        self.flatten = flatten

    def forward(self, x):
        x = F.relu(self.features(x), inplace=True)
        x = F.max_pool2d(self.noise(x), 2, stride=2)
        x = F.dropout(F.leaky_relu(self.conv(x), 0.1), 0.5, self.training)
        x = F.adaptive_avg_pool2d(x, (2, 2))
        x = self.flatten(x)
        x = torch.tanh(self.hidden(x)).sigmoid()
        return F.log_softmax(self.classes(x), dim=-1)


class TestModels:
    @pytest.mark.parametrize(
        "flatten",
        [
            lambda x: torch.flatten(x, 1),
            lambda x: x.flatten(start_dim=1),
            lambda x: x.view(x.size(0), -1),
            lambda x: x.reshape(x.shape[0], 20),
            lambda x: x.contiguous().view(-1, 20),
            nn.Flatten(),
        ],
        ids=["flatten", "method", "size", "shape", "view", "module"],
    )
    def test_function_calls(self, flatten):
        model = bmrs.add_noise(Functional(flatten), where="hidden")
        randomise(model, pruned=0.0)
        prune_structures(model.noise, [0, 5])
        prune_structures(model.hidden.noise, [1])
        compacted = assert_compacts(model, torch.randn(4, 1, 8, 8))
        assert [type(child).__name__ for child in compacted] == [
            "Conv2d",
            "BatchNorm2d",
            "ReLU",
            "MaxPool2d",
            "Conv2d",
            "LeakyReLU",
            "AdaptiveAvgPool2d",
            "Flatten",
            "Linear",
            "Tanh",
            "Sigmoid",
            "Linear",
            "LogSoftmax",
        ]
        assert compacted.features_0.out_channels == 4
        assert compacted.hidden.out_features == 7
        assert "features_1" in dict(compacted.named_children())

    def test_added_noise_in_the_place_of_its_layer(self):
        model = nn.Sequential(
            nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2)
        )
        bmrs.add_noise(model, where=lambda name, module: name in ("0", "3"), activation="relu")
        randomise(model)
        prune_structures(model[0].noise, [2])
        compacted = assert_compacts(model, torch.randn(3, 2, 6))
        assert compacted[0].out_channels == int(model[0].noise.mask.sum())

    def test_model_that_is_one_noisy_layer(self):
        model = bmrs.add_noise(nn.Linear(3, 4), where=nn.Linear)
        prune_structures(model.noise, [1])
        assert list(dict(assert_compacts(model, torch.randn(2, 3)).named_children())) == ["linear"]

    def test_model_without_noise(self):
        compacted = assert_compacts(bmrs.models.LeNet5(noise=False), torch.randn(2, 1, 32, 32))
        assert parameter_shapes(compacted) == parameter_shapes(bmrs.models.LeNet5(noise=False))

    def test_layer_called_twice(self):
        linear, noise = nn.Linear(4, 4), NoiseLayer(4, activation="relu")
        model = nn.Sequential(linear, noise, linear, noise, nn.Linear(4, 2))
        prune_structures(noise, [0])
        compacted = assert_compacts(model, torch.randn(3, 4))
        assert [name for name, _ in compacted.named_children()] == ["0", "1", "0_2", "1_2", "4"]
        assert compacted[0].weight.shape == (3, 4)
        assert compacted[2].weight.shape == (3, 3)

    def test_names_that_sequential_uses_itself(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.append = nn.Linear(2, 3)
                self.forward_ = nn.Linear(3, 1)

            def forward(self, x):
                return self.forward_(self.append(x))

        compacted = assert_compacts(Named(), torch.randn(3, 2))
        assert [name for name, _ in compacted.named_children()] == ["append_", "forward_"]

    def test_sequence_of_one_example_input(self):
        model = bmrs.models.MLP(in_features=3, num_blocks=0, hidden=4)
        assert isinstance(bmrs.compact(model, (torch.randn(1, 3),)), nn.Sequential)

    def test_batch_norm_behind_noise_can_be_trained_further(self):
        """Batch norm undoes a scale in training mode, so that the compacted one must not carry it in its weight."""
        model = nn.Sequential(
            nn.Linear(3, 4), NoiseLayer(4, initial_mu=-1.0), nn.BatchNorm1d(4), nn.Linear(4, 2)
        )
        randomise(model[2])
        compacted = assert_compacts(model, torch.randn(5, 3))
        x = torch.randn(500, 3)
        mean, std = model[0](x).mean(0), model[0](x).std(0)
        normalised = (model[0](x) - mean) / std
        expected = model[3](normalised * model[2].weight + model[2].bias)
        torch.testing.assert_close(compacted.train()(x), expected, rtol=1e-2, atol=1e-2)

    def test_compacted_model_trains(self):
        compacted = bmrs.compact(
            bmrs.models.MLP(in_features=3, num_blocks=1, hidden=4), torch.randn(1, 3)
        ).train()
        optimizer = torch.optim.SGD(compacted.parameters(), lr=0.1)
        x, before = torch.randn(5, 3), copy.deepcopy(compacted)
        compacted(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(compacted(x), before(x))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_16_bit_model(self, dtype):
        model = randomise(bmrs.models.MLP(in_features=6, num_blocks=1, hidden=8)).to(dtype)
        x = torch.randn(4, 6, dtype=dtype)
        compacted = bmrs.compact(model, x)
        assert {p.dtype for p in compacted.parameters()} == {dtype}
        assert compacted.hidden0.out_features < 8
        expected = model.eval()(x)
        assert (compacted(x) - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()


def test_structures_that_stay_can_keep_the_weights_that_were_trained_without_noise():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    model = bmrs.add_noise(copy.deepcopy(dense), where="0", initial_mu=-1.0)
    model[0].noise.mask[1::2] = False
    inputs = torch.randn(5, 4)
    compacted = bmrs.compact(model, inputs, expected_noise=False)
    assert compacted[0].weight.shape == (3, 4)
    assert torch.equal(compacted[0].weight, dense[0].weight[::2])
    assert torch.equal(compacted[2].weight, dense[2].weight[:, ::2])
    assert not torch.allclose(compacted(inputs), bmrs.compact(model, inputs)(inputs))
    assert model[0].noise.expected_noise().detach()[0] < 0.4
