"""Networks that are not chains of stock layers, in files: format versions 3 and, read only, 2."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compaction_cases import outputs, prune_structures, randomise
from residual_cases import RandomResidual, SmallResNet
from safetensors import safe_open
from safetensors.torch import save_file
from saved_files import rewrite
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map

import bmrs
from bmrs.compaction.surgery import ChannelScale
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """All that a description holds: convolutions, batch norm, dropout, a constant, operators with options."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.conv = nn.Conv2d(width, width, 3, groups=width // 2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(torch.relu(self.stem(x)))))
        return self.last(self.dropout(x.mean((2, 3)))) * torch.tensor([2.0, 3.0])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def compacted() -> nn.Module:
    torch.manual_seed(0)
    model = randomise(bmrs.add_noise(Small(), where=nn.Conv2d), pruned=0.0)
    prune_structures(model.stem.noise, [0, 1])
    model.last.bias.requires_grad_(False)
    result = bmrs.compact(model, IMAGES)
    assert (result.conv.groups, result.conv.out_channels) == (2, 4)
    return result


@pytest.fixture
def model(compacted) -> nn.Module:
    return copy.deepcopy(compacted)


@pytest.fixture(scope="module")
def written(compacted, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    bmrs.save(path, compacted)
    return path.read_bytes()


@pytest.fixture
def saved(written, path):
    """A file with the model, to be tampered with."""
    path.write_bytes(written)
    return path


def description_of(path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["bmrs"])


def tensors_of(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [leaf for leaf in outputs(model, inputs) if isinstance(leaf, torch.Tensor)]


def assert_same_outputs(loaded: nn.Module, model: nn.Module, inputs: Any) -> None:
    expected, found = tensors_of(model, inputs), tensors_of(loaded, inputs)
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_weights_and_outputs_are_bitwise_equal(self, model, path, dtype):
        model.to(dtype)
        bmrs.save(path, model)
        assert description_of(path)["version"] == 3
        loaded = bmrs.load(path)
        assert isinstance(loaded, fx.GraphModule)
        assert not any(module.training for module in loaded.modules())
        for name, value in model.state_dict().items():
            assert loaded.state_dict()[name].dtype == value.dtype
            assert torch.equal(loaded.state_dict()[name], value)
        assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["last.bias"]
        assert_same_outputs(loaded, model, IMAGES.to(dtype))

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(8))
    def test_random_networks(self, path, seed):
        torch.manual_seed(seed)
        case = RandomResidual(seed)
        x = torch.randn(case.example_shape)
        fresh = copy.deepcopy(case.model)
        model = bmrs.compact(randomise(case.model, seed), x)
        bmrs.save(path, model)
        assert_same_outputs(bmrs.load(path), model, x)
        assert_same_outputs(bmrs.load(path, model=fresh), model, x)

    def test_loaded_network_trains_and_saves_again(self, model, path):
        bmrs.save(path, model)
        loaded = bmrs.load(path).train()
        assert not torch.equal(loaded(IMAGES), loaded(IMAGES))  # dropout
        statistics = loaded.bn.running_mean.clone()
        loaded(IMAGES).sum().backward()
        assert not torch.equal(loaded.bn.running_mean, statistics)
        assert all(parameter.grad is not None for parameter in loaded.parameters() if parameter.requires_grad)
        bmrs.save(path, loaded.eval(), example_inputs=IMAGES)
        assert_same_outputs(bmrs.load(path), loaded, IMAGES)

    def test_other_numbers_of_examples(self, model, saved):
        loaded = bmrs.load(saved)
        for number in (1, 5):
            assert_same_outputs(loaded, model, torch.randn(number, 3, 8, 8))

    def test_trained_further_in_between(self, model, path):
        with torch.no_grad():
            model.last.weight.add_(1.0)
        bmrs.save(path, model)
        assert_same_outputs(bmrs.load(path), model, IMAGES)

    def test_loading_draws_no_random_numbers(self, model, saved):
        fresh, state = Small(), torch.get_rng_state()
        bmrs.load(saved)
        bmrs.load(saved, model=fresh)
        assert torch.equal(torch.get_rng_state(), state)

    def test_device(self, model, saved):
        assert bmrs.load(saved, device="meta").stem.weight.is_meta
        assert bmrs.load(saved, model=Small(), device="meta").stem.weight.is_meta

    def test_saving_leaves_the_model_as_it_is(self, model, path):
        model.train()
        state = copy.deepcopy(model.state_dict())
        bmrs.save(path, model)
        assert model.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize(
        ("model", "inputs"),
        [
            (nn.Linear(4, 2), torch.randn(3, 4)),
            (nn.BatchNorm1d(4), torch.randn(3, 4)),
            (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(3, 4)),
            (nn.Sequential(nn.Sequential(nn.ReLU())), torch.randn(3, 4)),
            (nn.LSTM(4, 3, num_layers=2, batch_first=True), torch.randn(2, 5, 4)),
            (nn.Embedding(5, 3), torch.randint(0, 5, (2, 4))),
            (nn.MultiheadAttention(4, 2), [torch.randn(5, 1, 4)] * 3),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_networks_that_were_not_compacted(self, path, model, inputs):
        bmrs.save(path, model.eval(), example_inputs=inputs)
        assert_same_outputs(bmrs.load(path), model, inputs)


class Gated(nn.Module):
    """Of what the batch norm returns, some is always multiplied by 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)
        self.register_buffer("gate", torch.tensor([[1.0], [0.0], [0.5], [0.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.bn(self.conv(x)) * self.gate)


def test_nothing_leaves_a_network_that_is_saved_as_it_is(path):
    model, x = Gated().eval(), torch.randn(2, 3, 5)
    bmrs.save(path, model, example_inputs=x)
    loaded = bmrs.load(path)
    assert torch.equal(loaded(x), model(x))
    assert loaded.state_dict()["bn.weight"].shape == (4,)


class Everything(nn.Module):
    """Several inputs and outputs, shared weights, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.noise = nn.Embedding(9, 4), nn.Linear(4, 4), NoiseLayer(4, dim=-1)
        self.last = nn.Linear(4, 9, bias=False)
        self.last.weight = self.table.weight
        self.register_buffer("offset", torch.arange(9.0))
        self.register_buffer("hidden", torch.tensor(3.0), persistent=False)

    def forward(self, tokens, scale=None, *, everything=True):
        x = self.noise(self.first(self.table(tokens)))
        x = x if scale is None else x * scale
        logits = self.last(torch.relu(x)) + self.offset * self.hidden
        return {"logits": logits, "others": [x.sum(-1), (tokens, None)]} if everything else logits


class TestInputsAndOutputs:
    @pytest.mark.parametrize(
        "inputs",
        [
            torch.randint(0, 9, (2, 5)),
            (torch.randint(0, 9, (2, 5)), torch.randn(2, 5, 1)),
            (torch.randint(0, 9, (2, 5)), None),
            {"tokens": torch.randint(0, 9, (2, 5)), "scale": torch.randn(2, 5, 1)},
            {"scale": torch.randn(2, 5, 1), "tokens": torch.randint(0, 9, (2, 5)), "everything": False},
        ],
        ids=["tensor", "positional", "none", "keywords", "flag"],
    )
    def test_of_many_kinds(self, path, inputs):
        torch.manual_seed(0)
        model = randomise(Everything(), pruned=0.0)
        prune_structures(model.noise, [1])
        compacted = bmrs.compact(model, inputs)
        bmrs.save(path, compacted)
        loaded = bmrs.load(path)
        fresh = bmrs.load(path, model=Everything())
        longer = tree_map(
            lambda x: x.repeat(2, 2, *[1] * (x.dim() - 2)) if isinstance(x, torch.Tensor) else x, inputs
        )
        for network in (loaded, fresh):
            assert_same_outputs(network, compacted, inputs)
            assert_same_outputs(network, compacted, longer)
        structures = [tree_flatten(call(network, inputs))[1] for network in (loaded, fresh, compacted)]
        assert structures[0] == structures[1] == structures[2]
        assert fresh.last.weight is fresh.table.weight
        assert len(list(loaded.parameters())) == len(list(compacted.parameters()))

    def test_networks_that_became_graphs(self, path):
        class Fixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

            def forward(self, x):
                return self.last(self.first(x).view(-1, 6))

        torch.manual_seed(0)
        model = bmrs.add_noise(Fixed(), where="first")
        prune_structures(model.first.noise, [0])
        compacted = bmrs.compact(model, torch.randn(3, 4))
        assert isinstance(compacted, fx.GraphModule)
        bmrs.save(path, compacted)
        assert_same_outputs(bmrs.load(path), compacted, torch.randn(3, 4))
        # Its class cannot run with the smaller weights.
        fresh = Fixed()
        with pytest.raises(ValueError, match=f"{path.name} holds a graph of operators, .* without model="):
            bmrs.load(path, model=fresh)
        assert fresh.first.out_features == 6


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def unfolded(kind: str, *, noise: bool = True) -> nn.Module:
    """Networks with noise that remains as a multiplication, in all the places where it can be."""
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 2)]
    model = nn.Sequential(*layers)
    if kind == "layer":
        return nn.Sequential(*layers[:2], NoiseLayer(6, activation="relu"), *layers[2:])
    if kind == "first layer":
        return nn.Sequential(NoiseLayer(4), nn.Sigmoid(), *layers)
    if noise and kind == "behind":
        bmrs.add_noise(model, where="1", num_structures=6, dim=-1, activation="relu")
    if noise and kind == "in front":
        layers[3].weight.requires_grad_(False)
        bmrs.add_noise(model, where="5", structures="heads", num_heads=3, activation="tanh")
    return model


class TestLoadIntoAModel:
    """A network of the class, freshly built at its full size."""

    @pytest.mark.parametrize("noise", [True, False])
    def test_it_becomes_the_saved_one(self, model, saved, noise):
        fresh = bmrs.add_noise(Small(), where=nn.Conv2d).train() if noise else Small().train()
        loaded = bmrs.load(saved, model=fresh)
        assert loaded is fresh
        assert not any(module.training for module in loaded.modules())
        assert not noise_layers(loaded)
        assert loaded.conv.groups == 2
        assert loaded.stem.out_channels == loaded.bn.num_features == loaded.last.in_features == 4
        assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["last.bias"]
        assert {n: t.dtype for n, t in loaded.state_dict().items()} == {
            n: t.dtype for n, t in model.state_dict().items()
        }
        assert_same_outputs(loaded, model, IMAGES)

    @pytest.mark.parametrize(
        ("kind", "noise"),
        [
            *(("layer", True), ("first layer", True)),
            *(("behind", True), ("behind", False)),
            *(("in front", True), ("in front", False)),
        ],
    )
    def test_noise_that_was_not_folded(self, path, kind, noise):
        torch.manual_seed(0)
        model = randomise(unfolded(kind), pruned=0.0)
        (layer,) = noise_layers(model).values()
        prune_structures(layer, [1])
        x = torch.randn(3, 4)
        compacted = bmrs.compact(model, x)
        assert any(isinstance(m, ChannelScale) for m in compacted.modules()) == (kind != "in front")
        bmrs.save(path, compacted)
        assert_same_outputs(bmrs.load(path), compacted, x)
        assert_same_outputs(bmrs.load(path, model=unfolded(kind, noise=noise)), compacted, x)

    @pytest.mark.parametrize(
        ("fresh", "message"),
        [
            (
                lambda: Small(width=2),
                r"its 'bn\.bias' of shape \(4,\) does not come from one of shape \(2,\), as model",
            ),
            (SmallResNet, r"it has no 'bn1\.bias', which model \(SmallResNet\) has"),
            (lambda: nn.Linear(6, 2), r"it has no 'bias', which model \(Linear\) has"),
            (lambda: nn.Sequential(nn.ReLU()), r"its '[a-z.]*' is not a part of model \(Sequential\)"),
            (
                lambda: without(Small(), "dropout", "last"),
                r"its 'last\.bias' is not a part of model \(Small\)",
            ),
        ],
        ids=["narrower", "class", "layer", "empty", "fewer"],
    )
    def test_other_networks_are_refused_and_left_alone(self, model, saved, fresh, message):
        other = fresh()
        before, state = repr(other), copy.deepcopy(other.state_dict())
        with pytest.raises(
            ValueError, match=rf"{saved.name} does not fit model \({type(other).__name__}\): {message}"
        ):
            bmrs.load(saved, model=other)
        assert repr(other) == before
        assert other.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())

    @pytest.mark.parametrize("unsuitable", [Small, 3], ids=["class", "number"])
    def test_what_is_no_network(self, model, saved, unsuitable):
        with pytest.raises(TypeError, match="model"):
            bmrs.load(saved, model=unsuitable)

    @pytest.mark.filterwarnings("ignore:the model .* has no noise layer")
    def test_operators_that_no_file_holds(self, path):
        class Gamma(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 2)

            def forward(self, x):
                return torch.lgamma(self.layer(x))

        model = bmrs.compact(Gamma(), torch.randn(3, 4))
        with pytest.warns(UserWarning, match=r"loaded with bmrs\.load\(path, model=.*Gamma: .*'lgamma'"):
            bmrs.save(path, model)
        with pytest.raises(
            ValueError,
            match=rf"{path.name} can only be loaded with model=, .* class .*Gamma: .*'lgamma', a call of aten\.lgamma",
        ):
            bmrs.load(path)
        assert_same_outputs(bmrs.load(path, model=Gamma()), model, torch.randn(3, 4))

    @pytest.mark.parametrize(
        "change",
        [
            lambda d, t: d.update(groups=[]),
            lambda d, t: d["groups"].update(conv="two"),
            lambda d, t: d["groups"].update(conv=[2]),
            lambda d, t: d["groups"].update(conv=None),
            lambda d, t: d["groups"].update(conv=0),
            lambda d, t: d.update(scales=[]),
            lambda d, t: d["scales"].update({"bn.noise": 3}),
            lambda d, t: d["scales"].update({"bn.noise": [1, None, False]}),
            lambda d, t: (
                d["scales"].update({"no.noise": [1, None, False]}),
                t.update({"no.noise.factors": torch.ones(4)}),
            ),
            lambda d, t: d.update(sizes=[]),
            lambda d, t: d["sizes"].update({"": 3}),
            lambda d, t: d["sizes"].update({"conv": {"nothing": 3}}),
            lambda d, t: d["sizes"].update({"nothing": {"width": 3}}),
            lambda d, t: d.update(frozen=3),
            lambda d, t: t.pop("last.bias"),
            lambda d, t: t.update({"last.bias": torch.ones(2, 1)}),
            lambda d, t: t.update({"extra.weight": torch.ones(2)}),
        ],
    )
    def test_broken_files_leave_it_alone(self, saved, change):
        rewrite(saved, silently(change))
        fresh = Small()
        before, state = repr(fresh), copy.deepcopy(fresh.state_dict())
        with pytest.raises(ValueError, match=saved.name):
            bmrs.load(saved, model=fresh)
        assert repr(fresh) == before
        assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())


