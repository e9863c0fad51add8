"""Chains of stock layers in files: format version 1."""

import copy
import json
import os
import re
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from saved_files import rewrite
from torch import nn

import bmrs
from bmrs.graph.stock_layers import STOCK_LAYERS, constructor_arguments
from bmrs.noise.lookup import noise_layers

EXAMPLES: list[nn.Module] = [
    nn.Linear(3, 2),
    nn.Linear(3, 2, bias=False),
    nn.Conv1d(2, 4, 3, padding="same"),
    nn.Conv2d(
        4, 6, (3, 2), stride=2, padding=(1, 0), dilation=2, groups=2, bias=False, padding_mode="reflect"
    ),
    nn.Conv3d(1, 2, 1),
    nn.BatchNorm1d(3),
    nn.BatchNorm2d(3, eps=1e-3, momentum=None, affine=False),
    nn.BatchNorm3d(2, track_running_stats=False),
    nn.MaxPool1d(2),
    nn.MaxPool2d((2, 3), stride=1, padding=1, ceil_mode=True),
    nn.MaxPool3d(2),
    nn.AvgPool1d(2),
    nn.AvgPool2d(3, padding=1, count_include_pad=False, divisor_override=2),
    nn.AvgPool3d(2),
    nn.AdaptiveAvgPool1d(1),
    nn.AdaptiveAvgPool2d((None, 2)),
    nn.AdaptiveAvgPool3d(1),
    nn.AdaptiveMaxPool1d(1),
    nn.AdaptiveMaxPool2d(1),
    nn.AdaptiveMaxPool3d(1),
    nn.Dropout(0.3),
    nn.Dropout1d(),
    nn.Dropout2d(),
    nn.Dropout3d(),
    nn.AlphaDropout(),
    nn.FeatureAlphaDropout(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.3),
    nn.ReLU6(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.ELU(0.5),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Hardswish(),
    nn.Hardtanh(-2.0, 3.0),
    nn.Softplus(2, 10),
    nn.Softmax(dim=1),
    nn.LogSoftmax(dim=-1),
    nn.Flatten(),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def compacted() -> nn.Sequential:
    torch.manual_seed(0)
    noisy = bmrs.models.LeNet5()
    noisy.conv1_relu.mask[:3] = False
    return bmrs.compact(noisy, torch.randn(2, 1, 32, 32))


@pytest.fixture
def model(compacted) -> nn.Sequential:
    return copy.deepcopy(compacted)


class TestRoundTrip:
    def test_examples_cover_every_known_layer(self):
        assert {type(layer) for layer in EXAMPLES} == set(STOCK_LAYERS)

    @pytest.mark.parametrize("layer", EXAMPLES, ids=lambda layer: type(layer).__name__)
    def test_every_known_layer(self, layer, path):
        bmrs.save(path, nn.Sequential(layer))
        (loaded,) = bmrs.load(path)
        assert type(loaded) is type(layer)
        assert repr(loaded) == repr(layer)
        assert constructor_arguments(loaded) == constructor_arguments(layer)
        for name, value in layer.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_weights_are_bitwise_equal(self, model, path, dtype):
        model.to(dtype)
        bmrs.save(path, model)
        loaded = bmrs.load(path)
        assert type(loaded) is nn.Sequential
        assert repr(loaded) == repr(model).replace("LeNet5", "Sequential", 1)
        assert not loaded.training
        assert list(loaded.state_dict()) == list(model.state_dict())
        for name, value in model.state_dict().items():
            found = loaded.state_dict()[name]
            assert found.dtype == value.dtype
            assert torch.equal(found, value)
        assert all(parameter.requires_grad for parameter in loaded.parameters())

    def test_outputs_are_bitwise_equal(self, model, path):
        bmrs.save(path, model)
        x = torch.randn(3, 1, 32, 32)
        assert torch.equal(bmrs.load(path)(x), model(x))

    def test_non_contiguous_and_shared_weights(self, path):
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
        convolution = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        bmrs.save(path, nn.Sequential(first, second, convolution))
        loaded = bmrs.load(path)
        assert torch.equal(loaded[1].weight, first.weight)
        assert torch.equal(loaded[2].weight, convolution.weight)

    def test_loading_draws_no_random_numbers(self, model, path):
        bmrs.save(path, model)
        state = torch.get_rng_state()
        bmrs.load(path)
        assert torch.equal(torch.get_rng_state(), state)

    def test_device(self, model, path):
        bmrs.save(path, model)
        assert bmrs.load(path, device="meta").conv1.weight.is_meta

    @pytest.mark.parametrize("noise", [True, False])
    def test_into_a_fresh_network_of_the_class(self, model, path, noise):
        bmrs.save(path, model)
        fresh = bmrs.models.LeNet5(noise=noise)
        loaded = bmrs.load(path, model=fresh)
        assert loaded is fresh
        assert not loaded.training
        assert not noise_layers(loaded)
        assert loaded.conv1.out_channels == loaded.conv2.in_channels == 3
        x = torch.randn(3, 1, 32, 32)
        assert torch.equal(loaded(x), model(x))


class TestSave:
    def test_file_is_safetensors_with_a_json_description(self, model, path):
        bmrs.save(str(path), model)
        with safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()["bmrs"])
        assert description["version"] == 1
        assert description["layers"][0] == {
            "name": "conv1",
            "type": "Conv2d",
            "arguments": {
                "in_channels": 1,
                "out_channels": 3,
                "kernel_size": [5, 5],
                "stride": [1, 1],
                "padding": [0, 0],
                "dilation": [1, 1],
                "groups": 1,
                "bias": True,
                "padding_mode": "zeros",
            },
            "dtype": "float32",
        }

    def test_replaces_the_file_in_one_step(self, model, path, monkeypatch):
        path.write_text("old")

        def fail(source, target):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(type(path), "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            bmrs.save(path, model)
        assert path.read_text() == "old"
        assert list(path.parent.iterdir()) == [path]
        monkeypatch.undo()
        bmrs.save(path, model)
        assert list(path.parent.iterdir()) == [path]
        assert type(bmrs.load(path)) is nn.Sequential

    def test_missing_folder(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match="missing"):
            bmrs.save(tmp_path / "missing" / "model.safetensors", model)

    @pytest.mark.parametrize(
        ("unsuitable", "message"),
        [
            (
                nn.Linear(2, 2),
                r"a network that bmrs\.compact returned or example_inputs, and got Linear alone",
            ),
            (bmrs.models.LeNet5(), "'conv1_relu' is one"),
            (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "and got Sequential alone"),
            (
                nn.Sequential(nn.Linear(2, 2), bmrs.NoiseLayer(2)),
                r"without noise layers, and '1' is one: bmrs\.compact",
            ),
            (
                bmrs.add_noise(nn.Sequential(nn.Linear(2, 2)), where="0"),
                r"'0\.noise' is one: .*bmrs\.fold\(model\)",
            ),
            (torch.relu, r"save needs a torch\.nn\.Module, got builtin_function_or_method"),
            (
                nn.Sequential(OrderedDict({"a-b": nn.ReLU()})),
                r"its layer 'a-b' \(ReLU\) cannot be built: its name cannot be that of a layer",
            ),
        ],
    )
    def test_refuses_what_it_cannot_describe(self, unsuitable, message, path):
        with pytest.raises(TypeError, match=message):
            bmrs.save(path, unsuitable)
        assert not path.exists()


class TestBrokenFiles:
    def test_missing(self, path):
        with pytest.raises(FileNotFoundError, match=f"no model file at .*{path.name}"):
            bmrs.load(path)

    @pytest.mark.parametrize("length", [0, 4, 200, -1])
    def test_truncated(self, model, path, length):
        bmrs.save(path, model)
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match=f"{path.name} is not a whole safetensors file"):
            bmrs.load(path)

    def test_foreign_safetensors_file(self, path):
        save_file({"weight": torch.ones(2)}, path)
        with pytest.raises(
            ValueError, match=r"does not hold a model that bmrs\.save wrote: it has no readable desc"
        ):
            bmrs.load(path)

    @pytest.mark.parametrize(
        "text", ["{", "3", "[" * 100_000, '["version"]', "{}"], ids=["cut", "number", "deep", "list", "empty"]
    )
    def test_unreadable_description(self, path, text):
        save_file({"weight": torch.ones(2)}, path, metadata={"bmrs": text})
        with pytest.raises(ValueError, match="it has no readable description"):
            bmrs.load(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda d, t: d | {"version": 4},
                "it has format version 4, and this version of bmrs reads 1 to 3",
            ),
            (lambda d, t: d | {"version": 2}, "layer .*'conv1'.* lacks or adds a key"),
            (lambda d, t: d | {"version": 3}, "wrote: its graph is not a mapping"),
            (lambda d, t: d | {"version": [1]}, r"it has format version \[1\]"),
            (
                lambda d, t: d["layers"][1].update(type="Addition", arguments={}),
                r"'conv1_relu' \(Addition\) cannot be built: its inputs \['conv1'\] are not 2 of",
            ),
            (
                lambda d, t: d["layers"][1].update(name="conv2_relu"),
                r"layer 'conv2_relu' \(ReLU\) cannot be built: its name is taken",
            ),
            (lambda d, t: d | {"layers": {}}, "its layers are not a list"),
            (lambda d, t: d["layers"][0].pop("dtype") and None, "lacks or adds a key"),
            (
                lambda d, t: d["layers"][0].update(type="os.system"),
                "layer 'conv1' is of unknown type 'os.system'",
            ),
            (
                lambda d, t: d["layers"][0].update(type=[1]),
                "layer 'conv1' is not described by a name, a type",
            ),
            (
                lambda d, t: d["layers"][0].update(name=3),
                "layer 3 is not described by a name, a type name and arguments",
            ),
            (
                lambda d, t: d["layers"][0]["arguments"].update(device="cuda"),
                "has unknown or unsuitable arguments",
            ),
            (
                lambda d, t: d["layers"][0]["arguments"].update(stride={"a": 1}),
                "has unknown or unsuitable arguments",
            ),
            (
                lambda d, t: d["layers"][0]["arguments"].update(out_channels=10**12),
                "'conv1' .* cannot be built",
            ),
            (lambda d, t: d["layers"][0]["arguments"].update(groups=0), "'conv1' .* cannot be built"),
            (
                lambda d, t: d["layers"][0]["arguments"].pop("in_channels") and None,
                "'conv1' .* cannot be built",
            ),
            (lambda d, t: d["layers"][1].update(name="append"), "'append' .* cannot be built"),
            (
                lambda d, t: d["layers"][1].update(name='a")) or exit(3) or ((self, "'),
                "its name cannot be that of a layer",
            ),
            (
                lambda d, t: d["layers"][1].update(type="Hardtanh", arguments={"min_val": 2, "max_val": 1}),
                r"'conv1_relu' \(Hardtanh\) cannot be built: max_val",
            ),
            (
                lambda d, t: d["layers"][0].update(dtype="float64"),
                "'conv1' is float32, but described as 'float64'",
            ),
            (lambda d, t: t.pop("conv1.bias") is None, "'conv1' .* cannot be built"),
            (lambda d, t: t.update({"conv1.bias": torch.ones(7)}), "'conv1' .* cannot be built"),
            (
                lambda d, t: t.update({"conv1.bias": torch.ones(3, dtype=torch.int64)}),
                "'conv1' .* cannot be built",
            ),
            (
                lambda d, t: t.update({"extra.weight": torch.ones(1)}),
                r"its tensors \['extra.weight'\] belong to no",
            ),
            (
                lambda d, t: d["layers"].pop(0) and None,
                r"its tensors \['conv1.bias', 'conv1.weight'\] belong to",
            ),
            (lambda d, t: d["layers"].append(d["layers"][0]), "'conv1' .* cannot be built"),
        ],
    )
    def test_tampered(self, model, path, change, message):
        bmrs.save(path, model)
        rewrite(path, change)
        with pytest.raises(ValueError, match=message):
            bmrs.load(path)

    @pytest.mark.parametrize(
        ("layer", "argument", "value", "expected"),
        [
            (nn.Softmax(1), "dim", "a", "a whole number or null, got 'a'"),
            (nn.Dropout(), "p", float("nan"), "a number from 0 to 1, got nan"),
            (nn.Dropout(), "p", True, "a number from 0 to 1, got True"),
            (nn.ReLU(), "inplace", 3, "true or false, got 3"),
            (nn.LeakyReLU(), "negative_slope", "a", "a finite number, got 'a'"),
            (nn.LeakyReLU(), "negative_slope", float("inf"), "a finite number, got inf"),
            (nn.LeakyReLU(), "negative_slope", 10**400, "a finite number, got 1000"),
            (nn.Hardtanh(), "min_val", float("nan"), "a number, got nan"),
            (nn.GELU(), "approximate", "x", "one of 'none', 'tanh', got 'x'"),
            (nn.Flatten(), "start_dim", None, "a whole number, got None"),
            (nn.Flatten(), "end_dim", 10**30, "a whole number, got 1000"),
            (nn.BatchNorm1d(2), "eps", -1.0, "a finite number of at least 0, got -1.0"),
            (nn.BatchNorm1d(2), "momentum", "a", "a finite number or null, got 'a'"),
            (nn.BatchNorm1d(2), "num_features", 2.0, "a whole number of at least 0, got 2.0"),
            (nn.Linear(2, 2), "in_features", True, "a whole number of at least 0, got True"),
            (nn.Conv2d(1, 1, 1), "kernel_size", [1], "a whole number of at least 1 or 2 of them, got (1,)"),
            (nn.Conv2d(1, 1, 1), "stride", [0, 1], "a whole number of at least 1 or 2 of them, got (0, 1)"),
            (nn.Conv2d(1, 1, 1), "padding", "more", "or 2 of them, 'same' or 'valid', got 'more'"),
            (
                nn.Conv2d(1, 1, 1),
                "padding_mode",
                "x",
                "one of 'zeros', 'reflect', 'replicate', 'circular', got",
            ),
            (nn.MaxPool2d(2), "kernel_size", None, "a whole number of at least 1 or 2 of them, got None"),
            (nn.MaxPool2d(2), "padding", 2, "at most half of kernel_size, got 2 and 2"),
            (nn.AvgPool1d(2), "ceil_mode", "no", "true or false, got 'no'"),
            (nn.AvgPool2d(2), "divisor_override", 0, "a whole number other than 0 or null, got 0"),
            (
                nn.AdaptiveAvgPool1d(1),
                "output_size",
                None,
                "a whole number of at least 0 or 1 of them, got None",
            ),
            (nn.AdaptiveAvgPool2d(1), "output_size", [1, -1], "or 2 of them, got (1, -1)"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
    )
    def test_arguments_of_layers(self, layer, argument, value, expected, path):
        bmrs.save(path, nn.Sequential(layer))
        rewrite(path, lambda d, t: d["layers"][0]["arguments"].update({argument: value}))
        message = f"layer '0' ({type(layer).__name__}) cannot be built: {argument} must be "
        with pytest.raises(ValueError, match=re.escape(message) + ".*" + re.escape(expected)):
            bmrs.load(path)

    def test_messages_are_one_line_of_reasonable_length(self, path):
        bmrs.save(path, nn.Sequential(nn.Linear(2, 2)))
        rewrite(path, lambda d, t: d["layers"][0].update(name="x\n" * 10**6))
        with pytest.raises(ValueError, match="does not hold a model") as caught:
            bmrs.load(path)
        assert len(str(caught.value)) < 1000
        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize(
        ("device", "error", "message"),
        [
            ("foo", ValueError, "device must be one that can be used here, got 'foo': "),
            ("cuda:99", ValueError, "device must be one that can be used here, got 'cuda:99': "),
            (3, TypeError, "device must be a torch.device or text such as 'cpu' or 'cuda:0', got 3"),
        ],
    )
    def test_devices(self, device, error, message, path):
        bmrs.save(path, nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(error, match=message) as caught:
            bmrs.load(path, device=device)
        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
    def test_weights_of_another_kind_for_a_network_of_the_class(self, model, path, dtype):
        bmrs.save(path, model)
        rewrite(path, lambda d, t: t.update({"conv1.bias": t["conv1.bias"].to(dtype)}))
        fresh = bmrs.models.LeNet5(noise=False)
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(ValueError, match=f"its 'conv1.bias' is {dtype}, and model"):
            bmrs.load(path, model=fresh)
        assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())
