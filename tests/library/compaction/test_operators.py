"""Networks that are more than chains of stock layers: operators, constants, several inputs and outputs."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compaction_cases import assert_compacts, layer_report, parameter_shapes, prune_structures, randomise
from residual_cases import Sum
from torch import nn

import bmrs
from bmrs.compaction.surgery import ChannelScale
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers


def calling(function, **layers: nn.Module) -> nn.Module:
    """A model whose forward is a function of itself and its inputs."""

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

        def forward(self, *args, **kwargs):
            return function(self, *args, **kwargs)

    return Calling()


def between(function, width: int = 6, reads: int = 6) -> nn.Module:
    """Two linear layers, with noise and a function between them."""
    return calling(
        lambda self, x: self.last(function(self.noise(self.first(x)))),
        first=nn.Linear(4, width),
        noise=NoiseLayer(width, dim=-1),
        last=nn.Linear(reads, 2),
    )


def pruned(model: nn.Module, structures: dict[str, list[int]]) -> nn.Module:
    torch.manual_seed(0)
    layers = noise_layers(randomise(model, pruned=0.0))
    for name, its_structures in structures.items():
        prune_structures(layers[name], its_structures)
    return model


class OwnConv(nn.Conv2d):
    """As libraries have them, which pad by themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if missing := -x.shape[-1] % self.stride[0]:
            x = F.pad(x, (0, missing))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class OwnConvOfOtherSizes(OwnConv):
    """It pads sizes that its stride does not divide, and not that of the example."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, stride=2)


class ConvThatPadsInTraining(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)) if self.training else x, self.weight, self.bias)


class ConvWithHook(OwnConv):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_forward_hook(lambda layer, args, y: y if layer.bias is None else 2 * y)


class ConvWithNorm(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, size: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, size, bias=bias)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(F.conv2d(x, self.weight, bias=self.bias, stride=self.stride)).relu()


class OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)


class StandardisedConv(nn.Conv2d):
    """Its weight is computed, and no constant is taken up, so that nothing can be wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std(dim=(1, 2, 3), keepdim=True), self.bias)


class ConvWithoutBias(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight)


class ConvWithBiasTwice(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, self.weight, self.bias)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class ConvWithOtherWay(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x if self.bias is None else x.abs(), self.weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "removed"),
    [
        *((OwnConv, 3), (ConvWithNorm, 3), (OwnLinear, 3)),
        *((StandardisedConv, 0), (ConvWithoutBias, 0), (ConvWithBiasTwice, 0), (ConvWithOtherWay, 0)),
        *((OwnConvOfOtherSizes, 0), (ConvThatPadsInTraining, 0), (ConvWithHook, 0)),
    ],
)
def test_a_layer_of_an_own_class_gets_a_bias_if_its_code_would_use_it(layer, removed):
    reads = layer(6, 5, bias=False) if layer is OwnLinear else layer(6, 5, 1, bias=False)
    model = nn.Sequential(
        *(
            nn.Conv2d(3, 6, 1),
            NoiseLayer(6),
            nn.BatchNorm2d(6),
            nn.SiLU(),
            reads,
            nn.ReLU(),
            nn.Conv2d(5, 2, 1),
        )
    )
    compacted = assert_compacts(pruned(model, {"1": [0, 2, 5]}), torch.randn(2, 3, 4, 4))
    report = layer_report(compacted, "1")
    assert report.removed == removed
    assert all("no bias can take it up" in reason for reason in report.kept_because)
    assert (compacted[3].bias is not None) == (removed == 3)


def test_a_pad_that_depends_on_the_size_lets_no_constant_pass():
    """It puts nothing around the example, and zeros beside constants for other sizes."""

    class Padded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.pad(x, (0, -x.shape[-1] % 2))

    layers = (nn.Conv2d(3, 6, 1), NoiseLayer(6), nn.BatchNorm2d(6), Padded(), nn.Conv2d(6, 2, 2, stride=2))
    model = pruned(nn.Sequential(*layers), {"1": [0, 2, 5]})
    compacted = assert_compacts(model, torch.randn(2, 3, 4, 4))
    images = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(compacted(images), model.eval()(images))


def chunk_product(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=1)
    return first * second


def chunk_sum(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=1)
    return first + second


def overwritten(x: torch.Tensor, value: torch.Tensor | float) -> torch.Tensor:
    x[:1] = value
    return x


def overwritten_nowhere(x: torch.Tensor, value: float) -> torch.Tensor:
    """As windows of attention do that are shifted by 0."""
    x[len(x) :, :1] = value
    return x


def put(x: torch.Tensor, where: torch.Tensor, value: float) -> torch.Tensor:
    x[where] = value
    return x


def of_input(h: torch.Tensor) -> torch.Tensor:
    """A mask for each example, which nobody knows."""
    return h.sum(1, keepdim=True) > 0.0


