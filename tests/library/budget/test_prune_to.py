import copy
import itertools
import json
import math

import pytest
import torch
from residual_cases import BasicBlock
from torch import nn

import bmrs
from bmrs.noise.lookup import noise_layers

IMAGES = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    """Expensive convolutions and cheap linear layers, with some structures that evidence prunes."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)),
    )
    bmrs.add_noise(layers, where=lambda name, _: name in ("0", "2", "6"))
    settle(layers, {"0.noise": (-1.0, 0.0), "2.noise": (-1.0, 0.0), "6.noise": (-2.0, -1.0)})
    layers[6].noise.mu.data[:3] = -20.0  # off
    return layers


def settle(model: nn.Module, means: dict[str, tuple[float, float]]) -> None:
    """Posteriors of known means, worth the more the later the structure."""
    for name, layer in noise_layers(model).items():
        with torch.no_grad():
            layer.mu.copy_(torch.linspace(*means[name], layer.num_structures))
            layer.log_sigma.fill_(-2.0)


def masks(model: nn.Module) -> dict[str, list[bool]]:
    return {name: layer.mask.tolist() for name, layer in noise_layers(model).items()}


def relative_loss(model: nn.Module) -> float:
    """What went of each layer over what stays, by the evidence of each structure."""
    total = 0.0
    for layer in noise_layers(model).values():
        worth = (-bmrs.BMRSNormal()(layer).scores).clamp(min=0)
        total += float(worth[~layer.mask].sum() / worth[layer.mask].sum()) ** 2
    return math.sqrt(total)


@pytest.mark.parametrize("target", [{"parameters": 0.4}, {"flops": 20_000}])
def test_the_compacted_network_is_within_the_target(model, target):
    alone = copy.deepcopy(model)
    bmrs.prune(alone, bmrs.BMRSNormal(), example_inputs=IMAGES)
    report = bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=IMAGES, **target)
    compacted = bmrs.compact_report(bmrs.compact(model, IMAGES[:1]))
    assert (report.after.parameters, report.after.flops) == (
        compacted.parameters_after,
        compacted.flops_after,
    )
    assert (report.dense.parameters, report.dense.flops) == (
        compacted.parameters_before,
        compacted.flops_before,
    )
    measure = report.measure
    assert report.met
    assert not report.met_by_evidence
    assert getattr(report.after, measure) <= report.limit < getattr(report.by_evidence, measure)
    for layer in report.layers:
        assert layer.after == int(noise_layers(model)[layer.name].mask.sum())
        assert layer.by_evidence == int(noise_layers(alone)[layer.name].mask.sum())
    assert report.lost == pytest.approx(sum(layer.lost for layer in report.layers))
    assert report.least_relative_loss == report.relative_loss == pytest.approx(relative_loss(model))
    assert json.loads(json.dumps(report.to_dict()))["after"] == {
        "parameters": report.after.parameters,
        "flops": report.after.flops,
        "latency": None,
    }
    assert "no choice gives up less" in str(report)


def test_cheap_layers_are_left_alone_where_operations_are_wanted(model):
    """The linear layer's structures are worth least, and take next to no operations."""
    report = bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=IMAGES, flops=0.4)
    layers = {layer.name: layer for layer in report.layers}
    assert layers["6.noise"].after == layers["6.noise"].by_evidence == 9
    assert layers["0.noise"].after < 8
    # In each layer those worth least go first.
    assert all(mask == sorted(mask) for mask in masks(model).values())


def test_no_layer_is_emptied_because_it_is_expensive():
    """A sum over all layers would leave one neuron of the first, and all that later ones keep could read it alone."""
    torch.manual_seed(0)
    sizes = [500, 20, 20, 20, 20]
    layers = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers, nn.Linear(20, 2))
    bmrs.add_noise(model, where="?.0")
    settle(model, dict.fromkeys(noise_layers(model), (-2.0, 0.0)))
    report = bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=torch.randn(1, 500), flops=0.12)
    kept = [layer.after for layer in report.layers]
    assert 2 <= kept[0] <= min(kept[1:])


