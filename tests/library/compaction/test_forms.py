"""Which form a smaller network takes where its own classes cannot be narrower."""

import pytest
import torch
from compaction_cases import assert_compacts, num_values, prune_structures, randomise
from torch import nn
from torch.nn import functional as F

import bmrs


class Attention(nn.Module):
    """Attention whose code has the size of its heads in it, beside a layer of hidden units."""

    def __init__(self, *, ending=torch.tanh, head_size=4):
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(12, 12) for _ in range(3))
        self.output, self.hidden, self.last = nn.Linear(12, 3), nn.Linear(12, 6), nn.Linear(6, 3)
        self.ending, self.head_size = ending, head_size

    def forward(self, x):
        hidden = self.last(self.hidden(x).relu())
        layers = (self.queries, self.keys, self.values)
        queries, keys, values = (
            layer(x).unflatten(-1, (3, self.head_size)).transpose(1, 2) for layer in layers
        )
        x = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
        # A view, as attention over heads of one size lays its result out that way.
        return self.ending(self.output(x.view(*x.shape[:2], -1)) + hidden)


def with_noise(*names, **options):
    model = bmrs.add_noise(Attention(**options), where=list(names))
    return randomise(model, pruned=0.0)


def test_values_narrower_than_keys_come_out_in_another_order_of_memory():
    model = with_noise("values")
    prune_structures(model.values.noise, [1, 5, 9])
    compacted = assert_compacts(model, torch.randn(2, 5, 12), form="graph")
    assert compacted.values.weight.shape == (9, 12)


@pytest.mark.parametrize("noisy", ["queries", "values"])
def test_heads_stay_where_neither_code_nor_graph_can_have_narrower_ones(noisy):
    """A graph does not hold what torch.vmap calls."""
    model = with_noise(noisy, "hidden", ending=torch.vmap(torch.tanh))
    prune_structures(getattr(model, noisy).noise, [1, 5, 9])
    prune_structures(model.hidden.noise, [0, 4])
    with pytest.warns(UserWarning, match=r"3 of 5 pruned structures stay.*Attention divides.*budgets"):
        compacted = assert_compacts(model, torch.randn(2, 5, 12))
    assert (compacted.hidden.out_features, getattr(compacted, noisy).out_features) == (4, 12)
    reasons = {layer.name: layer.kept_because for layer in bmrs.compact_report(compacted).layers}
    assert reasons[f"{noisy}.noise"] == {
        "the model's own code divides it into parts of its sizes at unflatten": 3
    }


