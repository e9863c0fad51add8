import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bmrs
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


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
            (["hidden", "features.?", "h*"], ["features.0.noise", "features.1.noise", "hidden.noise"]),
            ({"hidden"}, ["hidden.noise"]),
            (lambda name, module: getattr(module, "out_features", 0) > 5, ["hidden.noise"]),
        ],
        ids=["type", "types", "pattern", "prefix", "list", "set", "function"],
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
            (nn.Conv1d(4, 6, 1), (2, 4, 3), 6, -2),
            (nn.Conv1d(4, 6, 1), (4, 3), 6, -2),
            (nn.Conv2d(4, 6, 1), (2, 4, 3, 3), 6, -3),
            (nn.Conv2d(4, 6, 1), (4, 3, 3), 6, -3),
            (nn.Conv3d(2, 6, 1), (2, 2, 3, 3, 3), 6, -4),
            (nn.ConvTranspose2d(4, 6, 1), (2, 4, 3, 3), 6, -3),
            (nn.BatchNorm1d(4), (2, 4, 3), 4, 1),
            (nn.BatchNorm1d(4), (2, 4), 4, 1),
            (nn.BatchNorm2d(4, affine=False), (2, 4, 3, 3), 4, 1),
            (nn.InstanceNorm2d(4), (2, 4, 3, 3), 4, -3),
            (nn.InstanceNorm1d(4), (4, 3), 4, -2),
            (nn.GroupNorm(2, 4), (2, 4, 3, 3), 4, 1),
            (nn.LayerNorm(4), (2, 3, 4), 4, -1),
            (nn.RMSNorm(4), (2, 3, 4), 4, -1),
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

    def test_classes_with_the_names_of_torchs_are_told_from_them(self):
        """As the layers that peft wraps around linear ones."""

        class Adapted(nn.Module):
            def __init__(self):
                super().__init__()
                self.base = nn.Linear(2, 3)

            def forward(self, x):
                return self.base(x)

        Adapted.__qualname__ = Adapted.__name__ = "Linear"
        model = nn.Sequential(Adapted())
        message = (
            rf"layer '0' \({__name__}\.Linear\) .*, as it is none of torch\.nn's: .* or give num_structures,"
        )
        with pytest.raises(ValueError, match=message):
            bmrs.add_noise(model, where="0")
        assert model(torch.ones(4, 2)).shape == (4, 3)
        bmrs.add_noise(model, where="0", num_structures=3, dim=-1)
        assert list(noise_layers(model)) == ["0.noise"]

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
    def test_an_input_by_name_is_refused_by_the_layers_name(self, copied):
        model = bmrs.add_noise(nn.Linear(4, 3), where=nn.Linear, structures="heads", num_heads=2)
        with pytest.raises(
            TypeError, match="layer '' has noise on its input, and was called with that by name"
        ):
            copied(model)(input=torch.randn(2, 4))

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

    def test_norms_of_feature_maps(self):
        """As torchvision and timm have them."""

        class LayerNorm2d(nn.LayerNorm):
            def forward(self, x):
                return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        class InOwnPrecision(nn.LayerNorm):
            def forward(self, x):
                return super().forward(x.float()).type(x.dtype)

        model = bmrs.add_noise(nn.Sequential(LayerNorm2d(4)), where=nn.LayerNorm)
        assert model(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)
        assert bmrs.add_noise(InOwnPrecision(4), where=nn.LayerNorm)(torch.randn(2, 3, 4)).shape == (2, 3, 4)

    def test_a_layer_whose_structures_lie_elsewhere_is_named(self):
        class Moved(nn.Linear):
            def forward(self, x):
                return super().forward(x).movedim(-1, 1)

        model = bmrs.add_noise(nn.Sequential(nn.Identity(), Moved(3, 4)), where="1")
        with pytest.raises(
            ValueError, match=r"got shape \(2, 4, 5\), at layer '1': tell add_noise its num_structures"
        ):
            model(torch.randn(2, 5, 3))

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

    def test_embeddings(self):
        model = bmrs.add_noise(nn.Embedding(7, 4), where=nn.Embedding)
        assert (model.noise.num_structures, model.noise.dim) == (4, -1)
        model.noise.mask[2] = False
        found = model.eval()(torch.tensor([[0, 6]]))
        assert found.shape == (1, 2, 4)
        assert (found == 0).nonzero()[:, 2].tolist() == [2, 2]

    @pytest.mark.parametrize(
        ("layer", "structures"),
        [
            (nn.LSTM(3, 4, batch_first=True), 4),
            (nn.GRU(3, 4, bidirectional=True), 8),
            (nn.RNN(3, 4, num_layers=2), 4),
            (nn.LSTM(3, 4, proj_size=2), 2),
        ],
    )
    @pytest.mark.filterwarnings("ignore:LSTM with projections")
    def test_recurrent_layers(self, layer, structures):
        """The outputs of all steps get noise, the last state does not."""
        x = torch.randn(5, 2, 3)
        expected, state = copy.deepcopy(layer)(x)
        model = bmrs.add_noise(layer, where=type(layer), initial_mu=-1.0).eval()
        assert (model.noise.num_structures, model.noise.dim) == (structures, -1)
        model.noise.mask[0] = False
        found, found_state = model(x)
        torch.testing.assert_close(found, expected * model.noise.expected_noise())
        assert not found[..., 0].any()
        torch.testing.assert_close(found_state, state)
        assert not torch.equal(model.train()(x)[0], found)

    @pytest.mark.parametrize("form", ["batch_first", "times first", "packed", "packed, times first"])
    def test_noise_for_each_example_is_the_same_at_all_its_times(self, form):
        torch.manual_seed(0)
        plain = nn.LSTM(3, 4, batch_first=form in ("batch_first", "packed"))
        noisy = bmrs.add_noise(
            copy.deepcopy(plain), where=nn.LSTM, granularity="sample", initial_mu=-1.0, initial_log_sigma=0.0
        )
        x, lengths = torch.randn(3, 5, 3), torch.tensor([2, 5, 4])
        given = x if plain.batch_first else x.transpose(0, 1)
        if "packed" in form:
            given = pack_padded_sequence(given, lengths, plain.batch_first, enforce_sorted=False)

        def outputs(layer):
            found = layer(given)[0]
            if isinstance(found, PackedSequence):
                return pad_packed_sequence(found, batch_first=True)[0]
            return found if plain.batch_first else found.transpose(0, 1)

        with torch.no_grad():
            expected = outputs(plain)
            theta = outputs(noisy) / expected
            assert torch.equal(outputs(noisy.eval())[:, 0] == 0, expected[:, 0] == 0)
        times = lengths if "packed" in form else torch.full((3,), 5)
        for example, number in enumerate(times.tolist()):
            its = theta[example, :number]
            torch.testing.assert_close(its, its[:1].expand_as(its), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(theta[0, 0], theta[1, 0], rtol=1e-2)

    def test_one_example_without_a_batch_has_one_noise_at_all_its_times(self):
        torch.manual_seed(0)
        plain, x = nn.GRU(3, 4), torch.randn(5, 3)
        noisy = bmrs.add_noise(
            copy.deepcopy(plain), where=nn.GRU, granularity="sample", initial_log_sigma=0.0
        )
        theta = (noisy(x)[0] / plain(x)[0]).detach()
        torch.testing.assert_close(theta, theta[:1].expand(5, 4), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_noise_for_each_example_where_times_come_first_is_warned_of(self, batch_first):
        layer = nn.TransformerEncoderLayer(6, 2, 16, batch_first=batch_first)
        model = nn.ModuleDict({"blocks": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bmrs.add_noise(model, where="blocks.layers.1.linear?", granularity="sample")
        found = [str(warning.message) for warning in caught]
        expected = (
            "in 'blocks.layers.1' (TransformerEncoderLayer) these are times, as it was made with batch_first"
        )
        assert len(found) == (not batch_first)
        assert all(expected in text and "at 'blocks.layers.1.linear1'" in text for text in found)

    def test_in_inference_mode_noise_can_be_trained_later(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5))
        with torch.inference_mode():
            bmrs.add_noise(model, where="0")
            bmrs.add_noise(model, where="1", structures="hidden", granularity="batch")
        model(torch.randn(2, 6, 3))[0].sum().backward()
        assert all(layer.mu.grad is not None for layer in noise_layers(model).values())

    def test_a_name_is_that_layer_whatever_a_pattern_would_make_of_it(self):
        model = nn.ModuleDict({"[x]": nn.Linear(3, 4), "x": nn.Linear(3, 4)})
        bmrs.add_noise(model, where="[x]")
        assert list(noise_layers(model)) == ["[x].noise"]
        bmrs.add_noise(model, where="[xy]")
        assert list(noise_layers(model)) == ["[x].noise", "x.noise"]

    def test_packed_sequences(self):
        layer = nn.LSTM(3, 4, batch_first=True)
        x = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 3), [5, 2], batch_first=True)
        expected = copy.deepcopy(layer)(x)[0]
        model = bmrs.add_noise(layer, where=nn.LSTM, initial_mu=-1.0).eval()
        found = model(x)[0]
        torch.testing.assert_close(found.data, expected.data * model.noise.expected_noise())
        assert torch.equal(found.batch_sizes, expected.batch_sizes)

    @pytest.mark.parametrize("kind", [tuple, list], ids=["tuple", "list"])
    def test_layers_that_return_several_values(self, kind):
        class Several(nn.Linear):
            def forward(self, x):
                return kind([super().forward(x), x, "more"])

        layer = Several(3, 4)
        x = torch.randn(2, 3)
        expected = layer(x)
        model = bmrs.add_noise(layer, where=Several, initial_mu=-1.0).eval()
        if kind is list:
            with pytest.raises(
                TypeError, match=r"must return a tensor or a tuple that begins with one; (?s:.*)returned list"
            ):
                model(x)
            return
        found = model(x)
        torch.testing.assert_close(found[0], expected[0] * model.noise.expected_noise())
        assert found[1] is x
        assert found[2] == "more"

    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_nested_tensors(self, layout):
        examples = [torch.randn(2, 3), torch.randn(5, 3)]
        model = bmrs.add_noise(nn.Linear(3, 4), where=nn.Linear, initial_mu=-1.0)
        model.noise.mask[1] = False
        nested = torch.nested.nested_tensor(examples, layout=layout)
        found = model.eval()(nested).unbind()
        for example, its_found in zip(examples, found, strict=True):
            torch.testing.assert_close(its_found, model(example))
        noisy = model.train()(nested)
        assert [tuple(x.shape) for x in noisy.unbind()] == [(2, 4), (5, 4)]
        assert all(not x[:, 1].any() for x in noisy.unbind())
        sum(x.sum() for x in noisy.unbind()).backward()
        assert model.noise.mu.grad.isfinite().all()
        assert model.noise.mu.grad[0] != 0

    def test_transformer_encoder_with_padding(self):
        """In evaluation mode torch hands nested tensors from layer to layer."""
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
        bmrs.add_noise(model, where="*.linear1", initial_mu=-1.0)
        x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
        with torch.no_grad():
            whole = model(x, src_key_padding_mask=padding)
            torch.testing.assert_close(model(x[1:, :2]), whole[1:, :2])

    def test_models_compiled_before(self):
        model = nn.Sequential(nn.Linear(4, 3))
        compiled = torch.compile(model, backend="eager")
        x = torch.randn(2, 4)
        before = compiled(x)
        bmrs.add_noise(model, where="0", initial_mu=-1.0).eval()
        torch.testing.assert_close(compiled(x), before * model[0].noise.expected_noise())


class TestHeads:
    @pytest.mark.parametrize("training", [True, False])
    def test_noise_multiplies_what_the_projection_reads(self, training):
        torch.manual_seed(0)
        layer = nn.Linear(6, 5)
        plain = copy.deepcopy(layer)
        options = {"structures": "heads", "num_heads": 3}
        model = bmrs.add_noise(layer, where=nn.Linear, initial_mu=-1.0, granularity="batch", **options)
        model.train(training)
        noise = model.noise
        assert (noise.num_structures, noise.structure_size, noise.dim) == (3, 2, -1)
        noise.mask[1] = False
        x = torch.randn(2, 4, 6)
        torch.manual_seed(1)
        found = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(found, plain(noise(x)))
        factors = noise(torch.ones(1, 6))[0]
        assert torch.equal(factors[::2], factors[1::2])
        assert factors.bool().tolist() == [True, True, False, False, True, True]

    def test_hugging_face_projections(self):
        """Their weight is (inputs, outputs)."""

        class Conv1D(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(6, 4))

            def forward(self, x):
                return x @ self.weight

        model = bmrs.add_noise(Conv1D(), where=Conv1D, structures="heads", num_heads=2)
        assert (model.noise.num_structures, model.noise.structure_size) == (2, 3)
        model.noise.mask[0] = False
        x = torch.randn(2, 6)
        factor = model.noise.expected_noise()[1]
        torch.testing.assert_close(model.eval()(x), x[:, 3:] @ model.weight[3:] * factor)
        features = bmrs.add_noise(Conv1D(), where=Conv1D)
        assert (features.noise.num_structures, features.noise.dim) == (4, -1)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
    )
    def test_copies_use_their_own_noise(self, copied):
        model = bmrs.add_noise(nn.Linear(4, 3), where=nn.Linear, structures="heads", num_heads=2).eval()
        other = copied(model)
        other.noise.mask.fill_(False)
        x = torch.randn(2, 4)
        assert torch.equal(other(x), other.bias.expand(2, 3))
        assert not torch.equal(model(x), model.bias.expand(2, 3))

    @pytest.mark.parametrize(
        ("model", "options", "error", "message"),
        [
            (
                nn.Linear(6, 4),
                {"structures": "heads"},
                ValueError,
                r'num_heads must be given with structures="heads"',
            ),
            (nn.Linear(6, 4), {"num_heads": 2}, ValueError, "and only then, got 2"),
            (
                nn.Linear(6, 4),
                {"structures": "filters"},
                ValueError,
                "one of 'features', 'heads', 'hidden', got 'filters'",
            ),
            (
                nn.Linear(6, 4),
                {"structures": "heads", "num_heads": 4},
                ValueError,
                "must divide the 6 inputs of layer '', got 4",
            ),
            (
                nn.Linear(6, 4),
                {"structures": "heads", "num_heads": 0},
                ValueError,
                "must divide the 6 inputs of layer '', got 0",
            ),
            (
                nn.Linear(6, 4),
                {"structures": "heads", "num_heads": 2.0},
                TypeError,
                r"num_heads must be an int, got 2\.0",
            ),
            (
                nn.Conv2d(6, 4, 1),
                {"structures": "heads", "num_heads": 2},
                ValueError,
                "needs the linear layers .* '' is a Conv2d",
            ),
        ],
    )
    def test_errors(self, model, options, error, message):
        with pytest.raises(error, match=message):
            bmrs.add_noise(model, where=type(model), **options)
        assert not noise_layers(model)


class TestErrors:
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
            (nn.Linear(2, 2), [], TypeError, r"a list of them or a function, got \[\]"),
            (nn.Linear(2, 2), ["", nn.Linear], TypeError, "where must be"),
            (nn.Sequential(nn.Linear(2, 2)), ["0", "1"], ValueError, "where='1' matches no layer"),
            (nn.Sequential(nn.Linear(2, 2)), "*", ValueError, r"layer '' \(Sequential\) cannot be inferred"),
            (nn.LayerNorm((2, 3)), nn.LayerNorm, ValueError, r"\(LayerNorm\) cannot be inferred"),
            (nn.MultiheadAttention(4, 2), nn.MultiheadAttention, ValueError, r"cannot be inferred"),
            (nn.MultiheadAttention(4, 2), nn.Linear, ValueError, "read by its MultiheadAttention"),
        ],
    )
    def test_errors(self, model, where, error, message):
        with pytest.raises(error, match=message):
            bmrs.add_noise(model, where=where)

    def test_number_without_dimension_is_an_error(self):
        with pytest.raises(ValueError, match="num_structures and dim must be given together, got 3 and None"):
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
