"""The comparison of trainings: that both kinds see the same, and that a NaN or an infinity is found where it arises."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import bmrs
from benchmarks.__main__ import main
from benchmarks.experiments import finite_training
from benchmarks.experiments.finite_training import FiniteRun, FiniteSettings, train
from benchmarks.rivals import plain_layer
from benchmarks.rivals.plain_layer import PlainNoiseLayer, use_plain_formulas
from bmrs.noise.lookup import noise_layers

SHAPES = {(64, 5): 1, (3, 5, 4, 6): 1, (3, 4, 6, 5): -1}
QUICK = ("--steps", "2", "--models", "mlp", "--seeds", "1", "--jobs", "1")


def small_network() -> nn.Sequential:
    """Return a network for inputs of shape (N, 6) whose posteriors lie where the plain formulas are good."""
    torch.manual_seed(0)
    network = bmrs.models.MLP(in_features=6, num_blocks=1, hidden=5, num_classes=3)
    for number, layer in enumerate(noise_layers(network).values()):
        nn.init.normal_(layer.mu, -2.0 - number, 0.1)
        nn.init.normal_(layer.log_sigma, -1.0, 0.1)
    return network


def examples(steps: int):
    """Yield the batches of so many steps."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def plain_divergence(model: nn.Module) -> torch.Tensor:
    return plain_layer.kl_divergence(model, weight="elbo", dataset_size=100)


def no_divergence(model: nn.Module) -> torch.Tensor:
    return torch.zeros(())


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare to 1e-4 of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("granularity", ["element", "sample", "batch"])
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_plain_layer_is_the_noise_layer_where_its_formulas_are_good(shape, granularity, activation):
    layer = bmrs.NoiseLayer(
        5,
        dim=SHAPES[shape],
        granularity=granularity,
        activation=activation,
        initial_mu=-2.0,
        initial_log_sigma=-1.0,
    )
    torch.manual_seed(2)
    x, upstream = torch.randn(shape), torch.randn(shape)
    results = []
    for each in (layer, PlainNoiseLayer(layer)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        output = each(leaf)
        (output * upstream).sum().backward()
        results.append((output.detach(), leaf.grad, each.mu.grad, each.log_sigma.grad))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("weight", ["elbo", "mean"])
def test_plain_kl_is_weighted_as_the_library_weights_it(weight):
    model = small_network()
    model.append(bmrs.NoiseLayer(3, initial_mu=-4.0, initial_log_sigma=-0.5))  # layers of different widths
    divergence = bmrs.kl_divergence(model, weight=weight, dataset_size=7)
    divergence.backward()
    expected = [(layer.mu.grad, layer.log_sigma.grad) for layer in noise_layers(model).values()]
    plain_model = use_plain_formulas(model)
    plain_divergence = plain_layer.kl_divergence(plain_model, weight=weight, dataset_size=7)
    plain_divergence.backward()
    actual = [
        (layer.mu.grad, layer.log_sigma.grad)
        for layer in plain_model.modules()
        if isinstance(layer, PlainNoiseLayer)
    ]
    assert_close(plain_divergence.detach(), divergence.detach())
    for layer_actual, layer_expected in zip(actual, expected, strict=True):
        assert_close(layer_actual[0], layer_expected[0])
        assert_close(layer_actual[1], layer_expected[1])


def test_plain_network_replaces_every_layer_and_keeps_names_and_values():
    model = small_network()
    before = {name: values.detach().clone() for name, values in model.named_parameters()}
    after = dict(use_plain_formulas(model).named_parameters())
    assert not noise_layers(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], values) for name, values in before.items())


@pytest.mark.parametrize("kl_weight", ["elbo", "mean"])
@pytest.mark.parametrize("model", ["mlp", "lenet5"])
def test_both_kinds_of_a_run_start_alike(model, kl_weight):
    settings = FiniteSettings(steps=1, dataset_size=4800, granularity="sample")
    project, plain = (
        finite_training.train_run(FiniteRun(model, kl_weight, 1e-3, 0, formulas), settings)
        for formulas in ("project", "plain")
    )
    assert project.finite
    assert plain.finite
    # Other weights, batches or uniforms would show in the second digit.
    assert plain.final_loss == pytest.approx(project.final_loss, rel=1e-5)


def test_infinite_loss_is_found_where_it_arises():
    model = use_plain_formulas(small_network())
    with torch.no_grad():
        model.hidden1_tanh.mu[3] = 5.0
    outcome = train(model, plain_divergence, examples(3), 1e-3)
    assert (outcome.non_finite_step, outcome.place) == (1, "loss (KL divergence)")
    assert outcome.final_loss is None
    assert outcome.largest_excess == pytest.approx(5.0 / model.hidden1_tanh.log_sigma[3].exp().item())


