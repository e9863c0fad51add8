"""Channels of a residual stream that layer norms count, which leave where that approximation is asked for."""

import copy
import json

import pytest
import torch
from torch import nn

import bmrs
from bmrs.compaction.approximate_norms import fits
from bmrs.compaction.comparison import relative_difference, relative_root_mean_square
from bmrs.compaction.masked_model import MaskedModel
from bmrs.graph.inputs import as_inputs
from bmrs.models.vit import VisionTransformer
from bmrs.noise.lookup import noise_layers

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, PRUNED = 16, [1, 4, 7, 9]
ASKED = ("layer_norm",)
TOKENS = torch.arange(18).view(3, 6) % 11


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, norm_first=True, batch_first=True)
        last = nn.LayerNorm(WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 1, norm=last, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


class _ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, WIDTH, 2, 2), nn.LayerNorm(WIDTH, eps=1e-6)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.last = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.first(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + self.down(nn.functional.gelu(self.up(h))).permute(0, 3, 1, 2)
        return self.head(self.last(x.mean((2, 3))))


class _Small(nn.Module):
    """A stream of which every token has the mean that the embedding gives it; no bias is shared."""

    def __init__(self, norm=nn.LayerNorm, eps=0.1):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(5, WIDTH), norm(WIDTH, eps=eps), nn.Linear(WIDTH, 3)
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(self.norm(x))


class _Padded(_Small):
    """With a convolution behind the norm that pads, so that no bias can stand in for a constant."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.norm(self.embed(x)).transpose(1, 2))


def _bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
    return BertForSequenceClassification(BertConfig(vocab_size=11, max_position_embeddings=8, **sizes))


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_positions=8, n_embd=WIDTH, n_layer=1, n_head=2, **special)
    )


def _vit():
    return VisionTransformer(
        num_classes=3, in_channels=1, image_size=8, patch_size=4, depth=1, width=WIDTH, num_heads=2, hidden=24
    )


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
EXAMPLES = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(40, 5, generator=torch.Generator().manual_seed(2))
# What is added to the stream: layers whose structures are known, and others.
CASES = {
    "bert": (
        _bert,
        {"input_ids": TOKENS},
        ("*_embeddings", "*.output.dense"),
        (),
        "bert.encoder.layer.0.intermediate.dense.weight",
    ),
    "gpt2": (
        _gpt2,
        {"input_ids": TOKENS},
        ("*.wte", "*.wpe", "*.c_proj"),
        (),
        "transformer.h.0.ln_1.weight",
    ),
    "vit": (
        _vit,
        IMAGES[:, :1],
        ("*.out_proj", "*.mlp.3"),
        ("encoder.dropout",),
        "encoder.layers.encoder_layer_0.mlp.0.weight",
    ),
    "encoder": (
        _Encoder,
        EXAMPLES,
        ("embed", "*.linear2"),
        ("*.self_attn",),
        "encoder.layers.0.linear1.weight",
    ),
    "convnext": (_ConvNeXt, IMAGES, ("stem", "first", "down"), (), "up.weight"),
}


def _noisy(model, where, others=()):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "head" not in name:
                parameter.mul_(2)
    for pattern in where:
        bmrs.add_noise(model, where=pattern)
    for pattern in others:
        bmrs.add_noise(model, where=pattern, num_structures=WIDTH, dim=-1)
    for layer in noise_layers(model).values():
        nn.init.uniform_(layer.mu, -1.0, 0.0)
        layer.set_kept(torch.ones(WIDTH, dtype=torch.bool).index_fill(0, torch.tensor(PRUNED), value=False))
    return model.eval()


def _masked(name):
    torch.manual_seed(0)
    build, examples, where, others, narrower = CASES[name]
    return _noisy(build(), where, others), examples, narrower


def _outputs(model, examples):
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        if isinstance(examples, dict):
            return [model(**examples).logits]
        return [model(examples.double())]


@pytest.mark.parametrize("name", CASES)
def test_channels_leave_the_stream_and_the_report_says_what_it_costs(name, tmp_path):
    if name in ("bert", "gpt2"):
        pytest.importorskip("transformers", minversion="5.0")
    model, examples, narrower = _masked(name)
    compacted = bmrs.compact(model, examples, approximate=ASKED)
    report = bmrs.compact_report(compacted)
    assert report.removed == report.pruned == len(PRUNED) * len(noise_layers(model))
    assert WIDTH - len(PRUNED) in compacted.get_parameter(narrower).shape
    assert WIDTH not in compacted.get_parameter(narrower).shape

    found = report.approximated
    assert {(norm.before, norm.after, norm.dropped) for norm in found.norms} == {
        (WIDTH, WIDTH - len(PRUNED), False)
    }
    expected, given = _outputs(model, examples), _outputs(compacted, examples)
    assert found.largest_difference == pytest.approx(relative_difference(expected, given), rel=1e-3)
    assert found.root_mean_square == pytest.approx(relative_root_mean_square(expected, given), rel=1e-3)
    # All but the approximation is exact; that is near, and not the same.
    assert report.error < 1e-6
    assert 1e-4 < found.root_mean_square < 0.3
    assert f"{found.largest_difference:.1e} of the largest" in str(report)
    assert all(norm.name in str(report) for norm in found.norms)
    json.dumps(report.to_dict())

    # Saved, in a fresh network, and trained further.
    bmrs.save(tmp_path / "small", compacted)
    alone = bmrs.load(tmp_path / "small")
    assert (
        relative_difference(given, _outputs(alone, examples) if name not in ("bert", "gpt2") else given)
        < 1e-6
    )
    if report.form == "module":
        fresh = bmrs.load(tmp_path / "small", model=CASES[name][0]())
        assert relative_difference(given, _outputs(fresh, examples)) < 1e-9
        compacted = fresh
    else:
        assert name == "encoder"  # of which MultiheadAttention checks that heads are as wide as the stream
    optimizer = torch.optim.SGD(compacted.train().parameters(), lr=0.1)
    before = compacted.get_parameter(narrower).clone()
    outputs = compacted(**examples).logits if isinstance(examples, dict) else compacted(examples)
    outputs.square().mean().backward()
    optimizer.step()
    assert not torch.equal(compacted.get_parameter(narrower), before)


def _without_mean():
    """A network whose stream has a mean of zero, of the channels that stay."""
    torch.manual_seed(0)
    model = _noisy(_Small().double(), ("embed", "down"))
    bmrs.restore_noise(model)
    kept = torch.tensor([i for i in range(WIDTH) if i not in PRUNED])
    for layer in noise_layers(model).values():
        nn.init.zeros_(layer.mu)
    with torch.no_grad():
        for layer in (model.embed, model.down):
            for parameter in layer.parameters(recurse=False):
                parameter[kept] -= parameter[kept].mean(dim=0)
    return model


def test_where_the_mean_is_zero_it_is_exact():
    model = _without_mean()
    rows = ROWS.double()
    compacted = bmrs.compact(model, rows, approximate=ASKED)
    torch.testing.assert_close(compacted(rows), model(rows), rtol=1e-9, atol=1e-9)
    left = (WIDTH - len(PRUNED)) / WIDTH
    assert compacted.norm.eps == pytest.approx(0.1 / left)
    assert bmrs.compact_report(compacted).approximated.largest_difference < 1e-9


def test_no_other_factor_or_shift_is_closer():
    torch.manual_seed(1)
    model = _noisy(_Small().double(), ("embed", "down"))
    masked = MaskedModel(model, as_inputs(ROWS.double()), approximate=frozenset(ASKED))
    analysis = masked.analysis()
    fit = fits(masked.model, analysis, masked.examples)["norm.weight"]
    inputs = []
    model.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(ROWS.double())
    kept = [i for i in range(WIDTH) if i not in PRUNED]
    exact = nn.functional.layer_norm(inputs[0], (WIDTH,), eps=0.1)[:, kept]
    alone = nn.functional.layer_norm(inputs[0][:, kept], (len(kept),), eps=0.1 * WIDTH / len(kept))

    def error(gain, shift):
        return (gain * alone + shift - exact).square().mean().item()

    best = error(fit.gain, fit.shift)
    assert best < min(error(fit.gain * f, fit.shift) for f in (0.99, 1.01))
    assert best < min(error(fit.gain, fit.shift + d) for d in (-0.01, 0.01))
    assert best < 0.5 * error(1.0, 0.0)  # that is, than leaving the layer as it was


class _Own(nn.Module):
    """A norm of a class of its own."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.bias, self.eps = (
            nn.Parameter(torch.ones(width)),
            nn.Parameter(torch.ones(width)),
            eps,
        )

    def forward(self, x):
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _Single(nn.LayerNorm):
    """A norm that is computed in single precision whatever the network is in, as CLIP's."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class _Twice(_Small):
    def forward(self, x):
        x = self.embed(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.norm(x))


@pytest.mark.parametrize("norm", [_Own, _Single])
def test_a_norm_of_another_class_that_is_called_twice(norm):
    torch.manual_seed(0)
    report = bmrs.compact_report(
        bmrs.compact(_noisy(_Twice(norm), ("embed", "down")), ROWS, approximate=ASKED)
    )
    assert (report.form, report.removed, len(report.approximated.norms)) == ("module", 2 * len(PRUNED), 1)
    assert report.error < 1e-6


def test_norms_that_nothing_is_left_of_are_not_approximated():
    class Branch(_Small):
        def __init__(self):
            super().__init__()
            self.inner = nn.LayerNorm(WIDTH)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.norm(x + self.down(torch.relu(self.up(self.inner(x))))))

    model = _noisy(Branch(), ("embed", "down"))
    bmrs.add_noise(model, where="up").eval()
    for noise in (model.up.noise, model.down.noise):
        noise.set_kept(torch.zeros(noise.num_structures, dtype=torch.bool))
    report = bmrs.compact_report(bmrs.compact(model, ROWS, approximate=ASKED))
    assert "inner" in report.emptied
    assert [norm.name for norm in report.approximated.norms] == ["norm"]


def test_a_single_example_without_a_dimension_for_examples():
    torch.manual_seed(0)
    report = bmrs.compact_report(
        bmrs.compact(_noisy(_Small(), ("embed", "down")), ROWS[0], approximate=ASKED)
    )
    assert report.removed == 2 * len(PRUNED)


def test_without_being_asked_the_channels_stay():
    model, examples, _ = _masked("convnext")
    report = bmrs.compact_report(bmrs.compact(model, examples))
    assert report.removed == 0
    assert report.approximated is None
    assert "the statistics of a normalisation count it" in str(report)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_where_nothing_needs_it_nothing_changes(norm):
    torch.manual_seed(0)
    model = _noisy(_Small(norm), ("embed", "down")) if norm is nn.RMSNorm else _Small()
    if norm is nn.LayerNorm:
        bmrs.add_noise(model, where="up").eval()
        model.up.noise.set_kept(torch.arange(8) < 5)
    exact, asked = (bmrs.compact(model, ROWS, approximate=names) for names in ((), ASKED))
    assert bmrs.compact_report(asked).removed > 0
    assert bmrs.compact_report(asked) == bmrs.compact_report(exact)
    assert exact.state_dict().keys() == asked.state_dict().keys()
    assert all(torch.equal(tensor, asked.state_dict()[name]) for name, tensor in exact.state_dict().items())


def test_a_channel_that_varies_where_the_norm_counts_it_stays():
    torch.manual_seed(0)
    model = _noisy(_Small(), ("norm",))
    report = bmrs.compact_report(bmrs.compact(model, ROWS, approximate=ASKED))
    assert report.removed == 0
    assert report.error < 1e-6
    assert "the statistics of a normalisation count it" in str(report)


def test_what_no_bias_takes_up_is_dropped_and_said():
    torch.manual_seed(0)
    model = _noisy(_Padded(), ("embed",))
    report = bmrs.compact_report(bmrs.compact(model, ROWS.view(8, 5, 5), approximate=ASKED))
    assert report.removed == len(PRUNED)
    assert report.error < 1e-6
    assert [norm.dropped for norm in report.approximated.norms] == [True]
    assert "what they added behind norm is dropped, as no bias takes it up" in str(report)


def test_a_norm_without_a_weight_keeps_its_channels():
    torch.manual_seed(0)
    model = _Small()
    model.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
    report = bmrs.compact_report(bmrs.compact(_noisy(model, ("embed", "down")), ROWS, approximate=ASKED))
    assert report.removed == 0


def test_all_that_looks_ahead_knows_of_it():
    torch.manual_seed(0)
    model = _Small()
    assert bmrs.suggest(model, ROWS, approximate=ASKED).places != bmrs.suggest(model, ROWS).places
    together = [place.layers for place in bmrs.suggest(model, ROWS, approximate=ASKED) if place.together]
    assert ("embed", "down") in together
    bmrs.add_noise(model, where=lambda name, _: name in ("embed", "down"))
    assert bmrs.noise_outlook(model, ROWS).held == ("embed.noise", "down.noise")
    assert bmrs.noise_outlook(model, ROWS, approximate=ASKED).held == ()
    assert all(cost.parameters == 0 for cost in bmrs.structure_costs(model, ROWS).values())
    costs = bmrs.structure_costs(model, ROWS, approximate=ASKED)
    parts = 5 + 1 + 8 + 8 + 1 + 2 + 3  # of one channel: embed, up, down, norm, head
    assert [cost.parameters for cost in costs.values()] == [parts / 2] * 2
    assert bmrs.structure_prices(model, ROWS, approximate=ASKED) == {"embed.noise": 1.0, "down.noise": 1.0}
    for layer in noise_layers(model).values():
        nn.init.uniform_(layer.mu, -12.0, 0.0)
        nn.init.constant_(layer.log_sigma, -3.0)
    budget = bmrs.prune_to(
        copy.deepcopy(model), bmrs.BMRSOdds(), example_inputs=ROWS, parameters=0.5, approximate=ASKED
    )
    assert budget.after.parameters <= 0.5 * budget.dense.parameters
    assert bmrs.prune(copy.deepcopy(model), bmrs.BMRSOdds(), example_inputs=ROWS).tied == ()
    report = bmrs.prune(model, bmrs.BMRSOdds(), example_inputs=ROWS, approximate=ASKED)
    assert report.tied == (("embed.noise", "down.noise"),)


def test_with_the_other_options():
    torch.manual_seed(0)
    trained = _Small()
    model = _noisy(copy.deepcopy(trained), ("embed", "down"))
    rounded = bmrs.compact(model, ROWS, round_to=8, approximate=ASKED)
    assert rounded.norm.normalized_shape == (WIDTH,)
    assert bmrs.compact_report(rounded).approximated is None
    noise = bmrs.compact(model, ROWS, keep_noise=True, approximate=ASKED)
    assert noise.embed.noise.num_structures == WIDTH - len(PRUNED)
    refitted = bmrs.compact(model, ROWS, refit_to=trained, approximate=ASKED)
    assert refitted.norm.normalized_shape == (WIDTH - len(PRUNED),)
    optimizer = torch.optim.Adam(bmrs.parameter_groups(model, lr=0.1))
    model.train()(ROWS).square().mean().backward()
    optimizer.step()
    small = bmrs.compact(model, ROWS, approximate=ASKED)
    goes_on = bmrs.compact_optimizer(optimizer, model, small)
    kept = [i for i in range(WIDTH) if i not in PRUNED]
    moments = optimizer.state[model.norm.weight]["exp_avg"][kept]
    assert torch.equal(goes_on.state[small.norm.weight]["exp_avg"], moments)


def test_folders_of_transformers(tmp_path):
    pytest.importorskip("transformers", minversion="5.0")
    model, examples, _ = _masked("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    small = bmrs.compact(model, examples, approximate=ASKED)
    assert small.lm_head.weight is small.transformer.wte.weight
    # The new bias of the head that shares its weight with the table is trained.
    assert any(
        parameter is small.lm_head.bias
        for group in bmrs.compact_optimizer(optimizer, model, small).param_groups
        for parameter in group["params"]
    )
    bmrs.save_pretrained(tmp_path / "small", small)
    loaded = bmrs.load_pretrained(tmp_path / "small")
    assert loaded.transformer.ln_f.eps == small.transformer.ln_f.eps > 1e-5
    assert relative_difference(_outputs(small, examples), _outputs(loaded, examples)) < 1e-6


class _Shared(nn.Module):
    """With one weight for a table and a head, perhaps with a width in the code, so that only a graph is narrower."""

    def __init__(self, form):
        super().__init__()
        self.table, self.middle = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shift, self.head = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, 11, bias=False)
        self.head.weight, self.form = self.table.weight, form

    def forward(self, tokens):
        x = self.middle(self.table(tokens)) + self.shift
        return self.head(x.view(-1, 16) if self.form == "graph" else x)


def _missing(model, small):
    """Return what an optimizer of a model's parameters does not have of the compacted network."""
    groups = bmrs.compact_optimizer(torch.optim.SGD(model.parameters()), model, small).param_groups
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(trained) == len(set(trained))
    return [name for name, parameter in small.named_parameters() if id(parameter) not in trained]


