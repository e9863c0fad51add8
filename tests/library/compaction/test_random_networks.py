"""Properties of `bmrs.compact`, `bmrs.fold`, `bmrs.save` and `bmrs.load` on random networks of all operators."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compaction_cases import num_values
from random_networks import BATCHES, Builder, RandomNetwork, build, build_residual
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import bmrs
from bmrs.noise.lookup import noise_layers

NETWORKS = 60
RESIDUAL = 20


def run(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs in evaluation mode, for inputs of which the model gets copies."""
    with torch.no_grad():
        return tree_flatten(model(**{name: value.clone() for name, value in inputs.items()}))[0]


def assert_close(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert len(found) == len(expected), what
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), what
        error = (a - b).abs().max().item()
        # Outputs that are nothing but rounding are compared with small ones.
        assert error <= 1e-10 * max(b.abs().max().item(), 1e-2), f"{what}: {error:.2g}"


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that has to be as before: tensors by name with their values, modes and hooks."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {
            name: (id(p), p.requires_grad, p.grad)
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        {name: (id(m), m.training, type(m)) for name, m in modules.items()},
        {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in modules.items()},
    )


def assert_same(before: tuple[Any, ...], after: tuple[Any, ...], what: str) -> None:
    assert before[1:] == after[1:], f"{what} changed the model"
    assert before[0].keys() == after[0].keys(), f"{what} changed the model"
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items()), (
        f"{what} changed the model"
    )


def assert_report(compacted: nn.Module, model: nn.Module) -> None:
    report = bmrs.compact_report(compacted)
    assert (report.parameters_before, report.parameters_after) == (num_values(model), num_values(compacted))
    assert report.parameters_after <= report.parameters_before, "more parameters than before"
    assert [layer.name for layer in report.layers] == list(noise_layers(model))
    assert (report.form == "graph") == bool(report.form_because)
    for layer, noise in zip(report.layers, noise_layers(model).values(), strict=True):
        assert layer.structures == noise.num_structures
        assert layer.pruned == int((~noise.mask).sum())
        assert 0 <= layer.removed <= layer.pruned, "more removed than pruned"
        assert bool(layer.kept_because) == (layer.removed < layer.pruned), "no reason for what is kept"
        assert all(reason and number > 0 for reason, number in layer.kept_because.items()), "an empty reason"
        assert layer.folded == (layer.not_folded_because == "")
    assert str(report)


def assert_trains(compacted: nn.Module, inputs: dict[str, Tensor]) -> None:
    """One step of an optimizer changes nothing but numbers."""
    compacted = copy.deepcopy(compacted)
    trained = [p for p in compacted.parameters() if p.requires_grad]
    loss = torch.stack([out.square().mean() for out in tree_flatten(compacted(**inputs))[0]]).sum()
    if not trained or not loss.requires_grad:
        return
    loss.backward()
    torch.optim.SGD(trained, lr=1e-3).step()
    assert all(bool(out.isfinite().all()) for out in run(compacted, inputs))


def can_train(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the model itself can be trained: what works in place may overwrite what gradients need."""
    try:
        assert_trains(copy.deepcopy(model).eval(), inputs)
    except RuntimeError:
        return False
    return True


def check(
    seed: int,
    folder: Path,
    *,
    saved: bool = True,
    thorough: bool = True,
    network: tuple[RandomNetwork, Builder] | None = None,
) -> nn.Module:
    """All properties for the network of a seed; returns what it is compacted to.

    Args:
        seed: of the network and its inputs.
        folder: where a file may be written.
        saved: whether files are looked at too.
        thorough: whether torch.export and training of the result are looked at too.
        network: that of the seed, or one made smaller from it, to find out what it fails for.
    """
    model, b = network or build(seed)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"the model \(RandomNetwork\) has no noise layer")
        warnings.filterwarnings(
            "ignore", r".* structures stay, .* of RandomNetwork divides their dimension into equal"
        )
        compacted = bmrs.compact(model, b.example(BATCHES[seed % 2], seed + 1))
    assert_same(before, snapshot(model), "compact")
    folded = bmrs.fold(model)
    assert_same(before, snapshot(model), "fold")
    masked = copy.deepcopy(model).eval()
    loaded = None
    if saved:
        path = folder / f"{seed}.safetensors"
        bmrs.save(path, compacted)
        loaded = bmrs.load(path)
    for batch in BATCHES:
        inputs = b.example(batch, seed + 2)
        expected = run(masked, inputs)
        found = run(compacted, inputs)
        assert_close(found, expected, f"compacted, batch of {batch}")
        assert_close(run(folded, inputs), expected, f"folded, batch of {batch}")
        if loaded is not None:
            assert all(map(torch.equal, run(loaded, inputs), found)), f"loaded, batch of {batch}"
    if thorough:
        inputs = b.example(BATCHES[0], seed + 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(compacted, (), inputs)
            assert_close(run(program.module(), inputs), run(compacted, inputs), "exported")
            if can_train(model, inputs):
                assert_trains(compacted, inputs)
    assert_report(compacted, model)
    return compacted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NETWORKS))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    network = build(seed)
    try:
        check(seed, tmp_path, saved=seed % 4 == 0, thorough=seed % 16 == 0, network=network)
    except Exception as error:
        error.add_note(network[0].listing()) if hasattr(error, "add_note") else None
        raise


@pytest.mark.parametrize("seed", range(RESIDUAL))
def test_all_that_is_pruned_leaves_where_masks_agree(seed: int) -> None:
    model, x = build_residual(seed)
    compacted = bmrs.compact(model, x)
    report = bmrs.compact_report(compacted)
    assert [layer.removed for layer in report.layers] == [layer.pruned for layer in report.layers]
    assert report.form == "module"
    assert all(layer.folded for layer in report.layers)
    masks = {name: noise.mask for name, noise in noise_layers(model).items()}
    assert compacted.stem[0].weight.shape[0] == int(masks["stem.1"].sum())
    assert compacted.head.weight.shape[1] == int(masks["stem.1"].sum())
    masked = copy.deepcopy(model).eval()
    for batch in BATCHES:
        inputs = torch.randn(batch, *x.shape[1:], dtype=x.dtype)
        assert_close(run(compacted, {"x": inputs}), run(masked, {"x": inputs}), f"batch of {batch}")


def test_seeds_make_the_same_network() -> None:
    (first, b), (second, _) = build(3), build(3)
    assert first.listing() == second.listing()
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert tree_map(lambda t: t.shape, b.example(2, 0)) == tree_map(lambda t: t.shape, b.example(2, 1))
