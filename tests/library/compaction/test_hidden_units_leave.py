"""Pruned hidden units leave recurrent layers, whatever reads them, and what is left computes the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bmrs


class Network(nn.Module):
    """A recurrent layer between linear ones, read in one of several ways."""

    def __init__(self, kind, reading, options):
        super().__init__()
        self.reading, self.hidden = reading, 6
        self.into, self.recurrent = nn.Linear(3, 4), kind(4, 6, batch_first=True, **options)
        rows = self.recurrent.num_layers * (2 if self.recurrent.bidirectional else 1)
        width = (self.recurrent.proj_size or 6) * (2 if self.recurrent.bidirectional else 1)
        self.start = nn.Parameter(torch.randn(1, 1, 6))
        self.encoder = nn.Linear(3, rows * 6)
        self.second, self.behind = nn.GRU(width, 5, batch_first=True), nn.Linear(5, 2)
        self.out, self.from_state = nn.Linear(width, 2), nn.Linear(width if "state" in reading else 6, 2)

    def forward(self, x):
        return getattr(self, self.reading)(torch.relu(self.into(x)), x)

    def last(self, y, x):
        return self.out(self.recurrent(y)[0][:, -1])

    def mean(self, y, x):
        return self.out(self.recurrent(y)[0].mean(1))

    def tanh(self, y, x):
        return self.out(torch.tanh(self.recurrent(y)[0]))

    def last_state(self, y, x):
        state = self.recurrent(y)[1]
        state = state[0] if isinstance(state, tuple) else state
        both = [state[-2], state[-1]] if self.recurrent.bidirectional else [state[-1]]
        return self.from_state(torch.cat(both, dim=-1))

    def stacked(self, y, x):
        return self.behind(self.second(self.recurrent(y)[0])[0])

    def twice(self, y, x):
        return self.out(self.recurrent(y)[0]) + self.out(self.recurrent(y.flip(1))[0])

    def zeros(self, y, x):
        return self.out(self.recurrent(y, torch.zeros(1, x.shape[0], self.hidden))[0])

    def baked_zeros(self, y, x):
        start = x.new_zeros(1, x.shape[0], 6)
        return self.out(self.recurrent(y, (start, torch.zeros_like(start)))[0])

    def learned(self, y, x):
        return self.out(self.recurrent(y, self.start.expand(-1, x.shape[0], -1).contiguous())[0])

    def encoded(self, y, x):
        return self.out(self.recurrent(y, self.encoder(x[:, 0]).unsqueeze(0))[0])

    def carried(self, y, x):
        first, state = self.recurrent(y[:, :2])
        return self.out(torch.cat([first, self.recurrent(y[:, 2:], state)[0]], dim=1))

    def cell(self, y, x):
        output, (_, cells) = self.recurrent(y)
        return self.out(output[:, -1]) + self.out(cells[-1])

    def as_it_is(self, y, x):
        return self.recurrent(y)


@pytest.fixture(autouse=True)
def in_double_precision():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    yield
    torch.set_default_dtype(default)


def noisy(model, kept=3):
    """Put noise on all recurrent layers, of which as many units stay in each, chosen at random."""
    bmrs.add_noise(model, where=nn.RNNBase, structures="hidden", granularity="batch", initial_mu=-1.0)
    for layer in model.modules():
        if isinstance(layer, bmrs.NoiseLayer):
            layer.set_kept(torch.randperm(layer.num_structures) < kept)
            with torch.no_grad():
                layer.mu.add_(0.5 * torch.randn_like(layer.mu))
    return model.eval()


def assert_same(actual, expected):
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < 1e-10


CASES = [
    (nn.LSTM, "last", {}, "module"),
    (nn.RNN, "mean", {"nonlinearity": "relu", "bidirectional": True}, "module"),
    (nn.LSTM, "last_state", {"num_layers": 2, "bidirectional": True, "bias": False}, "module"),
    (nn.GRU, "tanh", {}, "module"),
    (nn.LSTM, "stacked", {"num_layers": 2}, "module"),
    (nn.GRU, "twice", {"bidirectional": True}, "module"),
    (nn.GRU, "zeros", {}, "module"),
    (nn.LSTM, "baked_zeros", {}, "graph"),
    (nn.RNN, "learned", {}, "module"),
    (nn.GRU, "encoded", {}, "module"),
    (nn.GRU, "carried", {}, "module"),
    (nn.LSTM, "last", {"proj_size": 2, "num_layers": 2, "bidirectional": True}, "module"),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("kind", "reading", "options", "form"), CASES)
def test_pruned_units_leave(kind, reading, options, form):
    model, x = noisy(Network(kind, reading, options)), torch.randn(2, 4, 3)
    compacted = bmrs.compact(model, x)
    assert_same(compacted(x), model(x))
    report = bmrs.compact_report(compacted)
    assert report.form == form
    used = [layer for layer in report.layers if layer.name.startswith("recurrent")]
    assert all(layer.removed == layer.pruned == 3 for layer in used)
    if form == "module":
        assert compacted.recurrent.hidden_size == 3
        assert {len(v) % 3 for n, v in compacted.recurrent.named_parameters() if "hr" not in n} == {0}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {"proj_size": 2}), (nn.GRU, {"num_layers": 2, "bidirectional": True})],
)
def test_what_is_left_is_saved_loaded_and_trained(kind, options, tmp_path):
    model, x = noisy(Network(kind, "last_state", options)), torch.randn(2, 4, 3)
    expected, compacted = model(x), bmrs.compact(model, x)
    bmrs.save(tmp_path / "model", compacted)
    assert_same(bmrs.load(tmp_path / "model")(x), expected)
    again = bmrs.load(tmp_path / "model", model=Network(kind, "last_state", options))
    assert again.recurrent.hidden_size == 3
    assert_same(again(x), expected)
    optimizer = torch.optim.Adam(again.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = again.train()(x).square().sum()
        loss.backward()
        optimizer.step()
    assert again(x).square().sum() < loss
    assert again.recurrent.hidden_size == 3


def test_what_can_take_the_factors_leaves_no_noise_and_what_cannot_a_multiplication():
    x = torch.randn(2, 4, 3)
    folded = bmrs.compact(noisy(Network(nn.LSTM, "last_state", {"num_layers": 2})), x)
    assert "noise" not in folded.recurrent._modules
    assert not folded.recurrent._forward_hooks
    assert not folded.recurrent._forward_pre_hooks
    kept = bmrs.compact(noisy(Network(nn.LSTM, "tanh", {"num_layers": 2})), x)
    assert list(kept.recurrent.noise._modules) == ["l1"]
    (first, second) = (layer for layer in bmrs.compact_report(kept).layers if layer.name.startswith("rec"))
    assert first.folded
    assert second.not_folded_because.endswith("forward it cannot pass tanh")


def test_as_many_units_stay_in_all_layers_as_in_the_largest():
    model, x = noisy(Network(nn.GRU, "last", {"num_layers": 2})), torch.randn(2, 4, 3)
    model.recurrent.noise.l0.set_kept(torch.arange(6) < 5)
    compacted = bmrs.compact(model, x)
    assert_same(compacted(x), model(x))
    assert compacted.recurrent.hidden_size == 5
    report = {layer.name: layer for layer in bmrs.compact_report(compacted).layers}
    assert report["recurrent.noise.l1"].removed == 1
    (reason,) = report["recurrent.noise.l1"].kept_because
    assert reason.startswith("as many hidden units stay in each layer and direction")


@pytest.mark.parametrize(
    ("reading", "reason"),
    [("cell", "it is read at linear in layer 'out'"), ("as_it_is", "it is an output of the model")],
)
def test_units_that_are_read_otherwise_stay_with_the_reason(reading, reason):
    model, x = noisy(Network(nn.LSTM, reading, {})), torch.randn(2, 4, 3)
    compacted = bmrs.compact(model, x)
    report = {layer.name: layer for layer in bmrs.compact_report(compacted).layers}["recurrent.noise.l0"]
    assert report.removed == 0
    assert [why.startswith(reason) for why in report.kept_because] == [True]


def test_kept_noise_is_saved_for_its_class_and_drawn_alike(tmp_path):
    model, x = noisy(Network(nn.GRU, "last", {"bidirectional": True})), torch.randn(2, 4, 3)
    kept = bmrs.compact(model, x, keep_noise=True)
    assert_same(kept(x), model(x))
    assert kept.recurrent.noise.l0_reverse.num_structures == 3
    with pytest.warns(UserWarning, match="can only be loaded with bmrs.load"):
        bmrs.save(tmp_path / "model", kept)
    with pytest.raises(ValueError, match=r"noise .* on hidden units, of which one draw"):
        bmrs.load(tmp_path / "model")
    again = bmrs.load(tmp_path / "model", model=Network(nn.GRU, "last", {"bidirectional": True}))
    torch.manual_seed(3)
    drawn = kept.train()(x)
    torch.manual_seed(3)
    assert torch.equal(again.train()(x), drawn)
    assert not torch.equal(again(x), drawn)


def test_folding_and_its_file_keep_the_size(tmp_path):
    model, x = noisy(Network(nn.LSTM, "last", {"num_layers": 2})), torch.randn(2, 4, 3)
    folded = bmrs.fold(model)
    assert_same(folded(x), model(x))
    bmrs.save(tmp_path / "model", folded, example_inputs=x)
    assert_same(bmrs.load(tmp_path / "model")(x), model(x))
    assert_same(bmrs.load(tmp_path / "model", model=Network(nn.LSTM, "last", {"num_layers": 2}))(x), model(x))


def test_suggestions_costs_and_budgets_count_hidden_units():
    model, x = Network(nn.LSTM, "last", {"num_layers": 2}), torch.randn(2, 4, 3)
    place = next(place for place in bmrs.suggest(model, x) if place.hidden)
    assert (place.layers, place.hidden, place.structures) == (("recurrent",), ("recurrent",), 12)
    noise = noisy(copy.deepcopy(model), kept=6)
    costs = bmrs.structure_costs(noise, x[:1])
    saved = (4 * 6 * (4 + 6 + 2) - 4 * 5 * (4 + 5 + 2)) + (4 * 6 * (6 + 6 + 2) - 4 * 5 * (5 + 5 + 2)) + 2
    assert [costs[f"recurrent.noise.l{i}"].parameters for i in (0, 1)] == [saved / 2, saved / 2]
    bmrs.prune_to(noise, bmrs.BMRSOdds(), example_inputs=x, parameters=0.4)
    kept = [int(part.kept.sum()) for part in noise.recurrent.noise.children()]
    assert bmrs.compact(noise, x).recurrent.hidden_size == max(kept) == min(kept) < 6


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences_are_refused_with_what_to_do_and_that_works(kind):
    class Packing(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.out, self.packs = kind(4, 6, batch_first=True), nn.Linear(6, 2), True

        def forward(self, x, lengths):
            if self.packs:
                x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            y = self.recurrent(x)[0]
            return self.out(pad_packed_sequence(y, batch_first=True)[0] if self.packs else y)

    torch.manual_seed(0)
    model = bmrs.add_noise(Packing(), where=kind, structures="hidden", granularity="batch").double()
    x, lengths = torch.randn(3, 5, 4).double(), torch.tensor([2, 5, 4])
    model(x, lengths).square().mean().backward()
    assert (model.recurrent.noise.l0.mu.grad != 0).all()
    model.eval().recurrent.noise.l0.set_kept(torch.arange(6) < 4)
    expected = model(x, lengths)
    assert (bmrs.fold(model)(x, lengths) - expected).abs().max() < 1e-12
    advice = r"packed sequences, as layer 'recurrent' .* switch pack_padded_sequence off .* bmrs.fold"
    with pytest.raises(ValueError, match=advice):
        bmrs.compact(model, (x, lengths))
    model.packs = False
    compacted = bmrs.compact(model, (x, lengths))
    compacted.packs = True
    assert compacted.recurrent.hidden_size == 4
    assert (compacted(x, lengths) - expected).abs().max() < 1e-12
