"""Compaction of the architectures that people use: what comes out is equal, smaller, and goes on living."""

import copy
import inspect
import warnings
from importlib import metadata
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import bmrs
from benchmarks.experiments.zoo import ENTRIES, Entry
from bmrs.noise.lookup import noise_layers

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

PLACES = [(name, "noise") for name in ENTRIES] + [
    (name, "heads") for name, entry in ENTRIES.items() if entry.heads
]


# Their layers have had the names that the zoo knows since then; Python 3.10 gets an older transformers.
RENAMED, RENAMED_IN = ("vit", "swin"), Version("5.24")
OLD_NAMES = Version(metadata.version("transformers")) < RENAMED_IN


@pytest.fixture(autouse=True)
def _names_are_known(request: pytest.FixtureRequest) -> None:
    if OLD_NAMES and request.node.callspec.params["name"] in RENAMED:
        pytest.skip(f"transformers names the layers otherwise before {RENAMED_IN}")


def built(entry: Entry, place: str) -> nn.Module:
    torch.manual_seed(0)
    model = entry.build()
    if place == "noise":
        for options in entry.noise:
            bmrs.add_noise(model, **options)
    else:
        for pattern, heads in entry.heads:
            bmrs.add_noise(model, where=pattern, structures="heads", num_heads=heads)
    return model.eval()


def masked(model: nn.Module, density: float, seed: int = 1) -> nn.Module:
    """Random posteriors and masks that keep a share of the structures, and one at least."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in noise_layers(model).values():
            layer.mu.uniform_(-2.0, 0.0, generator=generator)
            layer.log_sigma.uniform_(-3.0, 0.0, generator=generator)
            draw = torch.rand(layer.num_structures, generator=generator)
            layer.mask.copy_(draw <= max(density, float(draw.min())))
    return model


def example(entry: Entry, model: nn.Module, dtype: torch.dtype) -> Any:
    args, kwargs = entry.inputs(dtype)
    if not kwargs:
        return args
    names = inspect.signature(model.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    outputs = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    outputs = dict(outputs) if hasattr(outputs, "keys") else outputs
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    assert [x.shape for x in first] == [x.shape for x in second]
    return max(
        float((a - b).detach().abs().max() / a.detach().abs().max())
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_compacted_is_masked_and_smaller(name, place):
    entry = ENTRIES[name]
    model = built(entry, place).double()
    inputs = example(entry, model, torch.float64)
    # Beside half of all, for every fourth place all or few.
    extreme = {0: [(0.0, 2)], 4: [(0.85, 2)]}.get(PLACES.index((name, place)) % 8, [])
    for density, seed in [(0.5, 1), *extreme]:
        masked(model, density, seed)
        compacted = bmrs.compact(model, inputs)
        report = bmrs.compact_report(compacted)
        assert largest_difference(run(model, inputs), run(compacted, inputs)) < 1e-10, report
        assert report.parameters_after <= report.parameters_before
        if density < 0.85:
            assert 0 < report.removed <= report.pruned
            assert report.parameters_after < report.parameters_before
        for layer in report.layers:
            assert layer.removed + sum(layer.kept_because.values()) >= layer.pruned


@pytest.mark.parametrize(("name", "place"), PLACES[::7])
def test_compacted_goes_on_living(name, place, tmp_path):
    """Single precision; saved and loaded with and without its class; trained further."""
    entry = ENTRIES[name]
    model = masked(built(entry, place), 0.5)
    inputs = example(entry, model, torch.float32)
    compacted = bmrs.compact(model, inputs)
    outputs = run(compacted, inputs)
    assert largest_difference(run(model, inputs), outputs) < 1e-4

    path = tmp_path / "model.safetensors"
    bmrs.save(path, compacted)
    loaded = bmrs.load(path)
    assert all(torch.equal(a, b) for a, b in zip(run(loaded, inputs), outputs, strict=True))
    if bmrs.compact_report(compacted).form == "module":
        torch.manual_seed(3)
        again = bmrs.load(path, model=entry.build())
        assert type(again) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(run(again, inputs), outputs, strict=True))

    for network in (copy.deepcopy(compacted), loaded):
        network.train()
        optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
        before = [p.detach().clone() for p in network.parameters()]
        for _ in range(3):
            optimizer.zero_grad()
            sum(x.pow(2).mean() for x in run(network, inputs) if x.is_floating_point()).backward()
            optimizer.step()
        assert all(p.isfinite().all() for p in network.parameters())
        assert any(not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["mobilenet_v3", "vision_transformer", "llama", "lstm"])
def test_compacted_runs_elsewhere(name, tmp_path):
    """torch.compile, torch.export, and ONNX run by onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    entry = ENTRIES[name]
    model = masked(built(entry, "noise"), 0.5)
    inputs = example(entry, model, torch.float32)
    compacted = bmrs.compact(model, inputs)
    outputs = run(compacted, inputs)
    assert largest_difference(outputs, run(torch.compile(compacted, backend="aot_eager"), inputs)) < 1e-5

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    exported = torch.export.export(compacted, args, kwargs, strict=False).module()
    assert largest_difference(outputs, run(exported, inputs)) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            compacted, args, str(tmp_path / "m.onnx"), kwargs=kwargs, dynamo=True, verbose=False
        )
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    feed = {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), tensors, strict=True)}
    found = [torch.from_numpy(x) for x in session.run(None, feed)]
    assert largest_difference(outputs[:1], found[:1]) < 1e-4
