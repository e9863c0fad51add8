import dataclasses
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from compaction_cases import assert_compacts, assert_equal_outputs, prune_structures
from torch import distributed, nn

import bmrs
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.noise = nn.Linear(4, 4), NoiseLayer(4)

    def forward(self, x):
        x = self.noise(self.layer(x))
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x, y=None):
        return torch.relu(x) if y is None else x + y


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), NoiseLayer(4, initial_mu=-1.0), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class TestCapture:
    @pytest.mark.parametrize(
        "model", [Dynamic(), nn.Sequential(nn.Linear(4, 4), Dynamic())], ids=["whole", "part"]
    )
    def test_what_cannot_be_captured_is_named_with_its_line(self, model):
        with pytest.raises(
            ValueError, match=f"torch.export, which failed on {type(model).__name__}"
        ) as caught:
            bmrs.compact(model, torch.randn(3, 4))
        line = Dynamic.forward.__code__.co_firstlineno + 2
        assert f"at line {line} of {__file__} (return x if x.sum() > 0 else -x)" in str(caught.value)
        assert "bmrs.fold(model) makes a network without noise layers" in str(caught.value)
        assert caught.value.__cause__ is not None

    def test_such_a_model_can_be_folded(self):
        torch.manual_seed(0)
        model = Dynamic()
        prune_structures(model.noise, [1])
        folded = bmrs.fold(model)
        assert type(folded) is Dynamic
        assert not noise_layers(folded)
        assert_equal_outputs(folded, model, torch.randn(3, 4))

    def test_other_random_numbers_in_evaluation_mode_are_noticed(self, model):
        model[2] = DropsAlways()
        bmrs.compact(model, torch.randn(3, 4))  # of which nothing leaves: it drops the same
        prune_structures(model[1], [1])
        with pytest.raises(
            ValueError, match=r"gives other outputs every time in evaluation mode.*bmrs\.fold\(model\)"
        ):
            bmrs.compact(model, torch.randn(3, 4))

    @pytest.mark.parametrize("function", [bmrs.compact, bmrs.suggest])
    def test_transforms_of_functions_are_named_with_their_line(self, function):
        model = nn.Sequential(nn.Linear(4, 4), Transformed(), nn.Linear(4, 2)).eval()
        bmrs.add_noise(model, where="0")
        prune_structures(model[0].noise, [1])
        x = torch.randn(3, 4)
        with pytest.raises(
            ValueError, match=r"cannot be followed through _\w+ in layer '1' .* of torch\.func"
        ) as caught:
            function(model, x)
        line = Transformed.forward.__code__.co_firstlineno + 1
        assert f'"{__file__}", line {line}, in forward' in str(caught.value)
        assert_equal_outputs(bmrs.fold(model), model, x)

    @pytest.mark.parametrize("function", [bmrs.compact, bmrs.suggest])
    def test_dataclasses_are_named_until_they_are_registered(self, function):
        @dataclasses.dataclass
        class Batch:
            x: torch.Tensor

        @dataclasses.dataclass
        class Result:
            logits: torch.Tensor

        model = bmrs.add_noise(Wrapping(Result), where="a").eval()
        prune_structures(model.a.noise, [1, 2])
        x = torch.randn(300, 4)
        for example, error, message in (
            (Batch(x), TypeError, "got .*Batch, a dataclass, .* sequence or mapping, as in"),
            ((Batch(x),), TypeError, r"must hold a tensor, got .*Batch, a dataclass, .*register_dataclass\("),
            (
                {"x": Batch(x)},
                TypeError,
                r"must hold a tensor, got .*Batch, a dataclass, .*register_dataclass\(",
            ),
            (
                (Batch(x), x),
                ValueError,
                r"does not know .*Batch, an input of Wrapping: .*register_dataclass\(.*Bat",
            ),
            (
                x,
                ValueError,
                r"does not know .*Result, an output of Wrapping: call .*register_dataclass\(.*Result",
            ),
        ):
            with pytest.raises(error, match=message) as caught:
                function(model, example)
            assert "tensor(" not in str(caught.value)
        torch.export.register_dataclass(Batch)
        torch.export.register_dataclass(Result)
        found = function(model, (Batch(x),))
        if function is bmrs.compact:
            assert found.a.out_features == 6
            torch.testing.assert_close(found(Batch(x)).logits, model(Batch(x)).logits)

    def test_other_classes_of_outputs_are_named(self):
        class Result:
            def __init__(self, logits):
                self.logits = logits

        model = bmrs.add_noise(Wrapping(Result), where="a")
        with pytest.raises(
            ValueError,
            match=r"does not know .*Result, an output of Wrapping: use a tensor, a tuple, a dict or",
        ):
            bmrs.compact(model, torch.randn(3, 4))


