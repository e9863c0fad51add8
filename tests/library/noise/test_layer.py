import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import bmrs
import bmrs_kernels
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


def spread_posterior(layer: NoiseLayer) -> NoiseLayer:
    """Give every structure another posterior and prune one."""
    with torch.no_grad():
        layer.mu.copy_(torch.linspace(-6.0, 0.5, layer.num_structures))
        layer.log_sigma.copy_(torch.linspace(-3.0, 1.0, layer.num_structures))
        layer.mask[1] = False
    return layer


class TestForward:
    @pytest.mark.parametrize(
        ("shape", "dim"),
        [
            ((7, 5), 1),
            ((7, 5), -1),
            ((7, 5, 3), 1),
            ((7, 3, 5), -1),
            ((2, 5, 3, 4), 1),
            ((2, 5, 3, 4, 2), -4),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("activation", [None, "relu", "tanh"])
    def test_evaluation_multiplies_by_the_masked_mean(self, shape, dim, activation):
        layer = spread_posterior(NoiseLayer(5, dim=dim, activation=activation)).eval()
        x = torch.randn(shape)
        mean = bmrs_kernels.noise_mean(layer.mu, layer.log_sigma) * layer.mask
        apply = {None: torch.clone, "relu": torch.relu, "tanh": torch.tanh}[activation]
        expected = (apply(x).movedim(dim, -1) * mean).movedim(-1, dim)
        torch.testing.assert_close(layer(x), expected)
        assert (layer(x).movedim(dim, 0)[1] == 0).all()

    @pytest.mark.parametrize("granularity", ["element", "sample", "batch"])
    def test_training_draws_what_multiply_noise_draws(self, granularity):
        layer = spread_posterior(NoiseLayer(5, dim=1, granularity=granularity, activation="relu"))
        x = torch.randn(3, 5, 4, 4)
        torch.manual_seed(7)
        drawn = layer(x)
        torch.manual_seed(7)
        expected = bmrs_kernels.multiply_noise(
            x, layer.mu, layer.log_sigma, mask=layer.mask, granularity=granularity, activation="relu"
        )
        assert torch.equal(drawn, expected)
        assert not torch.equal(drawn, layer(x))

    def test_granularity_sets_what_shares_a_draw(self):
        x = torch.ones(6, 5, 4, 4)
        ratios = {}
        for granularity in ("element", "sample", "batch"):
            layer = NoiseLayer(5, granularity=granularity, initial_mu=-1.0, initial_log_sigma=-1.0)
            theta = layer(x).detach()
            ratios[granularity] = len(theta.unique()) / 5
        assert ratios["batch"] == 1
        assert ratios["sample"] == 6
        assert ratios["element"] > 6 * 16 * 0.9

    def test_mean_of_draws_is_the_evaluation_factor(self):
        layer = spread_posterior(NoiseLayer(5, dim=1))
        x = torch.ones(200_000, 5)
        drawn = layer(x).mean(0)
        torch.testing.assert_close(drawn, layer.eval()(x)[0], rtol=0.03, atol=1e-4)

    def test_gradients_reach_x_and_kept_posteriors_only(self):
        layer = spread_posterior(NoiseLayer(5, dim=1))
        x = torch.randn(8, 5, requires_grad=True)
        layer(x).square().sum().backward()
        for gradient in (layer.mu.grad, layer.log_sigma.grad, x.grad.abs().sum(0)):
            assert torch.equal(gradient != 0, layer.mask)

    @pytest.mark.parametrize("training", [True, False])
    def test_zero_size_batch(self, training):
        layer = NoiseLayer(5).train(training)
        x = torch.empty(0, 5, 2, 2, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.shape
        assert layer.mu.grad is None or (layer.mu.grad == 0).all()

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_output_has_the_dtype_of_x(self, training, dtype):
        layer = NoiseLayer(5, activation="tanh").train(training)
        assert layer(torch.randn(3, 5).to(dtype)).dtype == dtype

    @pytest.mark.parametrize("training", [True, False])
    def test_autocast_and_backward(self, training):
        model = nn.Sequential(nn.Linear(4, 5), NoiseLayer(5, activation="relu"), nn.Linear(5, 2)).train(
            training
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(torch.randn(3, 4))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert model[1].mu.grad.dtype == torch.float32

    @pytest.mark.parametrize("training", [True, False])
    def test_compiles_to_one_graph(self, training):
        layer = spread_posterior(NoiseLayer(5, activation="relu")).train(training)
        x = torch.randn(3, 5, 2)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.manual_seed(3)
        found = compiled(x)
        torch.manual_seed(3)
        torch.testing.assert_close(found, layer(x))


class TestState:
    def test_state_dict_loads_with_weights_only(self, tmp_path):
        layer = spread_posterior(NoiseLayer(5))
        torch.save(layer.state_dict(), tmp_path / "layer.pt")
        other = NoiseLayer(5)
        other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
        for name in ("mu", "log_sigma", "mask"):
            assert torch.equal(getattr(other, name), getattr(layer, name))
        assert other.mask.dtype == torch.bool

    def test_mask_of_another_shape_is_refused(self):
        state = NoiseLayer(5).state_dict() | {"mask": torch.ones(4, dtype=torch.bool)}
        with pytest.raises(RuntimeError, match="size mismatch for mask"):
            NoiseLayer(5).load_state_dict(state)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
    )
    def test_copies_are_independent_and_equal(self, copied):
        layer = spread_posterior(NoiseLayer(5, activation="relu", granularity="batch"))
        layer.eval()(torch.randn(2, 5)).sum().backward()
        other = copied(layer)
        x = torch.randn(2, 5)
        assert torch.equal(other(x), layer(x))
        with torch.no_grad():
            layer.mu.zero_()
        assert not torch.equal(other(x), layer(x))

    def test_evaluation_follows_every_change_of_the_parameters(self):
        layer = NoiseLayer(5).eval()
        x = torch.ones(1, 5)
        before = layer(x)
        layer.load_state_dict(spread_posterior(NoiseLayer(5)).state_dict())
        assert not torch.equal(layer(x), before)

    @pytest.mark.parametrize(
        "narrow",
        [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16), lambda m: m.type(torch.half)],
    )
    def test_posterior_stays_float32_in_a_16_bit_model(self, narrow):
        model = nn.Sequential(nn.Linear(4, 5), spread_posterior(NoiseLayer(5)))
        mu = model[1].mu.detach().clone()
        narrow(model)
        assert model[0].weight.dtype in (torch.float16, torch.bfloat16)
        assert model[1].mask.dtype == torch.bool
        assert model[1].log_sigma.dtype == torch.float32
        assert torch.equal(model[1].mu, mu)
        assert model(torch.randn(2, 4, dtype=model[0].weight.dtype)).dtype == model[0].weight.dtype

    def test_double_and_back(self):
        layer = NoiseLayer(5).double()
        assert layer.mu.dtype == layer.log_sigma.dtype == torch.float64
        assert layer.half().mu.dtype == torch.float32

    def test_moves_between_devices(self):
        layer = NoiseLayer(5).to("meta")
        assert layer.mu.is_meta
        assert layer.mask.is_meta
        restored = layer.to_empty(device="cpu")
        restored.reset_parameters()
        assert restored.mask.all()
        assert (restored.log_sigma == -5).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_constructor_widens_16_bit_dtypes(self, dtype):
        assert NoiseLayer(5, dtype=dtype).mu.dtype == torch.float32

    def test_repr_shows_the_arguments(self):
        layer = NoiseLayer(5, dim=-1, granularity="sample", activation="tanh", backend="torch")
        assert repr(layer) == (
            "NoiseLayer(5, dim=-1, granularity='sample', activation='tanh', lower=-20.0, upper=0.0, "
            "backend='torch')"
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"num_structures": 0}, ValueError, "num_structures must be at least 1, got 0"),
            ({"num_structures": 2.0}, TypeError, "num_structures must be an int, got 2.0"),
            ({"dim": True}, TypeError, "dim must be an int, got True"),
            ({"granularity": "pixel"}, ValueError, "granularity must be one of 'element', 'sample', 'batch'"),
            (
                {"activation": "gelu"},
                ValueError,
                "activation must be one of None, 'relu', 'tanh', got 'gelu'",
            ),
            (
                {"backend": "cuda"},
                ValueError,
                "backend must be one of 'auto', 'torch', 'triton', 'numba', got 'cuda'",
            ),
            ({"lower": 0.0}, ValueError, "lower must be less than upper, got 0.0 and 0.0"),
            ({"lower": -float("inf")}, ValueError, "lower must be finite, got -inf"),
            ({"initial_mu": float("nan")}, ValueError, "initial_mu must be finite, got nan"),
            ({"dtype": torch.int32}, TypeError, "dtype must be a floating dtype, got torch.int32"),
        ],
    )
    def test_constructor(self, options, error, message):
        with pytest.raises(error, match=message):
            NoiseLayer(**{"num_structures": 3} | options)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.ones(2, 4), ValueError, r"num_structures=3 entries along dim=1, got shape \(2, 4\)"),
            (torch.ones(3), ValueError, r"x must have a dimension 1, got shape \(3,\)"),
            (torch.ones(2, 3, dtype=torch.int64), TypeError, "x must have a floating dtype, got torch.int64"),
            (torch.ones(2, 3, device="meta"), ValueError, "noise layer's device cpu, got meta"),
            ([[1.0, 1.0, 1.0]], TypeError, "x must be a tensor, got list"),
        ],
    )
    def test_input(self, training, x, error, message):
        with pytest.raises(error, match=message):
            NoiseLayer(3).train(training)(x)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (
                torch.ones(2, 4),
                ValueError,
                r"num_structures=3 · structure_size=2 entries along dim=1, got shape \(2, 4\)",
            ),
            (torch.tensor(1.0), ValueError, r"x must have a dimension 1, got shape \(\)"),
            (torch.ones(2, 6, dtype=torch.int64), TypeError, "x must have a floating dtype, got torch.int64"),
            (3.0, TypeError, "x must be a tensor, got float"),
        ],
    )
    def test_input_of_larger_structures(self, training, x, error, message):
        with pytest.raises(error, match=message):
            NoiseLayer(3, structure_size=2).train(training)(x)

    def test_training_looks_at_x_once(self, monkeypatch):
        def looked(x):
            raise AssertionError("x was looked at twice")

        layer = NoiseLayer(3)
        monkeypatch.setattr(layer, "_check_input", looked)
        assert layer(torch.ones(2, 3)).shape == (2, 3)

    def test_an_error_that_is_not_of_x_is_the_kernels_own(self):
        layer = NoiseLayer(3, dim=0, granularity="sample")
        with pytest.raises(ValueError, match="dim must not be 0 with granularity") as caught:
            layer(torch.ones(3, 2))
        assert caught.value.__context__ is None


