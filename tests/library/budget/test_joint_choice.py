import copy
import itertools

import pytest
import torch
from residual_cases import SmallResNet
from torch import nn

import bmrs
from bmrs.budget.joint_choice import JointChoice
from bmrs.graph.inputs import as_inputs
from bmrs.graph.masked_graph import MaskedGraph
from bmrs.noise.lookup import noise_layers


def with_noise(network: nn.Module, *, where) -> nn.Module:
    model = bmrs.add_noise(copy.deepcopy(network), where=where, granularity="sample")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in noise_layers(model).values():
            layer.log_sigma.copy_(-2 + torch.rand(layer.log_sigma.shape, generator=generator))
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def order_of(model: nn.Module, examples: torch.Tensor, name: str, number: int) -> list[int]:
    """Which structures of a layer are left of all of them, by number."""
    graph = MaskedGraph(model, as_inputs(examples[:2]), "test")
    base = graph.without()
    units = [unit for unit in graph.units(base) if unit.structures[0].layer == name]
    (order,) = JointChoice(graph, base, as_inputs(examples)).order([units], [number])
    assert order is not None
    return sorted(units[place].structures[0].number for place in order[number:])


def residual(x: torch.Tensor, y: torch.Tensor) -> float:
    """What is left of y after a least squares fit, with a shift."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y - x @ torch.linalg.lstsq(x, y).solution).square().sum())


@pytest.fixture
def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def test_of_two_that_do_the_same_one_is_enough(mlp):
    with torch.no_grad():
        for tensor in (mlp[0].weight, mlp[0].bias):
            tensor[1] = tensor[0]
        mlp[2].weight[:, :2] *= 3  # both matter much
    model, examples = with_noise(mlp, where=lambda name, layer: name == "0"), images(300, 5)
    with torch.no_grad():
        model[0].noise.log_sigma.copy_(torch.tensor([-5.0, -5.0, -3.0, -3.0, -3.0, -3.0, -3.0]))
    alone, together = (copy.deepcopy(model) for _ in range(2))
    size = {"parameters": sum(p.numel() for p in mlp.parameters()) - 12}  # one structure less
    reports = [
        bmrs.prune_to(alone, bmrs.SNR(), example_inputs=examples[:1], **size),
        bmrs.prune_to(together, bmrs.SNR(), example_inputs=examples[:1], examples=examples, **size),
    ]
    assert [report.layers[0].after for report in reports] == [6, 6]
    assert reports[0].after == reports[1].after
    assert reports[1].lost > reports[0].lost
    assert noise_layers(alone)["0.noise"].mask[:2].all()
    assert noise_layers(together)["0.noise"].mask[:2].sum() == 1
    small = [bmrs.compact(m, examples, refit_to=mlp) for m in (alone, together)]
    with torch.no_grad():
        full = mlp(examples)
        errors = [float((network(examples) - full).norm() / full.norm()) for network in small]
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("number", [1, 2])
def test_what_goes_is_what_least_squares_miss_least(mlp, number):
    model, examples = with_noise(mlp, where=lambda name, layer: name == "0"), images(400, 5)
    with torch.no_grad():
        hidden = mlp[:2](examples)
        computed = mlp[:3](examples)
    left = list(range(7))
    for _ in range(number):  # one by one
        left = min(
            (list(rest) for rest in itertools.combinations(left, len(left) - 1)),
            key=lambda rest: residual(hidden[:, rest], computed),
        )
    assert order_of(model, examples, "0.noise", number) == left


def test_filters_and_whole_residual_channels():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)
    ).double()
    examples = images(120, 2, 8, 8)
    for name, layers, reader in (("0.noise", network[:2], 2), ("2.noise", network[:5], 5)):
        model = with_noise(network, where=lambda place, layer, name=name: f"{place}.noise" == name)
        with torch.no_grad():
            read, computed = layers(examples), network[: reader + 1](examples)
        if reader == 2:
            read = read.unfold(2, 3, 1).unfold(3, 3, 1).movedim(1, 3).flatten(4).flatten(0, 2)
            computed = computed.movedim(1, -1).flatten(0, 2)
        else:
            read = read.view(120, 4, 16)
        best = min(
            ([u for u in range(read.shape[1]) if u != gone] for gone in range(read.shape[1])),
            key=lambda rest: residual(read[:, rest].flatten(1), computed),
        )
        assert order_of(model, examples, name, 1) == best
    resnet = SmallResNet().double()
    model = with_noise(resnet, where=lambda name, layer: isinstance(layer, nn.Conv2d))
    shape = (60, next(resnet.parameters()).shape[1], 8, 8)
    plain, jointly = (copy.deepcopy(model) for _ in range(2))
    reports = [
        bmrs.prune_to(m, bmrs.SNR(), example_inputs=images(*shape)[:1], parameters=0.5, examples=given)
        for m, given in ((plain, None), (jointly, images(*shape)))
    ]
    assert all(report.met for report in reports)
    assert any(
        (a.mask != b.mask).any()
        for a, b in zip(noise_layers(plain).values(), noise_layers(jointly).values(), strict=True)
    )
    bmrs.compact(jointly, images(*shape)[:2])  # tied ones still go together


def rises_of(model: nn.Module, examples: torch.Tensor) -> list[list[float]] | None:
    """What the outputs lose with each structure of each layer but its last one."""
    graph = MaskedGraph(model, as_inputs(examples[:2]), "test")
    base = graph.without()
    units = graph.units(base)
    groups = [[u for u in units if u.structures[0].layer == name][:-1] for name in noise_layers(model)]
    rises = JointChoice(graph, base, as_inputs(examples)).rises(groups)
    return None if rises is None else [each.tolist() for each in rises]


def test_numbers_go_by_what_the_outputs_lose():
    """Of two branches the first one reaches the outputs by a thousandth: of it more can go."""
    torch.manual_seed(0)
    network = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 6), nn.Linear(6, 3)]).double()

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network

        def forward(self, x):
            a, b, c, d = self.layers
            return 1e-3 * b(torch.tanh(a(x))) + d(torch.tanh(c(x)))

    model = with_noise(Sum(), where=lambda name, layer: name in ("layers.0", "layers.2"))
    examples = images(300, 4)
    little, much = rises_of(model, examples)
    assert sum(little) < 1e-4 < 1e-2 < sum(much) < 1.1
    assert all(list(each) == sorted(each) for each in (little, much))
    report = bmrs.prune_to(model, bmrs.SNR(), example_inputs=examples[:1], parameters=0.6, examples=examples)
    first, second = report.layers
    assert first.after < second.after
    assert report.least_relative_loss is None
    assert report.unexplained == report.least_unexplained > 0
    assert f"the outputs lose {report.unexplained:.4g} of their variance" in str(report)


@pytest.mark.parametrize("frozen", [False, True])
def test_rises_of_a_linear_network_are_what_the_outputs_lose(frozen):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)).double()
    network.requires_grad_(not frozen)
    model, examples = with_noise(network, where=lambda name, layer: name == "0"), images(500, 5)
    (rises,) = rises_of(model, examples)
    with torch.no_grad():
        hidden, outputs = network[0](examples), network(examples)
    variance = residual(torch.zeros(500, 1).double(), outputs)
    left = list(range(6))
    for rise in rises:
        rests = [[u for u in left if u != gone] for gone in left if gone != 5]
        before = residual(hidden[:, left], outputs)
        losses = [(residual(hidden[:, rest], outputs) - before) / variance for rest in rests]
        assert rise == pytest.approx(min(losses), rel=0.2, abs=1e-4)  # signs are drawn
        left = rests[losses.index(min(losses))]


def test_rises_do_not_depend_on_masks_that_were_set_since(mlp):
    model, examples = with_noise(mlp, where=lambda name, layer: name in ("0", "2")), images(60, 5)
    graph = MaskedGraph(model, as_inputs(examples[:2]), "test")
    base = graph.without()
    groups = [[u for u in graph.units(base) if u.structures[0].layer == name] for name in noise_layers(model)]
    choice = JointChoice(graph, base, as_inputs(examples))
    before = choice.rises(groups)
    graph.set_masks({"0.noise": torch.arange(7) < 2})
    for one, other in zip(before, choice.rises(groups), strict=True):
        assert (one == other).all()


class With(nn.Module):
    """A network and what happens to its outputs."""

    def __init__(self, network, outputs):
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, x):
        return self.outputs(self.network(x))


def inside(outputs):
    return lambda network: with_noise(
        With(network, outputs), where=lambda name, layer: name in ("network.0", "network.2")
    )


@pytest.mark.parametrize(
    "outputs",
    [
        torch.Tensor.detach,
        lambda y: y.argmax(1),
        lambda y: y * 0.0,
        lambda y: y.mean(),
        lambda y: y + torch.sqrt(y * 0.0),  # whose gradient is NaN
    ],
)
def test_numbers_go_by_evidence_where_it_is_not_known_what_outputs_lose(mlp, outputs):
    model = inside(outputs)(mlp)
    assert rises_of(model, images(50, 5)) is None
    report = bmrs.prune_to(
        model, bmrs.SNR(), example_inputs=images(1, 5), parameters=0.6, examples=images(50, 5)
    )
    assert report.met
    assert report.unexplained is None
    assert report.least_relative_loss is not None
    assert "how many went of each layer was left to evidence in spite of the examples" in str(report)


def test_of_several_outputs_each_counts_the_same(mlp):
    examples = images(57, 5)  # the last batch is smaller
    alone = rises_of(inside(lambda y: y)(mlp), examples)
    twice = rises_of(inside(lambda y: {"a": y, "b": (1e6 * y, y.argmax(1))})(mlp), examples)
    pairs = rises_of(inside(lambda y: y @ y.T)(mlp), examples)
    for one, two, pair in zip(alone, twice, pairs, strict=True):
        assert two == pytest.approx([2 * x for x in one], rel=0.5)
        assert all(0 <= x < float("inf") for x in pair)


def test_examples_of_inference_mode_are_taken(mlp):
    model = with_noise(mlp, where=lambda name, layer: name in ("0", "2"))
    with torch.inference_mode():
        examples = images(60, 5) + 0.0
        report = bmrs.prune_to(
            model, bmrs.SNR(), example_inputs=examples[:1], parameters=0.6, examples=examples
        )
    assert report.met
    assert report.unexplained is not None


class Gated(nn.Module):
    """Of three hidden layers one is read by a matrix product, one by a layer that is not called, one as usual."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(3, 8)
        self.matrix, self.uncalled, self.called = (
            nn.Parameter(torch.randn(3, 8)),
            nn.Linear(8, 3),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = torch.tanh(self.first(x)) @ self.matrix.T
        x = nn.functional.linear(torch.tanh(self.second(x)), self.uncalled.weight)
        return self.called(input=torch.tanh(self.third(x)))


def test_what_no_known_layer_reads_goes_by_evidence_and_is_told():
    torch.manual_seed(0)
    model = with_noise(Gated().double(), where=lambda name, layer: name in ("first", "second", "third"))
    alone = copy.deepcopy(model)
    reports = [
        bmrs.prune_to(m, bmrs.SNR(), example_inputs=images(2, 4), parameters=0.6, examples=given)
        for m, given in ((alone, None), (model, images(50, 4)))
    ]
    assert [layer.jointly for layer in reports[1].layers] == [False, False, True]
    for name in ("first.noise", "second.noise"):
        assert torch.equal(noise_layers(model)[name].mask, noise_layers(alone)[name].mask)
    assert "by the examples: third.noise" in str(reports[1])
    assert "left to evidence in spite of the examples" in str(reports[1])
    assert "layers of up to 8,192 inputs read them: first.noise, second.noise" in str(reports[1])
    assert "examples" not in str(reports[0])


def test_feature_maps_are_laid_out_in_parts(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).double()
    model, examples = with_noise(network, where=lambda name, layer: name == "0"), images(30, 2, 8, 8)
    whole = order_of(model, examples, "0.noise", 2)
    monkeypatch.setattr("bmrs.budget.joint_choice._MOST_VALUES", 4000)  # two images
    assert order_of(model, examples, "0.noise", 2) == whole


def test_examples_are_not_run_where_evidence_is_enough(mlp):
    model = with_noise(mlp, where=lambda name, layer: name == "0")
    report = bmrs.prune_to(
        model, bmrs.SNR(), example_inputs=images(1, 5), parameters=1000, examples=images(20, 4)
    )
    assert report.met_by_evidence


def test_few_examples_and_constant_inputs_do_no_harm(mlp):
    model = with_noise(mlp, where=lambda name, layer: name in ("0", "2"))
    for examples in (images(1, 5), images(50, 5) * 0.0):
        trial = copy.deepcopy(model)
        report = bmrs.prune_to(
            trial, bmrs.SNR(), example_inputs=images(1, 5), parameters=0.5, examples=examples
        )
        assert report.met


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        (3, TypeError, "examples must be a tensor, a sequence of positional arguments or a mapping"),
        (torch.zeros(0, 5), ValueError, "examples must hold an example"),
        (
            torch.full((20, 5), torch.nan, dtype=torch.float64),
            ValueError,
            "layer '2' reads NaN or infinite values on examples; nothing was",
        ),
        (images(20, 4), ValueError, "the model does not run on examples: .*; nothing was pruned"),
    ],
)
def test_examples_that_do_not_fit_are_named(mlp, examples, error, message):
    model = with_noise(mlp, where=lambda name, layer: name == "0")
    with pytest.raises(error, match=message):
        bmrs.prune_to(model, bmrs.SNR(), example_inputs=images(1, 5), parameters=0.5, examples=examples)
    assert all(layer.mask.all() for layer in noise_layers(model).values())