class Transformed(nn.Module):
    def forward(self, x):
        return torch.func.grad(lambda values: (values**2).sum())(x)


class Wrapping(nn.Module):
    """Takes and returns classes of the user's own."""

    def __init__(self, result):
        super().__init__()
        self.a, self.o, self.result = nn.Linear(4, 8), nn.Linear(8, 2), result

    def forward(self, x, y=None):
        return self.result(self.o(torch.relu(self.a(getattr(x, "x", x)))))


class DropsAlways(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class TestExampleInputs:
    @pytest.mark.parametrize(
        ("example", "error", "message"),
        [
            (3.0, TypeError, r"a tensor, a sequence of positional arguments or a mapping .* got float"),
            ("input", TypeError, "got str"),
            (None, TypeError, "got NoneType"),
            (iter([torch.ones(1, 4)]), TypeError, "got list_iterator"),
            ([3.0], TypeError, r"example_inputs must hold a tensor, got \[3\.0\]"),
            ((), TypeError, r"must hold a tensor, got \(\)"),
            ({"input": 3}, TypeError, r"must hold a tensor, got \{'input': 3\}"),
            (torch.ones(0, 4), ValueError, r"must hold an example, got shape \(0, 4\)"),
            ({"input": torch.ones(0, 4)}, ValueError, r"must hold an example, got shape \(0, 4\)"),
            (
                torch.ones(2, 5),
                ValueError,
                r"\(Sequential\) does not run on example_inputs of \(2, 5\) float32: .*mat1",
            ),
            (
                (torch.ones(1, 4), torch.ones(1, 4)),
                ValueError,
                r"does not run on example_inputs of \(1, 4\) float32, \(1, 4\) float32: TypeError",
            ),
            (
                {"y": torch.ones(1, 4)},
                ValueError,
                r"\(Sequential\) does not run on example_inputs of \(1, 4\) float32: TypeError",
            ),
            (torch.ones(2, 4, dtype=torch.float64), ValueError, r"does not run on example_inputs .*dtype"),
            (torch.ones(2, 4, device="meta"), ValueError, "does not run on example_inputs .*meta"),
        ],
    )
    def test_unsuitable_ones_are_named(self, model, example, error, message):
        with pytest.raises(error, match=message):
            bmrs.compact(model, example)

    @pytest.mark.filterwarnings("ignore:the model .* has no noise layer")
    def test_optional_second_input_is_left_out(self):
        compacted = assert_compacts(TwoInputs(), torch.randn(2, 3))
        assert compacted(torch.zeros(2, 3), torch.ones(2, 3)).eq(1).all()

    @pytest.mark.filterwarnings("ignore:the model .* has no noise layer")
    def test_they_are_not_overwritten(self):
        model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))
        x = torch.randn(3, 4)
        before = x.clone()
        bmrs.compact(model, x)
        assert torch.equal(x, before)


class TestModels:
    @pytest.mark.parametrize("function", [bmrs.fold, lambda model: bmrs.compact(model, torch.ones(1, 4))])
    def test_what_is_no_module(self, function):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 3"):
            function(3)

    @pytest.mark.parametrize(
        ("name", "value"), [("0.weight", float("nan")), ("1.mu", float("inf")), ("3.bias", float("-inf"))]
    )
    def test_parameters_that_are_not_finite_are_named(self, model, name, value):
        with torch.no_grad():
            model.get_parameter(name).flatten()[0] = value
        with pytest.raises(ValueError, match=f"parameter '{re.escape(name)}' is NaN or infinite"):
            bmrs.compact(model, torch.randn(3, 4))

    def test_statistics_that_are_nan_are_named(self, model):
        model.append(nn.BatchNorm1d(2))
        model[-1].running_var[0] = float("nan")
        with pytest.raises(ValueError, match=r"buffer '4\.running_var' is NaN"):
            bmrs.compact(model, torch.randn(3, 4))

    def test_equal_infinities_are_no_difference(self, model):
        model.append(Infinite())
        compacted = bmrs.compact(model, torch.randn(3, 4))
        assert compacted(torch.randn(3, 4))[:, 0].isneginf().all()

    def test_weights_beyond_what_16_bits_hold_are_noticed(self):
        torch.manual_seed(0)
        linear = nn.Linear(4, 4, dtype=torch.float16)
        model = nn.Sequential(linear, NoiseLayer(4, upper=20.0, initial_mu=15.0))
        with pytest.raises(RuntimeError, match=r"compacted model.*(differ|not finite)"):
            bmrs.compact(model, torch.randn(3, 4).half())

    @pytest.mark.parametrize("function", [bmrs.fold, lambda model: bmrs.compact(model, torch.ones(1, 4))])
    def test_meta_device(self, function):
        with pytest.raises(
            ValueError, match="'weight' is on the meta device and has no values: load the weights"
        ):
            function(nn.Linear(4, 4, device="meta"))

    @pytest.mark.parametrize("function", [bmrs.fold, lambda model: bmrs.compact(model, torch.ones(1, 4))])
    def test_sharded_models(self, model, process_group, function):
        from torch.distributed.fsdp import fully_shard

        with pytest.raises(
            ValueError, match=r"parameters of the model \(.*\) are sharded: gather a full state_dict"
        ):
            function(fully_shard(model))

    def test_distributed_data_parallel_models(self, model, process_group):
        prune_structures(model[1], [1])
        compacted = bmrs.compact(nn.parallel.DistributedDataParallel(model), torch.randn(3, 4))
        assert type(compacted) is nn.Sequential
        assert compacted[0].out_features == 3
        assert_equal_outputs(compacted, model, torch.randn(3, 4))

    @pytest.mark.parametrize("kind", ["subclass", "hook"])
    @pytest.mark.parametrize("function", [bmrs.fold, lambda model: bmrs.compact(model, torch.randn(3, 4))])
    def test_noise_layers_with_code_of_their_own(self, model, function, kind):
        """What a subclass or a hook does is a part of the network: it is kept, or refused by name."""
        model[1] = Shifted(4) if kind == "subclass" else NoiseLayer(4)
        if kind == "hook":
            model[1].register_forward_hook(lambda module, args, output: output + 1.0)
        try:
            result = function(model)
        except (TypeError, ValueError, RuntimeError) as error:
            assert re.search(r"'1'|differ from the masked", str(error))  # noqa: PT017
        else:
            assert_equal_outputs(result, model, torch.randn(3, 4))


