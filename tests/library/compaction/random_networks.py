"""Random networks of all kinds of operators: modules of which the forward pass interprets a random program.

A program is a list of lines of Python, such as ``v3 = torch.cat([v1, self.conv2(v2)], 1)``. Lines are drawn one by one
and kept if they run for two batch sizes and give moderate numbers, so that every program is valid whatever is drawn.
"""

import functools
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bmrs
from bmrs.noise.layer import NoiseLayer
from bmrs.noise.lookup import noise_layers

BATCHES = (2, 5)
_NAMESPACE = {"torch": torch, "F": F}
_LARGEST_SIZE = 1500
_LARGEST_NUMBER = 300.0


class RandomNetwork(nn.Module):
    """A network whose forward pass runs lines of Python.

    Args:
        program: the lines; layers, parameters and sizes are attributes of ``self``.
        result: an expression for what is returned.
    """

    def __init__(self, program: Iterable[str] = (), result: str = "") -> None:
        super().__init__()
        self.program, self.result = list(program), result

    def forward(self, x: Tensor, y: Tensor | None = None, tokens: Tensor | None = None) -> Any:
        values: dict[str, Any] = {"self": self, "x": x, "y": y, "tokens": tokens}
        for line in self.program:
            exec(_code(line, "exec"), _NAMESPACE, values)
        return eval(_code(self.result, "eval"), _NAMESPACE, values)

    def listing(self) -> str:
        """The program and its layers, for messages."""
        own = [f"self.{name} = {child}" for name, child in self.named_children()]
        own += [f"self.{n}: {tuple(p.shape)}" for n, p in self.named_parameters(recurse=False)]
        own += [f"self.{n}: {b.tolist()}" for n, b in self.named_buffers(recurse=False)]
        sizes = [f"self.{n} = {v}" for n, v in vars(self).items() if type(v) is int]
        masks = [f"{n}.mask = {layer.mask.int().tolist()}" for n, layer in noise_layers(self).items()]
        return "\n".join([*own, *sizes, *masks, *self.program, f"return {self.result}"])


@functools.cache
def _code(text: str, mode: str) -> Any:
    return compile(text, f"<{text}>", mode)


class RejectedError(Exception):
    """A line that cannot be a part of the program."""


