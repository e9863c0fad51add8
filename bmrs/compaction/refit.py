"""Weights of a compacted network refitted in closed form, so that its layers compute what the full network's do.

When structures leave, the layers that read them lose what they contributed. Much of it can be told from the structures
that stay: they are correlated. Layer by layer, from the input to the output, the weights and the bias of each linear
or convolution layer become those with which its outputs, computed from the compacted network's own inputs, are closest
in the mean square to the full network's outputs for the same examples: ordinary least squares with a small ridge
towards the present weights. Later layers thus make up for the errors of earlier ones. No gradient, no labels and no
learning rate are involved. (Channel pruning by reconstruction: He, Zhang & Sun 2017, arXiv 1707.06168.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bmrs.graph.stock_layers import WEIGHT_LAYERS, WeightLayer, is_depthwise

RIDGE = 1e-3
"""How much the present weights count where none is trained afterwards, relative to the variance of the inputs."""

_BATCH = 100
# Equations for each unknown: of positions of feature maps beyond the most a random choice is taken, and with fewer than
# the least a layer keeps its weights.
_MOST_EQUATIONS, _LEAST_EQUATIONS = 100, 2


@dataclass(frozen=True)
class Origin:
    """Where a layer of a compacted network comes from.

    Attributes:
        name: qualified name of the layer in the full network.
        rows: its output channels that are left, int64 of shape (output channels,).
    """

    name: str
    rows: Tensor


@torch.no_grad()
def refit(
    compacted: nn.Module, origins: Mapping[str, Origin], reference: nn.Module, inputs: Tensor, *, ridge: float
) -> None:
    """Refit a compacted network's linear and convolution layers, in place, in an order of execution.

    Depthwise convolutions and batch norms, which do not mix channels, keep their weights. So do layers that read what
    they read in the full network, such as the first one, and, with a warning, those with too few examples.

    Args:
        compacted: the network.
        origins: by name of its layers, in an order of execution, where each comes from.
        reference: the full network with layers of these names, such as the trained one before noise was added.
        inputs: examples, the more the better: a few for each input of the widest layer at least.
        ridge: how much the present weights count, relative to the mean variance of a layer's inputs.

    Raises:
        ValueError: the reference lacks a layer or has one of another type or with fewer outputs; it is named. Or its
            dtype or device is another one than that of ``inputs``.
    """
    for parameter in reference.parameters():
        if parameter.is_floating_point() and (parameter.dtype, parameter.device) != (
            inputs.dtype,
            inputs.device,
        ):
            raise ValueError(
                f"refit_to must be {inputs.dtype} on {inputs.device} as example_inputs are, "
                f"got {parameter.dtype} on {parameter.device}"
            )
    layers = {name: compacted.get_submodule(name) for name in origins}
    chosen = {name: layer for name, layer in layers.items() if _mixes(layer)}
    for name, layer in chosen.items():
        _check_reference(layer, origins[name], reference)
    with _evaluating(compacted), _evaluating(reference):
        for name, layer in chosen.items():
            if not _reads_the_same(compacted, layer, reference, origins[name], inputs[:_BATCH]):
                _refit_layer(compacted, name, layer, reference, origins[name], inputs, ridge)


def _refit_layer(
    compacted: nn.Module,
    name: str,
    layer: WeightLayer,
    reference: nn.Module,
    origin: Origin,
    inputs: Tensor,
    ridge: float,
) -> None:
    axis = -1 if isinstance(layer, nn.Linear) else 1
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weights = layer.weight.double().flatten(1).chunk(groups)
    unknowns = weights[0].shape[1]
    equations = [_NormalEquations(weight, shifts=layer.bias is not None) for weight in weights]
    generator = torch.Generator().manual_seed(0)
    for batch in inputs.split(_BATCH):
        reads, wants = _inputs_of(compacted, layer, batch), _outputs_of(reference, origin, batch)
        most = max(1, _MOST_EQUATIONS * unknowns * len(batch) // (len(inputs) * len(reads)))
        for its_read, its_wanted in zip(reads, wants, strict=True):
            read, wanted = its_read.movedim(axis, -1), its_wanted.movedim(axis, -1)[..., origin.rows]
            # At random: a regular stride would meet the same few positions in every feature map.
            chosen = torch.randperm(wanted[..., 0].numel(), generator=generator)[:most].to(wanted.device)
            for part, x, y in zip(equations, read.chunk(groups, -1), wanted.chunk(groups, -1), strict=True):
                features = x if isinstance(layer, nn.Linear) else patches(layer, x.movedim(-1, 1))
                part.add(features.flatten(0, -2)[chosen].double(), y.flatten(0, -2)[chosen].double())
    if equations[0].count < _LEAST_EQUATIONS * unknowns:
        warnings.warn(
            f"layer {name!r} keeps its weights, as {equations[0].count} examples (positions of feature maps count) are "
            f"too few to refit its {unknowns} inputs; give at least {_LEAST_EQUATIONS * unknowns}",
            stacklevel=4,
        )
        return
    solutions = [part.solve(ridge) for part in equations]
    # Pruned structures that stay, in rows of zeros, stay pruned.
    dead = ~layer.weight.flatten(1).any(dim=1)
    if layer.bias is not None:
        dead &= layer.bias == 0
        bias = torch.cat([bias for _, bias in solutions])
        layer.bias.copy_(bias.masked_fill(dead, 0.0))
    weight = torch.cat([weight for weight, _ in solutions]).masked_fill(dead[:, None], 0.0)
    layer.weight.copy_(weight.view_as(layer.weight))


class _NormalEquations:
    """Sums for the least squares problem y ≈ x·Wᵀ + b over many rows; float64.

    Args:
        weight: the present W, of shape (outputs, inputs).
        shifts: whether there is a b; a layer without a bias gets none, so that it does not grow.
    """

    def __init__(self, weight: Tensor, *, shifts: bool) -> None:
        outputs, inputs = weight.shape
        self._weight, self._shifts = weight, shifts
        # Of the rows (x, 1): their products with each other, and with y.
        self._gram = weight.new_zeros(inputs + 1, inputs + 1)
        self._cross = weight.new_zeros(inputs + 1, outputs)

    @property
    def count(self) -> int:
        """Rows so far."""
        return int(self._gram[-1, -1])

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x of shape (rows, inputs), y of shape (rows, outputs)."""
        x = F.pad(x, (0, 1), value=1.0)
        self._gram += x.T @ x
        self._cross += x.T @ y

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return W and b, which is 0 if the layer has none."""
        count = self._gram[-1, -1]
        # Columns of zeros are of pruned structures that stay: they go on being ignored.
        read = self._weight.any(dim=0)
        mean_x, mean_y = self._gram[-1, :-1] / count, self._cross[-1] / count
        if not self._shifts:
            mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        gram = self._gram[:-1, :-1] / count - mean_x.outer(mean_x)
        cross = self._cross[:-1] / count - mean_x.outer(mean_y)
        # Inputs that never vary, and leave rounding errors only, leave their weights as they are.
        size = self._gram.diagonal()[:-1].mean() / count
        added = ridge * gram.diagonal().mean() + 1e-9 * size + torch.finfo(gram.dtype).tiny
        system = gram + added * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        missing = cross - gram @ self._weight.T
        weight = self._weight.clone()
        weight[:, read] += torch.linalg.solve(system[read][:, read], missing[read]).T
        return weight, mean_y - weight @ mean_x


def patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Return what each output position of a convolution reads, of shape (N, *positions, channels · kernel size)."""
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for i, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        x = x.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]
    spatial = len(layer.kernel_size)
    # (N, channels, *positions, *kernel) to (N, *positions, channels, *kernel).
    return x.movedim(1, 1 + spatial).flatten(1 + spatial)