class TestNoiseLayers:
    def test_names_in_module_order_with_subclasses_and_without_repeats(self):
        class Special(NoiseLayer):
            pass

        shared = NoiseLayer(4)
        model = nn.Sequential(nn.Linear(2, 4), Special(4), nn.Sequential(shared), shared)
        assert list(noise_layers(model)) == ["1", "2.0"]
        assert noise_layers(nn.Linear(2, 2)) == {}


class TestLoading:
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_states_leave_the_parameters_wide(self, dtype, assign):
        layer = NoiseLayer(3)
        state = {"mu": torch.tensor([-1.0, -2.0, -3.0]), "log_sigma": torch.zeros(3)}
        state = {name: value.to(dtype) for name, value in state.items()} | {
            "mask": torch.tensor([True, False, True])
        }
        layer.load_state_dict(state, assign=assign)
        assert (layer.mu.dtype, layer.log_sigma.dtype) == (torch.float32, torch.float32)
        assert layer.mu.tolist() == [-1.0, -2.0, -3.0]
        assert isinstance(layer.mu, torch.nn.Parameter)
        assert state["mu"].dtype == dtype  # the caller's own

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_structure_pruned_in_any_state_of_an_average_stays_pruned(self, assign):
        before, after = NoiseLayer(4), NoiseLayer(4)
        after.mask[1] = False
        average = {name: value.float() for name, value in before.state_dict().items()}
        for _ in range(3):  # an exponential moving average, right after pruning
            for name, value in after.state_dict().items():
                average[name] = 0.999 * average[name] + 0.001 * value.float()
        layer = NoiseLayer(4)
        layer.load_state_dict(average, assign=assign)
        assert layer.mask.dtype == torch.bool
        assert layer.mask.tolist() == [True, False, True, True]

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize(
        "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int64]
    )
    def test_masks_of_other_dtypes_mean_what_they_meant(self, dtype, assign):
        mask = torch.tensor([True, False, True])
        state = NoiseLayer(3).state_dict() | {"mask": mask.to(dtype)}
        layer = NoiseLayer(3)
        layer.load_state_dict(state, assign=assign)
        assert layer.mask.dtype == torch.bool
        assert torch.equal(layer.mask, mask)

    def test_double_precision_stays(self):
        layer = NoiseLayer(3)
        layer.load_state_dict(NoiseLayer(3, dtype=torch.float64).state_dict(), assign=True)
        assert layer.mu.dtype == torch.float64


