"""Noise whose input is computed again in backward: the same gradients, and nothing kept for them."""

import copy
import io
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bmrs
from bmrs.noise import hooks

LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 5)),
    "BatchNorm2d without statistics": (
        lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        (3, 4, 5, 5),
    ),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (3, 5, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (3, 5, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5, 5)),
    "GELU": (lambda: nn.GELU("tanh"), (6, 4)),
    "SiLU": (nn.SiLU, (6, 4)),
    "Mish": (nn.Mish, (6, 4)),
    "Hardswish": (nn.Hardswish, (6, 4)),
}


def network(layer, *, recompute, granularity="element"):
    """A layer with noise between two others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), layer, nn.Flatten())
    return bmrs.add_noise(model, where="1", granularity=granularity, recompute=recompute)


def alone(name, *, recompute):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    last = {"num_structures": 4, "dim": -1 if name in ("LayerNorm", "RMSNorm") or len(shape) == 2 else 1}
    bmrs.add_noise(layer, where=lambda path, _: path == "", recompute=recompute, **last)
    return layer, torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def results(model, x, run=None):
    """Return the output, all gradients and all buffers."""
    torch.manual_seed(2)
    out = (run or model)(x)
    # In place, as behind convolutions.
    torch.relu_(out).pow(2).sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return [out.detach(), *gradients, *model.buffers()]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def multiplied(monkeypatch):
    """Weak references to what noise multiplies."""
    seen = []
    multiply = hooks._noise_of

    def noted(layer):
        noise = multiply(layer)

        def forward(x):
            seen.append(weakref.ref(x))
            return noise(x)

        forward.recompute = noise.recompute
        return forward

    monkeypatch.setattr(hooks, "_noise_of", noted)
    return seen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_same_results_as_when_it_is_kept(name, training):
    found = []
    for recompute in (True, False):
        layer, x = alone(name, recompute=recompute)
        layer.train(training)
        layer.noise.train()
        found.append(results(layer, x))
    assert_same(*found)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_of_it_is_kept(name, multiplied):
    kept = []
    for recompute in (True, False):
        layer, x = alone(name, recompute=recompute)
        out = layer(x)
        kept.append(multiplied.pop()() is not None)
        assert out.grad_fn is not None
    assert kept == [False, True]


@pytest.mark.parametrize("granularity", ["sample", "batch"])
def test_other_granularities_in_a_network_that_overwrites(granularity):
    x = torch.randn(3, 2, 4, 4)
    found = [
        results(
            network(nn.BatchNorm2d(4), recompute=recompute, granularity=granularity),
            x.clone().requires_grad_(),
        )
        for recompute in (True, False)
    ]
    assert_same(*found)


def test_channels_last():
    x = torch.randn(3, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    found = [
        results(network(nn.BatchNorm2d(4), recompute=recompute), x.clone().requires_grad_())
        for recompute in (True, False)
    ]
    assert_same(*found)


@pytest.mark.parametrize("name", ["BatchNorm2d", "LayerNorm", "GELU"])
def test_under_autocast(name):
    def narrow(layer):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return layer(x)

        return run

    found = []
    for recompute in (True, False):
        layer, x = alone(name, recompute=recompute)
        found.append(results(layer, x, narrow(layer)))
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_decides_itself(reentrant, multiplied):
    found = []
    for recompute in (True, False):
        layer, x = alone("BatchNorm1d", recompute=recompute)
        layer.momentum = 0.0  # its statistics are updated twice with either
        found.append(results(layer, x, lambda x, layer=layer: checkpoint(layer, x, use_reentrant=reentrant)))
    assert_same(*found)
    layer, x = alone("BatchNorm1d", recompute=True)
    out = checkpoint(layer, x * 1, use_reentrant=reentrant)
    assert multiplied[-1]() is None
    assert out.requires_grad


def test_compiled():
    layer, x = alone("BatchNorm1d", recompute=True)
    compiled = torch.compile(layer, backend="aot_eager")
    torch.manual_seed(2)
    expected = layer(x)
    torch.manual_seed(2)
    out = compiled(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert layer.noise.mu.grad.isfinite().all()


def test_transforms_of_torch_func():
    layer, x = alone("LayerNorm", recompute=True)
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x.detach(),)).sum()

    torch.manual_seed(3)
    gradients = torch.func.grad(loss)(parameters)
    torch.manual_seed(3)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("changed", ["bias", "noise.mu"])
def test_what_changes_before_backward_is_an_error(changed):
    layer, x = alone("LayerNorm", recompute=True)
    out = layer(x).sum()
    with torch.no_grad():
        layer.get_parameter(changed).add_(1.0)
    with pytest.raises(
        RuntimeError, match=r"changed in place between forward and backward: its shape is \(4,\)"
    ):
        out.backward()


def test_another_hook_in_front_keeps_it(multiplied):
    layer, x = alone("LayerNorm", recompute=True)
    layer.register_forward_hook(lambda _layer, _inputs, output: output * 2, prepend=True)
    other, _ = alone("LayerNorm", recompute=False)
    other.register_forward_hook(lambda _layer, _inputs, output: output * 2, prepend=True)
    found = results(layer, x)
    x.grad = None
    assert_same(found, results(other, x))


def test_evaluation_and_no_grad_change_nothing():
    layer, x = alone("BatchNorm1d", recompute=True)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    layer.eval()
    results(layer, x, lambda x: layer(x) + layer.noise.log_sigma * 0)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda layer: pickled(layer)])
def test_copies_do_it_too(copies, multiplied):
    layer, x = alone("BatchNorm1d", recompute=True)
    out = copies(layer)(x)
    assert multiplied[-1]() is None
    assert out.requires_grad


def pickled(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (
            nn.Linear(4, 4),
            {},
            r"recompute=True is for BatchNorm1d, .*layer '0' is a Linear: call add_noise twice",
        ),
        (nn.SiLU(inplace=True), {"num_structures": 4, "dim": 1}, "layer '0' is a SiLU, in place"),
        (
            nn.Linear(4, 4),
            {"structures": "heads", "num_heads": 2},
            "is for structures=\"features\", got 'heads'",
        ),
    ],
)
def test_where_it_cannot_be_the_error_says_so(layer, options, message):
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=message):
        bmrs.add_noise(model, where="0", recompute=True, **options)
    assert not hasattr(layer, "noise")


def doubled(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def doubled_for_all(layer, monkeypatch):
    forward = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: 2 * forward(self, x))


@pytest.mark.parametrize("where", ["instance", "class", "every module"])
def test_what_others_make_of_the_result_is_kept(where, monkeypatch):
    found = []
    for recompute in (True, False):
        layer, x = alone("LayerNorm", recompute=recompute)
        if where == "instance":
            doubled(layer)
        with monkeypatch.context() as patches:
            if where == "class":
                doubled_for_all(layer, patches)
            everywhere = nn.modules.module.register_module_forward_hook(
                lambda module, _, out: (
                    2 * out if where == "every module" and type(module) is nn.LayerNorm else None
                )
            )
            found.append(results(layer, x))
            everywhere.remove()
    assert_same(*found)
    layer, x = alone("LayerNorm", recompute=True)
    assert not torch.equal(found[0][0], results(layer, x)[0])


def test_statistics_of_evaluation_are_those_of_its_own_time():
    found = []
    for recompute in (True, False):
        layer, x = alone("BatchNorm1d", recompute=recompute)
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
        layer.eval()
        layer.noise.train()
        torch.manual_seed(2)
        out = layer(x).pow(2).sum()
        layer.train()
        layer(torch.randn(6, 4) * 3 + 2)
        out.backward()
        found.append([layer.noise.mu.grad, layer.noise.log_sigma.grad])
    assert_same(*found)


def test_where_nothing_can_be_recomputed_it_is_kept():
    layer, x = alone("LayerNorm", recompute=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in prototype stage"
        nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    assert layer(nested).is_nested
    mapped = torch.vmap(layer, randomness="different")(x)
    mapped.sum().backward()
    assert layer.noise.mu.grad.isfinite().all()
    assert layer.to("meta")(x.detach().to("meta")).is_meta


def test_what_the_layer_need_not_keep_is_not_kept_for_it():
    found = []
    for recompute in (True, False):
        layer, x = alone("LayerNorm", recompute=recompute)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("noise" in name)
        given = x.detach().clone()
        torch.manual_seed(2)
        out = layer(given)
        given += 1
        out.sum().backward()
        found.append([layer.noise.mu.grad, layer.noise.log_sigma.grad])
    assert_same(*found)
