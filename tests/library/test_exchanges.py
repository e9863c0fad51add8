"""What several processes average and agree on, and posteriors that they learn together."""

import copy
from types import SimpleNamespace

import pytest
import torch
from several_processes import run_together
from torch import distributed, nn

import bmrs
from bmrs import processes
from bmrs.training import NonFiniteError, RunError
from bmrs.training.finite import FiniteWatch
from bmrs.training.sharing import check_same_state
from bmrs.training.torchrun import is_one_of_several, other_launcher

WORLD = 3
INPUTS = torch.linspace(-1, 1, 7 * 4).view(7, 4).sin()


def check_all(rank):
    distributed.init_process_group("gloo")
    for check in (
        check_parts_and_gradients,
        check_gradients_of_some,
        check_agreement,
        check_places_of_nan,
        check_batch_norms,
        check_posteriors,
        check_posteriors_of_different_models,
        check_one_infinite_loss,
    ):
        check(rank)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_exchange_what_they_should():
    run_together(check_all, world=WORLD)


def check_parts_and_gradients(rank):
    """Uneven parts, and batches that are smaller than the number of processes."""
    for size in (1, 2, 3, 7):
        model, alone = network(), network()
        batch = torch.arange(size)
        own, weight = processes.part_of(batch)
        loss = model(INPUTS[own]).square().mean()
        (loss * weight + model.weight.square().sum()).backward()  # a term that each process has, as the KL
        processes.average_gradients(model.parameters())
        expected = alone(INPUTS[batch]).square().mean()
        (expected + alone.weight.square().sum()).backward()
        torch.testing.assert_close(model.weight.grad, alone.weight.grad)
        torch.testing.assert_close(model.bias.grad, alone.bias.grad)
        torch.testing.assert_close(processes.average(loss.detach() * weight), expected.detach())
        assert processes.same_on_all([model.weight.grad, model.bias.grad])


def check_gradients_of_some(rank):
    everywhere, of_one, of_none, frozen = (nn.Parameter(torch.zeros(2, 2)) for _ in range(4))
    frozen.requires_grad_(False)
    everywhere.grad = torch.full((2, 2), float(rank)).t()
    frozen.grad = torch.full((2, 2), float(rank))
    if rank == 1:
        of_one.grad = torch.full((2, 2), 6.0)
    double = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    double.grad = torch.tensor([rank + 1e-12], dtype=torch.float64)
    processes.average_gradients([everywhere, of_one, of_none, frozen, double])
    assert torch.equal(everywhere.grad, torch.ones(2, 2))
    assert torch.equal(of_one.grad, torch.full((2, 2), 2.0))
    assert of_none.grad is None
    assert torch.equal(frozen.grad, torch.full((2, 2), float(rank)))
    torch.testing.assert_close(
        double.grad, torch.tensor([1 + 1e-12], dtype=torch.float64), rtol=0, atol=1e-14
    )


def check_agreement(rank):
    assert (processes.count(), processes.rank(), processes.is_first()) == (WORLD, rank, rank == 0)
    assert processes.of_first(lambda: {"rank": processes.rank()}) == {"rank": 0}
    assert processes.any_of(torch.arange(WORLD) == rank).all()
    assert not processes.any_of(torch.zeros(2, dtype=torch.bool)).any()
    mask = torch.tensor([True, False])
    assert processes.same_on_all([mask, torch.tensor(float("nan")), torch.ones(2, dtype=torch.bfloat16)])
    mask[1] = rank == 1
    assert not processes.same_on_all([mask])
    assert not processes.same_on_all([torch.zeros(2) if rank else torch.zeros(2).double()])
    state = SimpleNamespace(model=network(), history=[{}])
    check_same_state(state, "noisy")
    state.model.weight.data[0, 0] += 1e-7 * (rank == 2)
    with pytest.raises(RunError, match="after epoch 1 of network 'noisy' the 3 processes hold"):
        check_same_state(state, "noisy")


