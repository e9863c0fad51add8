"""Operations are counted whatever kernel torch takes for them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bmrs.compaction.flop_count import forward_flops


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, queries, keys, values):
        return F.scaled_dot_product_attention(queries, keys, values, **self.options)


@pytest.mark.parametrize("width", [4, 3])  # of values: as wide as keys, torch fuses attention on a CPU
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention(width, key_heads):
    inputs = torch.randn(2, 4, 5, 4), torch.randn(2, key_heads, 7, 4), torch.randn(2, key_heads, 7, width)
    counted = forward_flops(Attention(enable_gqa=key_heads < 4), (inputs, {}))
    assert counted == 2 * (2 * 4) * (5 * 7) * (4 + width)


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (nn.LSTM(4, 8), 4 * 8 * (4 + 8)),
        (nn.LSTM(4, 8, num_layers=2, bidirectional=True), 2 * 4 * 8 * (4 + 8) + 2 * 4 * 8 * (16 + 8)),
        (nn.LSTM(4, 8, batch_first=True), 4 * 8 * (4 + 8)),
        (nn.GRU(4, 8), 3 * 8 * (4 + 8)),
    ],
)
def test_recurrent_layers(layer, weights):
    assert forward_flops(layer, ((torch.randn(5, 3, 4),), {})) == 2 * (5 * 3) * weights
