"""Single heads of attention in which several queries share a key: as many may leave of every group."""

import pytest
import torch
from compaction_cases import assert_compacts, layer_report
from torch import nn
from torch.nn import functional as F

import bmrs
from bmrs.noise.lookup import noise_layers

SIZE, WIDTH = 4, 12


class Attention(nn.Module):
    """With keys that are brought to their queries in one of the usual ways."""

    def __init__(self, heads, groups, way):
        super().__init__()
        self.way, self.num_key_value_groups = way, heads // groups
        self.q_proj = nn.Linear(WIDTH, heads * SIZE)
        self.k_proj = nn.Linear(WIDTH, groups * SIZE)
        self.v_proj = nn.Linear(WIDTH, groups * SIZE)
        self.o_proj = nn.Linear(heads * SIZE, WIDTH)

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(2, (-1, SIZE)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.way == "expand":
            batch, groups, length, size = k.shape
            shape = batch, groups, self.num_key_value_groups, length, size
            k, v = (t[:, :, None].expand(shape).reshape(batch, -1, length, size) for t in (k, v))
        if self.way == "interleave":
            k, v = (t.repeat_interleave(self.num_key_value_groups, dim=1) for t in (k, v))
        result = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.way == "enable_gqa")
        return self.o_proj(result.transpose(1, 2).flatten(2))


def masked(heads, groups, way, pruned):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(heads, groups, way), nn.Linear(WIDTH, 3))
    bmrs.add_noise(model, where="0.o_proj", structures="heads", num_heads=heads)
    (layer,) = noise_layers(model).values()
    nn.init.uniform_(layer.mu, -3.0, 0.0)
    layer.set_kept(torch.tensor([head not in pruned for head in range(heads)]))
    return model.double().eval()


X = torch.linspace(-1.0, 1.0, 2 * 5 * WIDTH, dtype=torch.float64).sin().view(2, 5, WIDTH)
REASON = "as many queries stay in every group"


@pytest.mark.parametrize("way", ["expand", "enable_gqa"])
@pytest.mark.parametrize(
    ("heads", "groups", "pruned", "queries_left", "keys_left"),
    [
        (4, 2, [0, 3], 2, 2),  # one of each group, whichever
        (4, 2, [2, 3], 2, 1),  # a group
        (6, 2, [0, 4, 5], 4, 2),  # of the second one goes, one stays with zero weights
        (8, 2, [0, 1, 2, 3, 6], 3, 1),
        (4, 1, [0, 2], 2, 1),  # all queries share one key
        (4, 2, [1], 4, 2),
    ],
)
def test_as_many_of_every_group_leave(way, heads, groups, pruned, queries_left, keys_left):
    compacted = assert_compacts(masked(heads, groups, way, pruned), X)
    attention = compacted[0]
    assert attention.q_proj.out_features == attention.o_proj.in_features == queries_left * SIZE
    assert attention.k_proj.out_features == attention.v_proj.out_features == keys_left * SIZE
    # Also where this way does not read it.
    assert attention.num_key_value_groups == queries_left // keys_left
    kept = len(pruned) - heads + queries_left
    reasons = layer_report(compacted, "0.o_proj.noise").kept_because
    assert sum(reasons.values()) == kept
    assert all(REASON in reason for reason in reasons)


def test_keys_that_are_copied_leave_with_all_their_queries():
    """`repeat_interleave` is given the number of queries, and which of them stay cannot be told it."""
    whole = assert_compacts(masked(4, 2, "interleave", [2, 3]), X)
    assert whole[0].k_proj.out_features == SIZE
    single = assert_compacts(masked(4, 2, "interleave", [0, 3]), X)
    assert bmrs.compact_report(single).removed == 0


def test_budgets_take_as_many_of_every_group():
    model = masked(6, 2, "expand", [])
    before = bmrs.structure_costs(model, X)
    report = bmrs.prune_to(model, bmrs.BMRSOdds(), example_inputs=X, parameters=0.8)
    (layer,) = noise_layers(model).values()
    assert len(before) == 1
    assert str(report)
    kept = layer.kept.view(2, 3).sum(dim=1)
    assert kept[0] == kept[1] < 3 or 0 in kept
    compacted = bmrs.compact(model, X)
    assert bmrs.compact_report(compacted).removed == int((~layer.kept).sum())


def test_an_expanded_value_that_is_no_key_stays_whole():
    """As a global feature brought to all points, which a network of points puts beside those of each."""

    class Points(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.last = nn.Conv1d(3, 4, 1), nn.Conv1d(8, 2, 1)

        def forward(self, x):
            x = torch.relu(self.own(x))
            everywhere = x.amax(2, keepdim=True).expand(-1, -1, x.shape[2])
            return self.last(torch.cat([x, everywhere], 1)).flatten(1)

    torch.manual_seed(0)
    model = bmrs.add_noise(Points(), where="own")
    model.own.noise.set_kept(torch.tensor([True, False, True, True]))
    compacted = assert_compacts(model.double().eval(), X[:, :3])
    assert compacted.own.out_channels == 3
    assert compacted.last.in_channels == 6
