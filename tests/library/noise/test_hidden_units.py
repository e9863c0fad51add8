"""Noise on the hidden units of recurrent layers, against a recurrence that is written out."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bmrs

KINDS = [
    (nn.LSTM, {}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "bias": False}),
    (nn.LSTM, {"proj_size": 2, "num_layers": 2}),
    (nn.LSTM, {"bidirectional": True, "batch_first": True}),
]


@pytest.fixture(autouse=True)
def in_double_precision():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(default)


def noisy(kind, options, **more):
    layer = kind(3, 5, **options)
    noise = {"initial_mu": -1.0, "initial_log_sigma": -1.0, **more}
    return bmrs.add_noise(layer, where=kind, structures="hidden", granularity="batch", **noise)


def drawn(layer):
    """Return the θ that the next call of a layer will draw."""
    state = torch.get_rng_state()
    theta = {name: part(torch.ones_like(part.mu)) for name, part in layer.noise.named_children()}
    torch.set_rng_state(state)
    return theta


def step(layer, name, theta, x, h, c):
    """Return the next state and cell of one layer and direction, whose readers see θ·h."""
    weights = {kind: getattr(layer, f"{kind}_{name}", 0.0) for kind in ("weight_ih", "bias_ih", "bias_hh")}
    read = h if layer.proj_size else theta * h
    a = x @ weights["weight_ih"].T + weights["bias_ih"]
    b = read @ getattr(layer, f"weight_hh_{name}").T + weights["bias_hh"]
    if layer.mode == "LSTM":
        i, f, g, o = (a + b).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if layer.proj_size:
            h = (theta * h) @ getattr(layer, f"weight_hr_{name}").T
    elif layer.mode == "GRU":
        (ar, az, an), (br, bz, bn) = a.chunk(3, dim=-1), b.chunk(3, dim=-1)
        z = (az + bz).sigmoid()
        h = (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * h
    else:
        h = (a + b).relu()
    return h, c


def written_out(layer, theta, x, initial, cells):
    """Return the output and the last states of a recurrent layer; x has shape (times, batch, features)."""
    names, states = list(theta), []
    both = 2 if layer.bidirectional else 1
    for number in range(layer.num_layers):
        outputs = []
        for direction in range(both):
            place = number * both + direction
            name = names[place]
            h, c, sequence = initial[place], cells[place], []
            for x_t in x.flip(0) if direction else x:
                h, c = step(layer, name, theta[name], x_t, h, c)
                sequence.append(h if layer.proj_size else theta[name] * h)
            states.append(sequence[-1])
            outputs.append(torch.stack(sequence[::-1] if direction else sequence))
        x = torch.cat(outputs, dim=-1)
    return x, torch.stack(states)


def states_for(layer, batch):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    return torch.randn(rows, batch, layer.proj_size or 5), torch.randn(rows, batch, 5)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("kind", "options"), KINDS)
class TestRecurrence:
    def test_every_reader_sees_the_scaled_state(self, kind, options):
        layer = noisy(kind, options)
        x, (initial, cells) = torch.randn(4, 2, 3), states_for(layer, 2)
        theta = drawn(layer)
        given = x.transpose(0, 1) if layer.batch_first else x
        output, state = layer(given, (initial, cells) if kind is nn.LSTM else initial)
        expected, expected_states = written_out(layer, theta, x, initial, cells)
        output = output.transpose(0, 1) if layer.batch_first else output
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-14)
        last = state[0] if kind is nn.LSTM else state
        torch.testing.assert_close(last, expected_states, rtol=1e-12, atol=1e-14)

    def test_gradients_are_those_of_finite_differences(self, kind, options):
        layer = noisy(kind, options)
        x, (initial, cells) = torch.randn(4, 2, 3), states_for(layer, 2)
        weights = torch.randn(written_out(layer, drawn(layer), x, initial, cells)[0].shape)

        def loss():
            torch.manual_seed(5)
            output, states = written_out(layer, drawn(layer), x, initial, cells)
            return ((output * weights).sum() + states.square().sum()).item()

        torch.manual_seed(5)
        given = x.transpose(0, 1) if layer.batch_first else x
        output, state = layer(given, (initial, cells) if kind is nn.LSTM else initial)
        output = output.transpose(0, 1) if layer.batch_first else output
        ((output * weights).sum() + (state[0] if kind is nn.LSTM else state).square().sum()).backward()
        with torch.no_grad():
            for part in layer.noise.children():
                for parameter in part.parameters():
                    unit, small = 3, 1e-6
                    gradient = parameter.grad[unit].item()
                    parameter[unit] += small
                    above = loss()
                    parameter[unit] -= 2 * small
                    assert gradient == pytest.approx((above - loss()) / (2 * small), rel=1e-5, abs=1e-7)
                    parameter[unit] += small

    def test_evaluation_multiplies_by_the_expectation_of_what_is_kept(self, kind, options):
        layer = noisy(kind, options).eval()
        for part in layer.noise.children():
            part.set_kept(torch.tensor([True, False, True, True, False]))
        x, (initial, cells) = torch.randn(4, 2, 3), states_for(layer, 2)
        theta = {name: part.expected_noise() for name, part in layer.noise.named_children()}
        given = x.transpose(0, 1) if layer.batch_first else x
        output = layer(given, (initial, cells) if kind is nn.LSTM else initial)[0]
        output = output.transpose(0, 1) if layer.batch_first else output
        torch.testing.assert_close(output, written_out(layer, theta, x, initial, cells)[0])


def test_there_is_noise_for_every_layer_and_direction():
    layer = noisy(nn.GRU, {"num_layers": 2, "bidirectional": True})
    assert [name for name, _ in layer.noise.named_children()] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert layer.noise.l1_reverse.num_structures == 5
    assert {name for name, _ in layer.named_parameters() if "noise" not in name} == {
        name for name, _ in nn.GRU(3, 5, num_layers=2, bidirectional=True).named_parameters()
    }


def test_packed_sequences_are_scaled_as_padded_ones_and_the_weights_are_put_back():
    layer, x = noisy(nn.GRU, {"bidirectional": True}).eval(), torch.randn(4, 2, 3)
    packed = pack_padded_sequence(x, torch.tensor([4, 4]))
    output, state = layer(packed)
    expected, expected_state = layer(x)
    torch.testing.assert_close(pad_packed_sequence(output)[0], expected)
    torch.testing.assert_close(state, expected_state)
    assert layer._flat_weights[1] is layer.weight_hh_l0


def test_after_an_error_the_layer_has_its_own_weights():
    layer, x = noisy(nn.LSTM, {}).eval(), torch.randn(4, 2, 3)
    before = layer(x)[0]
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.randn(4, 2, 7))
    for again in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x)[0], before)


def test_learning_finds_the_unit_that_is_read():
    # The output reads the first unit alone, and that one ignores the others.
    layer = noisy(nn.RNN, {}, initial_mu=0.0, initial_log_sigma=-3.0)
    with torch.no_grad():
        layer.weight_hh_l0[0] = 0.0
    x = torch.randn(6, 8, 3)
    target = layer.eval()(x)[0][-1, :, 0].detach()

    def loss(model, batch):
        return 1e4 * (model(batch)[0][-1, :, 0] - target).square().mean()

    bmrs.learn_posteriors(layer, [x], loss, dataset_size=8, max_distance=8.0)
    bmrs.prune(layer, bmrs.BMRSOdds())
    assert layer.noise.l0.kept.tolist() == [True, False, False, False, False]


def test_lost_hooks_are_noticed_and_restored():
    layer, x = noisy(nn.LSTM, {}).eval(), torch.randn(4, 2, 3)
    before = layer(x)[0]
    layer._forward_hooks.clear()
    with pytest.raises(ValueError, match="does not act any more"):
        bmrs.kl_divergence(layer, weight=1.0)
    assert bmrs.restore_noise(layer) == [""]
    assert torch.equal(layer(x)[0], before)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            nn.LSTM(3, 5),
            {"granularity": "element"},
            "takes granularity=\"batch\", got 'element': a recurrent layer has",
        ),
        (nn.LSTM(3, 5), {"granularity": "sample"}, "one weight for all examples and times"),
        (
            nn.GRU(3, 5),
            {"activation": "relu"},
            "takes no activation, which a recurrent layer has inside, got 'relu'",
        ),
        (nn.GRU(3, 5), {"num_structures": 5, "dim": 1}, "takes no num_structures and dim"),
        (nn.Linear(3, 5), {}, "needs recurrent layers, .* and '' is a Linear"),
        (nn.LSTMCell(3, 5), {}, "needs recurrent layers, .* and '' is a LSTMCell"),
        (noisy(nn.RNN, {}), {}, r"layer '' \(RNN\) already has a noise layer"),
        (
            nn.utils.parametrizations.weight_norm(nn.GRU(3, 5), "weight_hh_l0"),
            {},
            "computed by a parametrization",
        ),
    ],
)
def test_what_is_refused(model, options, message):
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        bmrs.add_noise(model, where=type(model), structures="hidden", **{"granularity": "batch", **options})
    assert set(model.state_dict()) == keys


def test_a_parametrization_that_comes_later_is_refused_when_it_would_hide_the_noise():
    layer = noisy(nn.LSTM, {})
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    with pytest.raises(
        ValueError, match=r"cannot act: its weights are computed anew .*remove_parametrizations"
    ):
        layer(torch.randn(4, 2, 3))
