import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import bmrs
from bmrs.noise.lookup import noise_layers
from bmrs.pruning.learner import PosteriorLearner

NUM_INPUTS, NUM_HIDDEN, USEFUL = 8, 24, 6


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, NUM_INPUTS, generator=generator)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def trained(data) -> nn.Sequential:
    """A network of which the last hidden units contribute nothing, trained so that the others do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    with torch.no_grad():
        model[2].weight[:, USEFUL:] = 0
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
        model[2].weight.grad[:, USEFUL:] = 0
        optimizer.step()
    return model


@pytest.fixture
def noisy(trained) -> nn.Sequential:
    return bmrs.add_noise(copy.deepcopy(trained), where="0")


def loader(data: TensorDataset, seed: int = 0) -> DataLoader:
    return DataLoader(data, batch_size=100, shuffle=True, generator=torch.Generator().manual_seed(seed))


def test_useless_structures_are_off_and_useful_ones_stay(noisy, trained, data):
    torch.manual_seed(0)
    reports = []
    report = bmrs.learn_posteriors(noisy, loader(data), loss, temperature=1.0, on_check=reports.append)
    assert report.settled
    assert report.emptied == ()
    assert report is reports[-1]
    assert not any(each.settled for each in reports[:-1])
    assert [each.steps for each in reports] == list(range(50, report.steps + 1, 50))
    bmrs.prune(noisy, bmrs.BMRSOdds())
    kept = noisy[0].noise.mask
    assert not kept[USEFUL:].any()
    assert 2 <= kept[:USEFUL].sum() <= USEFUL
    x, y = data.tensors
    compacted = bmrs.compact(noisy, x, refit_to=trained)
    accuracy = [(model(x).argmax(1) == y).double().mean() for model in (trained, compacted)]
    assert accuracy[0] > 0.95
    assert accuracy[1] > accuracy[0] - 0.02


def test_weights_modes_and_flags_are_left_alone(noisy, data):
    noisy[2].bias.requires_grad_(False)
    noisy.eval()
    before = {name: tensor.clone() for name, tensor in noisy.state_dict().items()}
    bmrs.learn_posteriors(noisy, loader(data), loss, max_distance=2.0)
    changed = {name for name, tensor in noisy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.noise.mu", "0.noise.log_sigma"}
    assert not any(module.training for module in noisy.modules())
    assert [name for name, p in noisy.named_parameters() if not p.requires_grad] == ["2.bias"]


def test_modes_and_flags_come_back_after_an_error(noisy, data):
    def fails(model: nn.Module, batch: object) -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bmrs.learn_posteriors(noisy, loader(data), fails)
    assert all(parameter.requires_grad for parameter in noisy.parameters())
    assert all(module.training for module in noisy.modules())


def test_the_deployed_network_is_judged(data):
    """Batch norms use, and keep, their statistics; dropout does nothing."""
    model = nn.Sequential(nn.Linear(NUM_INPUTS, 6), nn.BatchNorm1d(6), nn.Dropout(0.9), nn.Linear(6, 2))
    bmrs.add_noise(model, where="1")
    seen = []

    def watching(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen.append([module.training for module in model])
        return loss(model, batch)

    bmrs.learn_posteriors(model, loader(data), watching, max_distance=1.0)
    assert seen[0] == [False] * 4
    assert int(model[1].num_batches_tracked) == 0


def test_weights_are_trained_on_request(noisy, data):
    before = noisy[2].weight.clone()
    noisy[0].weight.requires_grad_(False)
    frozen = noisy[0].weight.clone()
    bmrs.learn_posteriors(noisy, loader(data), loss, weight_lr=1e-3, max_distance=2.0)
    assert not torch.equal(noisy[2].weight, before)
    assert torch.equal(noisy[0].weight, frozen)
    assert noisy.training


def test_the_higher_the_temperature_the_more_goes(trained, data):
    kept = []
    for temperature in (0.3, 3.0, 20.0):
        torch.manual_seed(0)
        model = bmrs.add_noise(copy.deepcopy(trained), where="0")
        bmrs.learn_posteriors(model, loader(data), loss, temperature=temperature)
        kept.append(int((~bmrs.BMRSOdds()(model[0].noise).prune).sum()))
    assert kept[0] >= kept[1] >= kept[2]
    assert kept[0] > kept[2]


def test_prices_make_some_structures_cheaper_to_lose(data):
    """Two hidden layers of equal use; the one with the higher price ends with fewer structures."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        *(nn.Linear(NUM_INPUTS, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    )
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss(dense, data.tensors).backward()
        optimizer.step()
    kept = {}
    for first, second in ((10.0, 0.1), (0.1, 10.0)):
        torch.manual_seed(0)
        model = bmrs.add_noise(copy.deepcopy(dense), where=lambda name, _: name in ("0", "2"))
        prices = {"0.noise": first, "2.noise": second}
        kept[first] = bmrs.learn_posteriors(model, loader(data), loss, temperature=1.0, prices=prices).kept
    assert kept[10.0]["0.noise"] < kept[0.1]["0.noise"]
    assert kept[10.0]["2.noise"] > kept[0.1]["2.noise"]
    with pytest.raises(ValueError, match="prices must name the model's noise layers"):
        bmrs.learn_posteriors(model, loader(data), loss, prices={"0": 1.0})
    with pytest.raises(ValueError, match=r"prices\['2.noise'\] must be finite and at least 0, got -1"):
        bmrs.learn_posteriors(model, loader(data), loss, prices={"0.noise": 1.0, "2.noise": -1.0})
    numbers = {name: np.float32(price) for name, price in prices.items()}
    bmrs.learn_posteriors(model, loader(data), loss, prices=numbers, max_distance=0.1)


