"""Noise of several processes that have seeded torch alike."""

import pytest
import torch
from several_processes import run_together

import bmrs


def noise_of_rank(rank, world, same, folder):
    if world > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(5)
    layer = bmrs.NoiseLayer(300, initial_log_sigma=0.0, same_on_all_ranks=same, backend="torch")
    torch.save([layer(torch.ones(8, 300)).detach() for _ in range(2)], f"{folder}/{same}-{rank}")
    if world > 1:
        torch.distributed.destroy_process_group()


def noise(world, same, folder):
    run_together(noise_of_rank, world, same, str(folder), world=world)
    return [torch.load(f"{folder}/{same}-{rank}") for rank in range(world)]


@pytest.mark.slow
def test_ranks_draw_independently_unless_asked_not_to(tmp_path):
    ((first, second),) = noise(1, False, tmp_path)
    single = torch.cat([first, second])
    of_rank_0, of_rank_1 = (torch.cat(parts) for parts in noise(2, False, tmp_path))
    assert torch.equal(of_rank_0, single)
    correlation = torch.corrcoef(torch.stack([of_rank_0.flatten(), of_rank_1.flatten()]))[0, 1]
    assert correlation.abs() < 0.1
    assert not torch.equal(of_rank_1[:8], of_rank_1[8:])

    same_0, same_1 = (torch.cat(parts) for parts in noise(2, True, tmp_path))
    assert torch.equal(same_0, single)
    assert torch.equal(same_1, single)


def test_the_choice_is_shown():
    assert "same_on_all_ranks=True" in repr(bmrs.NoiseLayer(3, same_on_all_ranks=True))
    assert "same_on_all_ranks" not in repr(bmrs.NoiseLayer(3))
    model = bmrs.add_noise(torch.nn.Linear(2, 3), where="", same_on_all_ranks=True)
    assert model.noise.same_on_all_ranks
