"""Widths of a chain of layers within a budget of parameters and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bmrs.graph.stock_layers import WEIGHT_LAYERS

TOLERANCE = 0.05
"""How far parameters and FLOPs of networks that are compared may lie apart."""

_MOST_WIDTHS = 2_000_000  # that are all tried


class Cost(NamedTuple):
    """Parameters and FLOPs of a network, or arrays of them for several networks."""

    parameters: Tensor
    flops: Tensor  # for one example; a multiply-add counts as 2

    def close_to(self, other: Cost) -> Tensor:
        """Return where both are within the tolerance of another network's."""
        near = [(mine - theirs).abs() <= TOLERANCE * theirs for mine, theirs in zip(self, other, strict=True)]
        return near[0] & near[1]


@dataclass(frozen=True)
class Chain:
    """A network of linear and convolution layers, each reading the one before it.

    Attributes:
        names: qualified names of the layers whose outputs can be pruned: all but the last one.
        widths: their numbers of outputs.
        layers: for each layer, the last one too: its weights for a pair of an input and an output channel, and the
            number of positions of its output.
        inputs: channels of the network's input.
        outputs: of the last layer.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    inputs: int
    outputs: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, example: Tensor) -> Chain:
        """Read the chain off a model whose layers have biases, in the order of their calls."""
        seen: list[tuple[str, int, int, int]] = []
        names: dict[nn.Module, str] = {
            module: name for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)
        }

        def see(module: nn.Module, _: object, output: Tensor) -> None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            positions = output[0].numel() // len(weight)
            seen.append((names[module], weight.numel() // len(weight), len(weight), positions))

        handles = [module.register_forward_hook(see) for module in names]
        model.eval()(example)
        for handle in handles:
            handle.remove()
        before = [example.shape[1] if example.dim() > 2 else 1, *(outputs for _, _, outputs, _ in seen)]
        if isinstance(model.get_submodule(seen[0][0]), nn.Linear):
            before[0] = 1  # none of a flattened input can go
        return cls(
            tuple(name for name, *_ in seen[:-1]),
            tuple(outputs for _, _, outputs, _ in seen[:-1]),
            tuple(
                (fan_in // inputs, positions)
                for (_, fan_in, _, positions), inputs in zip(seen, before, strict=False)
            ),
            before[0],
            seen[-1][2],
        )

    def cost(self, widths: Sequence[Tensor | float]) -> Cost:
        """Return parameters and FLOPs of the chain at other widths, one for each name."""
        channels = [self.inputs, *widths, self.outputs]
        parameters, flops = torch.zeros(()), torch.zeros(())
        for (weights, positions), before, after in zip(self.layers, channels, channels[1:], strict=False):
            pairs = torch.as_tensor(before, dtype=torch.float64) * torch.as_tensor(after, dtype=torch.float64)
            parameters = parameters + pairs * weights + torch.as_tensor(after, dtype=torch.float64)
            flops = flops + 2 * pairs * weights * positions
        return Cost(parameters, flops)

    def uniform(self, share: float) -> tuple[int, ...]:
        """Return the widths, all narrowed by one factor, whose FLOPs come nearest to a share of the full ones."""
        full = self.cost(self.widths).flops

        def narrowed(factor: float) -> tuple[int, ...]:
            return tuple(max(1, round(factor * width)) for width in self.widths)

        factors = [step / 1000 for step in range(1, 1001)]
        return min(
            (narrowed(factor) for factor in factors),
            key=lambda widths: abs(math.log(self.cost(widths).flops / (share * full))),
        )

    def best(self, gains: Sequence[Tensor], target: Cost) -> tuple[int, ...] | None:
        """Return the widths, within the tolerance of a cost, whose gains have the largest sum.

        Args:
            gains: of each layer, for each number of structures that stay, from 0 to all.
            target: the cost that the network is to have.

        Returns:
            None if no widths come near enough.
        """
        if math.prod(self.widths) <= _MOST_WIDTHS:
            grid = torch.cartesian_prod(*(torch.arange(1, width + 1) for width in self.widths)).T
            total = torch.stack([gain[widths] for gain, widths in zip(gains, grid, strict=True)]).sum(dim=0)
            total = total.masked_fill(~self.cost(tuple(grid.double())).close_to(target), -math.inf)
            return None if total.max() == -math.inf else tuple(grid[:, total.argmax()].tolist())
        return self._narrowed_one_by_one(gains, target)

    def _narrowed_one_by_one(self, gains: Sequence[Tensor], target: Cost) -> tuple[int, ...] | None:
        """Return widths from which, one by one, the structure with the least score for its cost was taken."""
        widths = list(self.widths)
        while any(mine > theirs for mine, theirs in zip(self.cost(widths), target, strict=True)):
            before = self.cost(widths)
            price = []
            for layer, width in enumerate(widths):
                narrower = self.cost([*widths[:layer], width - 1, *widths[layer + 1 :]])
                saved = sum(
                    float((old - new) / theirs)
                    for old, new, theirs in zip(before, narrower, target, strict=True)
                    if old > theirs
                )
                lost = float(gains[layer][width] - gains[layer][width - 1])
                price.append(lost / saved if width > 1 else math.inf)
            widths[min(range(len(widths)), key=price.__getitem__)] -= 1
        if not self.cost(widths).close_to(target):
            self._widen_one_by_one(widths, gains, target)
        return tuple(widths) if self.cost(widths).close_to(target) else None

    def _widen_one_by_one(self, widths: list[int], gains: Sequence[Tensor], target: Cost) -> None:
        """Give back, one by one, the structure with the largest gain that the tolerance has room for."""
        most = Cost(*((1 + TOLERANCE) * each for each in target))
        while True:
            room = {}
            for layer, width in enumerate(widths):
                wider = self.cost([*widths[:layer], width + 1, *widths[layer + 1 :]])
                if width < self.widths[layer] and all(a <= b for a, b in zip(wider, most, strict=True)):
                    room[layer] = float(gains[layer][width + 1] - gains[layer][width])
            if not room:
                return
            widths[max(room, key=room.__getitem__)] += 1


def kept(scores: Tensor) -> Tensor:
    """Return the sum of the best scores, at least 0, for each number of structures that stay."""
    return torch.cat([torch.zeros(1), scores.sort(descending=True).values.double().cumsum(0)])


def minus_losses(losses: NDArray[np.float64]) -> Tensor:
    """Return, for each number of structures that stay, the losses of those that went, which cannot be all."""
    lost = torch.from_numpy(losses).cumsum(0)
    return torch.cat([torch.tensor([-math.inf]), -lost.flip(0), torch.zeros(1)])