def without(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        delattr(model, name)
    return model


def silently(change: Callable[[Any, Any], Any]) -> Callable[[Any, Any], None]:
    """A change that has a result of no meaning."""

    def apply(description: Any, tensors: Any) -> None:
        change(description, tensors)

    return apply


class TestSave:
    def test_description_lists_the_operations(self, model, path):
        bmrs.save(path, model)
        description = description_of(path)
        assert description["version"] == 3
        assert description["frozen"] == ["last.bias"]
        assert description["groups"] == {"stem": 1, "conv": 2}
        operations = {op["name"]: op for op in description["graph"]["operations"]}
        assert operations["batch_norm"] == {
            "name": "batch_norm",
            "kind": "layer",
            "target": "BatchNorm2d",
            "args": [{"of": "conv2d_1"}, "bn"],
            "kwargs": {
                "num_features": 4,
                "eps": 1e-5,
                "momentum": 0.1,
                "affine": True,
                "track_running_stats": True,
            },
        }
        assert operations["conv2d"]["target"] == "aten.conv2d.default"
        assert operations["conv2d"]["args"][:2] == [{"of": "x"}, {"of": operations["p_stem_weight"]["name"]}]
        assert operations["p_stem_weight"]["target"] == "stem.weight"
        assert {op["kind"] for op in operations.values()} == {"input", "tensor", "call", "layer"}

    @pytest.mark.parametrize(
        ("model", "example", "error", "message"),
        [
            (Small(), None, TypeError, r"bmrs\.compact returned or example_inputs, and got Small alone"),
            (Small(), torch.randn(2, 4, 8, 8), ValueError, r"\(Small\) does not run on example_inputs"),
            (Small(), 3.0, TypeError, "example_inputs must be a tensor"),
            (Everything(), torch.zeros(1, 2).long(), TypeError, "without noise layers, and 'noise' is one"),
            (nn.Linear(2, 2, device="meta"), torch.ones(1, 2), ValueError, "'weight' is on the meta device"),
        ],
    )
    def test_refuses_what_it_cannot_describe(self, model, example, error, message, path):
        with pytest.raises(error, match=message):
            bmrs.save(path, model, example_inputs=example)
        assert not path.exists()


def op(description: dict[str, Any], name: str) -> dict[str, Any]:
    return next(op for op in description["graph"]["operations"] if op["name"] == name)


def insert(description: dict[str, Any], **changes: Any) -> None:
    """Another operation behind the first convolution."""
    operations = description["graph"]["operations"]
    place = next(i for i, op in enumerate(operations) if op["name"] == "conv2d") + 1
    added = {
        "name": "added",
        "kind": "call",
        "target": "aten.relu.default",
        "args": [{"of": "x"}],
        "kwargs": {},
    }
    operations.insert(place, added | changes)


def nested(depth: int) -> list[Any]:
    result: list[Any] = []
    for _ in range(depth):
        result = [result]
    return result


class TestBrokenFiles:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            # Operators.
            (
                lambda d, t: op(d, "relu").update(target="aten.from_file.default"),
                "'relu', a call of aten.from_file",
            ),
            (lambda d, t: op(d, "relu").update(target="os.system"), "'relu', a call of os.system"),
            (
                lambda d, t: op(d, "relu").update(target="bmrs.mark_noise.default"),
                "'relu', a call of bmrs.mark_noise",
            ),
            (
                lambda d, t: op(d, "relu").update(target="aten.relu.__class__"),
                "no operator aten.relu.__class__",
            ),
            (lambda d, t: op(d, "relu").update(target="aten.relu._op"), "no operator aten.relu._op"),
            (lambda d, t: op(d, "relu").update(target="aten.relu.nothing"), "no operator aten.relu.nothing"),
            (lambda d, t: op(d, "relu").update(target="relu"), "'relu', a call of relu"),
            (lambda d, t: op(d, "relu").update(kwargs={"nothing": 1}), "'relu'.*nothing"),
            (
                lambda d, t: op(d, "relu").update(kind="scalar", target="eval", args=["exit(3)"]),
                "function 'eval'",
            ),
            # Keys and kinds.
            (lambda d, t: op(d, "relu").update(kind="python"), "'relu' is of unknown kind 'python'"),
            (lambda d, t: op(d, "relu").update(kind=["call"]), "'relu' is of unknown kind"),
            (lambda d, t: op(d, "relu").update(target=3), "'relu' is of unknown kind"),
            (lambda d, t: op(d, "relu").update(more=1), "lacks or adds a key"),
            (lambda d, t: op(d, "relu").pop("kwargs"), "lacks or adds a key"),
            (lambda d, t: op(d, "relu").update(args={}), "'relu' has no arguments"),
            (lambda d, t: op(d, "relu").update(kwargs=[]), "'relu' has no arguments"),
            (lambda d, t: d["graph"]["operations"].append("relu"), "its operation relu lacks or adds a key"),
            (lambda d, t: d["graph"].update(operations={}), "its operations are not a list"),
            (lambda d, t: d["graph"].pop("operations"), "its operations are not a list"),
            (lambda d, t: d.update(graph=[]), "its graph is not a mapping"),
            (lambda d, t: d.update(parameters=3), "its parameters are not a list of names"),
            (lambda d, t: d.update(frozen=[3]), "its frozen are not a list of names"),
            (lambda d, t: d.pop("frozen"), "its frozen are not a list of names"),
            # References and arguments.
            (lambda d, t: op(d, "relu").update(args=[{"of": "linear"}]), "argument .*'linear'.* is unknown"),
            (lambda d, t: op(d, "relu").update(args=[{"of": "relu"}]), "argument .*'relu'.* is unknown"),
            (
                lambda d, t: op(d, "relu").update(args=[{"of": "nothing"}]),
                "argument .*'nothing'.* is unknown",
            ),
            (lambda d, t: op(d, "relu").update(args=[{"of": ["x"]}]), "argument .* is unknown"),
            (lambda d, t: op(d, "relu").update(args=[{"of": "x", "more": 1}]), "argument .* is unknown"),
            (lambda d, t: op(d, "relu").update(args=[{"python": "exit(3)"}]), "argument .* is unknown"),
            (lambda d, t: op(d, "relu").update(args=[{"dtype": "ones"}]), "argument .* is unknown"),
            (lambda d, t: op(d, "relu").update(args=[{"dtype": [1]}]), "argument .* is unknown"),
            (lambda d, t: op(d, "relu").update(args=[{"float": "exit(3)"}]), "argument .* is unknown"),
            (lambda d, t: op(d, "relu").update(args=nested(450)), "model.safetensors"),
            (
                lambda d, t: insert(d, kind="item", target="", args=[{"of": "x"}, "exit(3)"]),
                "'added' takes no item",
            ),
            (
                lambda d, t: insert(d, kind="scale", target="", args=[{"of": "x"}] * 2 + ["a"]),
                "'added' scales along no",
            ),
            # Layers.
            (
                lambda d, t: op(d, "batch_norm").update(target="Linear"),
                "'batch_norm' is of unknown type 'Linear'",
            ),
            (lambda d, t: op(d, "batch_norm")["kwargs"].update(device="cuda"), "or has unknown arguments"),
            (lambda d, t: op(d, "batch_norm")["kwargs"].update(num_features=10**12), "cannot be built"),
            (lambda d, t: op(d, "batch_norm")["kwargs"].update(num_features="a"), "cannot be built"),
            (lambda d, t: op(d, "batch_norm")["kwargs"].update(num_features=7), "cannot be built"),
            (lambda d, t: op(d, "batch_norm")["kwargs"].update(num_features=2**31 - 1), "cannot be built"),
            (
                lambda d, t: op(d, "batch_norm")["kwargs"].update(momentum="a"),
                r"'batch_norm' \(BatchNorm2d\) cannot be built: momentum must be a finite number or null",
            ),
            (lambda d, t: op(d, "batch_norm").update(args=[]), "'batch_norm' has no place"),
            (lambda d, t: op(d, "batch_norm")["args"].__setitem__(1, "forward"), "'batch_norm' has no place"),
            (
                lambda d, t: op(d, "batch_norm")["args"].__setitem__(1, "bn(exit(3))"),
                "'batch_norm' has no place",
            ),
            (lambda d, t: op(d, "batch_norm")["args"].__setitem__(1, 3), "'batch_norm' has no place"),
            (lambda d, t: op(d, "batch_norm")["args"].__setitem__(1, "last.weight"), "cannot be built"),
            # Tensors.
            (lambda d, t: t.pop("last.weight"), r"its tensor 'last\.weight' is missing"),
            (lambda d, t: t.pop("bn.weight"), r"bn\.weight"),
            (lambda d, t: t.pop("bn.running_var"), r"bn\.running_var"),
            (lambda d, t: t.update({"bn.weight": torch.ones(7)}), "cannot be built"),
            (lambda d, t: t.update({"last.weight": torch.ones(2, 4).long()}), "cannot be built"),
            # Trees.
            (lambda d, t: d["graph"].update(outputs={"of": "nothing"}), "its tree .* is unknown"),
            (lambda d, t: d["graph"].update(outputs={"of": ["linear"]}), "its tree .* is unknown"),
            (lambda d, t: d["graph"].update(outputs={"set": [{"of": "linear"}]}), "its tree .* is unknown"),
            (lambda d, t: d["graph"].update(outputs={"list": {"of": "linear"}}), "its tree .* is unknown"),
            (lambda d, t: d["graph"].pop("outputs"), "model.safetensors"),
            (lambda d, t: d["graph"].update(in_tree=None), "its arguments are not a tuple and a dict"),
            (
                lambda d, t: d["graph"].update(in_tree={"tuple": []}),
                "its arguments are not a tuple and a dict",
            ),
            (lambda d, t: d["graph"].update(in_tree=arguments(2)), "argument"),
            (lambda d, t: d["graph"].update(in_tree=arguments(0)), "argument"),
            (lambda d, t: d["graph"].update(in_tree=arguments(1, "y")), "argument"),
            # Versions.
            (lambda d, t: d.update(version="3"), "it has format version '3'"),
            (lambda d, t: d.update(version=2), "its layers are not a list"),
        ],
    )
    def test_tampered(self, saved, change, message):
        rewrite(saved, silently(change))
        with pytest.raises(ValueError, match=message) as caught:
            bmrs.load(saved)
        assert str(saved) in str(caught.value)

    CODE = ('")]; raise SystemExit(3) #', "a.b", "a b", "", "class", "é", "x\n", "self", "1a", "x=exit(3)")

    @pytest.mark.parametrize("name", [*CODE, 3, None, "conv2d"])
    def test_names_of_operations_that_could_become_code(self, saved, name):
        rewrite(saved, lambda d, t: insert(d, name=name))
        with pytest.raises(ValueError, match="has an unsuitable name"):
            bmrs.load(saved)

    @pytest.mark.parametrize(
        "name",
        [n for n in CODE if n not in ("a.b", "1a", "self", "class")] + ["forward", "graph.x", "_graph"],
    )
    def test_names_of_tensors_that_could_become_code(self, saved, name):
        def change(description, tensors):
            tensors[name] = tensors["last.weight"].clone()
            op(description, "p_last_weight").update(target=name)

        rewrite(saved, change)
        with pytest.raises(ValueError, match=r"has an unsuitable name|cannot be built"):
            bmrs.load(saved)

    @pytest.mark.parametrize("name", ["x=exit(3), y", "**{} if exit(3) else {}, y", "a b", "", "class"])
    @pytest.mark.parametrize("place", ["call", "arguments"])
    def test_names_of_arguments_that_could_become_code(self, saved, place, name):
        def change(description, tensors):
            if place == "call":
                op(description, "relu").update(kwargs={name: True})
            else:
                description["graph"].update(in_tree=arguments(0, name))

        rewrite(saved, change)
        with pytest.raises(ValueError, match=saved.name):
            bmrs.load(saved)