def check_places_of_nan(rank):
    """One process alone meets a NaN; all of them say the same."""
    model = network()
    watch = FiniteWatch(model)
    with watch:
        for step in (1, 2):
            loss = model(INPUTS * (float("nan") if (rank, step) == (1, 2) else 1.0)).sum()
            watch.record(watch.probes(loss))
    with pytest.raises(NonFiniteError, match=r"at epoch 4, step 2: first seen in the output of layer ''"):
        watch.check(4)


def check_batch_norms(rank):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(
        ValueError, match="layer '1' is a BatchNorm1d, whose statistics would be those of each of the 3"
    ):
        processes.check_statistics(model)
    noisy = bmrs.add_noise(copy.deepcopy(model), where="0")
    processes.check_statistics(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    with pytest.raises(ValueError, match="layer '1' is a BatchNorm1d"):
        bmrs.learn_posteriors(noisy, [0], loss_of, dataset_size=7, weight_lr=1e-3, across_processes=True)


def check_posteriors(rank):
    """All processes with a part of the batch each learn what one learns from the whole of it."""
    whole = INPUTS[:6]
    reports = []
    models = [noisy_network(), noisy_network()]
    options = {"dataset_size": 6, "temperature": 0.5, "max_distance": 3.0}
    parts = [whole[2 * rank : 2 * rank + 2]]
    with pytest.raises(ValueError, match=r"across_processes is missing: torch\.distributed has 3 processes"):
        bmrs.learn_posteriors(models[0], parts, loss_of, **options)
    assert torch.equal(models[0][0].noise.mu, models[1][0].noise.mu)
    for model, batches, together in ((models[0], parts, True), (models[1], [whole], False)):
        reports.append(
            bmrs.learn_posteriors(model, batches, loss_without_draws, across_processes=together, **options)
        )
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(parameter, models[1].get_parameter(name), rtol=1e-4, atol=1e-5)
    assert str(reports[0]) == str(reports[1])
    assert processes.same_on_all(models[0].parameters())
    alone = noisy_network()
    if rank == 0:  # the others do not take part
        bmrs.learn_posteriors(alone, [whole], loss_of, across_processes=False, **options)


def check_posteriors_of_different_models(rank):
    model = noisy_network()
    model[0].noise.mask[0] = rank != 1
    with pytest.raises(
        ValueError, match="the 3 processes hold different parameters or masks: give each the same model"
    ):
        bmrs.learn_posteriors(
            model, [INPUTS], loss_of, dataset_size=7, max_distance=1.0, across_processes=True
        )


def check_one_infinite_loss(rank):
    def loss(model, batch):
        return loss_of(model, batch) + (torch.tensor(float("inf")) if rank == 2 else 0.0)

    with pytest.raises(
        FloatingPointError, match=rf"at step 20 of learning posteriors, on process {rank} of 3"
    ):
        bmrs.learn_posteriors(
            noisy_network(), [INPUTS], loss, dataset_size=7, max_distance=1.0, across_processes=True
        )


def network():
    torch.manual_seed(0)
    return nn.Linear(4, 5)


def noisy_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    return bmrs.add_noise(model, where="0", backend="torch")


def loss_of(model, batch):
    return model(batch).square().mean()


def loss_without_draws(model, batch):
    """Gradients reach μ and log σ by E[θ], which is the same on all processes."""
    layer = model[0].noise.eval()
    try:
        return loss_of(model, batch)
    finally:
        layer.train()


# One process


def test_one_process_exchanges_nothing():
    batch = torch.arange(5)
    own, weight = processes.part_of(batch)
    assert own is batch
    assert weight == 1.0
    assert processes.of_first(lambda: 3) == 3
    values = torch.rand(2)
    assert processes.average(values) is values
    assert processes.same_on_all([values])
    processes.check_statistics(nn.BatchNorm1d(2))


def test_a_world_of_another_launcher_is_not_waited_for(monkeypatch):
    """Slurm jobs and notebooks set such variables, whoever else may be there."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not is_one_of_several()
    assert (
        other_launcher()
        == "WORLD_SIZE is 4, but torchrun did not start this process, so that it trains alone"
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert is_one_of_several()
    assert other_launcher() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_one_of_several()