def test_sharper_posteriors_have_farther_to_go_before_they_count_as_settled(trained, data):
    model = bmrs.add_noise(copy.deepcopy(trained), where="0", initial_log_sigma=-15.0)
    report = bmrs.learn_posteriors(model, loader(data), loss)
    assert report.settled
    assert report.distance >= 20
    assert report.kept["0.noise"] <= USEFUL


def test_the_criterion_that_will_decide_is_watched(trained, data):
    model = bmrs.add_noise(copy.deepcopy(trained), where="0")
    rule = bmrs.SNR(threshold=1e9)
    report = bmrs.learn_posteriors(model, loader(data), loss, criterion=rule, max_distance=5.0)
    assert report.emptied == ("0.noise",)


def test_a_sampler_of_a_part_needs_the_number_of_examples(noisy, data):
    part = DataLoader(data, batch_size=50, sampler=torch.utils.data.SubsetRandomSampler(range(400)))
    with pytest.raises(ValueError, match="draws 400 of the 1000 examples of its dataset"):
        bmrs.learn_posteriors(noisy, part, loss)
    bmrs.learn_posteriors(noisy, part, loss, dataset_size=400, max_distance=1.0)
    batches = torch.utils.data.BatchSampler(part.sampler, 50, drop_last=False)
    with pytest.raises(ValueError, match="draws 400 of the 1000 examples of its dataset"):
        bmrs.learn_posteriors(noisy, DataLoader(data, batch_sampler=batches), loss)


def test_an_iterable_data_set_with_a_length_says_how_many_examples_there_are(noisy, data):
    class Streamed(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data)

        def __len__(self):
            return len(data)

    report = bmrs.learn_posteriors(noisy, DataLoader(Streamed(), batch_size=500), loss, max_distance=0.1)
    assert report.steps == 2


@pytest.mark.parametrize(("mode", "layer"), [("eval", "0.noise"), ("train", "")])
def test_a_loss_that_changes_modes_is_refused(noisy, data, mode, layer):
    def changing(model, batch):
        getattr(model, mode)()
        return loss(model, batch)

    place = f"layer {layer!r}" if layer else "the model"
    with pytest.raises(ValueError, match=rf"loss put {place} into \w+ mode, as by {mode}\(\)"):
        bmrs.learn_posteriors(noisy, loader(data), changing)