def arguments(number: int, *names: str) -> dict[str, Any]:
    return {"tuple": [{"tuple": [None] * number}, {"dict": dict.fromkeys(names)}]}


def layer(
    name: str, module: nn.Module, inputs: list[str | None], **arguments: Any
) -> tuple[dict[str, Any], dict]:
    """The entry of a layer in a file of version 2, and its tensors."""
    tensors = {f"{name}.{key}": value for key, value in module.state_dict().items()}
    entry = {
        "name": name,
        "type": type(module).__name__,
        "arguments": arguments,
        "dtype": "float32" if tensors else None,
        "inputs": inputs,
    }
    return entry, tensors


class TestVersion2:
    """Graphs of stock layers and additions, which are no longer written."""

    @pytest.fixture
    def layers(self) -> dict[str, nn.Module]:
        torch.manual_seed(0)
        return randomise(
            nn.ModuleDict({"first": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "last": nn.Linear(4, 2)})
        ).eval()

    @pytest.fixture
    def saved(self, path, layers):
        parts = [
            layer("first", layers["first"], [None], in_features=3, out_features=4, bias=True),
            layer("norm", layers["norm"], ["first"], num_features=4, eps=1e-5, momentum=0.1, affine=True),
            layer("relu", nn.ReLU(), ["norm"], inplace=False),
            (
                {
                    "name": "add",
                    "type": "Addition",
                    "arguments": {},
                    "dtype": None,
                    "inputs": ["relu", "first"],
                },
                {},
            ),
            layer("last", layers["last"], ["add"], in_features=4, out_features=2, bias=True),
        ]
        description = {"version": 2, "layers": [entry for entry, _ in parts]}
        tensors = {name: tensor for _, its_tensors in parts for name, tensor in its_tensors.items()}
        save_file(tensors, path, metadata={"bmrs": json.dumps(description)})
        return path

    def test_is_read(self, saved, layers):
        loaded = bmrs.load(saved)
        assert isinstance(loaded, fx.GraphModule)
        assert not any(module.training for module in loaded.modules())
        assert [name for name, _ in loaded.named_children()] == ["first", "norm", "relu", "last"]
        x = torch.randn(5, 3)
        first = layers["first"](x)
        assert torch.equal(loaded(x), layers["last"](torch.relu(layers["norm"](first)) + first))
        loaded.train()(x).sum().backward()
        assert all(parameter.grad is not None for parameter in loaded.parameters())

    def test_is_saved_again_as_version_3(self, saved, tmp_path):
        loaded, x = bmrs.load(saved), torch.randn(5, 3)
        bmrs.save(tmp_path / "again.safetensors", loaded, example_inputs=x)
        assert description_of(tmp_path / "again.safetensors")["version"] == 3
        assert torch.equal(bmrs.load(tmp_path / "again.safetensors")(x), loaded(x))

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("norm", {"inputs": ["norm"]}, r"'norm' .* its inputs \['norm'\] are not 1 of"),
            ("norm", {"inputs": ["last"]}, r"'norm' .* its inputs \['last'\] are not 1 of"),
            ("norm", {"inputs": []}, r"'norm' .* its inputs \[\] are not 1 of"),
            ("norm", {"inputs": None}, "'norm' .* has unsuitable inputs None"),
            ("norm", {"inputs": [["first"]]}, "'norm' .* has unsuitable inputs"),
            ("norm", {"more": 1}, "lacks or adds a key"),
            (
                "add",
                {"inputs": ["relu"]},
                r"'add' \(Addition\) cannot be built: its inputs \['relu'\] are not 2 of",
            ),
            ("add", {"arguments": {"alpha": 2}}, r"'add' \(Addition\) has unknown or unsuitable arguments"),
            ("relu", {"name": "first"}, r"'first' \(ReLU\) .* its name is taken"),
            ("relu", {"type": "os.system"}, "'relu' is of unknown type 'os.system'"),
        ],
    )
    def test_tampered(self, saved, name, changes, message):
        def change(description, tensors):
            next(entry for entry in description["layers"] if entry["name"] == name).update(changes)

        rewrite(saved, change)
        with pytest.raises(ValueError, match=message):
            bmrs.load(saved)

    @pytest.mark.parametrize(
        "name", ['")]; raise SystemExit(3) #', "a.b", "a b", "", "class", "forward", "é", "x\n"]
    )
    def test_names_that_could_become_code_are_refused(self, saved, name):
        entry = {
            "name": name,
            "type": "ReLU",
            "arguments": {"inplace": False},
            "dtype": None,
            "inputs": ["last"],
        }
        rewrite(saved, lambda d, t: d["layers"].append(entry))
        with pytest.raises(ValueError, match=r"\(ReLU\) cannot be built: its name cannot be that of a layer"):
            bmrs.load(saved)


