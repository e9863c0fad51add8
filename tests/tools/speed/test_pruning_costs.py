"""The timing of pruning: what is judged, compacted and compared."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_networks import TINY
from torch import nn

import bmrs
from benchmarks import records
from benchmarks.__main__ import main
from benchmarks.speed import pruning
from benchmarks.speed.networks import (
    RESNET50,
    SMALL_RESNET50,
    TimedNetwork,
    convolution_chain,
    with_noise_behind,
)
from benchmarks.speed.stopwatch import Stopwatch
from bmrs.noise.lookup import noise_layers

CPU = torch.device("cpu")
KEYS = {"kind", "network", "criterion", "batch", "model", "milliseconds", "speedup"}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(pruning, "ROUND_MS", 0.1)
    monkeypatch.setattr(pruning, "RESNET50", TINY)
    monkeypatch.setattr(pruning, "COMPACTED", {"tiny": TINY})


def test_command_prints_and_keeps_its_rows(tmp_path, capsys):
    assert main(["pruning", "--rounds", "1", "--device", "cpu", "--record", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| KL term, forward and backward | tiny |  |" in printed
    assert "| decision | tiny | BMRSUniform(p1=8) |" in printed
    (rows,) = records.load("pruning", tmp_path).values()
    assert all(KEYS | {"suite", "machine", "environment"} == row.keys() for row in rows)
    assert all(row["milliseconds"].keys() == {"median", "p20", "p80"} for row in rows)
    assert [row["criterion"] for row in rows if row["kind"] == "decision"] == list(pruning.CRITERIA)
    assert [row["network"] for row in rows if row["kind"] == "compaction"] == ["tiny"]
    latencies = [row for row in rows if row["kind"] == "latency"]
    assert [(row["batch"], row["model"]) for row in latencies] == [
        (batch, model) for batch in (1, 8, 64) for model in ("dense", "masked", "compacted")
    ]
    for row in rows:
        assert (row["speedup"] is not None) == (row["kind"] == "latency")
        if row["model"] == "dense":
            assert row["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_command_keeps_nothing_unasked(monkeypatch):
    monkeypatch.setattr(records, "save", None)
    assert main(["pruning", "--rounds", "1", "--device", "cpu"]) == 0


def test_speedup_is_over_the_dense_network(monkeypatch):
    fixed = {"dense": 6.0, "masked": 12.0, "compacted": 2.0}

    def timed(stopwatch, calls, *, rounds):
        return {
            name: {"median": fixed[name], "p20": fixed[name], "p80": fixed[name], "rounds": [fixed[name]]}
            for name in calls
        }

    monkeypatch.setattr(pruning, "timed", timed)
    rows = pruning.latencies({"tiny": TINY}, [3], Stopwatch(CPU), 1)
    assert [row["speedup"]["value"] for row in rows] == [1.0, 0.5, 3.0]


def test_models_compared_are_the_dense_the_masked_and_the_compacted_one(monkeypatch):
    compared = {}

    def timed(stopwatch, calls, *, rounds):
        compared.update({name: call.func for name, call in calls.items()})
        return {name: {"median": 1.0, "p20": 1.0, "p80": 1.0, "rounds": [1.0]} for name in calls}

    monkeypatch.setattr(pruning, "timed", timed)
    pruning.latencies({"tiny": TINY}, [1], Stopwatch(CPU), 1)
    widths = {
        name: [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
        for name, model in compared.items()
    }
    assert widths == {"dense": [6, 6, 10], "masked": [6, 6, 10], "compacted": [3, 3, 10]}
    assert [bool(noise_layers(model)) for model in compared.values()] == [False, True, False]
    assert not any(model.training for model in compared.values())


def test_convolutions_lose_half_their_filters():
    chain = TimedNetwork("chain", 4, (3, 32, 32), with_noise_behind(convolution_chain, nn.Conv2d))
    compacted = bmrs.compact(pruning.half_pruned(chain, CPU), chain.inputs(1))
    before = [layer.out_channels for layer in convolution_chain() if isinstance(layer, nn.Conv2d)]
    after = [layer.out_channels for layer in compacted if isinstance(layer, nn.Conv2d)]
    assert after == [width // 2 for width in before]


def test_a_residual_network_loses_half_its_channels_in_every_branch():
    compacted = bmrs.compact(pruning.half_pruned(SMALL_RESNET50, CPU), SMALL_RESNET50.inputs(1))
    dense = SMALL_RESNET50.build(None, "auto")
    before, after = (
        sum(layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))
        for model in (dense, compacted)
    )
    assert after == before // 2


@pytest.mark.parametrize("criterion", pruning.CRITERIA.values(), ids=pruning.CRITERIA)
def test_a_decision_on_the_whole_resnet50_keeps_some_and_prunes_some(criterion):
    model = RESNET50.build("element", "auto")
    pruning.spread_posteriors(model)
    report = bmrs.prune(model, criterion)
    assert report.before == 26_560
    assert len(report.layers) == 53
    assert 0.01 < report.after / report.before < 0.99


def test_the_kl_term_is_that_of_the_whole_network_with_its_gradients(monkeypatch):
    results = []

    def timed(stopwatch, calls, *, rounds):
        (name,) = calls
        results.append(calls[name]())
        return {name: {"median": 1.0, "p20": 1.0, "p80": 1.0}}

    monkeypatch.setattr(pruning, "timed", timed)
    (row,) = pruning.divergences(RESNET50, Stopwatch(CPU), 1)
    assert (row["kind"], row["network"]) == (pruning.KL_TERM, "ResNet-50")
    ((*gradients,),) = results
    assert len(gradients) == 2 * 53
    assert sum(each.numel() for each in gradients) == 2 * 26_560
    assert all((each != 0).any() for each in gradients)


def test_each_decision_is_timed_on_a_model_with_all_structures(monkeypatch):
    seen = []

    def prune(model, criterion):
        seen.append(all(layer.mask.all() for layer in noise_layers(model).values()))
        pruning.prune_half(model)

    monkeypatch.setattr(bmrs, "prune", prune)
    pruning.decisions(TINY, Stopwatch(CPU), 2)
    assert len(seen) > 4
    assert all(seen)


def test_calls_take_turns():
    order = []
    calls = {name: functools.partial(order.append, name) for name in ("first", "second")}
    times = pruning.timed(Stopwatch(CPU), calls, rounds=2)
    turns = [name for name, after in zip(order, [*order[1:], None], strict=True) if name != after]
    assert turns == ["first", "second"] * 3  # the first turn of each finds out how often it fits into a round
    assert all(len(each["rounds"]) == 2 for each in times.values())


@pytest.mark.parametrize("option", ["--rounds=0", "--device=abacus", "--networks=mlp"])
def test_bad_options_are_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["pruning", option])
    assert option.partition("=")[0] in capsys.readouterr().err
