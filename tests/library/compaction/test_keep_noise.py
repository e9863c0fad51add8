"""Compaction that leaves the noise of the structures that stay, and files of such networks."""

import copy
import re
import shutil

import pytest
import torch
from compaction_cases import assert_equal_outputs, prune_structures, randomise
from residual_cases import RandomResidual, SmallResNet
from saved_files import rewrite
from torch import fx, nn

import bmrs
from bmrs.noise.lookup import noise_layers, required_noise_layers

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Fixed(nn.Module):
    """Has a width written into its code, so that it becomes a graph of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.noise = bmrs.NoiseLayer(6, activation="relu", granularity="sample")
        self.last = nn.Linear(6 * 144, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.noise(self.conv(x)).view(-1, 864))


class Twice(nn.Module):
    """One noise layer in two places, one of them a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.noise = self.other = bmrs.NoiseLayer(6, granularity="sample")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.other(torch.relu(self.second(self.noise(torch.relu(self.first(x)))))))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.project = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(torch.relu(self.value(x)))


def resnet() -> SmallResNet:
    return bmrs.add_noise(SmallResNet(), where=nn.BatchNorm2d)


def heads() -> Heads:
    return bmrs.add_noise(Heads(), where="project", structures="heads", num_heads=4)


def drawn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a model gives with noise drawn by one seed, and all else in evaluation mode."""
    model.eval()
    for layer in required_noise_layers(model).values():
        layer.train()
    torch.manual_seed(3)
    with torch.no_grad():
        outputs = model(x)
    model.eval()
    return outputs


@pytest.mark.parametrize(("seed", "dtype"), [(13, torch.float32), (29, torch.float32), (5, torch.float64)])
def test_outputs_in_evaluation_mode_are_the_masked_networks(seed, dtype):
    case = RandomResidual(seed)
    model = randomise(case.model, seed, pruned=[0.0, 0.3, 0.6][seed % 3]).to(dtype).train()
    x = torch.randn(case.example_shape, dtype=dtype)
    plain, kept = bmrs.compact(model, x), bmrs.compact(model, x, keep_noise=True)
    assert_equal_outputs(kept, model, x)
    assert type(kept) is type(model)
    before, after = bmrs.compact_report(plain), bmrs.compact_report(kept)
    assert after.bytes_before == before.bytes_before
    # Noise that stays cannot multiply a constant, so that what adds one is not emptied.
    assert not after.emptied
    sizes = [(-report.removed, report.parameters_after) for report in (before, after)]
    assert sizes[0] == sizes[1] if not before.emptied else sizes[0] < sizes[1]
    assert list(required_noise_layers(kept)) == list(noise_layers(model))
    for (name, layer), report in zip(noise_layers(kept).items(), after.layers, strict=True):
        full = noise_layers(model)[name]
        assert (report.noise_kept, report.folded) == (int(layer.mask.sum()), False)
        assert layer.mu.dtype == full.mu.dtype
        # Of what stays, the posteriors that it had.
        survivors = torch.isin(full.mu, layer.mu)
        assert int(survivors.sum()) == layer.num_structures
        torch.testing.assert_close(full.log_sigma[survivors], layer.log_sigma, rtol=0, atol=0)
        assert layer.mu.data_ptr() != full.mu.data_ptr()


def test_structures_that_stay_pruned_are_off_and_others_go_on_learning():
    model = randomise(resnet(), pruned=0.0)
    prune_structures(model.bn1.noise, [1])  # its channel is kept by the branches that are added
    prune_structures(model.layer1[0].bn1.noise, [0, 4])
    kept = bmrs.compact(model, IMAGES, keep_noise=True).train()
    assert kept.bn1.noise.mask.tolist() == [True, False, True, True, True, True]
    assert kept.layer1[0].bn1.noise.num_structures == kept.layer1[0].conv1.out_channels == 4
    (bmrs.kl_divergence(kept, weight=1.0) + kept(IMAGES).square().sum()).backward()
    gradient, mask = kept.bn1.noise.mu.grad, kept.bn1.noise.mask
    assert gradient[mask].any()
    assert not gradient[~mask].any()
    assert "bn1.noise: the noise of 5 structures stays" in str(bmrs.compact_report(kept))
    # What is pruned next leaves next.
    prune_structures(kept.layer1[0].bn1.noise, [2])
    assert bmrs.compact(kept.eval(), IMAGES).layer1[0].conv1.out_channels == 3


def test_moments_of_the_noise_are_cut_with_it():
    model = randomise(bmrs.models.MLP(in_features=4, num_blocks=0, hidden=6, num_classes=2), pruned=0.0)
    prune_structures(model.hidden0_tanh, [0, 3])
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    kept = bmrs.compact(model, torch.ones(2, 4), keep_noise=True)
    moved = bmrs.compact_optimizer(optimizer, model, kept)
    old, new = (optimizer.state[model.hidden0_tanh.mu], moved.state[kept.hidden0_tanh.mu])
    assert torch.equal(new["exp_avg"], old["exp_avg"][[1, 2, 4, 5]])
    moved.step()


def test_heads_keep_their_noise_whole():
    model = randomise(heads(), pruned=0.0)
    prune_structures(model.project.noise, [2])
    kept = bmrs.compact(model, torch.randn(2, 4), keep_noise=True)
    assert (kept.project.noise.num_structures, kept.project.noise.structure_size) == (3, 3)
    assert kept.value.out_features == 9


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (bmrs.models.LeNet5, torch.randn(2, 1, 32, 32)),
        (Fixed, IMAGES),
        (Twice, torch.randn(3, 4)),
        (heads, torch.randn(3, 4)),
    ],
)
def test_files_hold_the_noise(make, x, tmp_path):
    torch.manual_seed(0)
    kept = bmrs.compact(randomise(make()), x, keep_noise=True)
    next(iter(noise_layers(kept).values())).mu.requires_grad_(False)
    bmrs.save(tmp_path / "kept", kept)
    alone = bmrs.load(tmp_path / "kept")
    assert isinstance(alone, fx.GraphModule)
    loaded = [alone]
    if make is Fixed:
        assert isinstance(kept, fx.GraphModule)
    else:
        loaded.append(bmrs.load(tmp_path / "kept", model=make()))
        assert type(loaded[1]) is type(kept)
    if make is heads:
        loaded.append(bmrs.load(tmp_path / "kept", model=Heads()))
    for model in loaded:
        with torch.no_grad():
            assert torch.equal(model(x), kept(x))
        assert torch.equal(drawn(model, x), drawn(kept, x))
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
            n for n, p in kept.named_parameters() if not p.requires_grad
        }
    # It can be saved again, also once more of it is pruned.
    prune_structures(next(iter(noise_layers(alone).values())), [0])
    bmrs.save(tmp_path / "again", alone, example_inputs=x)
    with torch.no_grad():
        assert torch.equal(bmrs.load(tmp_path / "again")(x), alone(x))


def replaced(part: str, value: object):
    def change(description, tensors):
        for operation in description["graph"]["operations"]:
            if operation["target"] == "NoiseLayer":
                operation["kwargs"][part] = value
        for options in description["noise"].values():
            options[1][part] = value

    return change


def without_mu(description, tensors):
    del tensors["noise.mu"]


@pytest.fixture(scope="module")
def of_twice(tmp_path_factory):
    """A file of a network with noise; tests change copies of it."""
    path = tmp_path_factory.mktemp("files") / "kept.safetensors"
    bmrs.save(path, bmrs.compact(randomise(Twice()), torch.randn(3, 4), keep_noise=True))
    return path


@pytest.mark.parametrize("own_class", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("num_structures", 2**40), "num_structures must be a whole number"),
        (replaced("num_structures", 7), "size mismatch"),
        (replaced("dim", "1"), "dim must be a whole number"),
        (replaced("lower", 1.0), "lower must be less than upper"),
        (replaced("granularity", "pixel"), "granularity must be one of"),
        (replaced("backend", "triton"), "backend must be left out"),
        (replaced("unheard_of", 1), "unknown arguments|unexpected keyword"),
        (without_mu, r"noise\.mu|Missing key"),
    ],
)
def test_broken_files_are_refused(of_twice, change, message, own_class, tmp_path):
    path = shutil.copy(of_twice, tmp_path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        bmrs.load(path, model=Twice() if own_class else None)


class TestRefusals:
    def test_a_constant_that_noise_would_multiply(self):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1, groups=4),
            nn.Flatten(),
            nn.LazyLinear(2),
        )
        model(IMAGES)
        model = randomise(bmrs.add_noise(model, where=lambda name, _: name in ("0", "2")), pruned=0.0)
        prune_structures(model[0].noise, [1, 2])
        message = r"noise of '2\.noise': 2 of its entries .* prune these too, or compact without keep_noise"
        with pytest.raises(ValueError, match=message):
            bmrs.compact(model, IMAGES, keep_noise=True)
        prune_structures(model[2].noise, [1, 2])
        kept = bmrs.compact(model, IMAGES, keep_noise=True)
        assert kept[2].noise.num_structures == 2
        assert_equal_outputs(kept, model, IMAGES)

    def test_options_that_contradict_each_other(self):
        with pytest.raises(
            ValueError, match="keep_noise=True keeps the noise that expected_noise=False would"
        ):
            bmrs.compact(resnet(), IMAGES, keep_noise=True, expected_noise=False)
        with pytest.raises(ValueError, match=re.escape("keep_noise must be one of False, True, got 2")):
            bmrs.compact(resnet(), IMAGES, keep_noise=2)

    def test_a_masked_network_is_not_saved_in_place_of_a_compacted_one(self, tmp_path):
        with pytest.raises(TypeError, match=r"'noise' is one: .* keep_noise=True"):
            bmrs.save(tmp_path / "model", Twice(), example_inputs=torch.ones(2, 4))
        bmrs.save(tmp_path / "model", copy.deepcopy(bmrs.compact(Twice(), torch.ones(2, 4), keep_noise=True)))