def test_the_scale_of_a_layers_scores_does_not_matter():
    """Norms of weights that are a thousand times larger in one layer say nothing about which layer matters."""
    kept = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        bmrs.add_noise(model, where=lambda name, _: name in ("0", "2"))
        with torch.no_grad():
            model[2].weight.mul_(scale)
        bmrs.prune_to(model, bmrs.L2(ratio=0.0), example_inputs=torch.randn(1, 16), parameters=0.4)
        kept.append(masks(model))
    assert kept[0] == kept[1]
    assert all(1 < sum(mask) < 16 for mask in kept[0].values())


def test_what_evidence_prunes_is_enough_or_not(model):
    report = bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=IMAGES, parameters=0.97)
    assert report.met_by_evidence
    assert report.lost == 0
    assert report.by_evidence == report.after
    assert "nothing went beyond it" in str(report)
    before = masks(model)
    assert before["6.noise"] == [False] * 3 + [True] * 9
    with pytest.raises(
        ValueError, match=r"flops=0.001 \(92\) is less than the smallest possible .* nothing was"
    ):
        bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=IMAGES, flops=0.001)
    assert masks(model) == before


def test_the_smallest_network_keeps_the_best_of_each_layer(model):
    with pytest.raises(ValueError, match="smallest possible network has") as error:
        bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=IMAGES, parameters=1)
    smallest = int(error.value.args[0].split("has: ")[1].split()[0].replace(",", ""))
    report = bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=IMAGES, parameters=smallest)
    assert report.after.parameters == smallest
    assert all(layer.at_minimum and layer.after == 1 for layer in report.layers)
    assert all(mask.index(True) == len(mask) - 1 for mask in masks(model).values())
    assert "nothing more can leave: 0.noise, 2.noise, 6.noise" in str(report)


@pytest.mark.parametrize("criterion", [bmrs.BMRSOdds(), bmrs.L2(ratio=0.0)])
def test_tied_structures_go_together(criterion):
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6))
    model = nn.Sequential(stem, BasicBlock(6, 6), nn.Conv2d(6, 2, 1))
    kind = nn.Conv2d if criterion.needs_producer else nn.BatchNorm2d
    bmrs.add_noise(model, where=lambda name, layer: isinstance(layer, kind) and name != "2")
    names = list(noise_layers(model))
    settle(model, dict.fromkeys(names, (-1.0, 0.0)))
    report = bmrs.prune_to(model, criterion, example_inputs=IMAGES, flops=0.5)
    kept = masks(model)
    assert kept[names[0]] == kept[names[2]]  # the stem and what is added to it
    assert not all(kept[names[0]]) or not all(kept[names[1]])
    assert report.in_nats == isinstance(criterion, bmrs.BMRSOdds)
    compacted = bmrs.compact_report(bmrs.compact(model, IMAGES[:1]))
    assert compacted.removed == compacted.pruned
    assert compacted.flops_after == report.after.flops <= report.limit


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ({}, ValueError, "one of flops, parameters and latency, got none"),
        ({"flops": 0.5, "parameters": 0.5}, ValueError, "got flops=0.5, parameters=0.5"),
        ({"flops": 0}, ValueError, "flops must be finite and greater than 0, got 0"),
        ({"latency": math.nan}, ValueError, "latency must be finite"),
        ({"parameters": "half"}, TypeError, "parameters must be a number, got 'half'"),
    ],
)
def test_wrong_targets_are_named(model, targets, error, message):
    with pytest.raises(error, match=message):
        bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=IMAGES, **targets)


def test_latency_is_predicted_and_measured(model, monkeypatch):
    """With times that are counted instead of measured: those of whole networks and of operations alike."""
    from bmrs.budget import latency
    from bmrs.compaction.flop_count import forward_flops

    def counted(makers, **options):
        return [1e-3 * forward_flops(make(), ((), {})) + 5.0 for make in makers]

    monkeypatch.setattr(latency, "_medians", counted)
    report = bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=IMAGES, latency=80.0)
    assert report.after.latency <= 80 < report.by_evidence.latency
    assert report.latency.predicted == pytest.approx(report.after.latency, rel=0.1)
    assert report.latency.batch == 2
    assert "predicted from the layers" in str(report)
    with pytest.raises(ValueError, match="latency=1 is less than the smallest possible network"):
        bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=IMAGES, latency=1.0)


def test_latency_by_the_clock(model):
    report = bmrs.prune_to(model, bmrs.BMRSNormal(), example_inputs=IMAGES, latency=1e4)
    assert report.met_by_evidence
    assert 0 < report.after.latency < 1e4