def averaged_by_torch(model, steps):
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999), use_buffers=True
    )
    averaged.update_parameters(model)
    yield averaged.module
    for _ in range(steps):
        averaged.update_parameters(model)
    yield averaged.module


def averaged_by_state(model, steps):
    averaged = copy.deepcopy(model)
    yield averaged
    with torch.no_grad():
        for _ in range(steps):
            for mean, value in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
                mean.copy_(0.999 * mean + 0.001 * value)
    yield averaged


@pytest.mark.parametrize("averaging", [averaged_by_torch, averaged_by_state])
class TestAveragesInPlace:
    def test_what_is_pruned_stays_pruned(self, averaging):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), NoiseLayer(4), torch.nn.Linear(4, 2))
        average = averaging(model, steps=1)
        averaged = next(average)
        model[1].set_kept(torch.tensor([True, False, True, True]))
        averaged = next(average)
        assert averaged[1].mask.all()  # what averaging does to a bool
        x = torch.ones(5, 4)
        assert (averaged[1].eval()(x) == 0).all(dim=0).tolist() == [False, True, False, False]
        assert (averaged[1].train()(x) == 0).all(dim=0).tolist() == [False, True, False, False]
        divergence = bmrs.kl_divergence(averaged, weight=1.0)
        assert divergence < bmrs.kl_divergence(torch.nn.Sequential(NoiseLayer(4)), weight=1.0)
        with pytest.warns(UserWarning, match="noise layer '1': 1 structures that are pruned came back"):
            compacted = bmrs.compact(averaged, torch.randn(2, 3))
        assert compacted[0].out_features == 3
        assert averaged[1].mask.tolist() == [True, False, True, True]

    def test_prune_and_saved_states_know(self, averaging):
        for entry in (lambda m: bmrs.prune(m, bmrs.SNR(threshold=0.0)), torch.nn.Module.state_dict):
            model = torch.nn.Sequential(NoiseLayer(4))
            average = averaging(model, steps=1)
            next(average)
            model[0].set_kept(torch.tensor([True, False, True, True]))
            averaged = next(average)
            with pytest.warns(UserWarning, match="noise layer '0': 1 structures"):
                entry(averaged)
            assert averaged[0].mask.tolist() == [True, False, True, True]


