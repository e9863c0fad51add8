"""Residual branches of which all structures are pruned: what is left of them is what they add."""

import copy

import pytest
import torch
from torch import nn

import bmrs
from bmrs.compaction.constant_layer import ConstantLayer
from bmrs.compaction.costs import num_parameters
from bmrs.compaction.sizes import CompactedSizes


class _Block(nn.Module):
    """As in a ResNet, with activations in place and a bias that comes through the second normalisation."""

    def __init__(self, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, stride, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, 1, "same"), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(6, 6, 1, stride) if stride > 1 else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.shortcut is None else self.shortcut(x)
        return self.relu(y)


class _Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.into, self.back = (
            nn.LayerNorm(6),
            nn.Linear(6, 12, bias=False),
            nn.Linear(12, 6, bias=False),
        )

    def forward(self, x):
        # Half a unit remains of a pruned one: the sigmoid of 0.
        return x + self.back(torch.sigmoid(self.into(self.norm(x))))


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7)
        return x + self.out(y.transpose(1, 2).flatten(2))


class _Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(nn.Conv2d(2, 6, 3), _Block(1), _Block(2)), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


class _Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(_Mlp(), _Attention(), _Mlp()), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.blocks(x))


class _Heads(_Sequences):
    """With noise on the heads of the attention."""


NOISE = {
    _Images: {"where": lambda name, _: name.endswith("bn1")},
    _Sequences: {"where": lambda name, _: name.endswith("into")},
    _Heads: {"where": lambda name, _: name.endswith("out"), "structures": "heads", "num_heads": 3},
}
CASES = {
    _Images: (torch.randn(3, 2, 9, 9), ["conv1", "bn1", "conv2"]),
    _Sequences: (torch.randn(2, 5, 6), ["norm", "into", "back"]),
    _Heads: (torch.randn(2, 5, 6), ["norm", "qkv", "out"]),
}


def _model(kind):
    torch.manual_seed(0)
    model = kind().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
    return model


def _emptied(kind, number):
    """Return a masked model of which the first so many noise layers keep nothing, and an input."""
    model = bmrs.add_noise(_model(kind), **NOISE[kind]).double()
    layers = [module for module in model.modules() if isinstance(module, bmrs.NoiseLayer)]
    for layer in layers[:number]:
        layer.set_kept(torch.zeros_like(layer.mask))
    return model, CASES[kind][0].double()


def _same(a, b):
    assert (a - b).abs().max() <= 1e-10 * b.abs().max()


@pytest.mark.parametrize("kind", CASES)
def test_nothing_is_left_but_what_the_branch_adds(kind):
    model, x = _emptied(kind, 1)
    compacted = bmrs.compact(model, x)
    report = bmrs.compact_report(compacted)
    _same(compacted(x), model(x))
    _same(compacted(x[:1]), model(x[:1]))
    assert (type(compacted), report.form) == (kind, "module")
    assert [name.rpartition(".")[2] for name in report.emptied] == CASES[kind][1]
    assert "nothing is left of these" in str(report)
    assert report.layers[0].removed == report.layers[0].structures
    assert not report.layers[0].kept_because
    first = {name.rpartition(".")[0] for name in report.emptied}.pop()
    left = sum(parameter.numel() for parameter in compacted.get_submodule(first).parameters())
    assert left <= 3 * 6  # what is added, and a normalisation of it
    assert num_parameters(compacted) == CompactedSizes(model, x).parameters()


@pytest.mark.parametrize("kind", CASES)
def test_all_branches_can_be_emptied_and_saved_and_trained(kind, tmp_path):
    model, x = _emptied(kind, 3)
    compacted = bmrs.compact(model, x)
    expected = model(x)
    _same(compacted(x), expected)
    bmrs.save(tmp_path / "small", compacted)
    for loaded in (
        bmrs.load(tmp_path / "small"),
        bmrs.load(tmp_path / "small", model=_model(kind)),
        copy.deepcopy(compacted),
    ):
        assert torch.equal(loaded(x), compacted(x))
    exported = torch.export.export(compacted, (x,)).module()
    assert torch.equal(exported(x), compacted(x))
    optimizer = bmrs.compact_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, compacted)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in compacted.parameters()
    }
    compacted.train()
    compacted(x).square().mean().backward()
    biases = [m.bias for m in compacted.modules() if isinstance(m, ConstantLayer) and m.bias is not None]
    assert biases
    assert all(bias.grad is not None and bias.grad.isfinite().all() for bias in biases)
    optimizer.step()
    assert not torch.equal(compacted.eval()(x), expected)


