import copy
import json

import pytest
import torch
import torch.nn.functional as F
from compaction_cases import (
    Chain,
    assert_compacts,
    assert_equal_outputs,
    parameter_shapes,
    prune_structures,
    randomise,
)
from torch import nn

import bmrs
from bmrs.compaction.surgery import ChannelScale
from bmrs.graph.stock_layers import STOCK_LAYERS
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model .* has no noise layer")
@pytest.mark.parametrize("seed", range(48))
def test_random_chains(seed):
    dtype = [torch.float32, torch.float64][seed % 2]
    torch.manual_seed(seed)
    chain = Chain(seed)
    model = randomise(chain.model, seed, pruned=[0.0, 0.3, 0.6, 1.0][seed // 2 % 4]).to(dtype).train()
    compacted = assert_compacts(model, torch.randn(chain.example_shape, dtype=dtype))
    stock = {type(layer) for layer in compacted if not isinstance(layer, ChannelScale)}
    assert stock <= {*STOCK_LAYERS, nn.Identity}


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
        assert type(compacted) is Functional
        assert parameter_shapes(compacted) == {
            "features.0.weight": (4, 1, 3, 3),
            "features.0.bias": (4,),
            "features.1.weight": (4,),
            "features.1.bias": (4,),
            "conv.weight": (5, 4, 3, 3),
            "conv.bias": (5,),
            "hidden.weight": (7, 20),
            "hidden.bias": (7,),
            "classes.weight": (3, 7),
            "classes.bias": (3,),
        }
        assert compacted.features[0].out_channels == compacted.features[1].num_features == 4
        assert len(compacted.features[1].running_var) == 4
        assert (compacted.hidden.out_features, compacted.classes.in_features) == (7, 7)

    @pytest.mark.parametrize(
        ("flatten", "form"),
        [
            (lambda x: torch.flatten(x, 1), "module"),
            (lambda x: x.view(x.size(0), -1), "module"),
            (lambda x: x.view(-1, x[0].numel()), "module"),
            (lambda x: x.reshape(x.shape[0], 20), "graph"),
            (lambda x: x.view(-1, 20), "graph"),
        ],
        ids=["flatten", "size", "computed", "shape", "view"],
    )
    def test_sizes_in_the_code_make_a_graph_where_they_would_not_fit(self, flatten, form):
        model = bmrs.add_noise(Functional(flatten), where="conv")
        randomise(model, pruned=0.0)
        prune_structures(model.noise, [0, 5])
        prune_structures(model.conv.noise, [1])
        compacted = assert_compacts(model, torch.randn(4, 1, 8, 8), form=form)
        assert parameter_shapes(compacted)["features.0.weight"] == (4, 1, 3, 3)
        assert parameter_shapes(compacted)["hidden.weight"] == (8, 16)
        assert ("20" in bmrs.compact_report(compacted).form_because) == (form == "graph")

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
        compacted = assert_compacts(model, torch.randn(2, 3))
        assert list(parameter_shapes(compacted)) == ["weight", "bias"]
        assert not compacted.weight[1].any()
        assert not compacted._forward_hooks

    def test_model_that_is_a_noise_layer(self):
        model = randomise(NoiseLayer(3, activation="relu"))
        compacted = bmrs.compact(model, torch.randn(2, 3))
        assert_equal_outputs(compacted, model, torch.randn(2, 3))
        assert not noise_layers(compacted)

    def test_model_without_noise(self):
        """As one into which the state of a masked model was loaded without asking for all of it."""
        plain, images = bmrs.models.LeNet5(noise=False), torch.randn(2, 1, 32, 32)
        plain.load_state_dict(bmrs.models.LeNet5().state_dict(), strict=False)
        with pytest.warns(
            UserWarning, match=r"\(LeNet5\) has no noise layer, .*strict=False.*add_noise as for"
        ):
            compacted = assert_compacts(plain, images)
        assert parameter_shapes(compacted) == parameter_shapes(plain)
        assert_compacts(compacted, images)  # nothing is missed of one that was compacted

    def test_layer_called_twice(self):
        first, linear, noise = nn.Linear(3, 4), nn.Linear(4, 4), NoiseLayer(4, activation="relu")
        model = nn.Sequential(first, NoiseLayer(4), linear, noise, linear, noise, nn.Linear(4, 2))
        prune_structures(noise, [0])
        whole = assert_compacts(model, torch.randn(3, 3))
        # The calls read different channels, so that none of them leaves.
        assert whole.get_submodule("2").weight.shape == (4, 4)
        assert not whole.get_submodule("2").weight[0].any()
        prune_structures(model[1], [0])
        compacted = assert_compacts(model, torch.randn(3, 3))
        assert compacted.get_submodule("2").weight.shape == (3, 3)
        assert compacted.get_submodule("2").weight is compacted.get_submodule("4").weight
        assert list(compacted._modules) == ["0", "2", "3", "4", "5", "6"]
        assert compacted.get_submodule("6").in_features == 3

    def test_sequence_of_one_example_input(self):
        model = randomise(bmrs.models.MLP(in_features=3, num_blocks=0, hidden=4))
        assert type(assert_compacts(model, (torch.randn(1, 3),))) is bmrs.models.MLP

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


class TestReport:
    @pytest.fixture
    def model(self) -> nn.Module:
        """One structure of each noise layer pruned; those of the output stay."""
        torch.manual_seed(0)
        norm, relu = nn.BatchNorm1d(6), NoiseLayer(6, activation="relu", initial_mu=-1.0)
        model = nn.Sequential(nn.Linear(4, 6, bias=False), norm, relu, nn.Linear(6, 3), nn.Tanh())
        bmrs.add_noise(model, where="4", num_structures=3, dim=-1, initial_mu=-1.0)
        prune_structures(model[2], [0, 5])
        prune_structures(model[4].noise, [1])
        return model

    def test_numbers(self, model):
        report = bmrs.compact_report(bmrs.compact(model, torch.randn(5, 4)))
        assert (report.form, report.form_because) == ("module", "")
        assert (report.pruned, report.removed) == (3, 2)
        assert report.paper_compression == pytest.approx(100 * 3 / 9)
        assert (report.parameters_before, report.parameters_after) == (24 + 12 + 21, 16 + 8 + 15)
        # Two statistics for each channel of the batch norm, its counter, and factors that could not be folded.
        assert report.bytes_before == 4 * (24 + 12 + 21) + 4 * 12 + 8
        assert report.bytes_after in (4 * (16 + 8 + 15) + 4 * 8 + 8, 4 * (16 + 8 + 15) + 4 * 8 + 8 + 4 * 3)
        assert (report.flops_before, report.flops_after) == (2 * 5 * (24 + 18), 2 * 5 * (16 + 12))
        assert 0 <= report.error < 1e-6

    def test_layers(self, model):
        first, last = bmrs.compact_report(bmrs.compact(model, torch.randn(5, 4))).layers
        assert (first.name, first.structures, first.pruned, first.removed) == ("2", 6, 2, 2)
        assert (first.kept_because, first.folded, first.not_folded_because) == ({}, True, "")
        assert (last.name, last.structures, last.pruned, last.removed) == ("4.noise", 3, 1, 0)
        assert last.kept_because == {"it is an output of the model at the model's output": 1}
        assert not last.folded
        assert "tanh" in last.not_folded_because

    def test_text_and_plain_values(self, model):
        report = bmrs.compact_report(bmrs.compact(model, torch.randn(5, 4)))
        plain = json.loads(json.dumps(report.to_dict()))
        assert plain["layers"][0]["removed"] == 2
        assert (plain["pruned"], plain["removed"], plain["form"]) == (3, 2, "module")
        text = str(report)
        assert "parameters: 57 before, 39 after (68.4 %)" in text
        assert "4.noise: 1 pruned, but kept with zero weights: it is an output of the model" in text
        assert "4.noise: one multiplication by its factors remains: " in text
        assert "graph" not in text

    def test_survives_copies(self, model):
        compacted = bmrs.compact(model, torch.randn(5, 4))
        assert bmrs.compact_report(copy.deepcopy(compacted)) == bmrs.compact_report(compacted)

    def test_of_another_network_is_an_error(self, model):
        with pytest.raises(TypeError, match=r"a network that bmrs\.compact returned, got Sequential"):
            bmrs.compact_report(model)
