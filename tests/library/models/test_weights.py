import copy
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bmrs
from bmrs.models import build_network, load_weights
from bmrs.noise.lookup import noise_layers


def network(num_classes: int = 3) -> nn.Module:
    return build_network("resnet20", num_classes=num_classes, in_channels=1, image_size=8, width=2, blocks=1)


def transformer() -> nn.Module:
    return build_network(
        "vit_b16", num_classes=3, in_channels=1, image_size=16, width=4, num_heads=2, depth=1
    )


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items() if name in theirs)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pt"


class TestWhatIsRead:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"epoch": 3, "state_dict": state},
            lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
            lambda state: {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}},
            lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
            lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        ],
        ids=["plain", "state_dict", "model_state_dict", "model, prefixes", "prefix", "no counters"],
    )
    def test_torch_files(self, file, wrap):
        theirs, ours = network(), network()
        torch.save(wrap(theirs.state_dict()), file)
        report = load_weights(ours, file)
        assert equal_states(ours, theirs)
        assert {*report.loaded} <= {*theirs.state_dict()}
        assert report.left_out == ()
        assert str(report) == f"{len(report.loaded)} tensors loaded"

    def test_safetensors_whatever_the_file_is_called(self, file):
        theirs, ours = network(), network()
        save_file(theirs.state_dict(), file)
        load_weights(ours, file)
        assert equal_states(ours, theirs)

    def test_other_floating_dtypes_become_the_models(self, file):
        theirs, ours = network().double(), network()
        save_file(theirs.state_dict(), file)
        load_weights(ours, file)
        assert equal_states(ours, theirs.float())

    def test_older_names_of_published_transformers(self, file):
        theirs, ours = transformer(), transformer()
        older = {
            name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value
            for name, value in theirs.state_dict().items()
        }
        torch.save(older, file)
        load_weights(ours, file)
        assert equal_states(ours, theirs)

    def test_a_prefix_that_is_the_models_own_stays(self, file):
        theirs, ours = (nn.ModuleDict({"module": nn.Linear(2, 2)}) for _ in range(2))
        torch.save(theirs.state_dict(), file)
        load_weights(ours, file)
        assert equal_states(ours, theirs)

    def test_one_name_of_tied_weights_is_enough(self, file):
        ours = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 5, bias=False))
        ours[1].weight = ours[0].weight
        save_file({"0.weight": torch.arange(10.0).view(5, 2)}, file)
        load_weights(ours, file)
        assert torch.equal(ours[1].weight, torch.arange(10.0).view(5, 2))

    def test_infinities_that_the_model_has_itself(self, file):
        theirs, ours = nn.Linear(2, 2), nn.Linear(2, 2)
        for layer in (theirs, ours):
            layer.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        torch.save(theirs.state_dict(), file)
        load_weights(ours, file)
        assert equal_states(ours, theirs)


class TestNoise:
    def test_that_the_file_lacks_stays(self, file):
        theirs = network()
        ours = bmrs.add_noise(network(), where="*bn1", initial_mu=-3.0)
        torch.save(theirs.state_dict(), file)
        load_weights(ours, file)
        assert equal_states(ours, theirs)
        assert all((layer.mu == -3.0).all() for layer in noise_layers(ours).values())

    def test_that_the_file_has_is_loaded_but_not_in_part(self, file):
        theirs = bmrs.add_noise(network(), where="*bn1", initial_mu=-3.0)
        ours = bmrs.add_noise(network(), where="*bn1")
        state = theirs.state_dict()
        del state["bn1.noise.pruned"]  # of an earlier version
        torch.save(state, file)
        load_weights(ours, file)
        assert equal_states(ours, theirs)
        del state["bn1.noise.mu"]
        torch.save(state, file)
        with pytest.raises(ValueError, match=r"lacks 1 of .* tensors \('bn1.noise.mu'\)"):
            load_weights(ours, file)
        with pytest.raises(ValueError, match=r"holds 14 that the model has not \('bn1.noise.log_sigma', "):
            load_weights(network(), file)