def test_a_layer_whose_weight_the_code_reads_stays():
    class Reads(_Mlp):
        def forward(self, x):
            return super().forward(x) + self.into.weight.sum()

    model = Reads().double().eval()
    bmrs.add_noise(model, where=lambda name, _: name == "into").double()
    model.into.noise.set_kept(torch.zeros(12, dtype=torch.bool))
    x = torch.randn(2, 5, 6).double()
    compacted = bmrs.compact(model, x)
    _same(compacted(x), model(x))
    assert isinstance(compacted.into, nn.Linear)


def test_a_write_into_what_is_passed_on_reaches_the_shortcut():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv1, self.conv2 = (
                nn.BatchNorm2d(2),
                nn.Conv2d(2, 4, 3, padding=1),
                nn.Conv2d(4, 2, 1),
            )
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            x = x * 1.0
            return x + self.conv2(self.conv1(self.relu(self.norm(x))))

    torch.manual_seed(0)
    model = PreActivation().double().eval()
    bmrs.add_noise(model, where=lambda name, _: name == "conv1").double()
    model.conv1.noise.set_kept(torch.zeros(4, dtype=torch.bool))
    x = torch.randn(2, 2, 5, 5).double()
    compacted = bmrs.compact(model, x)
    _same(compacted(x), model(x))
    assert bmrs.compact_report(compacted).emptied == ("conv1", "conv2")


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_encoder_layers_go_on_running_by_their_own_kernel(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(layer, nn.Linear(8, 3)).double().eval()
    bmrs.add_noise(model, where=lambda name, _: name.endswith("linear1")).double()
    layer.linear1.noise.set_kept(torch.zeros(12, dtype=torch.bool))
    x = torch.randn(2, 4, 8).double()
    compacted = bmrs.compact(model, x)
    expected = model(x)
    with torch.no_grad():
        _same(compacted(x), expected)


@pytest.mark.parametrize("kind", [_Images, _Sequences])
def test_what_is_left_is_compiled(kind):
    model, x = _emptied(kind, 3)
    compacted = bmrs.compact(model, x)
    compiled = torch.compile(compacted, backend="aot_eager", fullgraph=True, dynamic=True)
    other = torch.cat([x, x], dim=x.dim() - 2)[1:]
    assert torch.equal(compiled(other), compacted(other))


def test_what_is_left_runs_in_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    model, x = _emptied(_Images, 3)
    report = bmrs.export(bmrs.compact(model, x).float(), x.float(), tmp_path / "small.onnx")
    assert report.difference < 1e-5


@pytest.mark.parametrize("kept", [6, 0])
def test_a_graph_of_operators_gets_the_constant_as_a_bias_and_keeps_a_unit(kept, tmp_path):
    class WithSizes(_Mlp):
        def forward(self, x):
            hidden = torch.sigmoid(self.into(self.norm(x)).view(-1, 12))
            return x + self.back(hidden.view(x.shape[0], -1, 12))

    model = bmrs.add_noise(_model(WithSizes), where="into").double()
    model.back.weight.requires_grad_(kept == 0)
    model.into.noise.set_kept(torch.arange(12) < kept)
    x = torch.randn(2, 5, 6).double()
    compacted = bmrs.compact(model, x)
    report = bmrs.compact_report(compacted)
    assert (report.form, report.layers[0].removed) == ("graph", 12 - max(kept, 1))
    assert compacted.into.weight.shape == (max(kept, 1), 6)
    assert compacted.back.bias.requires_grad == (kept == 0)
    _same(compacted(x[:1]), model(x[:1]))
    bmrs.save(tmp_path / "small", compacted)
    assert torch.equal(bmrs.load(tmp_path / "small")(x), compacted(x))
