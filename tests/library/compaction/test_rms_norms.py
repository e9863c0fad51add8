"""Channels of a residual stream that a normalisation by the root mean square reads: zeros can leave it exactly."""

import pytest
import torch
from torch import nn

import bmrs
from bmrs.noise.lookup import noise_layers


class _ByHand(nn.Module):
    """As the layers of Llama and its like."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-2

    def forward(self, x):
        h = x.to(self.weight.dtype)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(x.dtype)


class _PlusOne(_ByHand):
    """As those of Gemma: no factor on the weight makes up for fewer channels."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


class _Decoder(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.embed, self.head, self.last = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False), norm(8)
        self.norms = nn.ModuleList(norm(8) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(8, 12, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 8, bias=False) for _ in range(2))

    def forward(self, tokens):
        x = self.embed(tokens)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.silu(up(norm(x))))
        return self.head(self.last(x))


class _FixedWidth(_Decoder):
    """With the width of the stream in its code, so that it becomes a graph of operators."""

    def forward(self, tokens):
        x = self.embed(tokens).view(*tokens.shape, 8)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.silu(up(norm(x).view(*tokens.shape, 8))))
        return self.head(self.last(x))


NORMS = {
    "stock": lambda width: nn.RMSNorm(width, eps=1e-2),
    "default": nn.RMSNorm,
    "by hand": _ByHand,
    "plus one": _PlusOne,
}
TOKENS = torch.arange(12).view(3, 4) % 9


def _masked(norm, kind=_Decoder):
    torch.manual_seed(0)
    model = kind(NORMS[norm]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    bmrs.add_noise(model, where=lambda name, _: name == "embed" or name.startswith("down."))
    for layer in noise_layers(model.double()).values():
        layer.set_kept(torch.tensor([True, False, True, True, False, True, True, False]))
    return model


@pytest.mark.parametrize(
    ("norm", "kind", "form"),
    [
        *(("stock", _Decoder, "module"), ("default", _Decoder, "module"), ("by hand", _Decoder, "module")),
        *(("stock", _FixedWidth, "graph"), ("by hand", _FixedWidth, "graph")),
    ],
)
def test_the_stream_becomes_narrower(norm, kind, form, tmp_path):
    model = _masked(norm, kind)
    compacted = bmrs.compact(model, TOKENS)
    report = bmrs.compact_report(compacted)
    assert (report.form, report.removed) == (form, report.pruned)
    expected = model(TOKENS)
    assert (compacted(TOKENS) - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert compacted.get_parameter("up.0.weight").shape == (12, 5)
    bmrs.save(tmp_path / "small", compacted)
    assert torch.equal(bmrs.load(tmp_path / "small")(TOKENS), compacted(TOKENS))
    if form == "module":
        torch.manual_seed(0)
        loaded = bmrs.load(tmp_path / "small", model=kind(NORMS[norm]).double())
        assert torch.equal(loaded(TOKENS), compacted(TOKENS))


def test_what_an_earlier_compaction_changed_is_not_forgotten(tmp_path):
    once = bmrs.add_noise(bmrs.compact(_masked("stock"), TOKENS), where="up.*")
    for layer in noise_layers(once.double()).values():
        layer.set_kept(torch.arange(12) < 7)
    twice = bmrs.compact(once, TOKENS)
    bmrs.save(tmp_path / "small", twice)
    loaded = bmrs.load(tmp_path / "small", model=_Decoder(NORMS["stock"]).double())
    assert loaded.last.eps == twice.last.eps > 1e-2
    torch.testing.assert_close(loaded(TOKENS), twice(TOKENS), rtol=0.0, atol=0.0)


def test_where_the_weight_cannot_make_up_for_it_the_channels_stay():
    model = _masked("plus one")
    compacted = bmrs.compact(model, TOKENS)
    torch.testing.assert_close(compacted(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10)
    assert bmrs.compact_report(compacted).removed == 0


def test_a_weight_that_two_layers_share_keeps_the_channels():
    model = _masked("stock")
    model.norms[1].weight = model.norms[0].weight
    compacted = bmrs.compact(model, TOKENS)
    torch.testing.assert_close(compacted(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10)
    assert bmrs.compact_report(compacted).removed == 0


def test_structures_of_the_stream_are_judged_together():
    report = bmrs.prune(_masked("by hand"), bmrs.BMRSNormal(), example_inputs=TOKENS)
    assert report.tied == (("embed.noise", "down.0.noise", "down.1.noise"),)
