"""What networks do in training mode alone: graphs, which lack it, say so."""

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compaction_cases import prune_structures
from torch import nn

import bmrs
from bmrs.noise.lookup import noise_layers


class Network(nn.Module):
    """Its code has a width in it, so that it becomes a graph."""

    def __init__(self, inside: nn.Module | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.inside = inside or nn.Identity()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(self.last(self.first(x).view(-1, 6)))


class OwnCode(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.training)


class TwoInTraining(Network):
    def forward(self, x):
        y = super().forward(x)
        return (y, y) if self.training else y


def attention(x: torch.Tensor, training: bool) -> torch.Tensor:
    queries = x[:, None, :]
    return F.scaled_dot_product_attention(queries, queries, queries, dropout_p=0.5 * training)[:, 0]


def compacted(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = bmrs.add_noise(network, where="first")
    prune_structures(noise_layers(model)["first.noise"], [0, 3])
    return bmrs.compact(model, torch.randn(5, 4))


@pytest.mark.parametrize(
    ("inside", "lacking"),
    [
        (
            OwnCode(lambda x, training: x + torch.randn_like(x) if training else x),
            "random numbers of randn_like in layer 'inside'",
        ),
        (
            OwnCode(lambda x, t: x * torch.bernoulli(torch.full_like(x, 0.5)) if t else x),
            "random numbers of bernoulli",
        ),
        (OwnCode(attention), "in layer 'inside'"),
        (nn.RReLU(), "random numbers of rrelu"),
        (
            nn.Sequential(
                nn.Unflatten(1, (1, 2)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten()
            ),
            "keeps in",
        ),
    ],
)
def test_what_a_graph_lacks_is_named(inside, lacking):
    random_state = torch.get_rng_state()
    network = Network(inside)
    torch.set_rng_state(random_state)
    with pytest.warns(UserWarning, match="in training mode it lacks"):
        report = bmrs.compact_report(compacted(network))
    assert report.form == "graph"
    assert lacking in "; ".join(report.only_in_training)
    assert f"in training mode the graph lacks {report.only_in_training[0]}" in str(report)
    assert report.to_dict()["only_in_training"] == report.only_in_training


def test_random_states_are_left_as_they_are():
    def draws(x, training):
        return x + (random.random() + np.random.rand()) * torch.rand(()) if training else x  # noqa: NPY002

    network = Network(OwnCode(draws))
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with pytest.warns(UserWarning, match="random numbers of rand in layer 'inside'"):
        compacted(network)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_nothing_is_said_of_a_training_mode_that_ends_in_an_error(error):
    def ends(x, training):
        if training:
            raise error
        return x

    assert bmrs.compact_report(compacted(Network(OwnCode(ends)))).only_in_training == ()


def test_no_process_waits_for_others_in_its_training_mode(monkeypatch):
    monkeypatch.setattr("bmrs.processes.count", lambda: 2)
    assert bmrs.compact_report(compacted(Network(nn.RReLU()))).only_in_training == ()


@pytest.mark.parametrize("way", ["in place", "of its data", "replaced"])
def test_parameters_that_training_writes_are_left_as_they_are(way):
    class Clipped(nn.Linear):
        def forward(self, x):
            if self.training:
                with torch.no_grad():
                    if way == "in place":
                        self.weight.clamp_(-0.01, 0.01)
                    elif way == "of its data":
                        self.weight.data.clamp_(-0.01, 0.01)
                    else:
                        self.weight.data = self.weight.data.clamp(-0.01, 0.01)
            return super().forward(x)

    network = Network(Clipped(2, 2))
    weight = network.inside.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compacted(network)
    assert torch.equal(network.inside.weight, weight)
    assert ("what training writes into parameters" in "".join(str(w.message) for w in caught)) == (
        way != "replaced"
    )


def test_outputs_that_training_alone_has_are_named():
    with pytest.warns(UserWarning, match="outputs that it has in training mode alone"):
        compacted(TwoInTraining())


@pytest.mark.parametrize(
    "inside",
    [
        nn.Dropout(0.5),
        nn.AlphaDropout(0.5),
        OwnCode(lambda x, training: F.dropout(x, 0.5, training)),
        nn.Sequential(nn.Unflatten(1, (2, 1, 1)), nn.Dropout2d(0.5), nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, (2, 1)), nn.Dropout1d(0.5), nn.Flatten()),
        OwnCode(lambda x, training: F.feature_alpha_dropout(x[..., None], 0.5, training)[..., 0]),
        nn.BatchNorm1d(2),
        OwnCode(lambda x, training: x + 0.0 * torch.rand_like(x)),  # in evaluation mode too
    ],
)
def test_nothing_is_said_of_what_graphs_have_too(inside):
    network = Network(inside)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smaller = compacted(network)
    report = bmrs.compact_report(smaller)
    assert (report.form, report.only_in_training) == ("graph", ())
    assert all(
        torch.equal(buffers[name], buffer) for name, buffer in network.named_buffers() if name in buffers
    )


def test_nothing_is_said_where_the_model_does_not_run_in_training_mode():
    model = bmrs.add_noise(Network(nn.BatchNorm1d(2)), where="first")
    prune_structures(noise_layers(model)["first.noise"], [0])
    report = bmrs.compact_report(bmrs.compact(model, torch.randn(1, 4)))
    assert (report.form, report.only_in_training) == ("graph", ())