class TestSetKept:
    def test_prunes_and_brings_back(self):
        layer = NoiseLayer(3).eval()
        for kept in ([True, False, False], [False, True, True], [True, True, True]):
            layer.set_kept(torch.tensor(kept))
            assert layer.mask.tolist() == layer.kept.tolist() == kept
            assert layer.pruned.tolist() == [not each for each in kept]
            assert (layer(torch.ones(2, 3)) > 0).all(dim=0).tolist() == kept

    def test_a_mask_written_by_hand_prunes_for_good(self):
        layer = NoiseLayer(3)
        layer.mask[1] = False
        layer.load_state_dict(layer.state_dict())
        assert layer.pruned.tolist() == [False, True, False]

    def test_states_and_pickles_of_earlier_versions(self):
        earlier = NoiseLayer(3)
        earlier.set_kept(torch.tensor([True, False, True]))
        state = earlier.state_dict()
        del state["pruned"]
        layer = NoiseLayer(3)
        layer.load_state_dict(state)
        assert layer.kept.tolist() == [True, False, True]
        del earlier._buffers["pruned"]
        layer = pickle.loads(pickle.dumps(earlier))
        assert layer.kept.tolist() == [True, False, True]


class TestTensorsWithoutValues:
    def test_to_empty_initialises(self):
        model = torch.nn.Sequential(NoiseLayer(300, device="meta", initial_mu=-1.0))
        model.to_empty(device="cpu")
        assert (model[0].mu == -1.0).all()
        assert (model[0].log_sigma == -5.0).all()
        assert model[0].kept.all()

    def test_from_pretrained_initialises_what_the_checkpoint_lacks(self, tmp_path):
        transformers = pytest.importorskip("transformers", minversion="5.0")

        class Noisy(transformers.BertModel):
            def __init__(self, config):
                super().__init__(config)
                bmrs.add_noise(self, where="*.intermediate.dense", initial_mu=-0.5)
                self.post_init()

        config = transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=500, vocab_size=9
        )
        plain = transformers.BertModel(config)
        plain.save_pretrained(tmp_path / "plain")
        model = Noisy.from_pretrained(tmp_path / "plain")
        (layer,) = noise_layers(model).values()
        assert (layer.mu == -0.5).all()
        assert (layer.log_sigma == -5.0).all()
        assert layer.kept.all()
        assert not layer.pruned.any()

        spread_posterior(layer)
        model.save_pretrained(tmp_path / "noisy")
        for dtype in (torch.float32, torch.bfloat16):
            (again,) = noise_layers(Noisy.from_pretrained(tmp_path / "noisy", dtype=dtype)).values()
            for name, value in layer.state_dict().items():
                assert torch.equal(getattr(again, name), value), name
        # An average with a state that prunes nothing: what transformers loads into a bool is True for any other number.
        from safetensors.torch import load_file, save_file

        path = tmp_path / "noisy" / "model.safetensors"
        halves = {
            name: (value.float() + name.endswith("mask")) / 2 if value.dtype == torch.bool else value
            for name, value in load_file(path).items()
        }
        save_file(halves, path, metadata={"format": "pt"})
        (average,) = noise_layers(Noisy.from_pretrained(tmp_path / "noisy")).values()
        assert torch.equal(average.kept, layer.kept)


