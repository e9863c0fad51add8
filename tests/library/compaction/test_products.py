import pytest
import torch
from torch import nn

from bmrs.compaction.products import patches, products


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", dilation=2),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(4, 6, 2, stride=2, padding=1),
    ],
    ids=str,
)
def test_patches_are_what_a_convolution_reads(layer):
    x = torch.randn(2, 4, *[7] * (layer.weight.dim() - 2), generator=generator())
    found = patches(layer, x) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(found.movedim(-1, 1), layer(x), rtol=1e-5, atol=1e-5)


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv1d(4, 6, 4, padding="same", dilation=2),
    nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2),
    nn.Conv2d(4, 6, 3, padding="valid", bias=False),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.Conv3d(4, 6, 2, stride=2, padding=1),
]


def made_of(product, weight, bias):
    """The result, from what each output reads."""
    features = [product.features(x) for x in product.read.chunk(product.groups, product.axis)]
    weights = (weight.T if product.transposed else weight.flatten(1)).chunk(product.groups)
    made = torch.cat([x @ rows.T for x, rows in zip(features, weights, strict=True)], dim=-1)
    return (made if bias is None else made + bias).movedim(-1, product.axis)


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), *CONVOLUTIONS], ids=str)
@pytest.mark.parametrize("batch", [2, None])
def test_a_product_is_what_a_layer_multiplies(layer, batch):
    sizes = [7] * (layer.weight.dim() - 2)
    x = torch.randn(*([] if batch is None else [batch]), 4, *sizes, generator=generator())
    with torch.no_grad():
        expected = layer(x)
        found = products(layer, ((x,), {}), {"its": layer.weight})
    (product,) = found["its"]
    assert product.bias is layer.bias
    result = product.result if batch is not None or not product.options else product.result[0]
    assert torch.equal(result, expected)
    torch.testing.assert_close(
        made_of(product, layer.weight, layer.bias), product.result, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (lambda x, w, b: torch.ops.aten.linear.default(x, w, b), (6, 4)),
        (lambda x, w, b: torch.ops.aten.addmm.default(b, x, w), (4, 6)),
        (lambda x, w, b: torch.ops.aten.conv1d.default(x[..., None], w, b), (6, 4, 1)),
        (lambda x, w, b: torch.ops.aten.conv1d.padding(x[..., None], w, b, [1], "same"), (6, 4, 1)),
        (lambda x, w, b: nn.functional.linear(input=x, weight=w, bias=b), (6, 4)),
    ],
)
def test_operators_of_a_graph_are_seen(call, shape):
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(x, self.w, self.b)

    model, x = Calls(), torch.randn(3, 4, generator=generator())
    with torch.no_grad():
        (product,) = products(model, ((x,), {}), {"w": model.w})["w"]
    assert product.bias is model.b
    torch.testing.assert_close(made_of(product, model.w, model.b), product.result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_last_product_of_attention_is_seen(batch_first):
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    nn.init.normal_(layer.out_proj.bias)
    x = torch.randn(3, 5, 8, generator=generator())
    seen = []
    layer.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
    with torch.no_grad():
        expected = layer(x, x, x)
        (product,) = products(layer, ((x, x, x), {}), {"o": layer.out_proj.weight})["o"]
        assert products(layer, ((x, x, x), {}), {"other": nn.Parameter(x)}) == {"other": []}
    for outputs in seen[1:]:
        for a, b in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        made_of(product, layer.out_proj.weight, layer.out_proj.bias), product.result, rtol=1e-5, atol=1e-5
    )


def test_a_network_stops_where_enough_was_seen_and_inputs_stay():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.ends = nn.Linear(3, 3), nn.Linear(3, 3), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            x = self.second(self.first(x).relu_())
            self.ends += 1
            return x

    model, x = Counting(), torch.zeros(2, 3)
    weights = {"first": model.first.weight, "second": model.second.weight}
    with torch.no_grad():
        found = products(model, ((x,), {}), weights, number=1)
        assert [len(its) for its in found.values()] == [1, 0]
        assert model.ends == 0
        found = products(model, ((x,), {}), weights)
    assert model.ends == 1
    assert not x.any()
    (first,), (second,) = found.values()
    assert torch.equal(second.read, first.result.relu())  # what is written over a result is no part of it
