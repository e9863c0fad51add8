"""Random chains of layers and the checks that every compaction must pass."""

import copy
import random
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map

import bmrs
from bmrs.compaction.report import LayerCompaction
from bmrs.graph.stock_layers import BATCH_NORMS, CONVOLUTIONS
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def randomise(model: nn.Module, seed: int = 0, pruned: float = 0.5) -> nn.Module:
    """Statistics and posteriors far from their initial values, a random mask that keeps at least one structure."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.1, 3.0, generator=generator)
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, generator=generator)
        if isinstance(module, NoiseLayer):
            with torch.no_grad():
                module.mu.uniform_(-6.0, 1.0, generator=generator)
                module.log_sigma.uniform_(-6.0, 1.0, generator=generator)
                draw = torch.rand(module.num_structures, generator=generator)
                module.mask.copy_(draw >= min(pruned, float(draw.max())))
    return model


def prune_structures(layer: NoiseLayer, structures: list[int]) -> None:
    layer.mask[structures] = False


def assert_compacts(model: nn.Module, x: Any, form: str = "module") -> nn.Module:
    """Compact, and check equality on other inputs than the example, the report, and that the model is untouched.

    Args:
        model: what to compact.
        x: a tensor, positional arguments or keyword arguments.
        form: ``"module"`` where the model's own code has to do, ``"graph"`` where it cannot.
    """
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    compacted = bmrs.compact(model, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    report = bmrs.compact_report(compacted)
    assert report.form == form, report.form_because
    assert isinstance(compacted, type(model) if form == "module" else fx.GraphModule)
    assert not noise_layers(compacted)
    assert (report.parameters_before, report.parameters_after) == (num_values(model), num_values(compacted))
    assert report.parameters_after <= report.parameters_before
    assert report.flops_after <= report.flops_before
    assert not any(module.training for module in compacted.modules())
    assert not {id(p) for p in compacted.parameters()} & {id(p) for p in model.parameters()}
    for layer, noise in zip(report.layers, noise_layers(model).values(), strict=True):
        assert layer.pruned == int((~noise.mask).sum())
        assert sum(layer.kept_because.values()) == layer.pruned - layer.removed
        assert all(layer.kept_because)
        assert layer.folded == (layer.not_folded_because == "")
    assert_equal_outputs(compacted, model, x)
    return compacted


def assert_equal_outputs(compacted: nn.Module, model: nn.Module, x: Any) -> None:
    """Two networks agree on inputs like ``x``, the second one in evaluation mode."""
    inputs = tree_map(_other_than, x)
    with torch.no_grad():
        expected, found = outputs(copy.deepcopy(model).eval(), inputs), outputs(compacted, inputs)
    assert len(expected) == len(found) > 0
    for a, b in zip(expected, found, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        tolerance = {torch.float32: 1e-4, torch.float64: 1e-11}[a.dtype]
        assert (a - b).abs().max() <= tolerance * a.abs().max()


def _other_than(leaf: Any) -> Any:
    floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return torch.randn_like(leaf) if floating else leaf


def outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """The tensors that a model returns, for inputs as `bmrs.compact` takes them; these are not overwritten."""
    inputs = copy.deepcopy(inputs)
    if isinstance(inputs, torch.Tensor):
        result = model(inputs)
    else:
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return tree_flatten(result)[0]


def layer_report(compacted: nn.Module, name: str) -> LayerCompaction:
    """What became of a noise layer."""
    return next(layer for layer in bmrs.compact_report(compacted).layers if layer.name == name)


def num_values(model: nn.Module) -> int:
    """Values of all parameters that are not of noise."""
    noise = {parameter for layer in noise_layers(model).values() for parameter in layer.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if parameter not in noise)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


class Chain:
    """A random chain of layers, grown while its shapes stay valid."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rank = self.random.choice([1, 2, 2, 2, 3])
        self.x = torch.zeros(2, self.random.choice([1, 3, 4]), *[8 if self.rank == 3 else 12] * self.rank)
        self.example_shape = (3, *self.x.shape[1:])
        self.layers: list[nn.Module] = []
        if self.random.random() < 0.1:
            self.add(NoiseLayer(self.channels))
        for _ in range(self.random.randint(1, 3)):
            self.add_convolution()
            self.add_operations()
        self.add(nn.Flatten())
        if self.random.random() < 0.2:
            self.add(self.random.choice([NoiseLayer, nn.BatchNorm1d])(self.channels))
        for _ in range(self.random.randint(1, 3)):
            self.add(
                nn.Linear(self.channels, self.random.choice([1, 3, 7, 12]), bias=self.random.random() < 0.7)
            )
            self.add_operations()
        self.add(nn.Linear(self.channels, 5))
        self.model = nn.Sequential(*self.layers)

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    def add(self, layer: nn.Module) -> None:
        self.x = layer.eval()(self.x)
        self.layers.append(layer)

    def add_convolution(self) -> None:
        out = self.random.choice([1, 2, 4, 6, 8])
        groups = self.random.choice([g for g in (1, 1, 1, 2, 4) if out % g == self.channels % g == 0])
        size = self.random.choice([1, 3]) if self.x.shape[-1] >= 3 else 1
        options = {"padding": self.random.choice([0, 0, 1]), "stride": self.random.choice([1, 1, 2])}
        bias = self.random.random() < 0.7
        self.add(CONVOLUTIONS[self.rank - 1](self.channels, out, size, groups=groups, bias=bias, **options))

    def add_operations(self) -> None:
        spatial = self.x.dim() > 2
        kinds = ["noise", "noise", "commuting"] + ["norm", "pool", "depthwise"] * spatial
        for _ in range(self.random.randint(0, 5)):
            kind = self.random.choice(kinds)
            if kind == "noise":
                activation = self.random.choice(
                    [None, None, "relu", "tanh"] if not self.has_pending() else [None, "relu"]
                )
                self.add(NoiseLayer(self.channels, activation=activation))
            elif kind == "commuting":
                self.add(self.random.choice([nn.ReLU(), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Identity()]))
            elif kind == "norm":
                self.add(BATCH_NORMS[self.rank - 1](self.channels, affine=self.random.random() < 0.8))
            elif kind == "pool" and self.x.shape[-1] >= 4:
                average = AVERAGE_POOLS[self.rank - 1]
                pools = [MAX_POOLS[self.rank - 1](2), average(2), average(3, stride=2, padding=1)]
                self.add(self.random.choice(pools))
            elif kind == "depthwise" and self.x.shape[-1] >= 3:
                mode = self.random.choice(["zeros", "circular"])
                padding = self.random.choice([0, 1])
                self.add(
                    CONVOLUTIONS[self.rank - 1](
                        self.channels,
                        self.channels,
                        3,
                        groups=self.channels,
                        padding=padding,
                        padding_mode=mode,
                    )
                )
        if not self.has_pending() and self.random.random() < 0.5:
            self.add(self.random.choice([nn.Tanh(), nn.GELU(), nn.Sigmoid(), nn.Softplus()]))

    def has_pending(self) -> bool:
        """True if noise may still have to move forward, so that no saturating activation may follow."""
        return any(isinstance(layer, NoiseLayer) for layer in self.layers[-6:])