class Builder:
    """Draws a network line by line.

    Attributes:
        network: the network so far.
        inputs: shapes of its inputs by name, without the batch dimension.
        names: values that lines can read, the newest last.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.network = RandomNetwork().double().eval()
        self.names: list[str] = []
        self.used: set[str] = set()
        self.vocabulary = 5
        self.inputs: dict[str, tuple[int, ...]] = {"x": self._input_shape()}
        if self.chance(0.25):
            self.inputs["y"] = self.inputs["x"] if self.chance(0.5) else self._input_shape()
        if self.chance(0.2):
            self.inputs["tokens"] = (self.random.choice([2, 3, 4]),)
        self.names += [name for name in self.inputs if name != "tokens"]
        self.examples = [self.example(batch, seed) for batch in BATCHES]
        self.runs: list[dict[str, Any]] = []
        self._replay()
        self._count = 0
        self._pending: list[str] = []
        if "tokens" in self.inputs:
            table = self.layer(nn.Embedding(self.vocabulary, self.channels()), "embedding")
            self.emit(f"{table}(tokens)")

    def _input_shape(self) -> tuple[int, ...]:
        width, length = self.random.choice([2, 3, 4, 6]), self.random.choice([3, 4, 5])
        shapes = [(width,), (width, length), (length, width), (width, length, self.random.choice([3, 4]))]
        return self.random.choice([*shapes, shapes[-1], shapes[-1]])

    def example(self, batch: int, seed: int) -> dict[str, Tensor]:
        """Inputs for a batch size."""
        generator = torch.Generator().manual_seed(seed * 10 + batch)
        return {
            name: torch.randint(self.vocabulary, (batch, *shape), generator=generator)
            if name == "tokens"
            else torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
            for name, shape in self.inputs.items()
        }

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self.random.random() < probability

    def channels(self) -> int:
        """A number of channels for a new layer."""
        return self.random.choice([2, 3, 4, 4, 6, 6, 8])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value for the first batch size."""
        return tuple(self.runs[0][name].shape)

    def rank(self, name: str) -> int:
        """Number of dimensions of a value."""
        return len(self.shape(name))

    def pick(self, *ranks: int, like: str | None = None) -> str:
        """A value, newer ones and those that nothing has read yet with a higher probability.

        Args:
            ranks: of these numbers of dimensions; any if there are none.
            like: of the same shape as this value and another one.
        """
        found = [
            name
            for name in self.names
            if (not ranks or self.rank(name) in ranks)
            and (like is None or (name != like and self.shape(name) == self.shape(like)))
        ]
        if not found:
            raise RejectedError("no such value")
        weights = [
            (6.0 if name not in self.used else 1.0) * 2.0 ** max(0, i - len(found) + 6)
            for i, name in enumerate(found)
        ]
        return self.random.choices(found, weights)[0]

    def dim(self, name: str) -> int:
        """A dimension of a value, mostly that of channels, never that of examples."""
        rank = self.rank(name)
        if rank == 4 and self.chance(0.7):
            return 1
        return self.random.randrange(1, rank)

    def layer(self, module: nn.Module, name: str) -> str:
        """Register a layer with random parameters; returns how lines call it."""
        return self._register(self._randomised(module), name)

    def tensor(self, value: Tensor, *, trained: bool = False) -> str:
        """Register a parameter or a buffer; returns how lines call it."""
        if trained:
            return self._register(nn.Parameter(value), "parameter")
        name = f"buffer{self._count}"
        self._count += 1
        self.network.register_buffer(name, value)
        self._pending.append(name)
        return f"self.{name}"

    def size(self, number: int) -> str:
        """How a line writes a size: as a number, or as an attribute."""
        return self._register(number, "size") if self.chance(0.4) else str(number)

    def _register(self, value: Any, name: str) -> str:
        name = f"{name}{self._count}"
        self._count += 1
        setattr(self.network, name, value)
        self._pending.append(name)
        return f"self.{name}"

    def _randomised(self, module: nn.Module) -> nn.Module:
        module = module.double().eval()
        with torch.no_grad():
            for part in module.modules():
                if isinstance(part, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding | NoiseLayer):
                    for parameter in part.parameters(recurse=False):
                        parameter.uniform_(-0.6, 0.6, generator=self.generator)
                else:
                    for parameter in part.parameters(recurse=False):
                        parameter.uniform_(-1.5, 1.5, generator=self.generator)
                if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
                    part.running_mean.normal_(generator=self.generator)
                    part.running_var.uniform_(0.3, 3.0, generator=self.generator)
        return module

    def normal(self, *shape: int) -> Tensor:
        """Random numbers in float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def emit(self, expression: str, *, results: int = 1, in_place: bool = False) -> str:
        """Add a line, if it runs and gives moderate numbers.

        Args:
            expression: what is computed.
            results: how many values; the last one's name is returned.
            in_place: whether a value is overwritten.
        """
        new = [f"v{len(self.names) + i}" for i in range(results)]
        line = f"{', '.join(new)} = {expression}"
        try:
            self._check(line, new, in_place)
        except Exception as error:
            for name in self._pending:
                delattr(self.network, name)
            if in_place:
                self._replay()
            raise RejectedError(str(error)) from error
        finally:
            self._pending = []
        self.used |= {name for name in self.names if name in line}
        self.names += new
        self.network.program.append(line)
        return new[-1]

    def _check(self, line: str, new: list[str], in_place: bool) -> None:
        with torch.no_grad():
            for values, batch in zip(self.runs, BATCHES, strict=True):
                for name in new:
                    values.pop(name, None)
                exec(_code(line, "exec"), _NAMESPACE, values)
                for name in new:
                    value = values[name]
                    if not isinstance(value, Tensor) or value.dtype != torch.float64:
                        raise RejectedError("not a tensor of numbers")
                    if not 2 <= value.dim() <= 5 or value.shape[0] != batch or value.numel() == 0:
                        raise RejectedError(f"shape {tuple(value.shape)}")
                    if value[:2].numel() > _LARGEST_SIZE or not value.abs().max() < _LARGEST_NUMBER:
                        raise RejectedError("too large")
                    places = {values[i].untyped_storage().data_ptr() for i in self.inputs}
                    if in_place and value.untyped_storage().data_ptr() in places:
                        raise RejectedError("an input would be overwritten")
                own = {values[i].untyped_storage().data_ptr() for i in self.inputs}
                if in_place and any(
                    values[n].untyped_storage().data_ptr() in own for n in new if n not in self.inputs
                ):
                    raise RejectedError("an input would be overwritten")

    def _replay(self) -> None:
        self.runs = []
        with torch.no_grad():
            for example in self.examples:
                values: dict[str, Any] = {"self": self.network, **{k: v.clone() for k, v in example.items()}}
                for line in self.network.program:
                    exec(_code(line, "exec"), _NAMESPACE, values)
                self.runs.append(values)

    def maybe_noise(self, name: str, dim: int, probability: float = 0.5) -> str:
        """A noise layer behind a value, or not."""
        if not self.chance(probability):
            return name
        return self.emit(f"{self.noise_layer(self.shape(name)[dim], dim - self.rank(name))}({name})")

    def noise_layer(self, width: int, dim: int, activation: str | None = None) -> str:
        """Register a noise layer."""
        size = 2 if width % 2 == 0 and self.chance(0.1) else 1
        noise = NoiseLayer(width // size, dim=dim, structure_size=size, activation=activation)  # type: ignore[arg-type]
        return self._register(noise.double(), "noise")


Operation = Callable[[Builder], None]
OPERATIONS: list[tuple[Operation, int]] = []
"""What can be a next line, with how often it is drawn."""


def _often(weight: int) -> Callable[[Operation], Operation]:
    def register(operation: Operation) -> Operation:
        OPERATIONS.append((operation, weight))
        return operation

    return register


@_often(9)
def noise(b: Builder) -> None:
    """A noise layer along any dimension but the first."""
    name = b.pick()
    dim = b.dim(name)
    activation = b.random.choice([None, None, None, "relu", "tanh"])
    written = dim - b.rank(name) if b.chance(0.5) else dim
    b.emit(f"{b.noise_layer(b.shape(name)[dim], written, activation)}({name})")


@_often(6)
def linear(b: Builder) -> None:
    """A linear layer along the last dimension, by itself or in a part of the network with noise."""
    name = b.pick()
    width, out = b.shape(name)[-1], b.channels()
    layer: nn.Module = nn.Linear(width, out, bias=b.chance(0.7))
    if b.chance(0.3):
        layer = nn.Sequential(layer, NoiseLayer(out, dim=-1), b.random.choice([nn.ReLU(), nn.Tanh()]))
    if b.chance(0.1):
        weight = b.tensor(0.5 * b.normal(out, width), trained=True)
        b.emit(f"F.linear({name}, {weight})")
    else:
        b.emit(f"{b.layer(layer, 'linear')}({name})")


@_often(7)
def convolution(b: Builder) -> None:
    """Convolutions of all kinds, depthwise ones with multipliers too."""
    name = b.pick(3, 4)
    spatial, width = b.rank(name) - 2, b.shape(name)[1]
    groups = b.random.choice([g for g in (1, 1, 1, 2, 3, width) if width % g == 0])
    out = groups * b.random.choice([1, 2, 3]) if groups > 1 else b.channels()
    kind = (nn.Conv1d, nn.Conv2d)[spatial - 1]
    size, stride = b.random.choice([1, 1, 2, 3]), b.random.choice([1, 1, 2])
    layer: nn.Module = kind(
        width,
        out,
        size,
        stride=stride,
        padding=b.random.choice([0, 0, 1, *["same"] * (stride == 1)]) if size == 3 else 0,
        padding_mode=b.random.choice(["zeros", "zeros", "reflect", "circular"]),
        dilation=b.random.choice([1, 1, 1, 2]),
        groups=groups,
        bias=b.chance(0.6),
    )
    if b.chance(0.3):
        norm = (nn.BatchNorm1d, nn.BatchNorm2d)[spatial - 1](out)
        layer = nn.Sequential(layer, norm, NoiseLayer(out, dim=1), nn.ReLU(inplace=b.chance(0.5)))
    b.emit(f"{b.layer(layer, 'conv')}({name})")


@_often(2)
def transposed_convolution(b: Builder) -> None:
    """Transposed convolutions, with groups too."""
    name = b.pick(3, 4)
    spatial, width = b.rank(name) - 2, b.shape(name)[1]
    groups = b.random.choice([g for g in (1, 1, 2, width) if width % g == 0])
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[spatial - 1]
    out = groups * b.random.choice([1, 2]) if groups > 1 else b.channels()
    layer = kind(
        width,
        out,
        b.random.choice([1, 2, 3]),
        stride=b.random.choice([1, 2]),
        padding=b.random.choice([0, 0, 1]),
        groups=groups,
        bias=b.chance(0.6),
    )
    b.emit(f"{b.layer(layer, 'deconv')}({name})")


@_often(5)
def normalisation(b: Builder) -> None:
    """Batch, instance, group, layer and RMS norms."""
    name = b.pick(2, 3, 4)
    rank, shape, affine = b.rank(name), b.shape(name), b.chance(0.7)
    kind = b.random.choice(["batch", "batch", "instance", "group", "layer", "rms"])
    if kind == "batch":
        layer: nn.Module = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[rank - 2](shape[1], affine=affine)
    elif kind == "instance":
        layer = (nn.InstanceNorm1d, nn.InstanceNorm1d, nn.InstanceNorm2d)[rank - 2](shape[1], affine=affine)
        if rank == 2:
            raise RejectedError("instance norm needs positions")
    elif kind == "group":
        groups = b.random.choice([g for g in (1, 2, 3, shape[1]) if shape[1] % g == 0])
        layer = nn.GroupNorm(groups, shape[1], affine=affine)
    elif kind == "layer":
        last = 2 if rank > 2 and b.chance(0.2) else 1
        layer = nn.LayerNorm(shape[-last:], elementwise_affine=affine, bias=b.chance(0.7))
    else:
        layer = nn.RMSNorm(shape[-1], eps=1e-3, elementwise_affine=affine)
    b.emit(f"{b.layer(layer, 'norm')}({name})")


_FUNCTIONS = (
    *("F.relu({0})", "F.relu({0})", "F.gelu({0})", "F.silu({0})", "torch.tanh({0})", "torch.sigmoid({0})"),
    *("F.hardswish({0})", "F.elu({0})", "F.softplus({0})", "F.leaky_relu({0}, 0.2)", "torch.abs({0})"),
    *(
        "torch.exp(-{0}.abs())",
        "{0}.clamp(-0.5, 0.7)",
        "-{0}",
        "{0} ** 2",
        "{0}.cos()",
        "F.dropout({0}, 0.3, False)",
    ),
    *("F.mish({0})", "F.hardtanh({0})", "{0}.clone()", "{0}.contiguous()", "torch.sqrt({0}.abs() + 0.1)"),
)


@_often(6)
def activation(b: Builder) -> None:
    """Functions of each element."""
    name = b.pick()
    if b.chance(0.12):
        width = b.shape(name)[1] if b.chance(0.6) else 1
        b.emit(f"{b.layer(nn.PReLU(width), 'prelu')}({name})")
        return
    if b.chance(0.12):
        b.emit(f"{b.layer(nn.ReLU(inplace=True), 'relu')}({name})", in_place=True)
        return
    b.emit(b.random.choice(_FUNCTIONS).format(name))


def _broadcasting(b: Builder, name: str) -> str:
    """A number, parameter or buffer that broadcasts to a value."""
    if b.chance(0.3):
        return str(b.random.choice([0.5, 2, -1.5, 0.0]))
    shape = [1, *(n if b.chance(0.6) else 1 for n in b.shape(name)[1:])]
    shape = shape[b.random.choice([0, 1, 1]) :]
    while len(shape) > 1 and shape[0] == 1 and b.chance(0.5):
        shape = shape[1:]
    return b.tensor(b.normal(*shape), trained=b.chance(0.6))


@_often(5)
def with_constant(b: Builder) -> None:
    """Arithmetic with numbers, parameters and buffers."""
    name = b.pick()
    other = _broadcasting(b, name)
    forms = ["{0} + {1}", "{0} * {1}", "{1} * {0}", "{0} - {1}", "{1} - {0}", "{0} / (abs({1}) + 0.5)"]
    forms += ["torch.maximum({0}, torch.as_tensor({1}, dtype={0}.dtype))", "torch.add({0}, {1}, alpha=0.5)"]
    b.emit(b.random.choice(forms).format(name, other))


@_often(8)
def of_two(b: Builder) -> None:
    """Arithmetic of two values of one shape."""
    first = b.pick()
    second = b.pick(like=first)
    forms = ["{0} + {1}", "{0} + {1}", "{0} + {1}", "{0} * {1}", "{0} - {1}", "torch.maximum({0}, {1})"]
    forms += ["{0} / ({1}.abs() + 1.0)", "{0} * torch.sigmoid({1})", "torch.lerp({0}, {1}, 0.3)"]
    forms += [
        "torch.stack([{0}, {1}], 1).sum(1)",
        "torch.stack([{0}, {1}]).mean(0)",
        "torch.addcmul({0}, {1}, {0})",
    ]
    if b.chance(0.1):
        b.emit(f"{first}.add_({second})", in_place=True)
        return
    b.emit(b.random.choice(forms).format(first, second))


@_often(2)
def broadcast_of_two(b: Builder) -> None:
    """Arithmetic of two values of which one has fewer sizes."""
    first = b.pick(3, 4, 5)
    second = b.pick()
    dims = [d for d in range(1, b.rank(first)) if b.chance(0.5)] or [1]
    if b.shape(second) == b.shape(first):
        second = f"{second}.mean({dims}, keepdim=True)"
    elif b.rank(second) == 2:
        second = f"{second}.view(-1, {b.shape(second)[1]}{', 1' * (b.rank(first) - 2)})"
    b.emit(b.random.choice(["{0} + {1}", "{0} * {1}", "{0} * {1}.sigmoid()"]).format(first, second))


@_often(5)
def residual(b: Builder) -> None:
    """A branch of one or two layers beside the identity."""
    name = b.pick(2, 3, 4)
    rank, shape = b.rank(name), b.shape(name)
    inner = b.channels()
    if rank > 2 and b.chance(0.6):
        kind = (nn.Conv1d, nn.Conv2d)[rank - 3]
        down: nn.Module = kind(shape[1], inner, 3, padding=1, bias=b.chance(0.5))
        up: nn.Module = kind(inner, shape[1], 1, bias=b.chance(0.5))
        dim = 1
    else:
        down, up, dim = nn.Linear(shape[-1], inner), nn.Linear(inner, shape[-1], bias=b.chance(0.5)), -1
    branch = b.emit(f"{b.layer(down, 'down')}({name})")
    branch = b.maybe_noise(branch, dim % rank)
    branch = b.emit(b.random.choice(["F.relu({0})", "F.gelu({0})", "F.silu({0})"]).format(branch))
    branch = b.emit(f"{b.layer(up, 'up')}({branch})")
    branch = b.maybe_noise(branch, dim % rank)
    total = b.emit(f"{name} + {branch}")
    b.maybe_noise(total, dim % rank, 0.2)


@_often(4)
def concatenation(b: Builder) -> None:
    """Two or three values behind each other, along any dimension."""
    names = [b.pick()]
    dim = b.dim(names[0])
    fitting = [
        n
        for n in b.names
        if b.rank(n) == b.rank(names[0])
        and all(
            p == q for d, (p, q) in enumerate(zip(b.shape(n), b.shape(names[0]), strict=True)) if d != dim
        )
    ]
    names += b.random.choices(fitting, k=b.random.choice([1, 1, 2]))
    if b.chance(0.1):
        names.append(f"torch.zeros_like({names[0]})")
    b.random.shuffle(names)
    b.emit(f"torch.cat([{', '.join(names)}], {dim})")


@_often(4)
def parts(b: Builder) -> None:
    """Parts of a value: equal and unequal ones, with steps, picked by number."""
    name = b.pick()
    dim = b.dim(name)
    size = b.shape(name)[dim]
    if size < 2:
        raise RejectedError("nothing to divide")
    kind = b.random.choice(["chunk", "split", "unequal", "narrow", "step", "select", "index", "unbind"])
    cut = b.random.randrange(1, size)
    before = ":, " * dim
    if kind == "chunk" and size % 2 == 0:
        b.emit(f"{name}.chunk(2, {dim})", results=2)
    elif kind == "split" and size % 2 == 0:
        b.emit(f"{name}.split({b.size(size // 2)}, {dim})", results=2)
    elif kind == "unequal":
        b.emit(f"{name}.split([{cut}, {size - cut}], {dim})", results=2)
    elif kind == "narrow":
        b.emit(f"{name}.narrow({dim}, {b.random.randrange(0, size - cut + 1)}, {cut})")
    elif kind == "step":
        b.emit(f"{name}[{before}{b.random.choice(['::2', '1::2', '1:', ':-1'])}]")
    elif kind == "select" and b.rank(name) > 2:
        b.emit(b.random.choice(["{0}.select({1}, {2})", "{0}[{3}{2}]"]).format(name, dim, cut - 1, before))
    elif kind == "unbind" and b.rank(name) > 2 and size <= 4:
        b.emit(f"{name}.unbind({dim})", results=size)
    else:
        order = torch.randperm(size, generator=b.generator)
        order = order if b.chance(0.6) else order[:cut]
        index = b.tensor(order)
        b.emit(
            b.random.choice(["{0}.index_select({1}, {2})", "{0}[{3}{2}]"]).format(name, dim, index, before)
        )


@_often(3)
def reordered(b: Builder) -> None:
    """Elements in another order along a dimension."""
    name = b.pick()
    dim = b.dim(name)
    size = b.shape(name)[dim]
    forms = ["{0}.flip({1})", "{0}.roll({2}, {1})"]
    if dim == 1 and size % 2 == 0 and b.rank(name) > 2:
        forms += ["F.channel_shuffle({0}, 2)", "{0}.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)"]
        forms += ["{0}.unflatten(1, (2, {3})).transpose(1, 2).reshape({0}.shape)"]
    b.emit(b.random.choice(forms).format(name, dim, b.random.choice([1, -1, 2]), size // 2))


@_often(5)
def reshaped(b: Builder) -> None:
    """Other dimensions."""
    name = b.pick()
    shape, rank = b.shape(name), b.rank(name)
    dim = b.dim(name)
    forms = ["{0}.unsqueeze({1})", "{0}.unsqueeze(-1)", "{0}.flatten(1)"]
    forms += ["{0}.squeeze({1})"] if shape[dim] == 1 else []
    if rank > 2:
        order = [0, *b.random.sample(range(1, rank), rank - 1)]
        forms += [
            "{0}.transpose(1, -1)",
            "{0}.mT",
            f"{{0}}.permute({order})",
            f"{{0}}.permute({order}).contiguous()",
        ]
        forms += ["{0}.flatten(1, 2)", "{0}.flatten(-2)", "{0}.reshape({0}.shape[0], -1)"]
        forms += [
            "{0}.reshape({0}.shape[0], -1, {0}.shape[-1])",
            f"{{0}}.reshape(-1, {shape[1] * shape[2]}, *{{0}}.shape[3:])",
        ]
    divisor = next((k for k in (2, 3) if shape[dim] % k == 0), None)
    if rank < 5 and divisor:
        parts = [b.random.choice(["-1", str(divisor)]), str(shape[dim] // divisor)]
        if parts[0] == "-1":
            b.random.shuffle(parts)
        forms += [f"{{0}}.unflatten({dim}, ({', '.join(parts)}))"] * 2
        sizes = [*(f"{name}.shape[{d}]" for d in range(dim)), parts[0], b.size(shape[dim] // divisor)]
        if parts[0] == "-1" or parts[0] == str(divisor):
            sizes = [*sizes[:dim], b.size(divisor), b.size(shape[dim] // divisor)]
            sizes += [f"{name}.shape[{d}]" for d in range(dim + 1, rank)]
            forms += [f"{{0}}.reshape({', '.join(sizes)})"] * 2
    b.emit(b.random.choice(forms).format(name, dim))


@_often(3)
def repeated(b: Builder) -> None:
    """Elements several times."""
    name = b.pick()
    dim, rank = b.dim(name), b.rank(name)
    times = [2 if d == dim else 1 for d in range(rank)]
    forms = [f"{name}.repeat({times})", f"{name}.repeat_interleave(2, {dim})", f"torch.tile({name}, {times})"]
    if b.shape(name)[dim] == 1:
        sizes = [3 if d == dim else -1 for d in range(rank)]
        forms += [f"{name}.expand({', '.join(map(str, sizes))})"] * 3
    if rank < 5:
        sizes = ["-1"] * (rank + 1)
        sizes[dim] = "2"
        forms += [f"{name}.unsqueeze({dim}).expand({', '.join(sizes)})"]
        forms += [f"{name}.unsqueeze({dim}).expand({', '.join(sizes)}).flatten({dim}, {dim + 1})"]
    b.emit(b.random.choice(forms))


@_often(3)
def padding(b: Builder) -> None:
    """Something put around, along positions or channels."""
    name = b.pick(2, 3, 4)
    rank = b.rank(name)
    last = b.random.randrange(1, rank)
    sizes = [b.random.choice([0, 1, 2]) for _ in range(2 * last)]
    modes = ["", "", ", value=0.7"]
    if (rank, last) in ((3, 1), (4, 2)):
        modes += [f", mode='{m}'" for m in ("reflect", "replicate", "circular")]
    b.emit(f"F.pad({name}, {tuple(sizes)}{b.random.choice(modes)})")


@_often(5)
def pooling(b: Builder) -> None:
    """Pooling and resampling of positions."""
    name = b.pick(3, 4)
    n = b.rank(name) - 2
    forms = ["F.max_pool{n}d({0}, 2)", "F.avg_pool{n}d({0}, 2)", "F.avg_pool{n}d({0}, 3, 1, 1)"]
    forms += ["F.avg_pool{n}d({0}, 3, 2, 1, count_include_pad=False)", "F.adaptive_avg_pool{n}d({0}, 1)"]
    forms += [
        "F.max_pool{n}d({0}, 3, 1, 1)",
        "F.adaptive_max_pool{n}d({0}, 2)",
        "F.adaptive_avg_pool{n}d({0}, 2)",
    ]
    forms += ["F.interpolate({0}, scale_factor=2, mode='nearest')", "F.lp_pool{n}d({0}.abs() + 0.1, 2, 2)"]
    if n == 2:
        forms += ["F.interpolate({0}, size=(3, 4), mode='bilinear')", "F.pixel_shuffle({0}, 2)"]
        forms += ["F.pixel_unshuffle({0}, 2)", "F.interpolate({0}, scale_factor=1.5, mode='bicubic')"]
    else:
        forms += ["F.interpolate({0}, size=5, mode='linear')"]
    b.emit(b.random.choice(forms).format(name, n=n))


@_often(5)
def reduction(b: Builder) -> None:
    """Positions or channels brought together."""
    name = b.pick()
    dim, keep = b.dim(name), b.chance(0.4) or b.rank(name) == 2
    dims = dim if b.chance(0.6) else sorted({b.dim(name), dim})
    kind = b.random.choice(["mean", "mean", "sum", "sum", "amax", "amin", "max", "var", "logsumexp", "norm"])
    if kind == "max":
        b.emit(f"{name}.max({dim}, keepdim={keep}).values")
    elif kind == "norm":
        b.emit(f"({name} + 0.5).norm(dim={dim}, keepdim={keep})")
    elif kind == "var":
        b.emit(f"{name}.var({dims}, unbiased=False, keepdim={keep})")
    else:
        b.emit(f"{name}.{kind}({dims}, keepdim={keep})")


@_often(3)
def along_a_dimension(b: Builder) -> None:
    """What mixes all entries along a dimension."""
    name = b.pick()
    dim = b.dim(name)
    forms = ["{0}.softmax({1})", "{0}.softmax({1})", "F.log_softmax({0}, {1})", "{0}.cumsum({1})"]
    forms += [
        "{0}.topk(min(2, {0}.shape[{1}]), {1}).values",
        "{0}.sort({1}).values",
        "F.normalize({0} + 0.5, dim={1})",
    ]
    b.emit(b.random.choice(forms).format(name, dim))


@_often(2)
def gated(b: Builder) -> None:
    """Gated linear units: one half times a function of the other."""
    name = b.pick()
    dim = b.dim(name)
    if b.shape(name)[dim] % 2:
        raise RejectedError("no two halves")
    if b.chance(0.5):
        b.emit(f"F.glu({name}, {dim})")
        return
    b.emit(f"{name}.chunk(2, {dim})", results=2)
    first, second = b.names[-2:]
    b.emit(b.random.choice(["F.silu({0}) * {1}", "{0} * F.gelu({1})"]).format(first, second))


@_often(2)
def swiglu(b: Builder) -> None:
    """Two linear layers, the one gating the other, and a third that reads them."""
    name = b.pick(2, 3)
    width, inner = b.shape(name)[-1], b.channels()
    gate, up = (b.emit(f"{b.layer(nn.Linear(width, inner, bias=False), 'gate')}({name})") for _ in range(2))
    product = b.maybe_noise(b.emit(f"F.silu({gate}) * {up}"), b.rank(name) - 1, 0.8)
    b.emit(f"{b.layer(nn.Linear(inner, width, bias=False), 'back')}({product})")


@_often(2)
def squeeze_excitation(b: Builder) -> None:
    """Channels multiplied by what is computed from their means."""
    name = b.pick(3, 4)
    rank, width = b.rank(name), b.shape(name)[1]
    squeezed = b.emit(f"{name}.mean({list(range(2, rank))})")
    hidden = b.emit(f"F.relu({b.layer(nn.Linear(width, 3), 'squeeze')}({squeezed}))")
    hidden = b.maybe_noise(hidden, 1)
    gates = b.emit(f"{b.layer(nn.Linear(3, width), 'excite')}({hidden}).sigmoid()")
    b.emit(f"{name} * {gates}[{':, :' + ', None' * (rank - 2)}]")


@_often(4)
def attention(b: Builder) -> None:
    """Attention of several heads, of which keys and values may have fewer."""
    name = b.pick(3)
    _, length, width = b.shape(name)
    heads, size = b.random.choice([(1, 2), (2, 2), (2, 3), (4, 1), (4, 2)])
    groups = b.random.choice([heads, heads, max(1, heads // 2), 1])
    source = name
    if b.chance(0.2):
        source = b.pick(3)
    queries, others = heads * size, groups * size
    bias = b.chance(0.5)
    if groups == heads and source == name and b.chance(0.4):
        joint = b.emit(f"{b.layer(nn.Linear(width, 3 * queries, bias=bias), 'qkv')}({name})")
        b.emit(
            f"{joint}.chunk(3, -1)" if b.chance(0.5) else f"{joint}.split({b.size(queries)}, -1)", results=3
        )
        q, k, v = b.names[-3:]
    else:
        q = b.emit(f"{b.layer(nn.Linear(width, queries, bias=bias), 'query')}({name})")
        k = b.emit(f"{b.layer(nn.Linear(b.shape(source)[-1], others, bias=bias), 'key')}({source})")
        v = b.emit(f"{b.layer(nn.Linear(b.shape(source)[-1], others, bias=bias), 'value')}({source})")
    if b.chance(0.3):
        v = b.maybe_noise(v, 2, 1.0)
    if b.chance(0.2):
        q = b.maybe_noise(q, 2, 1.0)
    form = b.random.choice(["heads", "size", "both", "unflatten"])
    divided = []
    for x, count in ((q, heads), (k, groups), (v, groups)):
        sizes = {"heads": f"{count}, -1", "size": f"-1, {size}", "unflatten": f"{count}, {size}"}
        written = sizes.get(form) or f"{b.size(count)}, {b.size(size)}"
        if form == "unflatten":
            divided.append(b.emit(f"{x}.unflatten(2, ({written})).transpose(1, 2)"))
        else:
            divided.append(b.emit(f"{x}.view(*{x}.shape[:2], {written}).transpose(1, 2)"))
    q, k, v = divided
    gqa = ""
    if groups < heads:
        repeats = heads // groups
        kind = b.random.choice(["interleave", "expand", "gqa"])
        if kind == "gqa":
            gqa = ", enable_gqa=True"
        for i in (1, 2) if kind != "gqa" else ():
            x = divided[i]
            if kind == "interleave":
                divided[i] = b.emit(f"{x}.repeat_interleave({repeats}, 1)")
            else:
                divided[i] = b.emit(f"{x}[:, :, None].expand(-1, -1, {repeats}, -1, -1).flatten(1, 2)")
        q, k, v = divided
    if b.chance(0.15):
        q = b.maybe_noise(q, 1, 1.0)
    if gqa or b.chance(0.5):
        mask = ""
        if b.chance(0.3) and source == name:
            mask = ", is_causal=True"
        elif b.chance(0.3):
            mask = f", attn_mask={b.tensor(b.normal(length, b.shape(source)[1]))}"
        result = b.emit(f"F.scaled_dot_product_attention({q}, {k}, {v}{mask}{gqa})")
    else:
        product = b.random.choice(
            [
                "{q} @ {k}.transpose(-2, -1)",
                "torch.matmul({q}, {k}.mT)",
                "torch.einsum('bhtd,bhsd->bhts', {q}, {k})",
            ]
        )
        scores = b.emit(
            f"({product.format(q=q, k=k)} * {b.random.choice(['0.7', f'{size} ** -0.5'])}).softmax(-1)"
        )
        result = b.emit(
            b.random.choice([f"{scores} @ {v}", f"torch.einsum('bhts,bhsd->bhtd', {scores}, {v})"])
        )
    if b.chance(0.3):
        result = b.maybe_noise(result, b.random.choice([1, 3]), 1.0)
    joined = [f"{result}.transpose(1, 2).reshape({result}.shape[0], {length}, {b.size(queries)})"]
    joined += [
        f"{result}.transpose(1, 2).flatten(2)",
        f"{result}.transpose(1, 2).reshape({result}.shape[0], {length}, -1)",
    ]
    result = b.emit(b.random.choice(joined))
    result = b.emit(f"{b.layer(nn.Linear(queries, width), 'out')}({result})")
    if b.chance(0.5):
        b.emit(f"{name} + {result}")


@_often(3)
def product(b: Builder) -> None:
    """Products of two values, or of a value and a parameter, as matrices."""
    first = b.pick(3)
    _, rows, columns = b.shape(first)
    if b.chance(0.5):
        out = b.channels()
        matrix = b.tensor(0.5 * b.normal(columns, out), trained=True)
        forms = ["{0} @ {1}", "torch.einsum('bti,io->bto', {0}, {1})", "torch.einsum('...i,io', {0}, {1})"]
        if b.chance(0.3):
            scale = b.tensor(b.normal(out))
            forms = [f"torch.einsum('b...i,io,o->b...o', {{0}}, {{1}}, {scale})"]
        b.emit(b.random.choice(forms).format(first, matrix))
        return
    second = b.pick(3)
    forms = []
    if b.shape(second)[1] == columns:
        forms += ["{0} @ {1}", "torch.bmm({0}, {1})", "torch.einsum('bik,bkj->bij', {0}, {1})"]
    if b.shape(second)[2] == columns:
        forms += ["{0} @ {1}.mT", "torch.einsum('bik,bjk->bij', {0}, {1})"]
    if b.shape(second)[1] == rows:
        forms += ["{0}.mT @ {1}", "torch.einsum('bki,bkj->bij', {0}, {1})"]
    if not forms:
        raise RejectedError("shapes differ")
    b.emit(b.random.choice(forms).format(first, second))


@_often(2)
def pooled(b: Builder) -> None:
    """Tokens pooled with the weights of several heads, one behind the other; or all products of two values' entries."""
    x = b.pick(3)
    if b.chance(0.3):
        first, second = (b.emit(f"{name}.mean(1)") for name in (x, b.pick(3)))
        joint = b.emit(f"torch.einsum('bi,bj->bij', {first}, {second})")
    else:
        heads = b.random.choice([1, 2, 3])
        scores = b.emit(f"{b.layer(nn.Linear(b.shape(x)[2], heads), 'linear')}({x}).softmax(1)")
        forms = ["torch.einsum('bth,btc->bhc', {1}, {0})", "{1}.mT @ {0}"]
        forms += ["torch.einsum('bt...,btc->b...c', {1}, {0})", "torch.einsum('btc,bth->bch', {0}, {1})"]
        joint = b.emit(b.random.choice(forms).format(x, scores))
    flat = b.emit(b.random.choice([f"{joint}.flatten(1)", f"{joint}.reshape({joint}.shape[0], -1)"]))
    if b.chance(0.3):
        flat = b.maybe_noise(flat, 1, 1.0)
    width = b.shape(flat)[1]
    out = b.emit(f"{b.layer(nn.Linear(width, b.channels()), 'linear')}({flat}).unsqueeze(1)")
    if b.chance(0.3):
        b.emit(f"{flat}.unflatten(1, {b.shape(joint)[1:]}).relu()")
    b.maybe_noise(out, 2)