def test_modes_that_a_model_sets_itself_are_its_own_affair(data):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(NUM_INPUTS, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)
            self.teacher = nn.Linear(NUM_INPUTS, 2)

        def forward(self, x):
            self.norm.eval()
            self.teacher.train()
            return self.last(self.norm(torch.relu(self.first(x)))) + self.teacher(x)

    model = bmrs.add_noise(Own(), where="first")
    for weight_lr in (None, 1e-3):
        bmrs.learn_posteriors(model, loader(data), loss, max_distance=0.1, weight_lr=weight_lr)


def test_hooks_that_step_an_optimizer_in_backward_are_refused(noisy, data):
    def step(parameter):
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(step) for parameter in noisy.parameters()]
    with pytest.raises(
        ValueError, match=r"noise layer '0\.noise' has no gradient after backward, as where hooks"
    ):
        bmrs.learn_posteriors(noisy, loader(data), loss)
    for handle in handles:
        handle.remove()
    bmrs.learn_posteriors(noisy, loader(data), loss, max_distance=0.1)


def test_an_interval_above_the_border_of_odds_is_judged_by_the_ratio(trained, data):
    model = bmrs.add_noise(copy.deepcopy(trained), where="0", lower=-4.0)
    report = bmrs.learn_posteriors(model, loader(data), loss, max_distance=5.0)
    assert report.kept["0.noise"] == int((~bmrs.SNR()(model[0].noise).prune).sum())


def test_a_collapse_is_reported(noisy, data):
    report = bmrs.learn_posteriors(noisy, loader(data), loss, temperature=1e4)
    assert report.emptied == ("0.noise",)
    assert "at this temperature nothing is left of '0.noise'" in str(report)
    assert "lower it" in str(report)


def test_a_run_that_is_cut_off_says_so(noisy, data):
    report = bmrs.learn_posteriors(noisy, loader(data), loss, max_distance=7.5)
    assert not report.settled
    assert report.steps == 150
    assert report.distance == pytest.approx(7.5)
    assert "still move after 150 steps at temperature 1" in str(report)
    assert "train them longer" in str(report)


def test_unsettled_is_the_share_between_a_lax_and_a_strict_rule(noisy):
    assert bmrs.unsettled(noisy) == 0  # nothing has left yet
    layer = noisy[0].noise
    with torch.no_grad():
        layer.mu[:3], layer.log_sigma[:3] = -1.0, 1.5
    lax, strict = bmrs.SNR(threshold=1.0), bmrs.BMRSNormal(tolerance=0.5 * math.log(2 * math.pi))
    assert (lax(layer).prune != strict(layer).prune).tolist()[:4] == [True, True, True, False]
    assert bmrs.unsettled(noisy) == 3 / NUM_HIDDEN
    layer.mask[0] = False
    assert bmrs.unsettled(noisy) == 2 / (NUM_HIDDEN - 1)


def test_a_learner_steps_as_the_function_does(trained, data):
    """A loop of one's own around `PosteriorLearner` gives bitwise the same posteriors."""
    batches = [tuple(tensor[i : i + 100] for tensor in data.tensors) for i in range(0, 1000, 100)]
    models = [bmrs.add_noise(copy.deepcopy(trained), where="0") for _ in range(2)]
    torch.manual_seed(0)
    bmrs.learn_posteriors(models[0], batches, loss, dataset_size=1000, max_distance=1.0)
    torch.manual_seed(0)
    with PosteriorLearner(models[1], temperature=1.0, dataset_size=1000) as learner:
        for batch in batches * 2:
            learner.step(loss(models[1], batch))
    first, second = (noise_layers(model)["0.noise"] for model in models)
    assert torch.equal(first.mu, second.mu)
    assert torch.equal(first.log_sigma, second.log_sigma)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be finite and greater than 0, got 0.0"),
        ({"temperature": "high"}, TypeError, "temperature must be a number, got 'high'"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate must be finite"),
        ({"weight_lr": -1.0}, ValueError, "weight_lr must be finite and greater than 0"),
        ({"max_distance": math.nan}, ValueError, "max_distance must be finite"),
        ({"dataset_size": 0}, ValueError, "dataset_size must be finite and greater than 0"),
    ],
)
def test_bad_options_are_named(noisy, data, options, error, message):
    with pytest.raises(error, match=message):
        bmrs.learn_posteriors(noisy, loader(data), loss, **options)


