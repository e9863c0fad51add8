import pytest
import torch
from compaction_cases import assert_compacts, parameter_shapes, prune_structures, randomise
from torch import nn
from torch.nn import functional as F

import bmrs
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


class TestShapes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_lenet(self, dtype):
        model = bmrs.models.LeNet5().to(dtype)
        randomise(model)
        for layer, kept in zip(noise_layers(model).values(), (4, 1, 30, 20), strict=True):
            layer.mask.fill_(False)
            layer.mask[torch.randperm(layer.num_structures)[:kept]] = True
        compacted = assert_compacts(model, torch.randn(4, 1, 32, 32, dtype=dtype))
        assert parameter_shapes(compacted) == {
            "conv1.weight": (4, 1, 5, 5),
            "conv1.bias": (4,),
            "conv2.weight": (1, 4, 5, 5),
            "conv2.bias": (1,),
            "hidden1.weight": (30, 25),
            "hidden1.bias": (30,),
            "hidden2.weight": (20, 30),
            "hidden2.bias": (20,),
            "classes.weight": (10, 20),
            "classes.bias": (10,),
        }
        assert [name for name, _ in compacted.named_children()] == [
            name for name, _ in model.named_children()
        ]
        assert compacted.hidden1.in_features == 25
        assert isinstance(compacted.conv1_relu, nn.ReLU)

    def test_mlp(self):
        model = randomise(bmrs.models.MLP(in_features=12, num_blocks=2, hidden=9))
        for layer in noise_layers(model).values():
            layer.mask.copy_(torch.arange(9) < 4)
        compacted = assert_compacts(model, torch.randn(5, 3, 2, 2))
        assert [tuple(m.weight.shape) for m in compacted if isinstance(m, nn.Linear)] == [
            (4, 12),
            (4, 4),
            (4, 4),
            (10, 4),
        ]
        assert isinstance(compacted.hidden0_tanh, nn.Tanh)

    def test_batch_norm_before_the_noise_shrinks_with_the_convolution(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            NoiseLayer(8, activation="relu"),
            nn.Conv2d(8, 4, 3, padding=1),
        )
        randomise(model, pruned=0.0)
        prune_structures(model[2], [0, 3, 7])
        compacted = assert_compacts(model, torch.randn(2, 3, 6, 6))
        assert compacted[0].weight.shape == (5, 3, 3, 3)
        assert compacted[1].num_features == len(compacted[1].running_var) == 5
        assert compacted[3].weight.shape == (4, 5, 3, 3)

    @pytest.mark.parametrize(
        ("consumer", "removed"),
        [
            (nn.Conv2d(8, 4, 3), True),
            (nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), True),
            (nn.Conv2d(8, 4, 3, padding="valid", bias=False), True),
            (nn.Conv2d(8, 4, 1, padding="same"), True),
            (nn.Conv2d(8, 4, 3, padding=1), False),
            (nn.Conv2d(8, 4, 3, padding="same"), False),
        ],
        ids=str,
    )
    def test_constant_behind_batch_norm_goes_to_the_next_bias_where_that_is_exact(self, consumer, removed):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), NoiseLayer(8), nn.BatchNorm2d(8), nn.Sigmoid(), consumer)
        randomise(model, pruned=0.0)
        prune_structures(model[1], [1, 2])
        compacted = assert_compacts(model, torch.randn(2, 3, 8, 8))
        assert compacted[0].out_channels == (6 if removed else 8)

    @pytest.mark.parametrize(
        ("pool", "removed"),
        [
            (nn.AvgPool2d(2), True),
            (nn.AvgPool2d(3, padding=1, count_include_pad=False), True),
            (nn.AvgPool2d(3, padding=1), False),
            (nn.AvgPool2d(2, divisor_override=3), False),
            (nn.MaxPool2d(3, padding=1), True),
            (nn.AdaptiveAvgPool2d(2), True),
            (nn.AdaptiveMaxPool2d((2, 1)), True),
        ],
        ids=str,
    )
    def test_constant_through_pools(self, pool, removed):
        linear = nn.LazyLinear(3)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), NoiseLayer(8), nn.BatchNorm2d(8), pool, nn.Flatten(), linear
        )
        model(torch.randn(2, 3, 8, 8))
        randomise(model, pruned=0.0)
        prune_structures(model[1], [1, 2])
        compacted = assert_compacts(model, torch.randn(2, 3, 8, 8))
        assert compacted[0].out_channels == (6 if removed else 8)

    def test_noise_on_flattened_features_removes_channels_without_any_left(self):
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), NoiseLayer(12), nn.Linear(12, 2))
        randomise(model, pruned=0.0)
        prune_structures(model[3], [0, 4, 5, 6, 7, 11])
        compacted = assert_compacts(model, torch.randn(2, 1, 4, 4))
        assert compacted[0].out_channels == 2
        assert compacted[-1].in_features == 8

    def test_depthwise_convolution_shrinks_with_its_channels(self):
        model = nn.Sequential(
            nn.Conv2d(3, 6, 1),
            NoiseLayer(6, activation="relu"),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            NoiseLayer(6, activation="relu"),
            nn.Conv2d(6, 4, 1),
        )
        randomise(model, pruned=0.0)
        prune_structures(model[1], [0])
        prune_structures(model[3], [5])
        compacted = assert_compacts(model, torch.randn(2, 3, 5, 5))
        assert compacted[0].out_channels == 4
        assert compacted[2].groups == compacted[2].in_channels == compacted[2].out_channels == 4
        assert compacted[2].weight.shape == (4, 1, 3, 3)

    def test_grouped_convolution_loses_equally_many_channels_of_each_group(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 1),
            NoiseLayer(8, activation="relu"),
            nn.Conv2d(8, 6, 3, groups=2),
            NoiseLayer(6, activation="relu"),
            nn.Conv2d(6, 4, 1),
        )
        randomise(model, pruned=0.0)
        prune_structures(model[1], [0, 1, 3, 6])
        prune_structures(model[3], [0, 4, 5])
        compacted = assert_compacts(model, torch.randn(2, 3, 5, 5))
        assert compacted[0].out_channels == 6
        assert compacted[2].weight.shape == (4, 3, 3, 3)
        assert compacted[4].in_channels == 4

    def test_grouped_convolution_whose_kernels_are_standardised_keeps_what_it_reads(self):
        class Standardised(nn.Conv2d):
            def forward(self, x):
                kernels = self.weight.reshape(1, len(self.weight), -1)
                weight = F.batch_norm(kernels, None, None, training=True).reshape(self.weight.shape)
                return F.conv2d(x, weight, self.bias, groups=self.groups)

        model = nn.Sequential(
            nn.Conv2d(3, 8, 1),
            NoiseLayer(8, activation="relu"),
            Standardised(8, 6, 3, groups=2),
            NoiseLayer(6, activation="relu"),
            nn.Conv2d(6, 4, 1),
        )
        randomise(model, pruned=0.0)
        prune_structures(model[1], [0, 4])
        compacted = assert_compacts(model, torch.randn(2, 3, 5, 5))
        assert compacted[0].out_channels == 8

    def test_channel_space_pruned_empty_by_two_noise_layers_keeps_one_channel(self):
        model = nn.Sequential(nn.Linear(3, 4), NoiseLayer(4), nn.ReLU(), NoiseLayer(4), nn.Linear(4, 2))
        prune_structures(model[1], [0, 1])
        prune_structures(model[3], [2, 3])
        compacted = assert_compacts(model, torch.randn(5, 3))
        assert compacted[0].out_features == 1

    def test_output_keeps_its_shape(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), NoiseLayer(4))
        randomise(model, pruned=0.0)
        prune_structures(model[2], [1])
        compacted = assert_compacts(model, torch.randn(5, 3))
        assert compacted[0].out_features == 4
        assert not compacted[0].weight[1].any()
        assert not compacted[0].bias[1].any()

    def test_input_keeps_its_shape(self):
        model = nn.Sequential(NoiseLayer(3), nn.Flatten(), nn.Linear(12, 2))
        randomise(model, pruned=0.0)
        prune_structures(model[0], [1])
        compacted = assert_compacts(model, torch.randn(5, 3, 2, 2))
        assert compacted[1].in_features == 12
        assert not compacted[1].weight[:, 4:8].any()

    def test_noise_on_the_input_of_a_batch_norm(self):
        model = nn.Sequential(NoiseLayer(3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1))
        randomise(model, pruned=0.0)
        prune_structures(model[0], [1])
        assert assert_compacts(model, torch.randn(5, 3, 4, 4))[1].in_channels == 3

    @pytest.mark.parametrize("log_noise", [-19.0, 5.0, 19.0])
    def test_statistics_of_a_batch_norm_become_those_of_its_input(self, log_noise):
        model = nn.Sequential(
            nn.Conv1d(3, 4, 1), nn.Tanh(), NoiseLayer(4, upper=20.0), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)
        )
        randomise(model, pruned=0.0)
        nn.init.constant_(model[2].mu, log_noise)
        compacted = assert_compacts(model, torch.randn(5, 3, 6))
        with torch.no_grad():
            factors = model[2].expected_noise()
        torch.testing.assert_close(compacted[2].running_mean * factors, model[3].running_mean)
        torch.testing.assert_close(compacted[2].running_var * factors**2, model[3].running_var)

    def test_noise_moves_backward_where_it_cannot_move_forward(self):
        model = nn.Sequential(
            nn.Linear(3, 4), NoiseLayer(4), nn.Tanh(), nn.Linear(4, 2), NoiseLayer(2), nn.Softmax(1)
        )
        randomise(model, pruned=0.0)
        prune_structures(model[1], [2])
        assert assert_compacts(model, torch.randn(5, 3))[0].out_features == 3

    def test_softmax_keeps_every_channel(self):
        model = nn.Sequential(nn.Linear(3, 4), NoiseLayer(4), nn.Softmax(1), nn.Linear(4, 2))
        randomise(model, pruned=0.0)
        prune_structures(model[1], [2])
        assert assert_compacts(model, torch.randn(5, 3))[0].out_features == 4

    def test_linear_layers_on_sequences(self):
        model = nn.Sequential(
            nn.Linear(3, 4), NoiseLayer(4, dim=-1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)
        )
        randomise(model, pruned=0.0)
        prune_structures(model[1], [2])
        compacted = assert_compacts(model, torch.randn(6, 5, 3))
        assert compacted[0].out_features == 3
        assert compacted[-1].in_features == 15