class Experts(nn.Module):
    """Two layers of which eager code runs the one that is asked for, and a captured graph both."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(8))

    def forward(self, x):
        x = self.attention(x)
        chosen = self.experts if torch.compiler.is_compiling() else self.experts[:1]
        for expert in chosen:
            x = x + (0 if expert is not self.experts[0] else 1) * expert(x)
        return x


def test_no_graph_that_computes_more_than_the_model():
    model = bmrs.add_noise(Experts(), where="attention.values")
    randomise(model, pruned=0.0)
    prune_structures(model.attention.values.noise, [1, 5, 9])
    with pytest.warns(UserWarning, match="3 of 3 pruned structures stay"):
        compacted = assert_compacts(model, torch.randn(2, 5, 12))
    report = bmrs.compact_report(compacted)
    assert (report.form, report.removed, report.flops_after) == ("module", 0, report.flops_before)


def test_attention_whose_scores_are_near_0_keeps_its_scale():
    """With heads that are narrower its own code would take another scale, which hardly matters on such scores."""
    torch.manual_seed(0)
    model = with_noise("queries", "keys", "values", head_size=-1)
    with torch.no_grad():
        for parameter in model.queries.parameters(recurse=False):
            parameter.mul_(0.1)
    for layer in (model.queries, model.keys, model.values):
        prune_structures(layer.noise, [1, 5, 9])
    report = bmrs.compact_report(assert_compacts(model, torch.randn(2, 5, 12), form="graph"))
    assert (report.removed, report.error < 1e-6) == (9, True)
    assert "which is more than rounding makes" in report.form_because


class WidthInCode(nn.Module):
    """Code that computes with the width of a layer, in parts that no graph holds."""

    def __init__(self, share):
        super().__init__()
        self.hidden, self.last, self.share = nn.Linear(12, 6), nn.Linear(6, 3), share

    def forward(self, x):
        x = self.last(self.hidden(x).relu()) * (1 + self.share * self.hidden.out_features)
        return torch.vmap(torch.tanh)(x)


def test_a_network_that_differs_by_more_than_rounding_makes_is_told_of():
    def compacted(share):
        torch.manual_seed(0)
        model = randomise(bmrs.add_noise(WidthInCode(share), where="hidden"), pruned=0.0)
        prune_structures(model.hidden.noise, [1, 5])
        return bmrs.compact_report(bmrs.compact(model, torch.randn(8, 12)))

    with pytest.warns(
        UserWarning, match=r"differ by .*within the tolerance of 0.0001, but more than rounding"
    ):
        report = compacted(5e-6)
    assert (report.form, report.removed, 1e-6 < report.error < 1e-4) == ("module", 2, True)
    assert compacted(0.0).error < 1e-6  # without a warning


class MasksByVmap(nn.Module):
    """Attention whose mask is made by a function of two places, mapped over all of them."""

    def __init__(self, *, mapped):
        super().__init__()
        self.attention, self.mapped = Attention(), mapped

    def forward(self, x):
        x = self.attention(x)
        if self.mapped == "values":
            return torch.vmap(torch.sum)(x)

        def before(example, row, column):
            return row >= column

        for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
            before = torch.vmap(before, in_dims=dims)
        places = torch.arange(x.shape[1])
        return before(torch.arange(x.shape[0]), places, places).to(x.dtype) @ x


@pytest.mark.parametrize("mapped", ["places", "values"])
def test_what_vmap_runs_over_stays_and_all_else_leaves(mapped):
    model = bmrs.add_noise(MasksByVmap(mapped=mapped), where=["*.hidden", "*.output"])
    randomise(model, pruned=0.0)
    prune_structures(model.attention.hidden.noise, [0, 4])
    prune_structures(model.attention.output.noise, [1])
    compacted = assert_compacts(model, torch.randn(2, 5, 12))
    assert (compacted.attention.hidden.out_features, compacted.attention.output.out_features) == (4, 3)
    reasons = bmrs.compact_report(compacted).layers[0].kept_because
    assert any("vmap" in reason for reason in reasons) == (mapped == "values")


class Mapped(nn.Module):
    """A layer that torch.vmap runs over examples, behind attention whose scores are near 0."""

    def __init__(self):
        super().__init__()
        self.attention, self.mapped = Attention(head_size=-1), nn.Linear(3, 3)

    def forward(self, x):
        return torch.vmap(self.mapped)(self.attention(x))


def test_parameters_within_vmap_are_used_and_looked_at():
    torch.manual_seed(0)
    model = bmrs.add_noise(Mapped(), where=["*.queries", "*.keys", "*.values"])
    randomise(model, pruned=0.0)
    with torch.no_grad():
        for parameter in model.attention.queries.parameters(recurse=False):
            parameter.mul_(0.1)
    for layer in (model.attention.queries, model.attention.keys, model.attention.values):
        prune_structures(layer.noise, [1, 5, 9])
    with pytest.warns(UserWarning, match="9 of 9 pruned structures stay"):
        report = bmrs.compact_report(assert_compacts(model, torch.randn(2, 5, 12)))
    assert (report.unused, report.error < 1e-6) == ((), True)


def test_noise_within_vmap_is_refused():
    model = bmrs.add_noise(Mapped(), where="mapped")
    prune_structures(model.mapped.noise, [1])
    with pytest.raises(ValueError, match=r"'mapped\.noise' lies within torch\.vmap .* line \d+, in forward"):
        bmrs.compact(model, torch.randn(2, 5, 12))


def test_rather_less_leaves_than_a_graph_that_takes_one_number_of_examples():
    class Fixed(Attention):
        def forward(self, x):
            return super().forward(x).view(len(x), -1)

    model = randomise(bmrs.add_noise(Fixed(), where="values"), pruned=0.0)
    prune_structures(model.values.noise, [1, 5, 9])
    with pytest.warns(UserWarning, match="3 of 3 pruned structures stay"):
        compacted = bmrs.compact(model, torch.randn(2, 5, 12))
    for number in (2, 3):
        x = torch.randn(number, 5, 12)
        torch.testing.assert_close(compacted(x), model.eval()(x))


class Halves(nn.Module):
    """A block of YOLO's: the second half of what a convolution returns is computed on, and joined with both."""

    def __init__(self, *, parts=2):
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 12 * parts, 1), nn.Conv2d(12, 12, 3, padding=1)
        self.joined, self.last = nn.Conv2d(12 * (parts + 1), 10, 1), nn.Conv2d(10, 4, 1)
        self.parts = parts

    def forward(self, x):
        x = self.first(x).relu()
        parts = list(x.chunk(self.parts, 1))
        parts.append(self.inner(parts[-1]).relu())
        x = self.last(self.joined(torch.cat(parts, 1)).relu())
        return x if self.training else x.sigmoid().flatten(2)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_stay_equal_for_code_that_divides_into_equal_ones(parts):
    model = randomise(bmrs.add_noise(Halves(parts=parts), where=["first", "inner"]), pruned=0.0)
    pruned = [0, 1, 2, 3, 12, 13, 14, 24, 25, 26][: 3 * parts + 1]
    prune_structures(model.first.noise, pruned)
    prune_structures(model.inner.noise, [4])
    with pytest.warns(
        UserWarning, match=rf"1 of {len(pruned) + 1} pruned structures stay.*Halves .*prune_to"
    ):
        compacted = assert_compacts(model, torch.randn(2, 3, 5, 5))
    report = bmrs.compact_report(compacted)
    assert (report.form, report.layers[0].kept_because) == (
        "module",
        {"the model's own code divides it into equal parts at chunk": 1},
    )
    assert compacted.train()(torch.randn(2, 3, 5, 5)).shape == (2, 4, 5, 5)


