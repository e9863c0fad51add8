"""Channels that are tied, pair by pair."""

import pytest
import torch

from bmrs.graph.channels import STAYS, Ties


@pytest.mark.parametrize("ends", ["chain", "random"])
def test_all_that_ties_connect_has_its_first_channel_as_root(ends):
    generator = torch.Generator().manual_seed(0)
    ties = Ties()
    channels = torch.cat([ties.new(3, 100).flatten(), ties.new(200)])
    order = channels[torch.randperm(500, generator=generator)]
    pairs = torch.stack([order[:-1], order[1:]])
    if ends == "random":
        pairs = order[torch.randint(500, (2, 300), generator=generator)]
    first = list(range(500))
    for part in pairs.split(7, dim=1):
        ties.tie(*part)
        for a, b in part.T.tolist():
            old, new = sorted((first[a], first[b]), reverse=True)
            first = [new if root == old else root for root in first]
        if ends == "random":
            assert ties.roots().tolist() == [*first, STAYS]
    assert ties.roots().tolist() == [*first, STAYS]
    assert len(set(first)) == 1 or ends == "random"


def test_a_channel_that_meets_what_stays_is_named_and_tied_to_nothing_else():
    ties = Ties()
    a, b = ties.new(2), ties.new(2)
    assert ties.tie(a, torch.tensor([STAYS, 3])).tolist() == [0]
    assert ties.roots().tolist() == [0, 1, 2, 1, STAYS]
    assert ties.tie(b[:0], b[:0]).numel() == 0