def test_bad_batches_and_losses_are_named(noisy, trained, data):
    batch = tuple(tensor[:10] for tensor in data.tensors)
    with pytest.raises(ValueError, match="dataset_size is missing: list has no dataset"):
        bmrs.learn_posteriors(noisy, [batch], loss)
    with pytest.raises(ValueError, match=r"batches gave nothing$"):
        bmrs.learn_posteriors(noisy, [], loss, dataset_size=10)
    with pytest.raises(ValueError, match="batches gave nothing when gone through again: pass a DataLoader"):
        bmrs.learn_posteriors(noisy, iter([batch]), loss, dataset_size=10)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 50"):
        bmrs.learn_posteriors(noisy, loader(data), lambda m, b: loss(m, b) * math.nan)
    with pytest.raises(ValueError, match="has no noise layer"):
        bmrs.learn_posteriors(trained, loader(data), loss)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda model, batch: loss(model, batch).detach(), ValueError, "loss does not depend on the noise"),
        (
            lambda model, batch: loss(model, batch).item(),
            TypeError,
            r"loss must return a tensor .*, got 0\.\d+",
        ),
        (lambda model, batch: [loss(model, batch).item()], TypeError, "loss must return a tensor"),
        (
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
            ValueError,
            r"loss must be one number, the mean over the batch, got shape \(100,\)",
        ),
        (
            lambda model, batch: torch.zeros((), requires_grad=True) + 1,
            ValueError,
            "does not depend on the noise",
        ),
    ],
)
def test_a_loss_that_nothing_can_be_learned_from_is_named(noisy, data, wrong, error, message):
    with pytest.raises(error, match=message):
        bmrs.learn_posteriors(noisy, loader(data), wrong)


def test_another_models_loss_is_noticed(noisy, trained, data):
    other = copy.deepcopy(trained)
    with pytest.raises(ValueError, match="compute it from the model that it is called with"):
        bmrs.learn_posteriors(noisy, loader(data), lambda _, batch: loss(other, batch))
    with torch.no_grad(), pytest.raises(ValueError, match=r"without detach, item or torch\.no_grad"):
        bmrs.learn_posteriors(noisy, loader(data), loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_hides_the_noise_from_nobody(noisy, data, reentrant):
    def checkpointed(model, batch):
        images = batch[0].clone().requires_grad_()
        return F.cross_entropy(checkpoint(model, images, use_reentrant=reentrant), batch[1])

    report = bmrs.learn_posteriors(noisy, loader(data), checkpointed, max_distance=0.5)
    assert report.steps > 0


def test_one_summand_that_depends_on_the_noise_is_enough(noisy, data):
    def penalised(model, batch):
        yield 1e-4 * model[2].weight.pow(2).sum()
        yield loss(model, batch)

    batch = data.tensors
    with PosteriorLearner(noisy, temperature=1.0, dataset_size=1000, weight_lr=1e-3) as learner:
        assert learner.step(penalised(noisy, batch)) > 0

    def penalty_alone(model, batch):
        yield 1e-4 * model[2].weight.pow(2).sum()

    before = noisy[0].noise.mu.detach().clone()
    with PosteriorLearner(noisy, temperature=1.0, dataset_size=1000, weight_lr=1e-3) as learner:
        with pytest.raises(ValueError, match="does not depend on the noise"):
            learner.step(penalty_alone(noisy, batch))
        with pytest.raises(TypeError, match=r"loss must be a tensor .*, got 1\.0"):
            learner.step([1.0])
    assert torch.equal(noisy[0].noise.mu, before)
