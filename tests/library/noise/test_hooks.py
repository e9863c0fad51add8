"""Noise that add_noise put into a model acts, or whoever meets it says that it does not."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bmrs
from bmrs.noise.lookup import noise_layers


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5), nn.Linear(5, 2)
    )
    bmrs.add_noise(model, where=nn.BatchNorm2d)
    return bmrs.add_noise(model, where="5", structures="heads", num_heads=5)


def masked(model):
    with torch.no_grad():
        for layer in noise_layers(model).values():
            layer.mu.uniform_(-2, 0)
            layer.mask[1] = False
    return model


EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))

CONVERSIONS = {
    "SyncBatchNorm": (nn.SyncBatchNorm.convert_sync_batchnorm, ["1"]),
    "hooks cleared": (lambda model: model[1]._forward_hooks.clear() or model, ["1"]),
    "hooks in front cleared": (lambda model: model[5]._forward_pre_hooks.clear() or model, ["5"]),
}

ENTRIES = {
    "kl_divergence": lambda model: bmrs.kl_divergence(model, weight="mean"),
    "prune": lambda model: bmrs.prune(model, bmrs.SNR()),
    "prune with examples": lambda model: bmrs.prune(model, bmrs.SNR(), example_inputs=EXAMPLE),
    "compact": lambda model: bmrs.compact(model, EXAMPLE),
    "fold": bmrs.fold,
    "structure_costs": lambda model: bmrs.structure_costs(model, EXAMPLE),
    "unsettled": bmrs.unsettled,
    "parameter_groups": lambda model: bmrs.parameter_groups(model, lr=0.1),
    "learn_posteriors": lambda model: bmrs.learn_posteriors(
        model, [EXAMPLE], lambda model, x: model(x).mean(), dataset_size=2
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_every_entry_says_that_noise_does_not_act(conversion, entry):
    convert, lost = CONVERSIONS[conversion]
    model = convert(masked(convolutional()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=f"the noise of '{lost[0]}' does not act any more.*bmrs.restore_noise"
    ):
        ENTRIES[entry](model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_restored_noise_acts_as_before(conversion):
    convert, lost = CONVERSIONS[conversion]
    model = masked(convolutional()).eval()
    expected = model(EXAMPLE)
    converted = convert(copy.deepcopy(model))
    assert not torch.allclose(converted(EXAMPLE), expected)
    assert bmrs.restore_noise(converted) == lost
    torch.testing.assert_close(converted(EXAMPLE), expected)
    assert bmrs.restore_noise(converted) == []
    torch.testing.assert_close(converted(EXAMPLE), expected)
    bmrs.kl_divergence(converted, weight="mean").backward()


def test_restored_noise_acts_in_a_model_that_ran_compiled_without_it():
    model = masked(convolutional()).eval()
    expected = model(EXAMPLE)
    model[1]._forward_hooks.clear()
    compiled = torch.compile(model, backend="eager")
    assert not torch.allclose(compiled(EXAMPLE), expected)
    assert bmrs.restore_noise(compiled) == ["1"]
    torch.testing.assert_close(compiled(EXAMPLE), expected)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_lost_nothing(carry):
    model = carry(masked(convolutional()))
    assert bmrs.restore_noise(model) == []
    bmrs.kl_divergence(model, weight="mean")


def test_a_layer_that_a_forward_calls_itself_needs_no_hook():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.noise = nn.Linear(3, 4), bmrs.NoiseLayer(4)

        def forward(self, x):
            return self.noise(self.linear(x))

    model = Own()
    bmrs.kl_divergence(model, weight="mean")
    assert bmrs.restore_noise(model) == []


def test_many_lost_layers_are_named_in_part():
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(7)))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(bmrs.add_noise(model, where=nn.BatchNorm1d))
    with pytest.raises(ValueError, match="the noise of '0', '1', '2', '3', '4', … does not act"):
        bmrs.prune(model, bmrs.SNR())
    assert bmrs.restore_noise(model) == [str(number) for number in range(7)]


@pytest.mark.parametrize("where", ["1", "5"])
def test_a_hook_without_its_noise_says_so(where):
    model = convolutional()
    del model.get_submodule(where)._modules["noise"]
    with pytest.raises(RuntimeError, match="lost its child 'noise'"):
        model(EXAMPLE)


def two_blocks():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten()
    ).eval()


def fused_by_fx(model):
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


FUSIONS = {
    "pairs": lambda model: torch.ao.quantization.fuse_modules(model, ["0", "1"]),
    "triples": lambda model: torch.ao.quantization.fuse_modules(model, ["0", "1", "2"]),
    "fx": fused_by_fx,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fusion", FUSIONS)
class TestFusing:
    def test_behind_noise_is_noticed(self, fusion):
        model = FUSIONS[fusion](bmrs.add_noise(two_blocks(), where="0"))
        for outside in (model, nn.Sequential(nn.Identity(), model)):
            with pytest.raises(
                ValueError, match=r"batch normalisation '.*' is gone, folded .*before add_noise"
            ):
                bmrs.kl_divergence(outside, weight=1.0)

    def test_away_from_noise_is_not(self, fusion):
        model = FUSIONS[fusion](bmrs.add_noise(two_blocks(), where="3"))
        bmrs.kl_divergence(model, weight=1.0)
        bmrs.compact(model, EXAMPLE)

    def test_that_takes_noise_away_is_noticed(self, fusion):
        model = FUSIONS[fusion](bmrs.add_noise(two_blocks(), where="[13]"))
        with pytest.raises(
            ValueError, match=r"the noise '.*' is gone: its layer was replaced, removed or fused"
        ):
            bmrs.kl_divergence(model, weight=1.0)


class TestLayersThatWereReplaced:
    def test_are_missed_until_that_is_meant(self):
        model = bmrs.add_noise(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), where=nn.Linear)
        wrapped = nn.ModuleDict({"inner": model})
        model[2] = nn.Linear(4, 7)
        with pytest.raises(ValueError, match=r"the noise '2\.noise' is gone.*bmrs\.restore_noise"):
            bmrs.prune(model, bmrs.SNR())
        with pytest.raises(ValueError, match=r"the noise 'inner\.2\.noise' is gone"):
            bmrs.prune(wrapped, bmrs.SNR())
        assert bmrs.restore_noise(model) == []
        bmrs.prune(model, bmrs.SNR())
        bmrs.add_noise(model, where="2")
        assert set(noise_layers(model)) == {"0.noise", "2.noise"}
        bmrs.kl_divergence(copy.deepcopy(model), weight=1.0)

    def test_a_part_of_a_model_misses_only_its_own(self):
        inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        model = bmrs.add_noise(nn.ModuleDict({"inner": inner, "other": nn.Linear(2, 2)}), where=nn.Linear)
        del model["other"]
        bmrs.kl_divergence(inner, weight=1.0)
        inner[2] = nn.Linear(4, 2)
        with pytest.raises(ValueError, match=r"the noise '2\.noise' is gone"):
            bmrs.kl_divergence(inner, weight=1.0)

    def test_another_normalisation_may_take_its_place(self):
        model = bmrs.add_noise(two_blocks(), where="0")
        model[1] = nn.GroupNorm(2, 6)
        bmrs.kl_divergence(model, weight=1.0)


def three_layers():
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.ReLU(), nn.Linear(4, 4))


def noisy():
    return bmrs.add_noise(three_layers(), where=nn.Linear)


def wrapped(names, wrap):
    model = noisy()
    for name in names:
        model.set_submodule(name, wrap(model.get_submodule(name)))
    return model


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base


def with_alias(name):
    model = noisy()
    return nn.ModuleDict({"alias": model.get_submodule(name), "model": model})


def part_and_whole(first):
    model = noisy()
    both = {"part": nn.Sequential(model[0]), "model": model}
    return nn.ModuleDict({name: both[name] for name in (first, *both)})


def shared_normalisation():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), norm), nn.Sequential(nn.Linear(4, 4), norm))
    return bmrs.add_noise(model, where=nn.Linear)


PRESENT = {
    "alias of a layer": lambda: with_alias("0.0"),
    "alias of a normalisation": lambda: with_alias("0.1"),
    "part before the whole": lambda: part_and_whole("part"),
    "part behind the whole": lambda: part_and_whole("model"),
    "shared normalisation": shared_normalisation,
    "compiled layer": lambda: wrapped(["2"], torch.compile),
    "compiled block": lambda: wrapped(["0"], torch.compile),
    "checkpointed layers": lambda: wrapped(["0", "2"], checkpoint_wrapper),
    "adapter": lambda: wrapped(["2"], Adapter),
    "adapters": lambda: wrapped(["0.0", "2"], Adapter),
}


def checkpoint_wrapper(layer):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(layer)


@pytest.mark.parametrize("case", PRESENT)
def test_noise_under_another_name_is_not_missed(case):
    for model in (PRESENT[case](), copy.deepcopy(PRESENT[case]()), nn.Sequential(PRESENT[case]())):
        bmrs.kl_divergence(model, weight=1.0)


@pytest.mark.parametrize("case", ["compiled block", "checkpointed layers"])
def test_noise_that_is_gone_beside_wrappers_is_missed(case):
    model = PRESENT[case]()
    model[2] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"the noise '2\.noise' is gone"):
        bmrs.kl_divergence(model, weight=1.0)


def test_a_renamed_layer_stands_for_itself_alone():
    adapted = wrapped(["2"], Adapter)
    lost = noisy()
    lost[2] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"the noise '1\.2\.noise' is gone"):
        bmrs.kl_divergence(nn.Sequential(adapted, lost), weight=1.0)


def test_a_layer_that_was_replaced_is_missed_where_something_else_still_holds_it():
    model = noisy()
    both = nn.ModuleDict({"old": model[2], "model": model})
    model[2] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"the noise 'model\.2\.noise' is gone"):
        bmrs.kl_divergence(both, weight=1.0)