@pytest.mark.filterwarnings("ignore:the compacted network is a graph")
def test_a_graph_where_most_would_stay_for_equal_parts():
    model = randomise(bmrs.add_noise(Halves(), where="first"), pruned=0.0)
    prune_structures(model.first.noise, [0, 1, 2, 3, 4])
    report = bmrs.compact_report(assert_compacts(model, torch.randn(2, 3, 5, 5), form="graph"))
    assert report.removed == 5


def test_a_budget_takes_equally_much_of_equal_parts():
    model = randomise(bmrs.add_noise(Halves(), where=["first", "inner", "joined"]), pruned=0.0)
    images = torch.randn(2, 3, 5, 5)
    report = bmrs.prune_to(model, bmrs.SNR(), example_inputs=images, parameters=0.5)
    compacted = assert_compacts(model, images, form="module")  # without a warning
    assert sum(p.numel() for p in compacted.parameters()) == report.after.parameters
    assert compacted.first.out_channels < 24


class SizeInCode(nn.Module):
    """Its code reads its width from an attribute."""

    def __init__(self):
        super().__init__()
        self.width, self.hidden, self.last = 6, nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.hidden(x).relu().view(len(x), self.width))


@pytest.mark.parametrize(
    "called",
    [
        lambda blocks, x: nn.Sequential(*blocks[1:])(x),
        lambda blocks, x: blocks[1:](x) if isinstance(blocks, nn.Sequential) else blocks[1](x),
        lambda blocks, x: blocks[1](blocks[-3::2][-1](x)),
    ],
)
@pytest.mark.parametrize("container", [lambda *x: nn.Sequential(*x), lambda *x: nn.ModuleList(x)])
def test_layers_that_are_called_by_slices_of_others(container, called):
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = container(nn.Linear(4, 4), SizeInCode(), SizeInCode())
            self.one_name = self.another_name = nn.Tanh()

        def forward(self, x):
            return self.one_name(called(self.blocks, x))

    model = Sliced()
    hidden = bmrs.add_noise(model, where=["blocks.1.hidden"]).blocks[1].hidden
    randomise(model, pruned=0.0)
    prune_structures(hidden.noise, [1, 5])
    compacted = assert_compacts(model, torch.randn(5, 4))
    assert [compacted.blocks[i].width for i in (1, 2)] == [4, 6]


class Asserting(nn.Module):
    """As blocks of diffusers, which check what they are given by a bare assertion."""

    def __init__(self, check):
        super().__init__()
        self.channels, self.groups, self.check = 6, 2, check
        self.conv = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        if not self.check(self, x):
            # An assertion itself would be given a text by pytest.
            raise AssertionError
        return self.conv(x) * self.groups


def asserting(check):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Asserting(check), nn.ReLU(), nn.Conv2d(5, 2, 1))
    bmrs.add_noise(model, where=["0", "2.conv"])
    randomise(model, pruned=0.0)
    prune_structures(model[0].noise, [1, 5])
    prune_structures(model[2].conv.noise, [0])
    return model


def test_code_that_checks_what_it_is_given_takes_fewer_channels():
    compacted = assert_compacts(
        asserting(lambda self, x: x.shape[1] == self.channels), torch.randn(5, 3, 2, 2)
    )
    assert (compacted[2].channels, compacted[2].groups) == (4, 2)


def test_a_bare_assertion_is_named_by_its_line():
    compacted = assert_compacts(asserting(lambda self, x: x.shape[1] == 6), torch.randn(5, 3, 2, 2), "graph")
    line = Asserting.forward.__code__.co_firstlineno + 3
    expected = f"AssertionError at line {line} of {__file__} (raise AssertionError)"
    assert bmrs.compact_report(compacted).form_because == expected


class Joined(nn.Module):
    """Two layers whose outputs are joined, and divided where they were joined."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1)
        self.left, self.right = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        left, right = torch.cat([self.first(x), self.second(x)], 1).relu().chunk(2, 1)
        return self.left(left) + self.right(right)


def test_a_budget_that_equal_parts_cannot_meet_takes_one_part():
    """The other one has no noise, so that equal parts have all of both."""
    model = randomise(bmrs.add_noise(Joined(), where="first"), pruned=0.0)
    images = torch.randn(2, 3, 5, 5)
    report = bmrs.prune_to(model, bmrs.SNR(), example_inputs=images, parameters=0.7)
    compacted = assert_compacts(model, images, form="graph")
    assert num_values(compacted) == report.after.parameters <= 0.7 * report.dense.parameters