@_often(2)
def shared(b: Builder) -> None:
    """A layer that is called another time."""
    kinds = ("linear", "conv", "norm", "noise", "prelu", "up", "down")
    names = [name for name in b.network._modules if name.startswith(kinds)]
    if not names:
        raise RejectedError("nothing to share")
    b.emit(f"self.{b.random.choice(names)}({b.pick()})")


@_often(2)
def chosen(b: Builder) -> None:
    """One of two values at each place, by a mask."""
    first = b.pick()
    mask = torch.rand([1, *b.shape(first)[1:]], generator=b.generator) < 0.5
    if b.chance(0.5):
        dim = b.dim(first)
        mask = mask.any(tuple(d for d in range(mask.dim()) if d != dim), keepdim=True)
    name = b.tensor(mask)
    if b.chance(0.4):
        b.emit(f"{first}.masked_fill({name}, {b.random.choice([0.0, 0.3])})")
        return
    other = b.pick(like=first) if b.chance(0.6) else "torch.zeros(())"
    other = f"torch.zeros_like({first})" if other.startswith("torch") else other
    b.emit(f"torch.where({name}, {first}, {other})")


@_often(1)
def merged(b: Builder) -> None:
    """Patches of positions moved to channels, as in networks of windows."""
    name = b.pick(4)
    _, width, height, columns = b.shape(name)
    if height % 2 or columns % 2:
        raise RejectedError("no windows")
    forms = [
        f"{name}.view({name}.shape[0], -1, {height // 2}, 2, {columns // 2}, 2).permute(0, 2, 4, 3, 5, 1)"
        f".reshape(-1, {height // 2 * columns // 2}, {b.size(4 * width)})",
        f"F.unfold({name}, 2, stride=2)",
        f"torch.cat([{name}[:, :, 0::2, 0::2], {name}[:, :, 1::2, 1::2]], 1)",
    ]
    b.emit(b.random.choice(forms))


