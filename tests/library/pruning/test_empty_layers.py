"""Layers that may lose all their structures, because a shortcut carries on."""

import pytest
import torch
from torch import nn

import bmrs
from bmrs.noise.lookup import noise_layers


class _Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.back = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.back(torch.relu(self.into(x)))


class _Two(nn.Module):
    """The sum of two layers, each of which is the other's shortcut."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.relu(self.first(x)) + torch.relu(self.second(x))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def _model(*layers, off=()):
    """A network with noise of which some layers' structures are all off, and the others worth more and more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, 3)).eval()
    bmrs.add_noise(model, where=lambda name, _: name.endswith(("into", "first", "second")) or name == "0")
    for i, (name, layer) in enumerate(noise_layers(model).items()):
        with torch.no_grad():
            layer.mu.copy_(torch.linspace(-0.5, 0.0, layer.num_structures) - 0.5 + 0.1 * i)
            layer.log_sigma.fill_(-2.0)
            if name in off:
                layer.mu.fill_(-20.0 + 0.1 * i)
    return model


def _kept(model):
    return {name: int(layer.mask.sum()) for name, layer in noise_layers(model).items()}


def test_a_branch_goes_whole_and_the_trunk_keeps_its_best():
    off = ("0.noise", "1.into.noise")
    model = _model(_Branch(), _Branch(), off=off)
    report = bmrs.prune(model, bmrs.BMRSNormal(), example_inputs=X, empty_layers=True)
    assert _kept(model) == {"0.noise": 1, "1.into.noise": 0, "2.into.noise": 10}
    assert [(layer.best_kept, layer.emptied) for layer in report.layers] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert report.after == 11
    assert "1.into.noise: the criterion asked for every structure; all went" in str(report)
    compacted = bmrs.compact(model, X)
    assert bmrs.compact_report(compacted).emptied == ("1.into", "1.back")
    torch.testing.assert_close(compacted(X), model(X))
    # What has nothing left can be judged and trained again.
    assert bmrs.prune(model, bmrs.BMRSNormal()).after == 11
    bmrs.kl_divergence(model, weight="mean").backward()


def test_of_two_that_are_each_others_shortcut_the_weaker_goes(monkeypatch):
    export, calls = torch.export.export, []
    monkeypatch.setattr(
        torch.export, "export", lambda *args, **more: calls.append(1) or export(*args, **more)
    )
    model = _model(_Two(), off=("1.first.noise", "1.second.noise"))
    bmrs.prune(model, bmrs.BMRSNormal(), example_inputs=X, empty_layers=True)
    assert len(calls) == 1
    assert _kept(model) == {"0.noise": 6, "1.first.noise": 0, "1.second.noise": 1}


def test_without_being_asked_the_best_stays():
    model = _model(_Branch(), off=("1.into.noise",))
    assert bmrs.prune(model, bmrs.BMRSNormal(), example_inputs=X).layers[1].best_kept
    assert _kept(model) == {"0.noise": 6, "1.into.noise": 1}


def test_a_noise_layer_alone_keeps_its_best():
    model = bmrs.NoiseLayer(4, dim=-1, initial_mu=-20.0, initial_log_sigma=-2.0)
    assert (
        bmrs.prune(model, bmrs.BMRSNormal(), example_inputs=torch.randn(2, 4), empty_layers=True).after == 1
    )


def test_it_needs_an_example():
    with pytest.raises(ValueError, match="empty_layers=True needs example_inputs"):
        bmrs.prune(_model(_Branch()), bmrs.BMRSNormal(), empty_layers=True)


def test_a_budget_takes_whole_branches_where_widths_do_not_do():
    target = {"example_inputs": X, "flops": 100}
    with pytest.raises(ValueError, match="smallest possible network"):
        bmrs.prune_to(_model(_Branch(), _Branch()), bmrs.BMRSNormal(), **target | {"flops": 70})
    model = _model(_Branch(), _Branch())
    report = bmrs.prune_to(model, bmrs.BMRSNormal(), **target | {"flops": 70}, empty_layers=True)
    kept = _kept(model)
    assert kept["0.noise"] > 0
    assert kept["1.into.noise"] == 0  # worth less than the next
    compacted = bmrs.compact_report(bmrs.compact(model, X[:1]))
    assert report.after.flops == compacted.flops_after <= 70
    assert report.after.parameters == compacted.parameters_after
    assert report.met
    assert report.lost > 0.0
    assert report.relative_loss >= report.least_relative_loss
    assert report.layers[1].by_evidence == 10
    assert not report.met_by_evidence