class Shifted(NoiseLayer):
    def forward(self, x):
        return super().forward(x) + 1.0


class InBytes(torch.Tensor):
    """A weight in eight bits, as libraries of quantisation make it."""

    @staticmethod
    def __new__(cls, values):
        scale = values.abs().max() / 127
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made.whole, made.scale = (values / scale).round().to(torch.int8), scale
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        if function.__name__ not in ("t.default", "linear.default"):
            raise NotImplementedError(function)
        values = [a.whole * a.scale if isinstance(a, cls) else a for a in args]
        return function(*values, **(kwargs or {}))

    def __deepcopy__(self, memo):
        return self


class Plain(nn.Parameter):
    """A class of its own that holds what it says."""


class TestQuantised:
    @staticmethod
    def model():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)
        )
        bmrs.add_noise(model, where="1")
        model[0][0].weight = nn.Parameter(InBytes(model[0][0].weight.detach()))
        return model.eval()

    @pytest.mark.parametrize(
        "function", [bmrs.compact, bmrs.suggest, bmrs.noise_outlook, bmrs.structure_costs]
    )
    def test_it_comes_after_compaction(self, function):
        with pytest.raises(
            ValueError,
            match=r"weight of layer '0\.0' \(Linear\) is of class InBytes, .* first, then quantise",
        ):
            function(self.model(), torch.randn(3, 4))

    def test_it_is_folded_but_not_saved(self, tmp_path):
        model, x = self.model(), torch.randn(3, 4)
        prune_structures(model[1].noise, [1])
        folded = bmrs.fold(model)
        torch.testing.assert_close(folded(x), model(x))
        with pytest.raises(
            ValueError, match=r"weight of layer '0\.0' .* InBytes, .* save first, then quantise"
        ):
            bmrs.save(tmp_path / "m", folded, example_inputs=x)

    @pytest.mark.filterwarnings("ignore")  # they are deprecated
    def test_torchs_own_ways(self):
        model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
        bmrs.add_noise(model, where="0")
        model.register_buffer("table", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
        with pytest.raises(
            ValueError, match=r"table of the model \(Sequential\) is of class Tensor, which holds"
        ):
            bmrs.compact(model.eval(), x)
        del model.table
        dynamic = torch.ao.nn.quantized.dynamic.Linear(6, 2)
        model[2] = dynamic
        with pytest.raises(
            ValueError, match=r"layer '2' \(Linear\) is quantised, .*: compact first, then quantise"
        ):
            bmrs.compact(model.eval(), x)

    def test_other_classes_of_parameters_are_cut(self, model):
        prune_structures(model[1], [1])
        model[0].weight = Plain(model[0].weight.detach())
        assert assert_compacts(model, torch.randn(3, 4))[0].out_features == 3


class Infinite(nn.Module):
    """As in attention masks."""

    def forward(self, x):
        return torch.cat([torch.full_like(x[:, :1], float("-inf")), x], dim=1)


class TestFold:
    def test_any_model_at_full_size(self, model):
        prune_structures(model[1], [1, 2])
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        folded = bmrs.fold(model.train())
        assert type(folded) is nn.Sequential
        assert not noise_layers(folded)
        assert not any(module.training for module in folded.modules())
        assert [name for name, _ in folded.named_parameters()] == ["0.weight", "0.bias", "3.weight", "3.bias"]
        assert torch.equal(folded[0].weight, model[0].weight)
        assert_equal_outputs(folded, model, torch.randn(3, 4))
        assert model.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize(
        "options", [{"where": "0"}, {"where": "3", "structures": "heads", "num_heads": 2}]
    )
    def test_added_noise_and_its_activation(self, options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        bmrs.add_noise(model, activation="tanh", initial_mu=-1.0, **options)
        (noise,) = noise_layers(model).values()
        prune_structures(noise, [0])
        folded = bmrs.fold(model)
        assert not noise_layers(folded)
        assert_equal_outputs(folded, model, torch.randn(3, 4))

    def test_its_copy_is_its_own(self, model):
        folded = bmrs.fold(model)
        with torch.no_grad():
            folded[0].weight.zero_()
        assert model[0].weight.any()

    @pytest.mark.filterwarnings("ignore:the model .* has no noise layer")
    def test_folded_model_compacts(self, model):
        """The factors are fixed by then; pruned structures are factors of zero."""
        x = torch.randn(3, 4)
        prune_structures(model[1], [1])
        folded = bmrs.fold(model)
        assert_equal_outputs(bmrs.compact(folded, x), model, x)
        with pytest.raises(TypeError, match=r"needs a network that bmrs\.compact returned"):
            bmrs.compact_report(folded)


class Depending(nn.Module):
    """Does what depends on the data, which a graph cannot say."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        hidden = self.hidden(x)
        return self.out(hidden * 2 if hidden.sum() > 0 else hidden)


def test_a_network_that_cannot_be_captured_is_refused_without_its_graph(capfd):
    model = bmrs.add_noise(Depending(), where="hidden")
    with pytest.raises(
        ValueError, match=r"compact follows the model with torch.export, which failed on Depending"
    ):
        bmrs.compact(model, torch.randn(3, 4))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


class Padded(nn.Module):
    """Attention over rows of which one is padded in full: softmax makes NaN of it."""

    def __init__(self, padded):
        super().__init__()
        self.padded, self.embed, self.head = padded, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.relu(self.embed(x))
        scores = (hidden @ hidden.mT).masked_fill(self.padded, -torch.inf)
        return self.head(scores.softmax(-1) @ hidden)


def masked_with_padding(padded):
    torch.manual_seed(0)
    model = bmrs.add_noise(Padded(padded), where="embed").double().eval()
    model.embed.noise.set_kept(torch.arange(6) % 2 == 0)
    return model


def test_nan_of_rows_that_are_padded_in_full_is_the_same_in_both():
    model = masked_with_padding(torch.tensor([[False], [True], [False]]))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    compacted = bmrs.compact(model, x)
    assert compacted.embed.out_features == 3
    expected, found = model(x), compacted(x)
    assert expected.isnan().any()
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_nan_alone_is_refused_as_such():
    model = masked_with_padding(torch.tensor(True))
    with pytest.raises(ValueError, match="returns NaN and infinities alone on example_inputs"):
        bmrs.compact(model, torch.randn(2, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("function", [bmrs.compact, bmrs.suggest, bmrs.noise_outlook, bmrs.structure_costs])
@pytest.mark.parametrize(
    ("sparse", "layout"), [(torch.Tensor.to_sparse, "sparse_coo"), (torch.Tensor.to_sparse_csr, "sparse_csr")]
)
def test_sparse_examples_are_refused(function, sparse, layout):
    model = bmrs.add_noise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), where="0").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "beta state"
        example = torch.eye(4).to_sparse(layout=getattr(torch, layout))
    with pytest.raises(
        ValueError, match=f"must hold dense tensors, which can be followed, got a {layout} one"
    ):
        function(model, example)


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.o = nn.Embedding(9, 8, max_norm=1.0), nn.Linear(8, 3)

    def forward(self, t):
        return self.o(self.e(t).mean(1))


@pytest.mark.parametrize("function", [bmrs.compact, bmrs.suggest, bmrs.noise_outlook, bmrs.structure_costs])
def test_embeddings_that_change_when_they_are_called_are_left_as_they_are(function):
    torch.manual_seed(0)
    model = bmrs.add_noise(Lookup(), where="e").eval()
    model.e.noise.set_kept(torch.arange(8) % 2 == 0)
    before = model.e.weight.detach().clone()
    found = function(model, torch.tensor([[0, 1], [1, 2]]))
    assert torch.equal(model.e.weight, before)
    if function is bmrs.compact:
        tokens = torch.tensor([[3, 4], [5, 0]])
        torch.testing.assert_close(found(tokens), model(tokens))