def build(seed: int) -> tuple[RandomNetwork, Builder]:
    """A random network with noise and random masks, in a random mode, and its builder, which makes inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        b = Builder(seed)
        operations, weights = zip(*OPERATIONS, strict=True)
        if b.chance(0.8):
            stem(b)
        wanted = len(b.network.program) + b.random.randint(2, 13)
        for _ in range(200):
            if len(b.network.program) >= wanted:
                break
            try:
                b.random.choices(operations, weights)[0](b)
            except RejectedError:
                b._pending = []
        _finish(b)
        add_noise_to_layers(b)
        set_masks(b)
    network = b.network
    for parameter in network.parameters():
        parameter.requires_grad_(b.random.random() < 0.97)
    return network.train(b.chance(0.3)), b


def stem(b: Builder) -> None:
    """A first layer with noise."""
    name = b.names[0]
    width, rank, out = b.shape(name)[1], b.rank(name), b.channels()
    if rank > 2 and b.chance(0.7):
        layer: nn.Module = (nn.Conv1d, nn.Conv2d)[rank - 3](
            width, out, b.random.choice([1, 3]), padding="same"
        )
        dim = 1
    else:
        layer, dim = nn.Linear(b.shape(name)[-1], out), rank - 1
    b.maybe_noise(b.emit(f"{b.layer(layer, 'stem')}({name})"), dim, 0.9)


def _read_all(b: Builder) -> None:
    """Linear layers that read all that nothing reads yet, added up."""
    total = ""
    for name in [n for n in b.names if n not in b.used and n not in b.inputs]:
        try:
            if b.rank(name) > 2:
                name = b.emit(f"{name}.flatten(1)" if b.chance(0.5) else f"{name}.flatten(2).mean(1)")
            name = b.emit(f"{b.layer(nn.Linear(b.shape(name)[-1], 3, bias=b.chance(0.7)), 'read')}({name})")
            total = b.emit(f"{total} + {name}") if total else name
        except RejectedError:
            b._pending = []


def _finish(b: Builder) -> None:
    """Choose what is returned."""
    if b.chance(0.7):
        _read_all(b)
    last = b.names[-1]
    if b.chance(0.5):
        try:
            if b.rank(last) > 2 and b.chance(0.5):
                last = b.emit(
                    f"{last}.mean(1)" if b.chance(0.5) else f"{last}.mean({list(range(2, b.rank(last)))})"
                )
            if b.rank(last) > 2 and b.chance(0.5):
                last = b.emit(f"{last}.flatten(1)")
            last = b.emit(f"{b.layer(nn.Linear(b.shape(last)[-1], 3), 'head')}({last})")
        except RejectedError:
            b._pending = []
    unread = [name for name in b.names if name not in b.used and name != last and name not in b.inputs]
    others = b.random.sample(unread, min(len(unread), b.random.choice([0, 0, 1, 2])))
    if b.chance(0.05):
        others.append(b.pick())
    kind = b.random.choice(["tuple", "dict"]) if others or b.chance(0.1) else "tensor"
    if kind == "tuple":
        b.network.result = f"({last}, {''.join(o + ', ' for o in others)})"
    elif kind == "dict":
        b.network.result = f"{{'last': {last}, 'others': [{', '.join(others)}]}}"
    else:
        b.network.result = last


def add_noise_to_layers(b: Builder) -> None:
    """Noise that `bmrs.add_noise` puts behind random layers, or in front of them, on their heads."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.Embedding)
    layers = [name for name, m in b.network.named_modules() if isinstance(m, kinds)]
    chosen = [name for name in layers if b.chance(0.3)]
    for name in chosen:
        layer = b.network.get_submodule(name)
        if isinstance(layer, nn.Linear) and layer.in_features % 2 == 0 and b.chance(0.4):
            bmrs.add_noise(
                b.network, where=lambda n, _, name=name: n == name, structures="heads", num_heads=2
            )
        else:
            bmrs.add_noise(b.network, where=lambda n, _, name=name: n == name)


