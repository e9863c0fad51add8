"""Networks whose code makes a plain number of how many examples there are."""

import pytest
import torch
from torch import nn

import bmrs


class Fixed(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.hidden = nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.cat([self.token.expand(self.number(x), -1, -1), x], dim=1)
        return self.out(self.hidden(x).relu())


def compacted(number):
    model = Fixed(number)
    bmrs.add_noise(model, where="hidden")
    model.hidden.noise.set_kept(torch.tensor([True, False] * 3))
    return bmrs.compact(model, torch.randn(3, 5, 4))


def test_saving_says_that_the_number_of_examples_is_fixed_and_why(tmp_path):
    network, path = compacted(len), tmp_path / "network.safetensors"
    with pytest.warns(
        UserWarning, match=r"takes 2 along the first dimension .* the code of Fixed, .*len\(x\)"
    ):
        bmrs.save(path, network)
    images = torch.randn(7, 5, 4)
    with pytest.raises(ValueError, match="must be 2"):
        bmrs.load(path)(images)
    own = bmrs.load(path, model=Fixed(len))
    torch.testing.assert_close(own(images), network.eval()(images))


def test_a_free_number_needs_no_warning(tmp_path):
    network, path = compacted(lambda x: x.shape[0]), tmp_path / "network.safetensors"
    bmrs.save(path, network)
    images = torch.randn(7, 5, 4)
    torch.testing.assert_close(bmrs.load(path)(images), network.eval()(images))
