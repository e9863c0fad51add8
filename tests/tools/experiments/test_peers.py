"""The comparison with what one would do instead: sizes, torch_pruning, runs and tables."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics

import numpy as np
import pytest
import torch
from torch import nn

import bmrs
from benchmarks.__main__ import main as benchmarks
from benchmarks.experiments.deadline import Deadline
from benchmarks.experiments.peers import (
    chains,
    command,
    comparison,
    picture,
    residual,
    rules,
    table,
    untrained,
)
from benchmarks.experiments.peers.budget import Chain, Cost, kept, minus_losses
from benchmarks.experiments.peers.untrained import UntrainedComparison
from benchmarks.rivals import torch_pruning
from bmrs.compaction.costs import flops, num_parameters
from bmrs.data import EMBEDDED, Dataset, TensorSplit
from bmrs.models import MLP, LeNet5, registry, resnet20

IMAGES = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "lenet5": lambda: LeNet5(noise=False),
    "lenet5 in colour": lambda: LeNet5(in_channels=3, noise=False),
    "mlp": lambda: MLP(in_features=1024, num_blocks=2, hidden=9, noise=False),
}


def example(name: str) -> torch.Tensor:
    return IMAGES.expand(-1, 3, -1, -1) if "colour" in name else IMAGES


@pytest.fixture(params=NETWORKS)
def network(request) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return NETWORKS[request.param](), example(request.param)


class TestBudget:
    @pytest.mark.parametrize("narrow", [False, True])
    def test_cost_is_what_torch_counts(self, network, narrow):
        model, images = network
        chain = Chain.of(model, images[:1])
        widths = tuple(max(1, width // 2 - i) if narrow else width for i, width in enumerate(chain.widths))
        kept = {name: torch.arange(width) for name, width in zip(chain.names, widths, strict=True)}
        pruned = torch_pruning.pruned(model, kept, images[:2])
        assert chain.cost(widths) == Cost(num_parameters(pruned), flops(pruned, images[:1]))

    def test_uniform_widths_come_near_their_share(self, network):
        chain = Chain.of(network[0], network[1][:1])
        for share in (0.4, 0.2):
            widths = chain.uniform(share)
            assert chain.cost(widths).flops / chain.cost(chain.widths).flops == pytest.approx(share, rel=0.2)
            ratios = [mine / full for mine, full in zip(widths, chain.widths, strict=True)]
            assert max(ratios) - min(ratios) < 0.5 / min(chain.widths) + 0.1

    @pytest.mark.parametrize("most", [2_000_000, 0])
    def test_best_widths_keep_the_budget_and_the_best_structures(self, most, monkeypatch):
        monkeypatch.setattr("benchmarks.experiments.peers.budget._MOST_WIDTHS", most)
        chain = Chain.of(MLP(in_features=50, num_blocks=1, hidden=100, noise=False), torch.randn(1, 50))
        target = chain.cost((50, 50))
        even = [kept(torch.full((100,), 1.0)), kept(torch.full((100,), 1.0))]
        first = [kept(torch.full((100,), 5.0)), minus_losses(np.full(99, 0.01))]
        for scores in (even, first):
            widths = chain.best(scores, target)
            assert chain.cost(widths).close_to(target)
        assert chain.best(first, target)[0] > chain.best(even, target)[0]
        assert chain.best(first, target)[1] < chain.best(even, target)[1]
        assert chain.best(even, Cost(torch.tensor(1.0), torch.tensor(1e9))) is None

    def test_an_expensive_neuron_too_many_is_made_up_for_by_cheap_ones(self, monkeypatch):
        monkeypatch.setattr("benchmarks.experiments.peers.budget._MOST_WIDTHS", 0)
        chain = Chain.of(MLP(in_features=784, num_blocks=1, hidden=100, noise=False), torch.randn(1, 784))
        target = chain.cost((7.9, 7.9))  # less than 5 % of it is a neuron of the second layer only
        gains = [kept(torch.full((100,), 1e-3)), kept(torch.full((100,), 1.0))]
        widths = chain.best(gains, target)
        assert widths is not None
        assert chain.cost(widths).close_to(target)
        assert widths[0] <= 7 < widths[1]


class TestRivals:
    def test_scores_are_torch_prunings_and_cover_every_structure(self):
        torch.manual_seed(0)
        model = LeNet5(noise=False)
        names = ("conv1", "conv2", "hidden1", "hidden2")
        split = TensorSplit(IMAGES, torch.arange(8))
        scores = torch_pruning.scores(model, names, split, seed=1)
        assert set(scores) == {"random", "L2", "Taylor"}
        for each in scores.values():
            assert [len(layer) for layer in each] == [6, 16, 120, 84]
            assert all(layer.isfinite().all() for layer in each)
        again = torch_pruning.scores(model, names, split, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(scores["random"], again["random"], strict=True))
        with torch.no_grad():
            model.hidden2.weight[3] = 0
            model.classes.weight[:, 3] = 0
        assert torch_pruning.scores(model, names, split, seed=1)["L2"][3].argmin() == 3

    def test_what_is_kept_computes_what_it_did(self, network):
        model, images = network
        chain = Chain.of(model, images[:1])
        kept = {
            name: torch.arange(0, width, 2) for name, width in zip(chain.names, chain.widths, strict=True)
        }
        pruned = torch_pruning.pruned(model, kept, images[:2])
        silenced = bmrs.add_noise(
            model, where=lambda name, _: name in chain.names, initial_mu=0.0, initial_log_sigma=-20.0
        )
        for name, indices in kept.items():
            mask = silenced.get_submodule(name).noise.mask
            mask.zero_()
            mask[indices] = True
        torch.testing.assert_close(pruned(images), silenced.eval()(images), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("criterion", ["L2", "Taylor"])
    def test_rounds_prune_and_train_by_turns(self, network, criterion):
        model, images = network
        chain = Chain.of(model, images[:1])
        wanted = {name: max(1, width // 3) for name, width in zip(chain.names, chain.widths, strict=True)}
        trained = []

        def train(model, epochs):
            trained.append((epochs, [len(model.get_submodule(name).weight) for name in wanted]))

        split = TensorSplit(images, torch.arange(8))
        small = torch_pruning.pruned_in_rounds(model, wanted, criterion, split, epochs=(1, 1, 5), train=train)
        assert [epochs for epochs, _ in trained] == [1, 1, 5]
        steps = [widths for _, widths in trained]
        assert steps[-1] == list(wanted.values())
        for one, next_one in zip([chain.widths, *steps], steps, strict=False):
            assert all(fewer < more for fewer, more in zip(next_one, one, strict=True))
        assert small(images).shape == (8, 10)
        assert Chain.of(model, images[:1]) == chain

    def test_flops_out_of_reach_are_an_error(self, monkeypatch):
        monkeypatch.setattr(torch_pruning, "_STEPS", 3)
        split = TensorSplit(IMAGES, torch.arange(8))
        with pytest.raises(ValueError, match="not 10"):
            torch_pruning.pruned_to(
                LeNet5(noise=False),
                10,
                "L2",
                split,
                everywhere=False,
                seed=0,
                epochs=(0,),
                train=lambda model, epochs: None,
            )


@pytest.mark.parametrize(("epochs", "parts"), [(15, (3, 3, 9)), (7, (1, 1, 5)), (2, (1, 1)), (1, (1,))])
def test_the_last_round_has_most_epochs(epochs, parts):
    assert comparison.in_rounds(epochs) == parts


@pytest.fixture
def quick(monkeypatch):
    """One epoch of each phase on a tenth of the embedded images, and one size beside the posteriors' own."""
    config_of, load = chains.config_of, command.load

    def short(subject, data_dir):
        return config_of(subject, data_dir, epochs=1, noise_epochs=1, fine_tune_epochs=1)

    def few(config, device):
        data = load(config, device)
        return type(data)(
            data.name,
            data.num_classes,
            *(
                TensorSplit(part.images[:480], part.labels[:480])
                for part in (data.train, data.validation, data.test)
            ),
        )

    monkeypatch.setattr(command, "config_of", short)
    monkeypatch.setattr(command, "load", few)
    monkeypatch.setattr(chains, "SIZES", ("own", "20 %"))
    monkeypatch.setattr(untrained, "SIZES", ("own", "20 %"))