def test_step_of_the_first_nan_is_counted_from_one():
    def spoil_third(steps):
        for step, (inputs, labels) in enumerate(steps, start=1):
            yield (inputs * torch.nan if step == 3 else inputs), labels

    outcome = train(small_network(), no_divergence, spoil_third(examples(5)), 1e-3)
    assert (outcome.non_finite_step, outcome.place) == (3, "loss (cross-entropy)")


def test_infinite_gradient_is_found_behind_a_finite_loss():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.weight.sqrt()

    model = nn.Sequential(nn.Linear(6, 3), Root())
    outcome = train(model, no_divergence, examples(2), 1e-3)
    assert (outcome.non_finite_step, outcome.place) == (1, "gradient of 1.weight")


def test_infinite_parameter_is_found_at_the_step_that_made_it():
    class Brink(nn.Module):
        """Has a finite output whatever its weights, which are one large step from overflow on either side."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3.4e38, -3.4e38]))

        def forward(self, x):
            return x * (1.0 + (self.weight - self.weight.detach()).sum())

    outcome = train(Brink(), no_divergence, examples(2), 1e37)
    assert (outcome.non_finite_step, outcome.place) == (1, "parameter weight")


def test_final_loss_is_the_mean_of_the_last_steps(monkeypatch):
    monkeypatch.setattr(finite_training, "FINAL_STEPS", 2)
    terms = iter([100.0, 100.0, 10.0, 30.0])
    # The data loss of an untrained network is near log 3.
    outcome = train(small_network(), lambda model: torch.tensor(next(terms)), examples(4), 1e-3)
    assert outcome.finite
    assert outcome.place is None
    assert outcome.final_loss == pytest.approx(20.0 + 1.1, abs=0.5)
    assert outcome.largest_excess < 0.0


def test_command_writes_its_table_and_every_run(tmp_path, capsys):
    folder = tmp_path / "results"
    assert main(["finite-training", *QUICK, "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    markdown = (folder / "finite_training.md").read_text("utf-8")
    assert markdown in printed
    for kl_weight in ("elbo", "mean"):
        for learning_rate in ("0.001", "0.01"):
            assert f"| mlp | {kl_weight} | {learning_rate} | 1 of 1 |" in markdown
    assert "| steps | 2 |" in markdown
    assert "| dtype | float32 |" in markdown
    data = json.loads((folder / "finite_training.json").read_text("utf-8"))
    assert data["conditions"]["batch size"] == finite_training.BATCH_SIZE
    keys = {(run["kl_weight"], run["learning_rate"], run["formulas"]) for run in data["runs"]}
    assert len(data["runs"]) == len(keys) == 8
    assert all(run["finite"] and run["final_loss"] > 0 for run in data["runs"])


def test_exit_code_is_1_if_a_run_of_the_project_is_not_finite(monkeypatch, tmp_path, capsys):
    original = bmrs.kl_divergence
    calls = 0

    def broken(model, **options):
        nonlocal calls
        calls += 1
        return original(model, **options) * (torch.nan if calls == 2 else 1.0)

    monkeypatch.setattr(bmrs, "kl_divergence", broken)
    assert main(["finite-training", *QUICK, "--output", str(tmp_path)]) == 1
    assert "- mlp, elbo, 0.001, seed 0: step 2, loss (KL divergence)" in capsys.readouterr().out
    runs = json.loads((tmp_path / "finite_training.json").read_text("utf-8"))["runs"]
    failed = [run for run in runs if not run["finite"]]
    assert [(run["formulas"], run["non_finite_step"]) for run in failed] == [("project", 2)]


def test_exit_code_is_0_if_only_the_plain_formulas_fail(monkeypatch, capsys):
    monkeypatch.setattr(plain_layer, "kl_divergence", lambda model, **options: torch.tensor(torch.inf))
    assert main(["finite-training", *QUICK, "--kl-weights", "elbo"]) == 0
    printed = capsys.readouterr().out
    assert "| mlp | elbo | 0.001 | 1 of 1 |" in printed
    assert "| 0 of 1 | – | 0.0 | 1 | loss (KL divergence) |" in printed


@pytest.mark.parametrize(
    "option", ["--models=resnet", "--kl-weights=sum", "--steps=0", "--granularity=pixel"]
)
def test_bad_options_are_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["finite-training", option])
    assert option.partition("=")[0] in capsys.readouterr().err


@pytest.mark.slow
def test_project_stays_finite_where_the_plain_formulas_do_not():
    # Weighted as on all of Fashion-MNIST, which is where the plain formulas fail soonest: on this seed at step 12, so
    # that another processor's rounding has little time to lead elsewhere.
    runs = [FiniteRun("mlp", "elbo", 1e-2, 0, formulas) for formulas in ("project", "plain")]
    settings = FiniteSettings(steps=60, dataset_size=48_000)
    project, plain = finite_training.train_all(runs, settings, jobs=2)
    assert project.finite
    assert not plain.finite
    # Their trajectories are the same up to there: it got past the point where the plain formulas broke.
    assert project.largest_excess > 0.99 * plain.largest_excess
