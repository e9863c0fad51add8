import pytest
import torch
from compaction_cases import randomise
from tiny_registry import images, tiny
from torch import nn

import bmrs
from bmrs.models import MLP, NETWORKS, LeNet5, NoisePlace, place_noise
from bmrs.noise.lookup import noise_layers


class Attention(nn.Module):
    """Reads heads, whose number it does not keep."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.act = nn.Tanh()

    def forward(self, x):
        return self.act(self.proj(x))


@pytest.mark.parametrize("name", ["mlp", "lenet5"])
def test_noise_behind_activations_is_that_of_fused_layers(name):
    dense = tiny(name)
    behind = randomise(place_noise(tiny(name), NETWORKS[name].placements["paper"], backend="torch"))
    fused = (
        LeNet5(num_classes=5, backend="torch")
        if name == "lenet5"
        else MLP(in_features=16, num_blocks=1, hidden=9, num_classes=5, backend="torch")
    )
    fused.load_state_dict({key.replace(".noise.", "."): value for key, value in behind.state_dict().items()})
    x = images(name, 3)
    for train in (False, True):
        torch.manual_seed(1)
        expected = fused.train(train)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(behind.train(train)(x), expected)
        assert not torch.allclose(dense(x), expected)


def test_patterns_and_options_reach_every_layer():
    model = place_noise(
        tiny("lenet5_caffe"), ["conv?", "hidden_relu"], granularity="batch", backend="torch", initial_mu=-2.0
    )
    layers = noise_layers(model)
    assert {name: layer.num_structures for name, layer in layers.items()} == {
        "conv1.noise": 4,
        "conv2.noise": 6,
        "hidden_relu.noise": 9,
    }
    for layer in layers.values():
        assert (layer.granularity, layer.backend, layer.initial_mu) == ("batch", "torch", -2.0)
    assert model.train()(images("lenet5_caffe")).shape == (2, 5)


def test_activations_and_dropout_take_the_structures_of_the_layer_in_front():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(16, 3),
        nn.GELU(),
    )
    place_noise(model, ["3", NoisePlace(nn.GELU)])
    assert {name: (n.num_structures, n.dim) for name, n in noise_layers(model).items()} == {
        "3.noise": (4, 1),
        "6.noise": (3, -1),
    }


def test_names_are_those_inside_torch_compile():
    model = torch.compile(tiny("vit_b16"), backend="eager")
    assert place_noise(model, NETWORKS["vit_b16"].placements["inner"]) is model
    block = "encoder.layers.encoder_layer_0"
    assert list(noise_layers(model)) == [f"{block}.self_attention.out_proj.noise", f"{block}.mlp.0.noise"]


class TestSuggest:
    def test_takes_all_layers_that_are_added_and_else_the_last(self):
        model = place_noise(tiny("resnet20"), "suggest", example_inputs=images("resnet20"))
        blocks = ("layer1.0", "layer2.0", "layer3.0")
        norms = ["bn1", *(f"{block}.bn{i}" for block in blocks for i in (1, 2))]
        norms += [f"{block}.downsample.1" for block in blocks[1:]]
        assert sorted(noise_layers(model)) == sorted(f"{name}.noise" for name in norms)
        assert bmrs.compact(randomise(model), images("resnet20"))

    def test_needs_an_example_and_a_place(self):
        with pytest.raises(ValueError, match='placement="suggest" needs example_inputs'):
            place_noise(tiny("mlp"), "suggest")
        with pytest.raises(ValueError, match=r"suggest\" finds no place in the model \(Linear\)"):
            place_noise(nn.Linear(2, 2), "suggest", example_inputs=torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("placement", "error", "message"),
    [
        (
            "paper",
            ValueError,
            "must be a sequence of patterns or NoisePlace records, or \"suggest\", got 'paper'",
        ),
        ([], ValueError, r'or "suggest", got \[\]'),
        ([3], TypeError, "must consist of patterns or NoisePlace records, got 3"),
        (["proj", "nowhere"], ValueError, "where='nowhere' matches no layer"),
        (["proj", "p*"], ValueError, r"layer 'proj' \(Linear\) already has a noise layer"),
        (["proj", "act"], ValueError, r"structures of layer 'act' \(Tanh\) cannot be inferred"),
        (
            [NoisePlace("proj", structures="heads")],
            ValueError,
            "reads cannot be inferred, as Attention has no",
        ),
        (["proj", NoisePlace("", structures="heads", num_heads=2)], ValueError, "and '' is a Attention"),
        ([NoisePlace("proj", num_structures=8)], ValueError, "num_structures and dim must be given together"),
    ],
)
def test_errors_leave_the_model_as_it_was(placement, error, message):
    model = Attention()
    with pytest.raises(error, match=message):
        place_noise(model, placement)
    assert not noise_layers(model)
    place_noise(model, [NoisePlace("proj", structures="heads", num_heads=2)], backend="torch")
    assert model.proj.noise.structure_size == 4
    with pytest.raises(ValueError, match="matches no layer"):
        place_noise(model, ["nowhere"])
    assert noise_layers(model).keys() == {"proj.noise"}
    assert bmrs.kl_divergence(model, weight=1.0) >= 0
