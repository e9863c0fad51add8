"""The paper's networks, trained once: branches are the runs they stand for, judgements and tables say what is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import bmrs
from benchmarks.__main__ import main
from benchmarks.experiments import paper
from benchmarks.experiments.paper import Conditions, PaperRun
from benchmarks.experiments.small_networks import drawing, formulas, judging, pictures, scores, table
from benchmarks.experiments.small_networks.formulas import snr_as_computed
from benchmarks.experiments.small_networks.judging import Judging
from benchmarks.experiments.small_networks.narrow import narrowed
from benchmarks.experiments.small_networks.trunk import Subject, Trunk
from benchmarks.records import RESULTS
from bmrs.compaction.costs import num_parameters
from bmrs.data import EMBEDDED, TensorSplit
from bmrs.models import MLP, LeNet5
from bmrs.noise.lookup import noise_layers
from bmrs.training.evaluation import accuracy, compression
from bmrs.training.run import load

CONDITIONS = Conditions(None, "cpu", cuda_graph=False, epochs=3, fine_tune_epochs=1)


@pytest.fixture
def few_images(monkeypatch):
    """Leaves so few images that an epoch takes no time."""

    def load_few(config, device):
        data = load(config, device)
        parts = {name: getattr(data, name) for name in ("train", "validation", "test")}
        few = {name: TensorSplit(split.images[:96], split.labels[:96]) for name, split in parts.items()}
        return replace(data, **few)

    monkeypatch.setattr(paper, "load", load_few)
    paper.load_once.cache_clear()
    yield paper.load_once(EMBEDDED, None, 0, "cpu")
    paper.load_once.cache_clear()


@pytest.fixture
def lenet():
    """A network with posteriors of all kinds."""
    torch.manual_seed(0)
    model = LeNet5(granularity="sample").eval()
    for layer in noise_layers(model).values():
        with torch.no_grad():
            layer.mu.uniform_(-3, 0)
            layer.log_sigma.uniform_(-2, 3)
    return model


def test_a_branch_is_the_run_that_it_stands_for(few_images, monkeypatch, tmp_path):
    # After the second of three epochs σ has risen so far that this one prunes.
    monkeypatch.setattr(paper, "CRITERIA", {"snr": {"criterion": "snr", "threshold": 144.0}})
    trunk = Trunk(Subject(EMBEDDED, "mlp", "element", 0), CONDITIONS, tmp_path)
    trunk.train(few_images)
    run = PaperRun(0, EMBEDDED, "mlp", "element", "snr")
    branch, whole = trunk.continue_with("snr", few_images), paper.train_run(run, CONDITIONS)
    before, *after = whole["epochs"]["compression_percent"]
    assert before == 0 < min(after)
    assert {**branch, "seconds": 0} == {**whole, "seconds": 0}


def test_the_command_goes_on_and_its_rows_make_tables(few_images, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paper, "CRITERIA", {"snr": paper.CRITERIA["snr"]})
    monkeypatch.setattr(judging, "POINTS", 4)
    monkeypatch.setattr(judging, "P1", (4, 8))
    few = (
        "--networks",
        "lenet5",
        "--data",
        EMBEDDED,
        "--seeds",
        "0",
        "--epochs",
        "1",
        "--fine-tune-epochs",
        "1",
    )
    output = tmp_path / "paper"
    command = ["small-networks", *few, "--criteria", "snr", "--tune-epochs", "1", "--output", str(output)]
    assert main(command) == 0
    written = {path.name: path.read_text("utf-8") for path in output.glob("*.jsonl")}
    assert {name: text.count("\n") for name, text in written.items()} == {
        "runs.jsonl": 2,
        "networks.jsonl": 1,
        "judged.jsonl": 1,
        "formulas.jsonl": 1,
        "drawn.jsonl": 1,
        "by_snr.jsonl": 2,
    }
    assert main(command) == 0
    assert written == {path.name: path.read_text("utf-8") for path in output.glob("*.jsonl")}

    assert "LeNet-5, Fashion-MNIST subset" in table.readme(tmp_path)
    assert "BMRS_U-8" in table.every_seed(tmp_path)
    assert "½ SNR²" in table.knowledge(tmp_path)
    assert table.formulas(tmp_path).count("\n") == 3 + 1  # header, and each epoch that was looked at
    assert "| as the authors compute it | 0 | never | 6-16-120-84 |" in table.by_snr(tmp_path)
    assert "| LeNet-5, Fashion-MNIST subset, element, 1 epochs | 1 |" in table.drawn(tmp_path)
    assert len(pictures.stale_files(tmp_path)) == len(pictures.PICTURES)
    pictures.write(tmp_path)
    table.write(tmp_path)
    assert not pictures.stale_files(tmp_path)
    assert not table.stale_files(tmp_path)


def test_noise_of_which_the_largest_is_taken_is_not_its_mean():
    """The larger of two elements is above the threshold if θ is drawn for each, and below it with E[θ]."""
    noise = bmrs.NoiseLayer(1, granularity="element", initial_mu=-1.0, initial_log_sigma=0.0)

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise = noise

        def forward(self, x):
            largest = self.noise(x).flatten(2).max(dim=2).values
            return torch.cat([largest, torch.full_like(largest, 0.6)], dim=1)

    images = TensorSplit(torch.ones(50, 1, 8, 8), torch.zeros(50, dtype=torch.int64))
    model = Pooled()
    assert accuracy(model, images) == 0.0
    assert drawing.accuracy_of_draws(model, images, {"noise"}, 3, 0) == 1.0
    assert drawing.accuracy_of_draws(model, images, set(), 3, 0) == 0.0
    assert drawing._over_feature_maps(model, {"noise": noise}, images.images[:1]) == {"noise"}


def test_a_ratio_that_is_nan_takes_the_last_structure_too(few_images, monkeypatch, tmp_path):
    trunk = Trunk(Subject(EMBEDDED, "mlp", "element", 0), CONDITIONS, tmp_path)
    right = formulas.pruned_by_snr(trunk, few_images, as_computed=False)
    assert right["kept"] == [[150, 150]] * 4
    assert right["pruned_wrongly"] == 0
    monkeypatch.setattr(formulas, "snr_as_computed", lambda mu, log_sigma: torch.full_like(mu, math.nan))
    printed = formulas.pruned_by_snr(trunk, few_images, as_computed=True)
    assert printed["kept"][0] == [0, 0]
    assert printed["pruned_wrongly"] == 300
    assert printed["test_accuracy"] < right["test_accuracy"]


def test_an_order_never_empties_a_layer_and_takes_the_least_first():
    worths = [torch.tensor([0.1, 0.2, 5.0]), torch.tensor([3.0, 4.0])]
    assert [kept.tolist() for kept in scores.kept_after(worths, 2)] == [[False, False, True], [True, True]]
    most = scores.most_prunable(worths)
    assert [kept.tolist() for kept in scores.kept_after(worths, most)] == [
        [False, False, True],
        [False, True],
    ]


@pytest.mark.parametrize("rule", scores.RULES)
def test_worths_and_stops_are_those_of_the_library(rule, lenet):
    criterion = scores.RULES[rule]
    kept = scores.kept_by(lenet, rule)
    assert all(layer.mask.all() for layer in noise_layers(lenet).values())
    for layer, own in zip(noise_layers(lenet).values(), kept, strict=True):
        decision = criterion(layer)
        worth = scores.posterior_worth(rule, layer.mu, layer.log_sigma, lower=layer.lower, upper=layer.upper)
        assert torch.equal(own, ~decision.prune)
        if own.any() and not own.all():
            assert worth[own].min() >= worth[~own].max()


def test_compression_and_single_masks_are_measured(few_images, lenet):
    measured = Judging(lenet, few_images)
    kept = scores.kept_by(lenet, "snr")
    scores.set_kept(lenet, kept)
    images, labels = few_images.train.images, few_images.train.labels
    assert measured.compression(kept) == pytest.approx(compression(lenet, images[:1]))
    scores.set_kept(lenet)

    def loss():
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(lenet(images).double(), labels)

    before = loss()
    changes = measured.alone()
    for number, layer in enumerate(noise_layers(lenet).values()):
        layer.set_kept(torch.arange(layer.num_structures) != 1)
        assert changes[number][1] == pytest.approx(float(loss() - before), abs=1e-6)
        layer.set_kept(torch.ones_like(layer.mask))


@pytest.mark.parametrize("network", ["mlp", "lenet"])
def test_a_narrow_network_does_what_the_masked_one_does(network, lenet):
    model = lenet
    if network == "mlp":
        model = MLP(in_features=1024, num_blocks=2, hidden=30).eval()
    for layer in noise_layers(model).values():
        layer.set_kept(torch.rand(layer.num_structures) < 0.4)
    kept = [layer.kept for layer in noise_layers(model).values()]
    images = torch.randn(3, 1, 32, 32)
    small = narrowed(model, kept)
    torch.testing.assert_close(small(images), model(images), atol=1e-5, rtol=1e-4)
    assert num_parameters(small) == num_parameters(bmrs.compact(model, images))


def test_rank_correlation():
    values = torch.tensor([1.0, 5.0, 5.0, 9.0])
    assert scores.spearman(values, values.exp()) == pytest.approx(1.0)
    assert scores.spearman(values, -values) == pytest.approx(-1.0)
    assert scores.spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.0])) == pytest.approx(0.5)


def test_the_authors_formula_loses_structures_far_inside():
    sigma = math.exp(-5)
    mu = torch.tensor([-5 * sigma, -20 * sigma])
    good, lost = snr_as_computed(mu, torch.full((2,), -5.0)).tolist()
    assert good == pytest.approx(148.4, rel=0.05)
    assert math.isnan(lost)
    assert torch.all(bmrs.SNR().scores(mu, torch.full((2,), -5.0), lower=-20, upper=0, backend="auto") > 100)


def test_the_knee_is_where_the_curve_bends():
    points = [[0, 0.0, 96.0], [1, 30.0, 95.5], [2, 60.0, 95.0], [3, 80.0, 20.0], [4, 100.0, 10.0]]
    assert table.knee(points) == 60.0


def test_committed_networks_are_whole_and_agree_with_their_scores():
    groups = table.judged(RESULTS)
    assert groups, "rows are committed"
    for group, rows in groups.items():
        assert len({row["seed"] for row in rows}) == len(rows), group
        for row in rows:
            each = table.structures_of(row)
            for rule in scores.RULES:
                _, compression_there, *_ = row["criteria"][rule]["stop"]
                decided = int(scores.RULES[rule].decide(_signed(rule, each)).sum())
                pruned = row["criteria"][rule]["stop"][0]
                assert decided - len(row["layers"]) <= pruned <= decided + 1, (group, row["seed"], rule)
                assert (compression_there > 0) == (pruned > 0)


def _signed(rule, each):
    worth = each.worth(rule)
    return -worth if scores.RULES[rule].prunes_high_scores else worth