class TestGenerator:
    def test_draws_from_it_alone(self):
        def draws(seed):
            model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
            bmrs.add_noise(model, where=torch.nn.Linear, generator=torch.Generator().manual_seed(seed))
            layers = list(noise_layers(model).values())
            with torch.no_grad():
                for layer in layers:
                    layer.log_sigma.fill_(0.0)
            return [layer(torch.ones(4, 3)).detach() for layer in layers]

        first, second = draws(1), draws(1)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[0], draws(2)[0])

    def test_uses_none_of_torchs_own_numbers(self):
        layer = NoiseLayer(3, generator=torch.Generator().manual_seed(0))
        before = torch.get_rng_state()
        layer(torch.ones(4, 3))
        assert torch.equal(torch.get_rng_state(), before)

    def test_is_copied_with_the_layer(self):
        layer = NoiseLayer(3, initial_log_sigma=0.0, generator=torch.Generator().manual_seed(0))
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            x = torch.ones(4, 3)
            state = layer.generator.get_state()
            expected = layer(x)
            layer.generator.set_state(state)
            assert torch.equal(again(x), expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_is_refused_where_checkpointing_would_draw_again(self, reentrant):
        layer = NoiseLayer(3, generator=torch.Generator().manual_seed(0))
        x = torch.ones(4, 3, requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match=r"leave generator out for layers inside a checkpoint"):
            y.sum().backward()

    def test_must_be_one(self):
        with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got 3"):
            NoiseLayer(3, generator=3)


def test_parameters_that_were_narrowed_are_refused():
    layer = NoiseLayer(3)
    layer.mu = torch.nn.Parameter(layer.mu.detach().bfloat16())
    layer.log_sigma = torch.nn.Parameter(layer.log_sigma.detach().bfloat16())
    for mode in (layer.train, layer.eval):
        mode()
        with pytest.raises(
            TypeError, match=r"mu and log_sigma must have 32 bits or more, got torch.bfloat16"
        ):
            layer(torch.ones(2, 3))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore:Converting a tensor",
    "ignore:.*nondeterministic nodes",
    "ignore:Output nr 1",
)
class TestTracing:
    """torch.jit.trace, which runs a model with gradients and, to check, without."""

    @staticmethod
    def traced(layer):
        return torch.jit.trace(layer, torch.randn(5, 4))

    def test_traces_of_evaluation_mode_expect_the_noise(self):
        layer = NoiseLayer(4, initial_log_sigma=0.0).eval()
        x = torch.randn(3, 4)
        assert torch.equal(self.traced(layer)(x), layer(x))

    def test_traces_of_training_mode_draw_noise_and_have_gradients(self):
        layer = NoiseLayer(4, initial_log_sigma=0.0)
        traced, x = self.traced(layer), torch.randn(3, 4)
        assert not torch.equal(traced(x), traced(x))
        outcomes = []
        for run in (traced, layer):
            torch.manual_seed(3)
            out = run(x)
            outcomes.append((out, *torch.autograd.grad(out.square().sum(), list(run.parameters()))))
        torch.testing.assert_close(*outcomes, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        (
            torch.tensor([0, 2]),
            TypeError,
            r"a bool tensor of shape \(3,\), got torch.int64; of indices, torch.zeros",
        ),
        ([True, False, True], TypeError, r"must be a bool tensor of shape \(3,\), got list"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"must have shape \(3,\), .* got \(2,\)"),
        (torch.tensor(True), ValueError, r"must have shape \(3,\), .* got \(\)"),
    ],
)
def test_what_is_kept_is_a_bool_for_each_structure(kept, error, message):
    layer = NoiseLayer(3)
    with pytest.raises(error, match=message):
        layer.set_kept(kept)
    assert layer.kept.all()


