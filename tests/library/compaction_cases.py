"""Random chains of layers and the checks that every compaction must pass."""

import copy
import operator
import random

import torch
from torch import fx, nn

import bmrs
from bmrs.compaction.stock_layers import BATCH_NORMS, CONVOLUTIONS, STOCK_LAYERS
from bmrs.noise_layer import NoiseLayer

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


def assert_compacts(model: nn.Module, x: torch.Tensor) -> nn.Sequential | fx.GraphModule:
    """Compact; check equality on other inputs than the example, stock layers only, and that the model is untouched."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    compacted = bmrs.compact(model, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    if type(compacted) is not nn.Sequential:
        assert isinstance(compacted, fx.GraphModule)
        functions = {node.target for node in compacted.graph.nodes if node.op == "call_function"}
        assert functions <= {operator.add}
    assert all(type(child) in STOCK_LAYERS for child in compacted.children())
    assert not any(module.training for module in compacted.modules())
    other = torch.randn_like(x)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(other)
        found = compacted(other)
    assert found.dtype == expected.dtype
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11}[x.dtype]
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    return compacted


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
