"""Compacted networks that branch, in files."""

import json
import operator

import pytest
import torch
from compaction_cases import randomise
from residual_cases import RandomResidual, SmallResNet
from safetensors import safe_open
from saved_files import rewrite
from torch import fx, nn

import bmrs

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def model() -> fx.GraphModule:
    torch.manual_seed(0)
    return bmrs.compact(randomise(bmrs.add_noise(SmallResNet(), where=nn.BatchNorm2d)), IMAGES)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_weights_and_outputs_are_bitwise_equal(self, model, path, dtype):
        model.to(dtype)
        bmrs.save(path, model)
        loaded = bmrs.load(path)
        assert isinstance(loaded, fx.GraphModule)
        assert not any(module.training for module in loaded.modules())
        assert loaded.code == model.code
        assert list(loaded.state_dict()) == list(model.state_dict())
        for name, value in model.state_dict().items():
            assert loaded.state_dict()[name].dtype == value.dtype
            assert torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(loaded(IMAGES.to(dtype)), model(IMAGES.to(dtype)))

    @pytest.mark.parametrize("seed", range(15))
    def test_random_networks(self, path, seed):
        torch.manual_seed(seed)
        case = RandomResidual(seed)
        x = torch.randn(case.example_shape)
        model = bmrs.compact(randomise(case.model, seed), x)
        bmrs.save(path, model)
        assert torch.equal(bmrs.load(path)(x), model(x))

    def test_loaded_network_trains_and_saves_again(self, model, path):
        bmrs.save(path, model)
        loaded = bmrs.load(path).train()
        loaded(IMAGES).sum().backward()
        assert all(parameter.grad is not None for parameter in loaded.parameters())
        bmrs.save(path, loaded)
        assert torch.equal(bmrs.load(path).conv1.weight, model.conv1.weight)

    def test_device(self, model, path):
        bmrs.save(path, model)
        assert bmrs.load(path, device="meta").conv1.weight.is_meta


def graph_module(build, **layers: nn.Module) -> fx.GraphModule:
    """A graph of the caller's own on one input."""
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return fx.GraphModule(layers, graph)


class TestSave:
    def test_description_names_the_inputs_of_each_layer(self, model, path):
        bmrs.save(path, model)
        with safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()["bmrs"])
        assert description["version"] == 2
        layers = {layer["name"]: layer for layer in description["layers"]}
        assert layers["conv1"]["inputs"] == [None]
        assert layers["bn1"]["inputs"] == ["conv1"]
        assert layers["layer1_0_add"] == {
            "name": "layer1_0_add",
            "type": "Addition",
            "arguments": {},
            "dtype": None,
            "inputs": ["layer1_0_bn2", "maxpool"],
        }
        assert description["layers"][-1]["name"] == "fc"

    @pytest.mark.parametrize(
        ("unsuitable", "message"),
        [
            (
                graph_module(lambda g, x: g.call_function(operator.mul, (x, x))),
                r"cannot describe the call at 'mul': .*operator.mul",
            ),
            (
                graph_module(lambda g, x: g.call_function(operator.add, (x, 1))),
                r"cannot describe the call at 'add': .*operator.add",
            ),
            (
                graph_module(lambda g, x: g.call_module("a.b", (x,)), **{"a.b": nn.ReLU()}),
                r"'a\.b' \(ReLU\) cannot be built: its name cannot be that of a layer",
            ),
            (
                graph_module(lambda g, x: g.call_module("a", (g.call_module("a", (x,)),)), a=nn.ReLU()),
                r"cannot describe this network: its layer 'a' \(ReLU\) cannot be built: its name is taken",
            ),
            (
                graph_module(lambda g, x: (g.call_module("a", (x,)), x)[1], a=nn.ReLU()),
                r"cannot describe the call at 'output'",
            ),
            (
                graph_module(lambda g, x: g.call_function(operator.add, (x, g.placeholder("y")))),
                r"cannot describe the call at 'y'",
            ),
            (
                graph_module(
                    lambda g, x: g.call_function(operator.add, (x, g.call_module("a", (x,)))),
                    a=nn.LayerNorm(3),
                ),
                r"cannot describe layer 'a' \(LayerNorm\): not a stock layer",
            ),
        ],
    )
    def test_refuses_what_it_cannot_describe(self, unsuitable, message, path):
        with pytest.raises(TypeError, match=message):
            bmrs.save(path, unsuitable)
        assert not path.exists()


def entry(description, name):
    return next(layer for layer in description["layers"] if layer["name"] == name)


class TestBrokenFiles:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda d, t: entry(d, "bn1").update(inputs=["bn1"]),
                r"'bn1' .* its inputs \['bn1'\] are not 1 of",
            ),
            (
                lambda d, t: entry(d, "bn1").update(inputs=["fc"]),
                r"'bn1' .* its inputs \['fc'\] are not 1 of",
            ),
            (lambda d, t: entry(d, "bn1").update(inputs=[]), r"'bn1' .* its inputs \[\] are not 1 of"),
            (lambda d, t: entry(d, "bn1").update(inputs=None), "'bn1' .* has unsuitable inputs None"),
            (lambda d, t: entry(d, "bn1").update(inputs=[["conv1"]]), "'bn1' .* has unsuitable inputs"),
            (
                lambda d, t: entry(d, "layer1_0_add").update(inputs=["maxpool"]),
                r"'layer1_0_add' \(Addition\) cannot be built: its inputs \['maxpool'\] are not 2 of",
            ),
            (
                lambda d, t: entry(d, "layer1_0_add").update(arguments={"alpha": 2}),
                r"'layer1_0_add' \(Addition\) has unknown or unsuitable arguments",
            ),
            (
                lambda d, t: d["layers"].append(dict(entry(d, "relu"))),
                r"'relu' \(ReLU\) .* its name is taken",
            ),
            (lambda d, t: entry(d, "bn1").pop("inputs") and None, "lacks or adds a key"),
            (lambda d, t: d | {"version": 1}, "lacks or adds a key"),
        ],
    )
    def test_tampered(self, model, path, change, message):
        bmrs.save(path, model)
        rewrite(path, change)
        with pytest.raises(ValueError, match=message):
            bmrs.load(path)

    @pytest.mark.parametrize(
        "name",
        ['")]; raise SystemExit(3) #', "a.b", "a b", "", "class", "forward", "é", "x\n"],
    )
    def test_names_that_could_become_code_are_refused(self, model, path, name):
        bmrs.save(path, model)

        def change(description, tensors):
            description["layers"].append(
                {
                    "name": name,
                    "type": "ReLU",
                    "arguments": {"inplace": False},
                    "dtype": None,
                    "inputs": ["fc"],
                }
            )

        rewrite(path, change)
        with pytest.raises(ValueError, match=r"\(ReLU\) cannot be built: its name cannot be that of a layer"):
            bmrs.load(path)