class TestOperators:
    @pytest.mark.parametrize(
        ("function", "reads", "structures", "removed", "left"),
        [
            (lambda h: h * torch.relu(h), 6, [0, 3], 2, 4),
            (lambda h: torch.cat([h, torch.relu(h)]), 6, [0, 3], 2, 4),
            (lambda h: torch.cat([h, torch.relu(h)], dim=1), 12, [0, 3], 2, 8),
            (lambda h: h + 1.0, 6, [0, 3], 2, 4),
            (lambda h: 3.0 - h / 2, 6, [0, 3], 2, 4),
            (lambda h: torch.add(h, torch.relu(h), alpha=2), 6, [0, 3], 2, 4),
            (lambda h: h + h.sum(1, keepdim=True), 6, [0, 3], 0, 6),
            (lambda h: h * h.sum(1, keepdim=True), 6, [0, 3], 2, 4),
            (lambda h: torch.softmax(h, 1), 6, [0, 3], 0, 6),
            (lambda h: torch.sin(h), 6, [0, 3], 2, 4),
            (lambda h: torch.cos(h), 6, [0, 3], 2, 4),
            (lambda h: F.dropout(h, 0.5, training=False), 6, [0, 3], 2, 4),
            (chunk_product, 3, [0, 4], 2, 1),
            # Structures 0 and 3 are added; 4 is added to 1, which stays.
            (chunk_sum, 3, [0, 3, 4], 2, 2),
            (lambda h: h.view(len(h), -1, 2).relu().flatten(1), 6, [0, 1, 4, 5], 4, 2),
            (lambda h: torch.stack([h, -h], dim=1).amax(1), 6, [0, 3], 2, 4),
            # The code counts entries by number.
            (lambda h: h[:, ::2], 3, [0, 2], 0, 3),
            (lambda h: torch.where(h > 0.0, h, h.exp() - 1.0), 6, [0, 3], 2, 4),
            (lambda h: torch.einsum("ni,ni->ni", h, h), 6, [0, 3], 2, 4),
            (lambda h: torch.einsum("ni,mi->mi", h, h), 6, [0, 3], 2, 4),
            (lambda h: torch.einsum("n...->n...", h), 6, [0, 3], 2, 4),
            (lambda h: torch.einsum("n...,n...", h, h), 6, [0, 3], 2, 4),
            (lambda h: torch.einsum("ni,ni,ni->ni", h, h.relu(), h.sigmoid()), 6, [0, 3], 2, 4),
            (lambda h: torch.einsum("ni,mj,mi->ni", h, h, h), 6, [0, 3], 2, 4),
            (lambda h: torch.einsum("nini->ni", h[:, :, None, None].expand(-1, -1, len(h), 6)), 6, [0], 0, 6),
            # What is written at some places, of all channels alike or of numbers that are no channels.
            (lambda h: h * overwritten(torch.ones(len(h), 1), 0.0), 6, [0, 3], 2, 4),
            (lambda h: overwritten(h * 1.0, torch.tensor(0.0)), 6, [0, 3], 2, 4),
            (
                lambda h: h * torch.zeros(1, 1).masked_fill(torch.ones(1, 1) > 0, torch.tensor(2.0)),
                6,
                [0],
                1,
                5,
            ),
            (lambda h: overwritten(h * 1.0, 2.0), 6, [0, 3], 0, 6),
            (lambda h: put(h * 1.0, h < 0.0, 0.0), 6, [0, 3], 2, 4),
            (lambda h: put(h * 1.0, h <= 0.0, 2.0), 6, [0, 3], 0, 6),
            (lambda h: put(h * 1.0, torch.tensor([0, 2]), 0.0), 6, [0, 3], 0, 6),
            (lambda h: h + torch.empty_like(h).zero_(), 6, [0, 3], 2, 4),
            # Of no elements.
            (lambda h: h * overwritten_nowhere(h.new_ones(4, 1), 2.0).sum(), 6, [0, 3], 2, 4),
            (lambda h: overwritten_nowhere(h * 1.0, 2.0), 6, [0, 3], 2, 4),
            (lambda h: h + h[:0].sum(), 6, [0, 3], 0, 6),
            (lambda h: h * torch.zeros_like(h)[:0].prod(0), 6, [0, 3], 0, 6),
            (lambda h: h.index_fill(0, torch.tensor([1]), 0.0), 6, [0, 3], 2, 4),
            (lambda h: h.index_fill(1, torch.tensor([1]), 0.0), 6, [0, 3], 0, 6),
            # What the input picks of zeros is 0, whatever it picks.
            (lambda h: h.masked_fill(of_input(h), 0.0), 6, [0, 3], 2, 4),
            (lambda h: h.masked_fill(of_input(h), 2.0), 6, [0, 3], 0, 6),
            (lambda h: torch.where(of_input(h), h, 0.0), 6, [0, 3], 2, 4),
            (lambda h: torch.where(of_input(h), h, h.relu()), 6, [0, 3], 2, 4),
            (lambda h: torch.where(of_input(h), h, h + 1.0), 6, [0, 3], 0, 6),
            (lambda h: torch.lerp(h, h.relu(), of_input(h).to(h.dtype)), 6, [0, 3], 2, 4),
            (lambda h: torch.addcmul(h, h.relu(), of_input(h).to(h.dtype)), 6, [0, 3], 2, 4),
            (lambda h: torch.addcdiv(h, h.relu(), 2.0 + of_input(h)), 6, [0, 3], 2, 4),
            (lambda h: torch.addcdiv(h, 1.0 + h, 2.0 + of_input(h)), 6, [0, 3], 0, 6),
            (lambda h: torch.fmod(h, 2.0 + of_input(h)), 6, [0, 3], 2, 4),
            (lambda h: put(h * 1.0, of_input(h)[:, 0], 0.0), 6, [0, 3], 2, 4),
            (lambda h: put(h * 1.0, of_input(h)[:, 0], 2.0), 6, [0, 3], 0, 6),
            # The larger of two, which has the name of a reduction.
            (lambda h: torch.max(h, h.relu() - h), 6, [0, 3], 2, 4),
            (lambda h: h.min(torch.tensor(0.0)), 6, [0, 3], 2, 4),
            (lambda h: torch.hstack([h, h.relu()]), 12, [0, 3], 2, 8),
            (lambda h: torch.vstack([h, h.relu()]), 6, [0, 3], 2, 4),
            (lambda h: h / (1.0 + torch.linalg.norm(h, dim=1, keepdim=True)), 6, [0, 3], 2, 4),
            (lambda h: h / (1.0 + torch.linalg.norm(h, -1.0, dim=1, keepdim=True)), 6, [0, 3], 0, 6),
            (lambda h: 1.0 - torch.erfc(h), 6, [0, 3], 2, 4),
            # All products of two entries: those of one that is 0 are.
            (lambda h: torch.einsum("ni,nj->nij", h, h).flatten(1), 36, [0, 3], 2, 16),
            (lambda h: (h[:, :, None] * h[:, None]).view(len(h), -1), 36, [0, 3], 2, 16),
            (lambda h: (h[:, :, None] * h[:, None].exp()).flatten(1), 36, [0, 3], 0, 36),
            (lambda h: F.glu(h, dim=1), 3, [0, 1], 2, 1),
            (lambda h: F.normalize(h, dim=1), 6, [0, 3], 2, 4),
            (lambda h: h / (1.0 + h.norm(dim=1, keepdim=True)).expand(h.shape), 6, [0, 3], 2, 4),
            (lambda h: h + torch.linalg.vector_norm(h, -1, 1, True), 6, [0, 3], 0, 6),  # 0 where any entry is
            (lambda h: 1.0 / (2.0 + h.tanh()), 6, [0, 3], 2, 4),
            (lambda h: h.cumsum(0), 6, [0, 3], 2, 4),
            (lambda h: F.pad(h[None], (2, 3), mode="circular")[0], 11, [0, 1, 2, 3], 0, 11),
            (lambda h: F.pad(h.T[None], (2, 1), mode="reflect")[0].T[:3], 6, [0, 3], 2, 4),
            (lambda h: h.cumsum(1), 6, [0, 3], 0, 6),
            (lambda h: h.sort(dim=0).values, 6, [0, 3], 2, 4),
        ],
    )
    def test_between_linear_layers(self, function, reads, structures, removed, left):
        model = pruned(between(function, reads=reads), {"noise": structures})
        compacted = assert_compacts(model, torch.randn(3, 4))
        assert layer_report(compacted, "noise").removed == removed
        assert compacted.last.in_features == left

    @pytest.mark.parametrize(
        ("change", "left"),
        [
            (lambda w: w * 0.5, 4),
            (lambda w: w - w.mean((1, 2, 3), keepdim=True), 6),  # reads all of a filter
            (lambda w: (w - w.mean((2, 3), keepdim=True)).tanh(), 4),
            (lambda w: F.normalize(w, dim=(2, 3)), 4),
        ],
    )
    def test_kernels_that_are_computed_of_a_weight(self, change, left):
        model = calling(
            lambda self, x: F.conv2d(
                self.noise(F.conv2d(x, change(self.first.weight))), change(self.last.weight)
            ),
            first=nn.Conv2d(3, 6, 3),
            noise=NoiseLayer(6),
            last=nn.Conv2d(6, 2, 3),
        )
        compacted = assert_compacts(pruned(model, {"noise": [0, 3]}), torch.randn(2, 3, 7, 7))
        assert len(compacted.first.weight) == compacted.last.weight.shape[1] == left

    @pytest.mark.parametrize("gate", [torch.sigmoid, lambda w: w.softmax(1), lambda w: w.cumsum(1)])
    def test_channels_leave_branches_that_compete(self, gate):
        """As in selective kernels: each channel of each branch has a gate, which depends on those of the others."""

        def forward(self, x):
            branches = torch.stack([self.noise(self.first(x)), self.other_noise(self.second(x))], 1)
            gates = gate(self.gates(branches.sum(1)).unflatten(1, (2, -1)))
            return self.last((branches * gates).sum(1))

        layers = {"first": nn.Linear(4, 6), "second": nn.Linear(4, 6), "gates": nn.Linear(6, 12)}
        model = calling(
            forward, **layers, noise=NoiseLayer(6), other_noise=NoiseLayer(6), last=nn.Linear(6, 2)
        )
        model = pruned(model, {"noise": [0, 3], "other_noise": [0, 3, 4]})
        compacted = assert_compacts(model, torch.randn(3, 4))
        assert compacted.first.out_features == compacted.second.out_features == 4
        assert compacted.gates.out_features == 8

    def test_branches_that_compete_keep_a_channel_that_one_of_them_needs(self):
        model = calling(
            lambda self, x: self.last(
                (self.noise(self.first(x)).view(-1, 2, 3).softmax(1) * x[:, :1, None]).flatten(1)
            ),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6),
            last=nn.Linear(6, 2),
        )
        compacted = assert_compacts(pruned(model, {"noise": [0, 4]}), torch.randn(3, 4))
        assert compacted.first.out_features == 6

    @pytest.mark.parametrize(
        "gather",
        [
            lambda h, index: torch.zeros_like(h).index_add(0, index, h * 2.0),
            lambda h, index: torch.zeros(len(h), h.shape[1]).index_add(0, index, h),
            lambda h, index: torch.zeros_like(h).scatter_add(0, index[:, None].expand_as(h), h),
            lambda h, index: torch.zeros_like(h).scatter_reduce(
                0, index[:, None].expand(-1, h.shape[1]), h, "amax"
            ),
            lambda h, index: (h * 1.0).index_copy(0, index, h.sin()),
            lambda h, index: (h * 1.0).scatter(0, index[:, None].expand_as(h), 0.0),
            lambda h, index: torch.zeros_like(h).index_add(0, index, h[index]),
            lambda h, index: torch.zeros_like(h).index_add(0, index, h.index_select(0, index)),
        ],
    )
    def test_channels_leave_messages_between_nodes(self, gather):
        model = calling(
            lambda self, x, index: self.last(gather(self.noise(self.first(x)), index)),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6),
            last=nn.Linear(6, 2),
        )
        index = torch.tensor([1, 0, 3, 2, 4])
        compacted = assert_compacts(pruned(model, {"noise": [0, 3]}), (torch.randn(5, 4), index))
        assert compacted.first.out_features == compacted.last.in_features == 4

    @pytest.mark.parametrize("written_out", [True, False])
    def test_channels_that_attention_takes_for_keys_stay(self, written_out):
        """What is pruned has zeros for key and value, but a share of the attention all the same."""

        def forward(self, x):
            tokens = self.noise(self.first(x))
            queries, keys, values = self.query(x), self.key(tokens), self.value(tokens)
            if written_out:
                return self.last((queries @ keys.mT).softmax(-1) @ values)
            return self.last(F.scaled_dot_product_attention(queries, keys, values))

        heads = {name: nn.Linear(5, 4, bias=False) for name in ("query", "key", "value")}
        model = calling(forward, first=nn.Conv1d(3, 6, 1), noise=NoiseLayer(6), last=nn.Linear(4, 2), **heads)
        compacted = assert_compacts(pruned(model, {"noise": [0, 3]}), torch.randn(2, 3, 5))
        (reason,) = layer_report(compacted, "noise").kept_because
        assert "softmax" in reason

    def test_numbers_of_groups_in_attributes_of_ones_own_layers_change(self):
        """As of blurring that stands in for a stride, with a fixed kernel for each channel."""

        class Blur(nn.Module):
            def __init__(self, channels: int) -> None:
                super().__init__()
                self.channels, self.size = channels, 3
                self.register_buffer("kernel", torch.ones(channels, 1, 3, 3) / 9)

            def forward(self, x):
                return F.conv2d(x, self.kernel, groups=self.channels)

        layers = (nn.Conv2d(3, 8, 1), NoiseLayer(8), Blur(8), nn.Conv2d(8, 6, 1), NoiseLayer(6), Blur(6))
        model = pruned(nn.Sequential(*layers, nn.Conv2d(6, 2, 1)), {"1": [0, 3, 5], "4": [2]})
        compacted = assert_compacts(model, torch.randn(2, 3, 9, 9))
        assert [layer.channels for layer in compacted if isinstance(layer, Blur)] == [5, 5]
        assert model[2].channels == 8

    def test_sums_over_messages_of_a_width_in_the_code_make_a_graph(self):
        model = calling(
            lambda self, x, index: self.last(
                torch.zeros(x.shape[0], 6).index_add(0, index, self.noise(self.first(x)))
            ),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6),
            last=nn.Linear(6, 2),
        )
        inputs = (torch.randn(5, 4), torch.tensor([1, 0, 3, 2, 4]))
        compacted = assert_compacts(pruned(model, {"noise": [0, 3]}), inputs, form="graph")
        assert parameter_shapes(compacted)["first.weight"] == (4, 4)

    @pytest.mark.parametrize(
        "gather",
        [
            lambda h, index: (h * 1.0).index_add(1, index, h),  # along the channels
            lambda h, index: (h * 1.0).scatter(0, index[:, None].expand_as(h), 2.0),  # no zeros any more
            lambda h, index: (h * 1.0).scatter_add(0, index[:3, None].expand(3, 4), h[:, :4]),  # a part
            lambda h, index: (h + 1.0).index_add(0, index, h),
        ],
    )
    def test_channels_stay_where_messages_are_more_than_zeros(self, gather):
        model = calling(
            lambda self, x, index: self.last(gather(self.noise(self.first(x)), index)),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6),
            last=nn.Linear(6, 2),
        )
        index = torch.tensor([1, 0, 3, 2, 4, 5])
        compacted = assert_compacts(pruned(model, {"noise": [0, 3]}), (torch.randn(6, 4), index))
        assert compacted.first.out_features == 6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_graphs_of_networks_that_cast_to_the_dtype_of_what_they_get(self, dtype):
        """In the graph that dtype is written down, so that it cannot be computed in double precision."""
        model = pruned(between(lambda h: h.view(-1, 6).float().to(h.dtype) * 1.0), {"noise": [0, 3]}).to(
            dtype
        )
        compacted = bmrs.compact(model, torch.randn(3, 4, dtype=dtype))
        report = bmrs.compact_report(compacted)
        assert (report.form, report.removed, report.compared_in) == ("graph", 2, "its own dtype")

    def test_entries_picked_by_number_make_a_graph(self):
        model = pruned(between(lambda h: h[:, [5, 4, 3, 2, 1, 0]]), {"noise": [0, 2]})
        compacted = assert_compacts(model, torch.randn(3, 4), form="graph")
        assert layer_report(compacted, "noise").removed == 2
        assert parameter_shapes(compacted)["last.weight"] == (2, 4)

    def test_a_width_that_the_code_expands_to_makes_a_graph(self):
        model = pruned(
            between(lambda h: h * h.sum(1, keepdim=True).sigmoid().expand(-1, 6)), {"noise": [0, 3]}
        )
        compacted = assert_compacts(model, torch.randn(3, 4), form="graph")
        assert layer_report(compacted, "noise").removed == 2

    @pytest.mark.parametrize(
        ("activation", "options", "removed"),
        [
            (torch.relu, {"padding": 1, "stride": 2}, 2),
            (torch.sigmoid, {"dilation": 2}, 2),
            (torch.sigmoid, {"padding": 1}, 0),  # a half, but 0 around the map
        ],
    )
    def test_channels_leave_windows_of_feature_maps(self, activation, options, removed):
        model = calling(
            lambda self, x: self.last(F.unfold(activation(self.noise(self.first(x))), 3, **options).mT),
            first=nn.Conv2d(3, 6, 1),
            noise=NoiseLayer(6, dim=1),
            last=nn.Linear(54, 2),
        )
        compacted = assert_compacts(pruned(model, {"noise": [0, 3]}), torch.randn(2, 3, 7, 7))
        assert layer_report(compacted, "noise").removed == removed
        assert compacted.last.in_features == 54 - 9 * removed

    @pytest.mark.parametrize("structures", [[0, 3], [0]])
    def test_cosines_read_what_either_of_two_towers_has(self, structures):
        model = calling(
            lambda self, x, y: F.cosine_similarity(
                self.left(self.first(x)), self.right(self.second(y)), dim=1
            ),
            first=nn.Linear(4, 6),
            left=NoiseLayer(6, dim=-1),
            second=nn.Linear(5, 6),
            right=NoiseLayer(6, dim=-1),
        )
        model = pruned(model, {"left": [0, 3], "right": structures})
        compacted = assert_compacts(model, (torch.randn(3, 4), torch.randn(3, 5)))
        assert sum(layer_report(compacted, name).removed for name in ("left", "right")) == 2 * len(structures)
        assert compacted.first.out_features == compacted.second.out_features == 6 - len(structures)

    def test_tokens_of_the_model_that_a_layer_takes_expanded(self):
        """Without gradients such a view has none, and FlopCounterMode would stop at it."""
        model = calling(
            lambda self, x: self.last(self.noise(self.first(self.token.expand(len(x), -1)) + x)),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6, dim=-1),
            last=nn.Linear(6, 2),
        )
        model.token = nn.Parameter(torch.randn(1, 4))
        compacted = assert_compacts(pruned(model, {"noise": [0]}), torch.randn(3, 6))
        assert bmrs.compact_report(compacted).flops_before == 2 * 3 * (4 * 6 + 6 * 2)

    def test_constant_of_a_fixed_width_keeps_channels(self):
        model = pruned(between(lambda h: h + torch.ones(6)), {"noise": [0]})
        compacted = assert_compacts(model, torch.randn(3, 4))
        (reason,) = layer_report(compacted, "noise").kept_because
        assert "cannot be cut at add" in reason

    @pytest.mark.parametrize(
        ("last", "read", "reason"),
        [
            (
                nn.Conv1d(6, 2, 3, padding=1),
                None,
                "beside the zeros of the padding at conv1d in layer 'last'",
            ),
            (nn.Conv1d(6, 2, 3, padding=1, groups=2), None, "beside the zeros of the padding at conv1d"),
            (
                nn.ConvTranspose1d(6, 2, 3),
                None,
                "which fewer weights meet at the borders at conv_transpose1d",
            ),
            (
                nn.ConvTranspose1d(6, 2, 2, stride=2),
                None,
                "which meets other weights from place to place, as the stride is more than 1 at conv_transpose1d",
            ),
            (
                nn.ConvTranspose1d(6, 2, 3, padding=2),
                None,
                "which is not followed through transposed convolutions at conv_transpose1d",
            ),
            # The weight alone.
            (
                nn.Conv1d(6, 2, 3),
                lambda h, last: F.conv1d(h, last.weight),
                "and no bias can take it up at conv1d",
            ),
            (
                nn.Linear(6, 2),
                lambda h, last: F.linear(h.mT, last.weight),
                "and no bias can take it up at linear",
            ),
        ],
    )
    def test_constants_that_stay_say_why(self, last, read, reason):
        def forward(self, x):
            h = torch.sigmoid(self.noise(self.first(x)))
            return self.last(h) if read is None else read(h, self.last)

        model = calling(forward, first=nn.Conv1d(3, 6, 1), noise=NoiseLayer(6, dim=1), last=last)
        compacted = assert_compacts(pruned(model, {"noise": [0]}), torch.randn(2, 3, 7))
        (found,) = layer_report(compacted, "noise").kept_because
        assert f"a constant other than 0 is left of it, {reason}" in found

    def test_constants_in_front_of_a_depthwise_convolution_leave_with_what_is_behind_it(self):
        """As in MobileNets: what is left of a channel is a constant, and its own output is pruned as well."""
        layers = [nn.Conv2d(3, 8, 1), NoiseLayer(8), nn.BatchNorm2d(8), nn.ReLU6()]
        layers += [nn.Conv2d(8, 8, 3, padding=1, groups=8), NoiseLayer(8), nn.BatchNorm2d(8), nn.ReLU6()]
        model = pruned(nn.Sequential(*layers, nn.Conv2d(8, 4, 1)), {"1": [0, 3, 5, 6], "5": [0, 3, 5, 6]})
        nn.init.ones_(model[2].bias)
        nn.init.ones_(model[6].bias)
        compacted = assert_compacts(model, torch.randn(2, 3, 8, 8))
        assert [layer_report(compacted, name).removed for name in ("1", "5")] == [4, 4]

    @pytest.mark.parametrize(
        ("function", "of_b", "removed", "form"),
        [
            (lambda a, b: a.flatten(0, 1).relu().reshape_as(a), [], (2, 0), "module"),
            (lambda a, b: a.unflatten(-1, (2, 3)).relu().reshape_as(b), [1, 4], (2, 2), "graph"),
            # Of both, whatever the other one is where only its sizes are read.
            (lambda a, b: a.flatten(0, 1).relu().view_as(b), [1, 4], (2, 2), "module"),
            (lambda a, b: a.flatten(0, 1).relu().view_as(b), [], (2, 0), "module"),
            (lambda a, b: a.flatten(0, 1).relu().view_as(b) + b.exp(), [], (0, 0), "module"),
            (lambda a, b: b.flatten(0, 1).relu().reshape_as(a), [], (0, 0), "module"),
            (lambda a, b: a.flatten(0, 1).relu().reshape_as(torch.ones(3, 5, 6)), [], (0, 0), "module"),
            (lambda a, b: a.sum(1, keepdim=True).expand_as(b), [1, 4], (2, 2), "module"),
            (lambda a, b: b[:, :1].expand_as(a), [], (0, 0), "module"),
            (lambda a, b: a.sum(2, keepdim=True).expand_as(b) * b, [1, 4], (2, 2), "module"),
        ],
    )
    def test_a_tensor_that_gives_the_sizes_keeps_those_of_the_result(self, function, of_b, removed, form):
        model = calling(
            lambda self, x: self.last(function(self.noise_a(self.a(x)), self.noise_b(self.b(x)))),
            a=nn.Linear(3, 6),
            noise_a=NoiseLayer(6, dim=-1),
            b=nn.Linear(3, 6),
            noise_b=NoiseLayer(6, dim=-1),
            last=nn.Linear(6, 2),
        )
        model = pruned(model, {"noise_a": [1, 4], "noise_b": of_b})
        compacted = assert_compacts(model, torch.randn(3, 5, 3), form)
        assert tuple(layer_report(compacted, f"noise_{n}").removed for n in "ab") == removed

    def test_pruned_entries_of_the_input_itself_are_not_counted_as_removed(self):
        model = calling(
            lambda self, x: self.last(self.noise(torch.cat([self.first(x), x], dim=1))),
            first=nn.Linear(4, 3),
            noise=NoiseLayer(7, dim=-1),
            last=nn.Linear(7, 2),
        )
        compacted = assert_compacts(pruned(model, {"noise": [1, 5, 6]}), torch.randn(3, 4))
        report = layer_report(compacted, "noise")
        assert (report.removed, report.kept_because) == (1, {"it multiplies what always stays": 2})
        assert compacted.last.in_features == 6

    def test_parameter_of_the_model_itself_shrinks(self):
        model = calling(
            lambda self, x: self.last(torch.relu(self.noise(self.first(x))) * self.scale),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6),
            last=nn.Linear(6, 2),
        )
        model.register_parameter("scale", nn.Parameter(torch.randn(6), requires_grad=False))
        compacted = assert_compacts(pruned(model, {"noise": [0, 3]}), torch.randn(3, 4))
        assert compacted.scale.shape == (4,)
        assert not compacted.scale.requires_grad
        assert torch.equal(compacted.scale, model.scale[[1, 2, 4, 5]])

    def test_addition_of_unequal_shapes(self):
        branches = [
            nn.Sequential(nn.Conv1d(2, 4, 1), NoiseLayer(4), nn.AdaptiveAvgPool1d(1)),
            nn.Sequential(nn.Conv1d(2, 4, 1), NoiseLayer(4)),
        ]
        model = nn.Sequential(Sum(*branches, way="operator"), nn.Conv1d(4, 2, 1))
        pruned(model, {"0.first.1": [0, 1], "0.second.1": [0]})
        compacted = assert_compacts(model, torch.randn(3, 2, 5))
        assert compacted[1].in_channels == compacted[0].first[0].out_channels == 3

    def test_addition_of_channels_to_something_else(self):
        branches = [
            nn.Sequential(nn.Conv1d(5, 5, 1), NoiseLayer(5)),
            nn.Sequential(nn.Linear(5, 5), NoiseLayer(5, dim=2)),
        ]
        model = nn.Sequential(Sum(*branches, way="operator"), nn.Flatten(), nn.Linear(25, 2))
        pruned(model, {"0.first.1": [0], "0.second.1": [1]})
        compacted = assert_compacts(model, torch.randn(3, 5, 5))
        assert compacted[2].in_features == 25
        assert not compacted[0].first[0].weight[0].any()
        assert not compacted[0].second[0].weight[1].any()

    @pytest.mark.parametrize(
        ("layers", "shape", "structures", "removed"),
        [
            (
                [nn.Conv1d(2, 4, 1), NoiseLayer(4), nn.ReLU(), nn.Linear(5, 5), nn.Conv1d(4, 1, 1)],
                (3, 2, 5),
                [1],
                0,
            ),
            ([nn.Linear(5, 4), NoiseLayer(4, dim=2), nn.BatchNorm1d(2), nn.Linear(4, 1)], (3, 2, 5), [1], 0),
            ([NoiseLayer(3, dim=0), nn.Linear(5, 4)], (3, 2, 5), [1], 0),
            ([nn.Linear(4, 4), NoiseLayer(4), nn.MaxPool1d(2)], (3, 4), [1], 0),
            (
                [nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Flatten(), NoiseLayer(20), nn.Linear(20, 2)],
                (3, 2, 5),
                range(7),
                5,
            ),
        ],
    )
    def test_layers_along_other_dimensions(self, layers, shape, structures, removed):
        model = nn.Sequential(*layers)
        (name,) = noise_layers(model)
        compacted = assert_compacts(pruned(model, {name: list(structures)}), torch.randn(shape))
        assert layer_report(compacted, name).removed == removed