@pytest.mark.slow
def test_runs_are_resumed_and_compare_networks_of_one_size(quick, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    arguments = ["peers", "--data", EMBEDDED, "--networks", "mlp", "--seeds", "1", "--output", str(output)]
    assert benchmarks([*arguments, "--minutes", "0"]) == 0
    assert table.load(output) == []

    trained = []
    rows = chains.ChainComparison.rows

    def first_ones(self, done):
        for row in rows(self, done):
            trained.append((row["size"], row["method"]))
            yield row
            if len(trained) == 3:
                return

    with monkeypatch.context() as patch:
        patch.setattr(chains.ChainComparison, "rows", first_ones)
        assert benchmarks(arguments) == 0
    assert trained == [("dense", "dense"), ("dense", "trained"), ("own", "bmrs")]
    before = output.read_text("utf-8")
    assert benchmarks(arguments) == 0
    text = output.read_text("utf-8")
    assert text.startswith(before)
    found = table.load(output)
    assert len({(row["size"], row["method"]) for row in found}) == len(found)
    assert {row["method"] for row in found if row["size"] == "20 %"} == {
        *("bmrs", "bmrs, uniform", "scratch", "paper's training, uniform"),
        *chains.RIVALS,
        *chains.WEIGHT_RATES,
        *chains.IN_ROUNDS,
    }
    for size in ("own", "20 %"):
        costs = [
            Cost(*(torch.tensor(float(row[n])) for n in ("parameters", "flops")))
            for row in found
            if row["size"] == size
        ]
        assert all(cost.close_to(costs[0]) for cost in costs)
    for row in found:
        assert row["epochs"] == (1 if row["method"] == "trained" else 3)
        assert 0 < row["accuracy"] <= 1
        assert ("pruned_accuracy" in row) == (
            row["method"] not in ("dense", "trained", "scratch", *chains.IN_ROUNDS)
        )
        assert ("refitted_accuracy" in row) == row["method"].startswith("bmrs")
        assert row["environment"]["torch"] == torch.__version__
    out = capsys.readouterr().out
    assert "**MLP, embedded images**" in out
    assert "Torch-Pruning, Taylor, uniform" in out
    assert benchmarks(arguments) == 0
    assert output.read_text("utf-8") == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--untrained", "--networks", "resnet20"], "--untrained compares lenet5 and mlp"),
        (["--untrained", "--methods", "scratch"], "there is no scratch with --untrained"),
        (["--methods", "random, this recipe's widths"], "there is no random, this recipe's widths without"),
    ],
)
def test_what_there_is_not_is_named(arguments, message, tmp_path, capsys):
    assert benchmarks(["peers", "--output", str(tmp_path / "rows"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_no_way_trains_is_refitted_alike(quick, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    arguments = ["peers", "--untrained", "--data", EMBEDDED, "--networks", "mlp", "--seeds", "1"]
    assert benchmarks([*arguments, "--output", str(output)]) == 0
    text = output.read_text("utf-8")
    found = {(row["size"], row["method"]): row for row in table.load(output)}
    assert [method for size, method in found if size == "20 %"] == [
        *("bmrs", "bmrs, uniform", *chains.RIVALS, "random, this recipe's widths")
    ]
    assert ("own", "random, uniform") in found
    assert ("own", "L2, global") not in found
    for row in found.values():
        assert 0 < row["pruned_accuracy"] <= 1
        assert 0 < row["refitted_accuracy"] <= 1
        assert "accuracy" not in row
    of_size = [row for (size, _), row in found.items() if size == "20 %"]
    assert statistics.mean(row["refitted_accuracy"] - row["pruned_accuracy"] for row in of_size) > 0.02
    shown = capsys.readouterr().out
    assert "| MLP, embedded images | 20 % | 1 |" in shown
    assert benchmarks([*arguments, "--output", str(output)]) == 0
    assert output.read_text("utf-8") == text


@pytest.mark.parametrize("size", ["own", "20 %"])
def test_rivals_are_refitted_from_what_torch_pruning_leaves(quick, size):
    """What stays by its scores computes, as masks and compacted, what Torch-Pruning's own network does."""
    subject = comparison.Subject(EMBEDDED, "mlp", 0)
    config = command.config_of(subject, None)
    found = UntrainedComparison(subject, config, command.load(config, torch.device("cpu")), Deadline())
    masked = found._chosen_by_rival(size, "L2", False)
    theirs = torch_pruning.pruned(found.trained, found.kept_by_rival(size, "L2", False), found.examples[:2])
    ours = bmrs.compact(masked, found.examples[:2], expected_noise=False)
    torch.testing.assert_close(ours(found.examples), theirs(found.examples), rtol=1e-4, atol=1e-4)


def test_the_table_of_what_was_not_trained_names_the_best_rival(tmp_path):
    ways = {
        "bmrs": (0.6, 0.8),
        "L2, uniform": (0.5, 0.6),
        "Taylor, global": (0.4, 0.7),
        "random, this recipe's widths": (0.3, 0.65),
    }
    rows = [
        row(
            method=method, seed=seed, trained_accuracy=0.9, pruned_accuracy=pruned, refitted_accuracy=refitted
        )
        for method, (pruned, refitted) in ways.items()
        for seed in ((0, 1) if method == "bmrs" else (1,))
    ]
    for each in rows:
        each["environment"] = {"CPU": "a core", "torch": "2.13"}
    assert table.untrained_readme(tmp_path) == ""
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / table.UNTRAINED).write_text("".join(json.dumps(each) + "\n" for each in rows))
    shown = table.untrained_readme(tmp_path)
    assert shown.startswith("a core; torch 2.13; float32")
    assert shown.endswith(
        "| LeNet-5, MNIST | 8 % | 1 | 1,000 | 90.00 | 60.00 | 50.00 (L2) | **80.00** | 70.00 (Taylor, global) |  | "
        "65.00 |"
    )


def test_a_failure_is_named_and_the_others_go_on(quick, tmp_path, capsys):
    arguments = [
        "peers",
        "--data",
        "mnist",
        "--networks",
        "mlp",
        "--seeds",
        "1",
        "--output",
        str(tmp_path / "rows"),
    ]
    assert benchmarks(arguments) == 1
    assert "peers: mnist mlp 0: --data mnist needs --data-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "networks", "idle", "code"),
    [
        (["cifar10"], ["mlp", "lenet5"], "mlp, lenet5, cifar10", 2),
        (["mnist", "cifar10"], ["mlp"], "cifar10", 0),
        (["cifar10"], ["mlp", "resnet20"], "mlp", 0),
    ],
)
def test_what_nothing_is_trained_for_is_said(data, networks, idle, code, tmp_path, capsys):
    arguments = [
        "--data",
        *data,
        "--networks",
        *networks,
        "--minutes",
        "0",
        "--output",
        str(tmp_path / "rows"),
    ]
    assert benchmarks(["peers", *arguments]) == code
    assert f"nothing to train for {idle}: resnet20 is trained on cifar10 alone" in capsys.readouterr().err


def random_images(number, seed):
    generator = torch.Generator().manual_seed(seed)
    return TensorSplit(torch.randn(number, 3, 32, 32, generator=generator), torch.arange(number) % 10)


def test_residual_networks_of_one_size(monkeypatch):
    small = functools.partial(resnet20, width=8, blocks=1)
    named = dataclasses.replace(registry.NETWORKS["resnet20"], build=small)
    monkeypatch.setitem(registry.NETWORKS, "resnet20", named)
    monkeypatch.setattr(residual, "SHARES", {"50 %": 0.5})
    monkeypatch.setattr(residual, "IMAGES", 128)
    monkeypatch.setattr(torch_pruning, "_STEPS", 20)
    subject = comparison.Subject("cifar10", "resnet20", 0)
    config = residual.config_of(subject, "somewhere", epochs=1, noise_epochs=1, fine_tune_epochs=1)
    data = Dataset("cifar10", 10, random_images(200, 0), random_images(20, 1), random_images(20, 2))
    few = residual.first_images(data)
    assert len(few.train) == 128
    wanted = ("bmrs", "L2, uniform", "Taylor, global", "Taylor, in rounds", "scratch")
    ways = residual.ResidualComparison(subject, config, few, Deadline(), wanted)
    rows = {row["method"]: row for row in ways.rows([])}
    assert list(rows) == list(wanted)
    full = flops(ways.trained, few.train.examples(1))
    for method, found in rows.items():
        assert found["flops"] <= rows["L2, uniform"]["flops"] <= full / 2
        assert found["epochs"] == 3
        assert len(found["widths"]) == 9
        assert ("pruned_accuracy" in found) == (method not in ("scratch", "Taylor, in rounds"))
    assert rows["bmrs"]["parameters"] <= rows["L2, uniform"]["parameters"]
    assert rows["bmrs"]["widths"] == rows["scratch"]["widths"]
    assert not list(ways.rows(list(rows.values())))


def row(**values):
    return {
        "data": "mnist",
        "network": "lenet5",
        "seed": 0,
        "size": "8 %",
        "method": "bmrs",
        "parameters": 1000,
        "flops": 2000,
        "accuracy": 0.9,
        **values,
    }


def test_tables_show_means_differences_on_the_same_seeds_and_each_seed():
    rows = [row(seed=seed, accuracy=value, refitted_accuracy=0.8) for seed, value in enumerate((0.90, 0.92))]
    rows += [row(seed=s, method="scratch", accuracy=v) for s, v in enumerate((0.89, 0.90, 0.50))]
    lines = table.as_markdown(rows).splitlines()
    assert lines[0] == "**LeNet-5, MNIST**"
    assert lines[-2] == (
        "| 8 % | **this recipe** | 1,000 | 2,000 |  | 80.00 ± 0.00 | 91.00 ± 1.41 |  | 90.00 92.00 |"
    )
    assert lines[-1] == (
        "| 8 % | this recipe's widths from scratch | 1,000 | 2,000 |  |  | 76.33 ± 22.81 | -1.50 (± 0.50) | "
        "89.00 90.00 50.00 |"
    )


def test_the_short_table_shows_the_seeds_that_all_ways_have(tmp_path):
    (tmp_path / "peers").mkdir()
    rivals_rows = [
        row(method=method, seed=seed, accuracy=0.5 + seed / 10, pruned_accuracy=value)
        for method, value in (
            ("scratch", 0.0),
            ("random, uniform", 0.1),
            ("L2, uniform", 0.3),
            ("Taylor, uniform", 0.2),
        )
        for seed in (0, 1)
    ]
    ours = [
        row(seed=s, accuracy=0.9, pruned_accuracy=0.6, refitted_accuracy=0.8, parameters=900 + s)
        for s in (0, 2)
    ]
    trained = [row(size="dense", method="trained", seed=s, accuracy=0.95 - s / 10) for s in (0, 1)]
    for each in (*rivals_rows, *ours, *trained):
        each["environment"] = {"CPU": "a core", "torch": "2.13"}
    text = "".join(json.dumps(each) + "\n" for each in (*rivals_rows, *ours, *trained))
    (tmp_path / "peers" / table.RUNS).write_text(text)
    short = table.readme(tmp_path)
    assert "a core; torch 2.13; float32" in short
    assert (
        "| LeNet-5, MNIST | 8 % | 1 | 900 | 2,000 | 95.00 | **90.00** | 50.00 | 50.00 | 50.00 | 50.00 |"
    ) in short
    assert "**this recipe**" in table.tables(tmp_path)
    full = tmp_path / "peers" / "tables.md"
    assert table.stale_files(tmp_path) == [full]
    table.write(tmp_path)
    assert table.stale_files(tmp_path) == []
    full.write_text("something else")
    assert table.stale_files(tmp_path) == [full]
    assert table.stale_files(tmp_path / "nowhere") == []
    assert table.readme(tmp_path / "nowhere") == ""


def test_rules_are_compared_structure_by_structure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rules, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(rules, "DISTANCE", 0.3)
    load = rules.load_data

    def few(config, device):
        data = load(chains.config_of(comparison.Subject(EMBEDDED, "lenet5", 0), None), device)
        return type(data)(
            data.name,
            10,
            *(TensorSplit(p.images[:256], p.labels[:256]) for p in (data.train, data.validation, data.test)),
        )

    monkeypatch.setattr(rules, "load_data", few)
    arguments = ["rules", "--data", "mnist", "--data-dir", str(tmp_path), "--seeds", "1"]
    output = tmp_path / "rules.jsonl"
    assert benchmarks([*arguments, "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [each["lower"] for each in found] == [-20.0, -40.0]
    assert all(each["pruned by odds"] == 0 and each["structures"] == 226 for each in found)
    assert found[0]["distance"] == pytest.approx(0.3)
    assert found[1]["lower ends differ"] == 0
    assert "| MNIST | 1 | -20 | 1 | 0 of 226 | 0.0% (0.0%) | 0.0% (0.0%) |  |" in capsys.readouterr().out


def test_the_picture_goes_with_the_rows(tmp_path):
    folder = tmp_path / "peers"
    folder.mkdir()
    assert not picture.is_stale(tmp_path)
    rows = [
        row(size=size, method=method, seed=seed, accuracy=0.8 + seed / 100, pruned_accuracy=0.5)
        for size in ("own", "8 %")
        for method in ("bmrs", "L2, uniform", "dense")
        for seed in (0, 1)
    ]
    (folder / table.RUNS).write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert picture.is_stale(tmp_path)
    picture.write(tmp_path)
    assert not picture.is_stale(tmp_path)
    before = picture.path_of(tmp_path).stat().st_mtime_ns
    picture.write(tmp_path)
    assert picture.path_of(tmp_path).stat().st_mtime_ns == before
    (folder / table.RUNS).write_text(json.dumps(rows[0]) + "\n")
    assert picture.is_stale(tmp_path)