def set_masks(b: Builder) -> None:
    """Random posteriors and masks: of all densities, sometimes the same for all layers of one width."""
    tied = b.chance(0.5)
    by_width: dict[int, Tensor] = {}
    density = b.random.choice([0.0, 0.3, 0.5, 0.5, 0.7, 0.9, 1.0])
    with torch.no_grad():
        for layer in noise_layers(b.network).values():
            layer.mu.uniform_(-4.0, 1.0, generator=b.generator)
            layer.log_sigma.uniform_(-6.0, 1.0, generator=b.generator)
            own = density if tied else b.random.choice([0.0, 0.3, 0.5, 0.8, 1.0, density])
            mask = torch.rand(layer.num_structures, generator=b.generator) < own
            if b.chance(0.8):
                mask[int(b.random.random() * len(mask))] = True
            if tied:
                mask = by_width.setdefault(layer.num_structures, mask)
            layer.mask.copy_(mask)
    if b.chance(0.15) and noise_layers(b.network):
        bmrs.prune(b.network, bmrs.BMRSNormal(), example_inputs=b.example(BATCHES[0], 0))


def build_residual(seed: int) -> tuple[nn.Module, Tensor]:
    """A plain network of residual blocks: all masks on its stream agree, so that all that is pruned can leave."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        images = rng.random() < 0.6
        width = rng.choice([4, 5, 6, 8])
        stream = torch.rand(width, generator=generator) < 0.6
        stream[rng.randrange(width)] = True
        network = RandomNetwork()
        dim = 1 if images else -1

        def layer(n_in: int, n_out: int, size: int = 1) -> nn.Module:
            bias = rng.random() < 0.5
            return (
                nn.Conv2d(n_in, n_out, size, padding=size // 2, bias=bias)
                if images
                else nn.Linear(n_in, n_out, bias)
            )

        def noise_with(mask: Tensor, activation: str | None = None) -> NoiseLayer:
            noise = NoiseLayer(len(mask), dim=dim, activation=activation)  # type: ignore[arg-type]
            noise.mask.copy_(mask)
            nn.init.uniform_(noise.mu, -4.0, 1.0, generator=generator)
            return noise

        network.stem = nn.Sequential(layer(3, width, 3 if images else 1), noise_with(stream))
        network.program.append("v = self.stem(x)")
        for i in range(rng.randint(0, 3)):
            inner = rng.choice([3, 4, 6])
            mask = torch.rand(inner, generator=generator) < 0.6
            mask[rng.randrange(inner)] = True
            parts: list[nn.Module] = []
            if rng.random() < 0.5:
                parts.append(nn.ReLU())
            parts.append(layer(width, inner, rng.choice([1, 3]) if images else 1))
            if images and rng.random() < 0.5:
                parts += [nn.BatchNorm2d(inner), nn.ReLU(), noise_with(mask)]
            else:
                parts += [noise_with(mask, rng.choice([None, "relu", "tanh"]))]
            parts += [layer(inner, width), noise_with(stream)]
            setattr(network, f"block{i}", nn.Sequential(*parts))
            network.program.append(f"v = v + self.block{i}(v)")
        network.head = nn.Linear(width, 2)
        network.result = "self.head(v.mean((2, 3)))" if images else "self.head(v)"
        x = torch.randn(3, 3, *([5, 4] if images else []), generator=generator, dtype=torch.float64)
    return network.double(), x