def _reads_the_same(
    compacted: nn.Module, layer: nn.Module, reference: nn.Module, origin: Origin, inputs: Tensor
) -> bool:
    found = _inputs_of(compacted, layer, inputs)
    expected = _inputs_of(reference, reference.get_submodule(origin.name), inputs)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _inputs_of(model: nn.Module, layer: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Return the tensors that a layer of a model gets, one for each of its calls."""
    found: list[Tensor] = []

    def see(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0].clone())

    _run(model, inputs, layer.register_forward_pre_hook(see))
    return found


def _outputs_of(model: nn.Module, origin: Origin, inputs: Tensor) -> list[Tensor]:
    """Return what a layer of a model returns before any other hook sees it, one tensor for each of its calls."""
    found: list[Tensor] = []

    def see(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.clone())

    layer = model.get_submodule(origin.name)
    _run(model, inputs, layer.register_forward_hook(see, prepend=True))
    return found


def _run(model: nn.Module, inputs: Tensor, handle: RemovableHandle) -> None:
    try:
        # Cloned, as a model may overwrite its input.
        model(inputs.clone())
    finally:
        handle.remove()


def _check_reference(layer: WeightLayer, origin: Origin, reference: nn.Module) -> None:
    try:
        found = reference.get_submodule(origin.name)
    except AttributeError:
        raise ValueError(
            f"refit_to must be the full network that was pruned, with a layer {origin.name!r}, "
            f"got {type(reference).__name__}"
        ) from None
    outputs = len(getattr(found, "weight", ()))
    if not isinstance(found, type(layer)) or outputs <= int(origin.rows.max()):
        raise ValueError(
            f"layer {origin.name!r} of refit_to must be a {type(layer).__name__} with more than "
            f"{int(origin.rows.max())} outputs, got {type(found).__name__} with {outputs}"
        )


def _mixes(layer: nn.Module) -> TypeGuard[WeightLayer]:
    return isinstance(layer, WEIGHT_LAYERS) and not is_depthwise(layer)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