@pytest.mark.filterwarnings("ignore:the saved network takes")  # of sequences of one length
class TestTrustingOperators:
    """Their kernels take sizes on trust, and read and write beside their memory where these are others."""

    @pytest.mark.parametrize(
        "network",
        [
            nn.LSTM(4, 3),
            nn.LSTM(4, 3, proj_size=2, num_layers=2, bidirectional=True),
            nn.GRU(4, 3, bias=False, bidirectional=True, batch_first=True),
            nn.RNN(4, 3),
        ],
        ids=repr,
    )
    def test_weights_of_other_sizes(self, path, network):
        x = torch.randn(5, 2, 4)
        bmrs.save(path, network.eval(), example_inputs=x)
        assert torch.equal(bmrs.load(path)(x)[0], network(x)[0])
        rewrite(path, silently(lambda d, t: t.update(weight_hh_l0=t["weight_hh_l0"][:2].clone())))
        with pytest.raises(ValueError, match="must have states and weights of shapes"):
            bmrs.load(path)(x)
        with pytest.raises(
            ValueError, match=r"'weight_hh_l0' of shape \(2, .* does not fit the other weights"
        ):
            bmrs.load(path, model=copy.deepcopy(network))

    @pytest.mark.parametrize(("position", "value"), [(8, True), (8, -1), (7, True), (4, 2), (3, False)])
    def test_options_that_do_not_suit_the_states(self, path, position, value):
        x = torch.randn(5, 2, 4)
        bmrs.save(path, nn.LSTM(4, 3).eval(), example_inputs=x)
        name = next(o["name"] for o in description_of(path)["graph"]["operations"] if "lstm" in o["target"])
        rewrite(path, silently(lambda d, t: op(d, name)["args"].__setitem__(position, value)))
        with pytest.raises(ValueError, match=r"aten.lstm.input must have"):
            bmrs.load(path)(x)

    def test_dtypes(self, path):
        network, x = nn.LSTM(4, 3).eval(), torch.randn(5, 2, 4)
        bmrs.save(path, network, example_inputs=x)
        loaded = bmrs.load(path)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loaded(x.bfloat16())[0], network(x.bfloat16())[0])
        rewrite(path, silently(lambda d, t: t.update(bias_hh_l0=t["bias_hh_l0"].double())))
        with pytest.raises(ValueError, match="and one dtype"):
            bmrs.load(path)(x)

    @pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
    def test_cells(self, path, kind):
        class Cell(nn.Module):
            def __init__(self):
                super().__init__()
                self.cell = kind(4, 3)

            def forward(self, x):
                result = self.cell(x)
                return result if isinstance(result, torch.Tensor) else result[0]

        network, x = Cell().eval(), torch.randn(2, 4)
        bmrs.save(path, network, example_inputs=x)
        assert torch.equal(bmrs.load(path)(x), network(x))
        rewrite(path, silently(lambda d, t: t.update({"cell.weight_hh": t["cell.weight_hh"][:2].clone()})))
        with pytest.raises(ValueError, match=r"_cell.* must have states and weights of shapes"):
            bmrs.load(path)(x)

    def test_batch_norm_of_the_inside(self, path):
        class Norm(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("scale", torch.ones(6))

            def forward(self, x):
                ones = self.scale
                norm = torch.ops.aten._native_batch_norm_legit_no_training(
                    x, ones, ones, ones, ones, 0.1, 1e-5
                )
                return norm[0]

        network, x = Norm().eval(), torch.randn(2, 6)
        bmrs.save(path, network, example_inputs=x)
        assert torch.equal(bmrs.load(path)(x), network(x))
        rewrite(path, silently(lambda d, t: t.update(scale=t["scale"][:1].clone())))
        with pytest.raises(
            ValueError, match=r"must have tensors of shape \(6,\) beside its input, got \(1,\)"
        ):
            bmrs.load(path)(x)


class Named(nn.Module):
    """Parts with names that are not those of variables."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last = first, last
        self.parts = nn.ModuleDict({first: nn.Linear(4, 8), last: nn.BatchNorm1d(8)})
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(torch.relu(self.parts[self.last](self.parts[self.first](x))))


def compacted_with_names(*names):
    model = bmrs.add_noise(Named(*names), where="parts.*").eval()
    for layer in noise_layers(model).values():
        layer.set_kept(torch.arange(8) % 2 == 0)
    return bmrs.compact(model, torch.randn(3, 4))


def test_names_with_a_hyphen(tmp_path):
    compacted, path, x = (
        compacted_with_names("conv-1", "norm-1"),
        tmp_path / "m.safetensors",
        torch.randn(5, 4),
    )
    bmrs.save(path, compacted)
    for loaded in (bmrs.load(path), bmrs.load(path, model=Named("conv-1", "norm-1"))):
        torch.testing.assert_close(loaded(x), compacted(x))
        assert {name for name, _ in loaded.named_parameters()} >= {"parts.conv-1.weight", "parts.norm-1.bias"}


@pytest.mark.parametrize("names", [("en fr", "norm"), ("first", "x/2")])
def test_names_that_no_file_can_hold_need_the_class(names, tmp_path):
    compacted, path, x = compacted_with_names(*names), tmp_path / "m.safetensors", torch.randn(5, 4)
    with pytest.warns(
        UserWarning, match=r"can only be loaded with bmrs.load\(path, model=...\).* has '(en fr|x/2)'"
    ):
        bmrs.save(path, compacted)
    torch.testing.assert_close(bmrs.load(path, model=Named(*names))(x), compacted(x))
    with pytest.raises(ValueError, match="model="):
        bmrs.load(path)


class Keyed(nn.Module):
    """Returns a dict by the sizes of its feature maps, as detectors do."""

    def __init__(self, key, written=False):
        super().__init__()
        self.a, self.o = nn.Linear(4, 8), nn.Linear(8, 3)
        self.key, self.written = key, written

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        return {self.key: self.o(hidden.view(-1, 8) if self.written else hidden), "x": x}


def compacted_with_key(key, **options):
    model = bmrs.add_noise(Keyed(key, **options), where="a").eval()
    model.a.noise.set_kept(torch.arange(8) % 2 == 0)
    return bmrs.compact(model, torch.randn(3, 4))


@pytest.mark.parametrize("written", [False, True])
def test_keys_of_outputs_stay_what_they_are(written, tmp_path):
    compacted = compacted_with_key(7, written=written)
    assert bmrs.compact_report(compacted).form == ("graph" if written else "module")
    bmrs.save(tmp_path / "m.safetensors", compacted)
    x = torch.randn(5, 4)
    for network in (compacted, bmrs.load(tmp_path / "m.safetensors")):
        assert list(network(x)) == [7, "x"]


def test_keys_that_no_file_can_hold_need_the_class(tmp_path):
    compacted, x = compacted_with_key((1, 2)), torch.randn(5, 4)
    with pytest.warns(UserWarning, match=r"a dict with the key \(1, 2\)"):
        bmrs.save(tmp_path / "m.safetensors", compacted)
    assert list(bmrs.load(tmp_path / "m.safetensors", model=Keyed((1, 2)))(x)) == [(1, 2), "x"]


def test_pairs_that_are_none_are_named(saved):
    rewrite(saved, lambda description, _: description["graph"].update(outputs={"pairs": [[1.5, None]]}))
    with pytest.raises(ValueError, match=r"its tree .* is unknown"):
        bmrs.load(saved)


def test_dtypes_that_no_file_can_hold_are_named(tmp_path):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 2, dtype=torch.complex128)

        def forward(self, x):
            return self.c(self.a(x).to(torch.complex128)).abs()

    model = bmrs.add_noise(Complex(), where="a").eval()
    compacted = bmrs.compact(model, torch.randn(3, 4))
    with pytest.raises(
        TypeError, match=r"tensor 'c\.(weight|bias)' is of torch\.complex128, which safetensors cannot"
    ):
        bmrs.save(tmp_path / "m.safetensors", compacted)
    assert not (tmp_path / "m.safetensors").exists()