class TestStatesOfLayersThatMustNotBeWritten:
    def test_born_in_inference_mode(self):
        with torch.inference_mode():
            layer = NoiseLayer(3)
            layer.set_kept(torch.tensor([True, False, True]))
        assert layer.state_dict()["pruned"].tolist() == [False, True, False]

    def test_nothing_is_written_where_nothing_changes(self):
        layer = NoiseLayer(3)
        layer.set_kept(torch.tensor([True, False, True]))
        versions = layer.mask._version, layer.pruned._version
        layer.state_dict()
        assert versions == (layer.mask._version, layer.pruned._version)

    @pytest.mark.parametrize("born_outside", [False, True])
    def test_without_values(self, born_outside):
        layer = NoiseLayer(3)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            layer = layer if born_outside else NoiseLayer(3)
            assert layer.state_dict()["mask"].shape == (3,)
        assert layer.state_dict()["mask"].shape == (3,)


WAYS_TO_AVERAGE = {
    "bools added": lambda first, second: (first + second) / 2,
    "numbers": lambda first, second: (first.float() + second.float()) / 2,
    "half precision": lambda first, second: (first.half() + second.half()) / 2,
    "stacked": lambda first, second: torch.stack([first, second]).float().mean(0),
    "whole numbers": lambda first, second: (first.to(torch.uint8) + second.to(torch.uint8)) // 2,
}


@pytest.mark.parametrize("way", WAYS_TO_AVERAGE)
def test_an_average_of_two_states_prunes_what_either_prunes(way):
    states = []
    for kept in ([True, False, True], [True, True, False]):
        layer = NoiseLayer(3)
        layer.set_kept(torch.tensor(kept))
        states.append(layer.state_dict())
    layer.load_state_dict(
        {name: WAYS_TO_AVERAGE[way](value, states[1][name]) for name, value in states[0].items()}
    )
    assert layer.kept.tolist() == [True, False, False]
