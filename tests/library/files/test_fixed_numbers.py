"""Networks whose code makes a plain number of how many examples there are."""

import pytest
import torch
from torch import nn

import bmrs
from bmrs.graph.free_numbers import is_right_for_more


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


def compacted(number, examples=3):
    model = Fixed(number)
    bmrs.add_noise(model, where="hidden")
    model.hidden.noise.set_kept(torch.tensor([True, False] * 3))
    return bmrs.compact(model, torch.randn(examples, 5, 4))


@pytest.mark.parametrize("examples", [1, 3])
def test_saving_says_that_the_number_of_examples_is_fixed_and_why(examples, tmp_path):
    network, path = compacted(len, examples), tmp_path / "network.safetensors"
    with pytest.warns(
        UserWarning, match=rf"takes {examples} along the first dimension .* the code of Fixed, .*len\(x\)"
    ):
        bmrs.save(path, network)
    images = torch.randn(7, 5, 4)
    torch.testing.assert_close(bmrs.load(path)(images[:examples]), network.eval()(images[:examples]))
    with pytest.raises(ValueError, match=f"must be {examples}"):
        bmrs.load(path)(images)
    own = bmrs.load(path, model=Fixed(len))
    torch.testing.assert_close(own(images), network.eval()(images))


def test_a_free_number_needs_no_warning(tmp_path):
    network, path = compacted(lambda x: x.shape[0]), tmp_path / "network.safetensors"
    bmrs.save(path, network)
    images = torch.randn(7, 5, 4)
    torch.testing.assert_close(bmrs.load(path)(images), network.eval()(images))


class Written(nn.Module):
    """The number of images and the number of channels are both in its code."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Conv2d(1, 8, 3), nn.Linear(8 * 16, 2)

    def forward(self, x):
        return self.o(torch.relu(self.a(x)).view(len(x), 8 * 16))


@pytest.mark.parametrize("number", [1, 3])
def test_a_graph_takes_as_many_as_the_example_has(number, tmp_path):
    model = bmrs.add_noise(Written(), where="a").eval()
    model.a.noise.set_kept(torch.arange(8) % 2 == 0)
    x = torch.randn(number, 1, 6, 6)
    with pytest.warns(UserWarning, match=f"compacted network takes {number} along .* the code of Written"):
        compacted = bmrs.compact(model, x)
    assert bmrs.compact_report(compacted).form == "graph"
    torch.testing.assert_close(compacted(x), model(x))
    with pytest.warns(UserWarning, match=f"saved network takes {number} along"):
        bmrs.save(tmp_path / "m.safetensors", compacted)
    assert torch.equal(bmrs.load(tmp_path / "m.safetensors")(x), compacted(x))


class InParts(nn.Module):
    """Computes parts of its examples one after the other, and has a number of channels in its code."""

    def __init__(self, parts):
        super().__init__()
        self.a, self.o, self.parts = nn.Conv2d(1, 8, 3), nn.Linear(8 * 16, 2), parts

    def forward(self, x):
        x = torch.cat([self.a(part).relu() for part in self.parts(x)])
        return self.o(x.view(-1, 8 * 16))


def compacted_in_parts(parts, images):
    model = bmrs.add_noise(InParts(parts), where="a").eval()
    model.a.noise.set_kept(torch.arange(8) % 2 == 0)
    small = bmrs.compact(model, images)
    assert bmrs.compact_report(small).form == "graph"
    torch.testing.assert_close(small(images), model(images))
    return model, small


@pytest.mark.parametrize(
    ("parts", "number"),
    [
        (lambda x: x.split(8), 14),
        (lambda x: x.chunk(4), 14),
        (lambda x: x.chunk(3), 1),
        (lambda x: x.split(x.shape[0] // 2), 4),
        (lambda x: [x[8 * i : 8 * i + 8] for i in range(-(-x.shape[0] // 8))], 16),
        (lambda x: x.tensor_split(-(-x.shape[0] // 8)), 16),
        (lambda x: x.view(-1, 2, *x.shape[1:]).unbind(0), 4),
    ],
)
def test_parts_of_a_given_size_make_a_number_that_is_fixed(parts, number):
    """Of more examples a graph would leave some out, or take parts that are not there."""
    with pytest.warns(UserWarning, match=rf"takes {number} along .* as x\.split\(8\) does"):
        _, small = compacted_in_parts(parts, torch.randn(number, 1, 6, 6))
    with pytest.raises(ValueError, match=f"size 0 of x must be {number}, .* got 20"):
        small(torch.randn(20, 1, 6, 6))


def test_a_part_that_holds_all_examples_holds_fewer_too():
    model, small = compacted_in_parts(lambda x: x.split(8), torch.randn(1, 1, 6, 6))
    images = torch.randn(8, 1, 6, 6)
    torch.testing.assert_close(small(images), model(images))
    with pytest.raises(ValueError, match=r"size 0 of x must be .* at most 8, .* got 9"):
        small(torch.randn(9, 1, 6, 6))


@pytest.mark.parametrize(
    "parts",
    [
        lambda x: x.chunk(2),
        lambda x: x.repeat(3, 1, 1, 1).chunk(3),
        lambda x: torch.cat([x, x]).split(x.shape[0]),
        lambda x: x.tensor_split(3),
    ],
)
def test_as_many_parts_of_any_size_leave_the_number_free(parts):
    model, small = compacted_in_parts(parts, torch.randn(4, 1, 6, 6))
    images = torch.randn(9, 1, 6, 6)
    torch.testing.assert_close(small(images), model(images))


class Drawing(nn.Module):
    """Counts its calls and draws random numbers, in evaluation mode too; its outputs are small."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        x = self.hidden(x).relu()
        return 1e-6 * self.out(x + torch.randn_like(x))


@pytest.mark.parametrize("differs", [False, True])
def test_more_examples_are_compared_with_nothing_changed(differs):
    model, x = Drawing().eval(), torch.randn(4, 4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
    if differs:
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.neg.default
        program.graph_module.recompile()
    calls, state = model.calls.clone(), torch.get_rng_state()
    assert is_right_for_more(program, model, ((x,), {})) != differs
    assert torch.equal(model.calls, calls)
    assert torch.equal(torch.get_rng_state(), state)