@pytest.mark.parametrize(("form", "frozen"), [("module", False), ("graph", True)])
def test_a_head_that_shares_its_weight_with_a_table_takes_constants_up_exactly(form, frozen, tmp_path):
    torch.manual_seed(0)
    shared = _Shared(form)
    shared.head.weight.requires_grad_(not frozen)
    model = _noisy(shared, ("table", "middle"))
    small = bmrs.compact(model, TOKENS)
    report = bmrs.compact_report(small)
    assert (report.form, report.removed) == (form, 2 * len(PRUNED))
    assert small.head.weight.shape == (11, WIDTH - len(PRUNED))
    assert small.head.weight.requires_grad == small.head.bias.requires_grad == (not frozen)
    torch.testing.assert_close(small(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)
    assert _missing(model, small) == []
    bmrs.save(tmp_path / "small", small)
    torch.testing.assert_close(bmrs.load(tmp_path / "small")(TOKENS), small(TOKENS))


def test_a_table_stays_trained_where_the_head_that_shares_it_is_gone():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.table = nn.Linear(WIDTH, 11), nn.Embedding(11, WIDTH)
            self.table.weight = self.head.weight
            self.middle, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 11)

        def forward(self, tokens):
            x = self.table(tokens)
            return self.other(x) + self.head(self.middle(x))

    model = bmrs.add_noise(Branch(), where="middle")
    model.middle.noise.set_kept(torch.zeros(WIDTH, dtype=torch.bool))
    small = bmrs.compact(model, TOKENS)
    assert "head" in bmrs.compact_report(small).emptied
    assert _missing(model, small) == []


def test_factors_go_into_a_table_that_nothing_else_reads():
    torch.manual_seed(0)
    model = _noisy(nn.Sequential(nn.Embedding(11, WIDTH), nn.LayerNorm(WIDTH)), ("0",))
    small = bmrs.compact(model, TOKENS)
    assert bmrs.compact_report(small).layers[0].folded
    torch.testing.assert_close(small(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)


def test_errors_say_what_there_is():
    model = _Small()
    with pytest.raises(ValueError, match=r"approximate must consist of 'layer_norm', .* got 'batch_norm'"):
        bmrs.compact(model, ROWS, approximate=["batch_norm"])
    with pytest.raises(
        TypeError, match=r"approximate must be a sequence of names, such as \('layer_norm',\)"
    ):
        bmrs.compact(model, ROWS, approximate="layer_norm")
    bmrs.add_noise(model, where="embed")
    with pytest.raises(ValueError, match="approximate needs example_inputs"):
        bmrs.prune(model, bmrs.BMRSOdds(), approximate=ASKED)