class TestClassifier:
    @pytest.mark.parametrize("missing", [False, True])
    def test_a_new_one_stays_as_it_was(self, file, missing):
        theirs, ours = network(10), network(3)
        before = copy.deepcopy(ours.fc)
        state = theirs.state_dict()
        if missing:
            del state["fc.weight"], state["fc.bias"]
        torch.save(state, file)
        report = load_weights(ours, file, new_classifier=True)
        assert report.left_out == ("fc.weight", "fc.bias")
        assert str(report).endswith("tensors loaded; the classifier (fc.weight, fc.bias) is untrained")
        assert equal_states(ours.fc, before)
        assert torch.equal(ours.conv1.weight, theirs.conv1.weight)

    def test_one_that_fits_is_loaded_all_the_same(self, file):
        theirs, ours = network(), network()
        torch.save(theirs.state_dict(), file)
        assert load_weights(ours, file, new_classifier=True).left_out == ()
        assert equal_states(ours, theirs)


class TestErrors:
    """Each of them leaves the model as it was and takes one line."""

    def check(self, file, message: str, model: nn.Module | None = None, **options: bool) -> None:
        model = network() if model is None else model
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=message) as error:
            load_weights(model, file, **options)
        assert equal_states(model, before)
        assert "\n" not in str(error.value)
        assert str(file) in str(error.value)

    def test_no_file(self, tmp_path):
        for path in (tmp_path, tmp_path / "absent.pt"):
            with pytest.raises(FileNotFoundError, match=f"no file with weights at {re.escape(str(path))}"):
                load_weights(network(), path)

    def test_names_and_shapes(self, file):
        state = network(4).state_dict()
        for name in [name for name in state if name.startswith("layer1.0.bn")]:
            state[f"{name}.other"] = state.pop(name)
        torch.save(state, file)
        self.check(
            file,
            r"does not fit the model \(ResNet\): it lacks 8 of \d+ tensors \('layer1.0.bn1.weight', "
            r"'layer1.0.bn1.bias', 'layer1.0.bn1.running_mean' and 5 more\); it holds 10 that the model has not \(.* "
            r"and 7 more\); 2 of another shape or kind \('fc.weight' \(4, 8\) float32 instead of \(3, 8\) float32, "
            r"'fc.bias' \(4,\) float32 instead of \(3,\) float32\); new_classifier leaves out the classifier$",
        )

    def test_a_new_classifier_excuses_nothing_else(self, file):
        torch.save(nn.Linear(5, 4).state_dict(), file)
        message = r"2 of another .* \('weight' \(4, 5\) float32 instead of \(3, 2\) float32, .*32\)$"
        self.check(file, message, nn.Linear(2, 3), new_classifier=True)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300])
    def test_values_that_are_not_finite(self, file, value):
        state = network().double().state_dict()
        state["bn1.running_var"][1] = value
        torch.save(state, file)
        self.check(file, "holds NaN or infinity in 'bn1.running_var'")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (network(), r"neither a safetensors file nor one of torch.save with tensors alone.*Unpickling"),
            (torch.zeros(3), "holds no state_dict but a value of type Tensor"),
            ({}, "holds no state_dict but nothing"),
            (
                {"net": network().state_dict()},
                "'net' in it is a value of type OrderedDict, not a tensor; a state_dict",
            ),
            ({"module.a": torch.zeros(1), "a": torch.zeros(1)}, "holds 'a' twice, once of them as 'a'"),
        ],
        ids=["module", "tensor", "empty", "other key", "twice"],
    )
    def test_what_is_no_state(self, file, content, message):
        torch.save(content, file)
        self.check(file, message)

    @pytest.mark.parametrize("content", [b"", b"weights", b"PK\x03\x04", b"\x10\0\0\0\0\0\0\0{"])
    def test_what_is_no_such_file(self, file, content):
        file.write_bytes(content)
        self.check(file, "is neither a safetensors file nor|is not a whole safetensors file")

    def test_cut_files(self, file):
        for save in (torch.save, save_file):
            save(network().state_dict(), file)
            file.write_bytes(file.read_bytes()[:-100])
            self.check(file, "is neither a safetensors file nor|is not a whole safetensors file")

    def test_files_of_the_library_itself(self, tmp_path):
        bmrs.save(tmp_path / "small.safetensors", nn.Sequential(nn.Linear(2, 2)))
        self.check(tmp_path / "small.safetensors", "it is a file of bmrs.save, which bmrs.load reads")

    def test_a_model_without_memory(self, file):
        torch.save(nn.Linear(2, 2).state_dict(), file)
        with pytest.raises(ValueError, match=r"'weight', 'bias' of the model have no memory \(device meta\)"):
            load_weights(nn.Linear(2, 2, device="meta"), file)