class TestLayers:
    @pytest.mark.parametrize(
        ("layer", "structures", "removed"),
        [
            (nn.GroupNorm(3, 6), [2, 3], 2),
            (nn.GroupNorm(3, 6), [1, 2], 0),
            (nn.InstanceNorm1d(6, affine=True), [1, 2], 2),
            (nn.BatchNorm1d(6, track_running_stats=False), [1, 2], 2),
            (nn.PReLU(6), [1, 2], 2),
            (nn.PReLU(), [1, 2], 2),
            (nn.Upsample(scale_factor=2), [1, 2], 2),
            (nn.ConstantPad1d(1, 0.0), [1, 2], 2),
            (nn.ReflectionPad1d(1), [1, 2], 2),
            (nn.ConvTranspose1d(6, 6, 2, stride=2), [1, 2], 2),
            (nn.ConvTranspose1d(6, 6, 2, groups=2), [1, 4], 2),
            (nn.Softsign(), [1, 2], 2),
            (nn.LayerNorm([6, 5]), [1, 2], 0),
        ],
        ids=str,
    )
    def test_behind_noise_on_channels(self, layer, structures, removed):
        model = nn.Sequential(nn.Conv1d(2, 6, 1), NoiseLayer(6), layer, nn.Conv1d(6, 2, 1))
        compacted = assert_compacts(pruned(model, {"1": structures}), torch.randn(3, 2, 5))
        assert layer_report(compacted, "1").removed == removed
        assert compacted[0].out_channels == 6 - removed

    # Zeros in front of a root mean square can leave it; what it makes is not zero before the noise.
    @pytest.mark.parametrize(
        ("norm", "before"),
        [(nn.LayerNorm(6), False), (nn.LayerNorm(6), True), (nn.RMSNorm(6), True)],
        ids=str,
    )
    def test_statistics_keep_channels_and_the_report_says_so(self, norm, before):
        layers = [norm, NoiseLayer(6)] if before else [NoiseLayer(6), norm]
        model = nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 2))
        (name,) = noise_layers(model)
        compacted = assert_compacts(pruned(model, {name: [0, 3]}), torch.randn(3, 4))
        report = layer_report(compacted, name)
        assert report.removed == 0
        assert list(report.kept_because.values()) == [2]
        assert "normalisation" in next(iter(report.kept_because))

    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("function", [torch.relu, lambda h: h + 1.0])
    def test_a_group_that_is_not_pruned_as_a_whole_names_the_normalisation(self, affine, function):
        model = calling(
            lambda self, x: self.last(function(self.norm(self.noise(self.first(x))))),
            first=nn.Conv2d(3, 6, 1),
            noise=NoiseLayer(6),
            norm=nn.GroupNorm(2, 6, affine=affine),
            last=nn.Conv2d(6, 2, 3, padding=1),
        )
        compacted = assert_compacts(pruned(model, {"noise": [1, 2]}), torch.randn(2, 3, 4, 4))
        counted = "the statistics of a normalisation count it (group_norm in layer 'norm')"
        assert layer_report(compacted, "noise").kept_because == {
            f"{counted}, and it is read at conv2d in layer 'last'": 2
        }

    def test_transformer_encoder_layer(self):
        model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        bmrs.add_noise(model, where="linear1")
        compacted = assert_compacts(pruned(model, {"linear1.noise": [0, 3]}), torch.randn(3, 5, 8))
        assert compacted.linear1.out_features == compacted.linear2.in_features == 14

    @pytest.mark.parametrize(("heads", "form"), [(-1, "module"), (4, "graph")])
    def test_attention_heads(self, heads, form):
        def attend(self, x):
            q, k, v = (
                layer(x).unflatten(-1, (heads, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        model = calling(attend, **{name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")})
        bmrs.add_noise(model, where="out", structures="heads", num_heads=4)
        compacted = assert_compacts(pruned(model, {"out.noise": [1, 3]}), torch.randn(3, 5, 8), form=form)
        assert {parameter_shapes(compacted)[f"{name}.weight"] for name in ("q", "k", "v")} == {(4, 8)}
        assert parameter_shapes(compacted)["out.weight"] == (8, 4)
        with torch.no_grad():
            x = torch.randn(7, 3, 8)
            torch.testing.assert_close(compacted(x), model.eval()(x))

    def test_embedding(self):
        model = nn.Sequential(nn.Embedding(10, 6), NoiseLayer(6, dim=-1), nn.ReLU(), nn.Linear(6, 2))
        compacted = assert_compacts(pruned(model, {"1": [0, 3]}), torch.randint(0, 10, (3, 7)))
        assert compacted[0].weight.shape == (10, 4)
        assert compacted[0].embedding_dim == 4

    def test_recurrent_layers(self):
        model = calling(
            lambda self, x: self.behind(self.second(self.recurrent(self.noise(self.first(x)))[0])),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6, dim=-1),
            recurrent=nn.LSTM(6, 5, batch_first=True),
            second=NoiseLayer(5, dim=-1),
            behind=nn.Linear(5, 2),
        )
        compacted = assert_compacts(pruned(model, {"noise": [0, 3], "second": [2]}), torch.randn(3, 7, 4))
        assert compacted.recurrent.input_size == compacted.first.out_features == 4
        assert compacted.recurrent.weight_hh_l0.shape == (20, 5)
        assert not compacted.behind.weight[:, 2].any()


class Named(nn.Module):
    """Several inputs, some of them optional, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.noise, self.last = nn.Linear(4, 6), NoiseLayer(6), nn.Linear(6, 2)

    def forward(self, x, scale=None, *, everything=True):
        hidden = self.noise(self.first(x))
        if scale is not None:
            hidden = hidden * scale
        out = self.last(torch.relu(hidden))
        return {"out": out, "others": (hidden.sum(1), x)} if everything else out


class TestInputsAndOutputs:
    @pytest.mark.parametrize(
        "inputs",
        [
            torch.randn(3, 4),
            (torch.randn(3, 4), torch.randn(3, 1)),
            {"x": torch.randn(3, 4)},
            {"scale": torch.randn(3, 1), "x": torch.randn(3, 4)},
            OrderedDict(x=torch.randn(3, 4), everything=False),
            [torch.randn(3, 4), None],
        ],
        ids=["tensor", "positional", "keyword", "keywords", "flag", "none"],
    )
    def test_arguments(self, inputs):
        model = pruned(Named(), {"noise": [0, 3]})
        compacted = assert_compacts(model, inputs)
        assert compacted.first.out_features == compacted.last.in_features == 4

    def test_structures_of_the_arguments(self):
        model = calling(
            lambda self, pair, named: (
                self.last(torch.relu(self.noise(self.first(pair[0] + named["y"])))),
                pair,
            ),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6),
            last=nn.Linear(6, 2),
        )
        inputs = ([torch.randn(3, 4), torch.randn(3)], {"y": torch.randn(3, 4)})
        assert assert_compacts(pruned(model, {"noise": [0, 3]}), inputs).last.in_features == 4

    def test_second_input_joins_the_channels(self):
        model = calling(
            lambda self, x, y: self.last(torch.cat([self.noise(self.first(x)), y], dim=1)),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6),
            last=nn.Linear(11, 2),
        )
        compacted = assert_compacts(pruned(model, {"noise": [0, 3]}), (torch.randn(3, 4), torch.randn(3, 5)))
        assert compacted.last.in_features == 9
        assert torch.equal(compacted.last.weight[:, 4:], model.last.weight[:, 6:])

    def test_intermediate_result_that_is_returned_keeps_its_channels(self):
        model = calling(
            lambda self, x: (hidden := self.noise(self.first(x)), self.last(hidden)),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6),
            last=nn.Linear(6, 2),
        )
        compacted = assert_compacts(pruned(model, {"noise": [0, 3]}), torch.randn(3, 4))
        assert compacted.first.out_features == 6

    def test_other_numbers_of_examples(self):
        model = pruned(Named(), {"noise": [0, 3]})
        compacted = bmrs.compact(model, torch.randn(1, 4))
        x = torch.randn(9, 4)
        with torch.no_grad():
            torch.testing.assert_close(compacted(x)["out"], model.eval()(x)["out"])


class TestNoiseThatCannotBeFolded:
    """One multiplication by fixed factors is left."""

    @pytest.mark.parametrize(
        ("model", "name", "obstacle"),
        [
            (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), NoiseLayer(4), nn.Tanh()), "2", "pass tanh"),
            (
                nn.Sequential(nn.Linear(4, 4), NoiseLayer(4, activation="tanh"), nn.ReLU()),
                "1",
                "the model's output",
            ),
            (
                nn.Sequential(NoiseLayer(4), nn.ReLU(), NoiseLayer(4, activation="tanh"), nn.Linear(4, 1)),
                "0",
                "no parameters, and forward it cannot pass tanh",
            ),
            (
                nn.Sequential(
                    nn.Linear(4, 4), nn.Tanh(), NoiseLayer(4), Sum(nn.Linear(4, 4), nn.Identity(), "operator")
                ),
                "2",
                "cannot pass tanh, and forward it cannot pass add",
            ),
            (
                nn.Sequential(
                    nn.Linear(4, 4),
                    Sum(nn.Sequential(NoiseLayer(4), nn.Sigmoid()), nn.Linear(4, 4), way="operator"),
                ),
                "1.first.0",
                "act on linear_1 too, and forward it cannot pass sigmoid",
            ),
            (
                nn.Sequential(
                    *(
                        nn.Linear(4, 4),
                        nn.ReLU(),
                        Sum(nn.Linear(4, 4), nn.Identity(), way="operator"),
                        nn.ReLU(),
                    ),
                    *(NoiseLayer(4), Sum(nn.Linear(4, 4), nn.Identity(), way="operator"), nn.Linear(4, 4)),
                ),
                "4",
                "act on linear_1 too, and forward it cannot pass add_1",
            ),
            (Sum(nn.Linear(4, 4), NoiseLayer(4), way="operator"), "second", "no parameters"),
            (nn.Sequential(NoiseLayer(4), nn.Sigmoid(), nn.Linear(4, 2)), "0", "no parameters"),
        ],
    )
    def test_the_reason_is_named(self, model, name, obstacle):
        pruned(model, {name: [1]})
        compacted = assert_compacts(model, torch.randn(3, 4))
        report = layer_report(compacted, name)
        assert not report.folded
        assert obstacle in report.not_folded_because
        scales = {name: m for name, m in compacted.named_modules() if isinstance(m, ChannelScale)}
        assert list(scales) == [name]
        torch.testing.assert_close(scales[name].factors, noise_layers(model)[name].expected_noise().detach())

    def test_factors_that_differ_within_a_channel(self):
        model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Flatten(), NoiseLayer(20))
        compacted = assert_compacts(pruned(model, {"3": [0]}), torch.randn(3, 2, 5))
        assert "scales parts of one channel differently" in layer_report(compacted, "3").not_folded_because

    @pytest.mark.parametrize("pool", [nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)])
    @pytest.mark.parametrize("backward", [True, False])
    def test_factors_that_differ_within_the_windows_of_a_pool(self, pool, backward):
        """The map keeps its size, so that no shape gives it away."""
        scale = nn.Parameter(torch.rand(1, 2, 5, 6))
        model = calling(
            (lambda self, x: self.noise(self.pool(x * self.scale)))
            if backward
            else lambda self, x: self.last(self.pool(self.noise(x)).flatten(1)),
            noise=NoiseLayer(5, dim=-2),
            pool=pool,
            last=nn.Linear(60, 2),
        )
        model.register_parameter("scale", scale)
        compacted = assert_compacts(pruned(model, {"noise": [0, 1, 3]}), torch.randn(3, 2, 5, 6))
        assert "what is pooled differently" in layer_report(compacted, "noise").not_folded_because

    def test_shared_layer_that_meets_other_noise(self):
        linear, last = nn.Linear(4, 4), nn.Linear(4, 2)
        layers = [linear, NoiseLayer(4), nn.Tanh(), linear, NoiseLayer(4), nn.Tanh(), last]
        model = pruned(nn.Sequential(*layers), {"1": [0]})
        compacted = assert_compacts(model, torch.randn(3, 4))
        assert not layer_report(compacted, "1").folded
        assert "is also used without this noise" in layer_report(compacted, "1").not_folded_because
        assert compacted.get_submodule("0") is compacted.get_submodule("3")

    def test_added_noise_stays_a_hook(self):
        model = bmrs.add_noise(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Tanh()), where="1", num_structures=4, dim=-1
        )
        compacted = assert_compacts(pruned(model, {"1.noise": [1]}), torch.randn(3, 4))
        assert isinstance(compacted[1].noise, ChannelScale)
        assert not compacted(torch.randn(3, 4))[:, 1].any()

    def test_compacted_again(self):
        model = pruned(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), NoiseLayer(4), nn.Tanh()), {"2": [1]})
        x = torch.randn(3, 4)
        once = bmrs.compact(model, x)
        torch.testing.assert_close(bmrs.compact(once, x)(x), once(x))

    def test_channels_are_removed_all_the_same(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), NoiseLayer(4), nn.Tanh(), nn.Linear(4, 2))
        compacted = assert_compacts(pruned(model, {"2": [1]}), torch.randn(3, 4))
        assert compacted[0].out_features == len(compacted[2].factors) == compacted[4].in_features == 3


class TestWhatIsKept:
    def test_class_attributes_hooks_and_flags(self):
        model = pruned(Named(), {"noise": [0, 3]})
        model.note, seen = ["anything"], []
        model.last.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        model.last.weight.requires_grad_(False)
        compacted = assert_compacts(model, torch.randn(3, 4))
        assert type(compacted) is Named
        assert compacted.note == ["anything"]
        assert compacted.note is not model.note
        seen.clear()
        compacted(torch.randn(5, 4))
        assert seen == [(5, 2)]
        assert not compacted.last.weight.requires_grad
        assert compacted.first.weight.requires_grad

    def test_memory_format(self):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), NoiseLayer(6), nn.Conv2d(6, 4, 3)).to(
            memory_format=torch.channels_last
        )
        compacted = assert_compacts(pruned(model, {"1": [0]}), torch.randn(2, 3, 8, 8))
        assert all(
            p.is_contiguous(memory_format=torch.channels_last) for p in compacted.parameters() if p.dim() == 4
        )

    def test_tied_weights_stay_tied(self):
        model = calling(
            lambda self, i: self.out(torch.relu(self.noise(self.inner(self.embed(i))))),
            embed=nn.Embedding(9, 5),
            inner=nn.Linear(5, 5),
            noise=NoiseLayer(5, dim=-1),
            out=nn.Linear(5, 9, bias=False),
        )
        model.out.weight = model.embed.weight
        compacted = assert_compacts(pruned(model, {"noise": [1]}), torch.randint(0, 9, (3, 4)))
        assert compacted.out.weight is compacted.embed.weight

    def test_compiled_models(self):
        model = pruned(Named(), {"noise": [0, 3]})
        x = torch.randn(3, 4)
        compacted = bmrs.compact(torch.compile(model, backend="eager"), x)
        assert type(compacted) is Named
        torch.testing.assert_close(compacted(x)["out"], model.eval()(x)["out"])

    def test_weights_that_are_computed(self):
        linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        model = nn.Sequential(linear, NoiseLayer(6), nn.ReLU(), nn.Linear(6, 2))
        compacted = bmrs.compact(pruned(model, {"1": [0]}), torch.randn(3, 4))
        x = torch.randn(3, 4)
        with torch.no_grad():
            torch.testing.assert_close(compacted(x), model.eval()(x))
        assert list(parameter_shapes(compacted)) == ["0.bias", "0.weight", "3.weight", "3.bias"]
        assert compacted[0].weight.shape == (5, 4)
        assert nn.utils.parametrize.is_parametrized(model[0])


def statistics(h: torch.Tensor, *kinds: str) -> torch.Tensor:
    """Means and the like over places."""
    found = [getattr(h, kind)(2) for kind in kinds]
    return torch.cat([part if isinstance(part, torch.Tensor) else part[0] for part in found], 1)


def test_indices_that_are_written_in_code():
    model = pruned(between(lambda h: h[:, torch.tensor([1, 0, 3, 2, 5, 4])]), {"noise": [0, 3]})
    x = torch.randn(3, 4)
    compacted = bmrs.compact(model.eval(), x)
    torch.testing.assert_close(compacted(x), model(x))
    assert layer_report(compacted, "noise").removed == 2
    assert bmrs.compact_report(compacted).form == "graph"  # as the numbers are those of the whole layer


class TestPlaces:
    """Feature maps behind noise, and functions that run over their places."""

    @pytest.mark.parametrize(
        ("function", "reads"),
        [
            (lambda h: statistics(h.flatten(2), "mean", "std"), 16),
            (lambda h: statistics(h.flatten(2), "var", "amax", "logsumexp"), 24),
            (lambda h: torch.cat(torch.std_mean(h.flatten(2), 2), 1), 16),
            (lambda h: torch.cat(torch.var_mean(h.flatten(2), 2), 1), 16),
            (lambda h: statistics(h.flatten(2), "max", "amin"), 16),
            (lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2).mean((2, 3)), 8),
            (lambda h: F.fold(F.unfold(h, 2, stride=2), (4, 4), 2, stride=2).mean((2, 3)), 8),
            (lambda h: F.fold(F.unfold(h, 3, padding=1), (4, 4), 3, padding=1).mean((2, 3)), 8),
            (lambda h: torch.fft.irfft2(torch.fft.rfft2(h), s=(4, 4)).mean((2, 3)), 8),
            (lambda h: torch.fft.fftshift(torch.fft.fft(h, dim=3), dim=3).real.mean((2, 3)), 8),
        ],
    )
    def test_channels_leave(self, function, reads):
        model = calling(
            lambda self, x: self.last(function(self.noise(self.first(x)))),
            first=nn.Conv2d(3, 8, 3, padding=1),
            noise=NoiseLayer(8),
            last=nn.Linear(reads, 2),
        )
        pruned(model, {"noise": [0, 3, 4]})
        compacted = assert_compacts(model, torch.randn(2, 3, 4, 4))
        assert layer_report(compacted, "noise").removed == 3
        assert compacted.get_parameter("last.weight").shape == (2, reads * 5 // 8)

    @pytest.mark.parametrize(
        "norm",
        [
            lambda h: h.norm(p=0, dim=1),
            lambda h: torch.linalg.vector_norm(h, 0, dim=1),
            lambda h: torch.linalg.norm(h, 0, dim=1),
        ],
    )
    def test_what_varies_is_no_constant_to_a_norm_that_counts(self, norm):
        """The number of entries that are not 0, over time, which is all of them on one example and not on others."""
        model = calling(
            lambda self, x: self.last(norm(torch.relu(self.noise(self.first(x))))),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6, dim=-1),
            last=nn.Linear(6, 2),
        )
        pruned(model, {"noise": [0, 3]})
        with torch.no_grad():
            model.first.bias.fill_(3.0)
        example, others = torch.zeros(2, 5, 4), 5.0 * torch.randn(3, 5, 4)
        compacted = bmrs.compact(model.eval(), example)
        assert layer_report(compacted, "noise").removed == 2
        torch.testing.assert_close(compacted(others), model(others))

    @pytest.mark.parametrize("order", ["nuc", 2])
    def test_norms_of_matrices(self, order):
        model = between(lambda h: h * torch.linalg.norm(h.unflatten(1, (2, 3)), order, dim=(1, 2))[:, None])
        assert_compacts(pruned(model, {"noise": [0, 3]}), torch.randn(3, 4))

    def test_a_product_of_whole_numbers(self):
        model = between(lambda h: h * (3.0 * h.sigmoid()).prod(1, keepdim=True, dtype=torch.int64))
        assert_compacts(pruned(model, {"noise": [0, 3]}), torch.randn(3, 4))

    def test_what_is_added_at_the_places_of_a_mask_is_no_assignment(self):
        def added(self, x, mask):
            h = self.noise(self.first(x)).exp()
            return self.last(h.index_put((mask,), torch.tensor(1.0), accumulate=True))

        model = calling(added, first=nn.Linear(4, 6), noise=NoiseLayer(6), last=nn.Linear(6, 2))
        pruned(model, {"noise": [0, 3]}).eval()
        x = torch.randn(3, 4)
        compacted = bmrs.compact(model, (x, torch.zeros(3, dtype=torch.bool)))
        others = torch.tensor([True, False, True])
        torch.testing.assert_close(compacted(x, others), model(x, others))

    def test_along_transformed_dimensions_they_stay(self):
        model = between(lambda h: torch.fft.fft(h, dim=1).abs())
        pruned(model, {"noise": [0, 3]})
        report = layer_report(assert_compacts(model, torch.randn(3, 4)), "noise")
        assert report.kept_because == {"fft_fft runs over its dimension at fft_fft": 2}


class Loop(nn.Module):
    """A recurrence that is written out, from a state of zeros, with noise on the state."""

    def __init__(self, cell: nn.Module, start: str) -> None:
        super().__init__()
        self.cell, self.start, self.width = cell, start, 10
        self.noise, self.last = NoiseLayer(10), nn.Linear(10, 2)

    def first(self, x: torch.Tensor) -> torch.Tensor | None:
        if self.start == "none":
            return None
        return x.new_zeros(len(x), self.width) if self.start == "new" else torch.zeros(x.shape[0], self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        state = None
        for t in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                state = (
                    None if h is None else (h, torch.zeros(x.shape[0], self.width) if t == 0 else state[1])
                )
                state = self.cell(x[:, t], state)
                h = self.noise(state[0])
            else:
                h = self.noise(self.cell(x[:, t], h))
        return self.last(h)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.recurrent = nn.Linear(4, 10), nn.Linear(10, 10)

    def forward(self, x: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
        return torch.tanh(self.into(x) if h is None else self.into(x) + self.recurrent(h))


class TestLoops:
    @pytest.mark.parametrize("start", ["zeros", "new", "none"])
    @pytest.mark.parametrize(
        "cell",
        [ByHand, *(lambda kind=kind: kind(4, 10) for kind in (nn.GRUCell, nn.LSTMCell, nn.RNNCell))],
        ids=["by hand", "GRUCell", "LSTMCell", "RNNCell"],
    )
    def test_units_leave(self, cell, start):
        model = pruned(Loop(cell(), start), {"noise": [0, 3, 4, 8]})
        compacted = assert_compacts(model, torch.randn(2, 5, 4))
        assert layer_report(compacted, "noise").removed == 4
        assert compacted.last.in_features == 6
        if isinstance(compacted.cell, nn.RNNCellBase):
            assert (compacted.cell.input_size, compacted.cell.hidden_size) == (4, 6)
            assert len(compacted.cell.weight_hh) % 6 == 0

    @pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
    def test_noise_added_to_a_cell_multiplies_its_state(self, kind):
        loop = Loop(kind(4, 10), "none")
        loop.noise = nn.Identity()
        model = pruned(bmrs.add_noise(loop, where="cell"), {"cell.noise": [0, 3, 4, 8]})
        compacted = assert_compacts(model, torch.randn(2, 5, 4))
        assert compacted.cell.hidden_size == 6

    @staticmethod
    def sum_from_zeros(number_of):
        def summed(self, x):
            total = torch.zeros(number_of(x), 6)
            for layer in self.layers:
                total = total + torch.relu(layer(x))
            return self.last(self.noise(total))

        layers = nn.ModuleList(nn.Linear(4, 6) for _ in range(3))
        model = calling(summed, layers=layers, noise=NoiseLayer(6), last=nn.Linear(6, 2))
        return pruned(model, {"noise": [0, 3]}).eval()

    def test_a_sum_that_starts_from_zeros(self):
        model, x = self.sum_from_zeros(lambda x: x.shape[0]), torch.randn(3, 4)
        compacted = bmrs.compact(model, x)
        assert layer_report(compacted, "noise").removed == 2
        torch.testing.assert_close(compacted(x), model(x))

    def test_a_number_of_examples_is_not_given_up_for_a_width(self):
        """A graph would take four examples and no other number."""
        model, x = self.sum_from_zeros(len), torch.randn(7, 4)
        compacted = bmrs.compact(model, x[:4])
        assert bmrs.compact_report(compacted).form == "module"
        torch.testing.assert_close(compacted(x), model(x))

    def test_zeros_that_meet_no_noise_stay(self):
        model = calling(
            lambda self, x: self.last(self.noise(self.first(torch.zeros(x.shape[0], 4) + x))),
            first=nn.Linear(4, 6),
            noise=NoiseLayer(6),
            last=nn.Linear(6, 2),
        )
        compacted = assert_compacts(pruned(model, {"noise": [0, 3]}), torch.randn(3, 4))
        assert bmrs.compact_report(compacted).form == "module"
        assert compacted.first.weight.shape == (4, 4)


@pytest.mark.parametrize("repeated", ["expand", "repeat"])
@pytest.mark.parametrize(
    ("count", "form"), [("shape", "module"), ("attribute", "module"), ("number", "graph")]
)
def test_one_kernel_for_each_channel(repeated, count, form):
    """As of blurs and of windows in which statistics are taken."""

    class Blurred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.width = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), 8
            self.register_buffer("kernel", torch.rand(1, 1, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.first(x))
            number = {"shape": y.shape[1], "attribute": self.width, "number": 8}[count]
            kernel = getattr(self.kernel, repeated)(number, 1, *((3, 3) if repeated == "expand" else (1, 1)))
            return self.last(F.conv2d(y, kernel, padding=1, groups=number))

    model = pruned(bmrs.add_noise(Blurred(), where="first"), {"first.noise": [0, 3, 4]}).eval()
    x = torch.randn(2, 3, 7, 7)
    compacted = bmrs.compact(model, x)
    assert bmrs.compact_report(compacted).form == form
    assert layer_report(compacted, "first.noise").removed == 3
    torch.testing.assert_close(compacted(x), model(x))


def test_heads_leave_behind_rotations_by_complex_numbers():
    """Positions as in the reference code of Llama."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(12, 12) for _ in range(4))
            angles = torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.1]))
            self.register_buffer("turns", torch.polar(torch.ones(9, 2), angles))

        def turned(self, x: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * self.turns[: x.shape[1], None]).flatten(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (layer(x).unflatten(-1, (-1, 4)) for layer in (self.query, self.key, self.value))
            heads = [part.transpose(1, 2) for part in (self.turned(q), self.turned(k), v)]
            return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    model = bmrs.add_noise(Attention(), where="out", structures="heads", num_heads=3)
    x = torch.randn(2, 5, 12)
    compacted = bmrs.compact(pruned(model, {"out.noise": [1]}).eval(), x)
    assert bmrs.compact_report(compacted).form == "module"
    assert compacted.query.weight.shape == compacted.key.weight.shape == (8, 12)
    torch.testing.assert_close(compacted(x), model(x))
