import copy
import pickle

import pytest
import torch
from torch import nn

import bmrs
from bmrs.noise_layer import NoiseLayer, noise_layers


def set_posterior(layer: NoiseLayer) -> NoiseLayer:
    """Give every structure another posterior."""
    with torch.no_grad():
        layer.mu.copy_(torch.linspace(-6.0, 0.5, layer.num_structures))
        layer.log_sigma.copy_(torch.linspace(-3.0, 1.0, layer.num_structures))
    return layer


class Block(nn.Module):
    """A module with a shared layer, called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.conv
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.again(self.conv(x)))


class TestAddNoise:
    @pytest.mark.parametrize(
        ("where", "expected"),
        [
            (nn.Conv2d, ["features.0.noise"]),
            ((nn.Conv2d, nn.Linear), ["features.0.noise", "hidden.noise", "classes.noise"]),
            ("features.?", ["features.0.noise", "features.1.noise"]),
            ("h*", ["hidden.noise"]),
            (lambda name, module: getattr(module, "out_features", 0) > 5, ["hidden.noise"]),
        ],
        ids=["type", "types", "pattern", "prefix", "function"],
    )
    def test_chooses_layers(self, where, expected):
        features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        model = nn.Sequential()
        model.add_module("features", features)
        model.add_module("flatten", nn.Flatten())
        model.add_module("hidden", nn.Linear(16, 6))
        model.add_module("classes", nn.Linear(6, 2))
        assert bmrs.add_noise(model, where=where) is model
        assert list(noise_layers(model)) == expected
        assert model(torch.randn(3, 1, 4, 4)).shape == (3, 2)

    @pytest.mark.parametrize(
        ("layer", "shape", "structures", "dim"),
        [
            (nn.Linear(4, 5), (2, 7, 4), 5, -1),
            (nn.Conv1d(4, 6, 1), (2, 4, 3), 6, 1),
            (nn.Conv3d(2, 6, 1), (2, 2, 3, 3, 3), 6, 1),
            (nn.ConvTranspose2d(4, 6, 1), (2, 4, 3, 3), 6, 1),
            (nn.BatchNorm1d(4), (2, 4, 3), 4, 1),
            (nn.BatchNorm2d(4, affine=False), (2, 4, 3, 3), 4, 1),
            (nn.LayerNorm(4), (2, 3, 4), 4, -1),
        ],
    )
    def test_infers_structures_of_a_layer_that_is_the_model_itself(self, layer, shape, structures, dim):
        plain = copy.deepcopy(layer).eval()
        model = bmrs.add_noise(layer, where=type(layer), initial_mu=-1.0)
        (noise,) = noise_layers(model).values()
        assert (noise.num_structures, noise.dim) == (structures, dim)
        x = torch.randn(shape)
        mean = noise.expected_noise()[0].item()
        assert mean == pytest.approx(0.3679, rel=1e-3)
        torch.testing.assert_close(model.eval()(x), plain(x) * mean)
        assert not torch.equal(model.train()(x), model(x))

    def test_options_device_dtype_and_mode_carry_over(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3).double()).to("meta").eval()
        options = {
            "granularity": "batch",
            "activation": "tanh",
            "lower": -10.0,
            "upper": 1.0,
            "backend": "torch",
        }
        bmrs.add_noise(model, where=nn.Linear, initial_log_sigma=-2.0, **options)
        first, second = noise_layers(model).values()
        assert {name: getattr(first, name) for name in options} == options
        assert first.initial_log_sigma == -2.0
        assert first.mu.is_meta
        assert (first.mu.dtype, second.mu.dtype) == (torch.float32, torch.float64)
        assert not first.training

    def test_other_layers_need_the_number_and_dimension(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
        with pytest.raises(ValueError, match=r"structures of layer '1' \(Tanh\) cannot be inferred"):
            bmrs.add_noise(model, where=nn.Tanh)
        bmrs.add_noise(model, where=nn.Tanh, num_structures=3, dim=-1)
        assert list(noise_layers(model)) == ["1.noise"]
        assert model(torch.randn(4, 2)).shape == (4, 3)

    def test_shared_layer_gets_one_noise_layer_by_either_name(self):
        model = bmrs.add_noise(Block(), where="again")
        assert list(noise_layers(model)) == ["conv.noise"]
        with torch.no_grad():
            model.conv.noise.mask.fill_(False)
        model.eval()
        assert torch.equal(model(torch.randn(1, 3, 4, 4)), model.norm(torch.zeros(1, 3, 4, 4)))

    def test_weights_saved_without_noise_still_load(self):
        plain = Block().state_dict()
        missing, unexpected = bmrs.add_noise(Block(), where=nn.Conv2d).load_state_dict(plain, strict=False)
        assert not unexpected
        assert all(".noise." in name for name in missing)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
    )
    def test_copies_use_their_own_noise(self, copied):
        model = bmrs.add_noise(nn.Sequential(nn.Linear(2, 3)), where=nn.Linear).eval()
        other = copied(model)
        with torch.no_grad():
            other[0].noise.mask.fill_(False)
        x = torch.randn(4, 2)
        assert (other(x) == 0).all()
        assert (model(x) != 0).any()

    def test_acts_as_behind_a_following_relu(self):
        torch.manual_seed(0)
        layer = nn.Linear(4, 5)
        fused = nn.Sequential(copy.deepcopy(layer), set_posterior(NoiseLayer(5, activation="relu")))
        added = bmrs.add_noise(nn.Sequential(layer, nn.ReLU()), where=nn.Linear)
        set_posterior(added[0].noise)
        x = torch.randn(6, 4)
        torch.testing.assert_close(added.eval()(x), fused.eval()(x))

    @pytest.mark.parametrize("training", [True, False])
    def test_compiles_to_one_graph(self, training):
        model = bmrs.add_noise(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), where="0").train(training)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, 4)
        torch.manual_seed(3)
        found = compiled(x)
        torch.manual_seed(3)
        torch.testing.assert_close(found, model(x))

    def test_transformer_layer_does_not_bypass_it(self):
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True).eval()
        bmrs.add_noise(layer, where="linear1")
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            before = layer(x)
            layer.linear1.noise.mask.fill_(False)
            assert not torch.equal(layer(x), before)

    @pytest.mark.parametrize(
        ("model", "where", "error", "message"),
        [
            (
                nn.Linear(2, 2),
                "conv*",
                ValueError,
                r"where='conv\*' matches no layer of the model \(Linear\)",
            ),
            (nn.Linear(2, 2), 3, TypeError, "where must be a module type, a tuple of them, a name pattern"),
            (nn.Sequential(nn.Linear(2, 2)), "*", ValueError, r"layer '' \(Sequential\) cannot be inferred"),
            (nn.LayerNorm((2, 3)), nn.LayerNorm, ValueError, r"\(LayerNorm\) cannot be inferred"),
            (nn.MultiheadAttention(4, 2), nn.Linear, ValueError, "read by its MultiheadAttention"),
        ],
    )
    def test_errors(self, model, where, error, message):
        with pytest.raises(error, match=message):
            bmrs.add_noise(model, where=where)

    def test_number_without_dimension_is_an_error(self):
        with pytest.raises(
            ValueError, match="num_structures and dim must be given together, were 3 and None"
        ):
            bmrs.add_noise(nn.Linear(2, 3), where=nn.Linear, num_structures=3)

    def test_an_error_leaves_the_model_unchanged(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        bmrs.add_noise(model, where="1")
        with pytest.raises(ValueError, match=r"layer '1' \(Linear\) already has a noise layer"):
            bmrs.add_noise(model, where=nn.Linear)
        assert list(noise_layers(model)) == ["1.noise"]

    def test_foreign_attribute_of_the_same_name_is_an_error(self):
        layer = nn.Linear(2, 3)
        layer.noise = 0.1
        with pytest.raises(ValueError, match="already has an attribute 'noise'"):
            bmrs.add_noise(layer, where=nn.Linear)
