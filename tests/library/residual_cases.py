"""Residual networks: a small one of basic blocks, and random ones of all kinds of blocks."""

import random

import torch
from torch import nn

from bmrs.graph.stock_layers import BATCH_NORMS, CONVOLUTIONS
from bmrs.noise.layer import NoiseLayer

ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)


class BasicBlock(nn.Module):
    """As in ResNet-18: two convolutions beside an identity or, where the shape changes, a projection."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class SmallResNet(nn.Module):
    """A stem and two stages of basic blocks for images of shape (N, 3, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(6, 6), BasicBlock(6, 6))
        self.layer2 = nn.Sequential(BasicBlock(6, 8, 2), BasicBlock(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class Sum(nn.Module):
    """The sum of what two modules make of one input, in one of several ways of writing it."""

    def __init__(self, first: nn.Module, second: nn.Module, way: str) -> None:
        super().__init__()
        self.first, self.second, self.way = first, second, way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, y = self.first(x), self.second(x)
        if self.way == "in place":
            x += y
            return x
        return {
            "operator": lambda: x + y,
            "function": lambda: torch.add(x, y),
            "method": lambda: x.add(other=y),
        }[self.way]()


class RandomResidual:
    """A random network of residual blocks, and what it was made of."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rank = self.random.choice([1, 2, 2])
        self.channels = self.random.choice([2, 4, 6])
        self.example_shape = (2, 3, *[8] * self.rank)
        layers = [self.convolution(3, self.channels, 3), *self.norm(self.channels), nn.ReLU(inplace=True)]
        for _ in range(self.random.randint(1, 4)):
            layers += self.block()
        if self.random.random() < 0.3:
            layers.append(NoiseLayer(self.channels))
        if self.random.random() < 0.5:
            layers.append(self.convolution(self.channels, self.channels, 3, padding=1))
        layers += [ADAPTIVE_POOLS[self.rank - 1](self.random.choice([1, 2])), nn.Flatten()]
        layers.append(nn.LazyLinear(4))
        if self.random.random() < 0.3:
            inner = nn.Sequential(nn.Linear(4, 6), NoiseLayer(6, activation="relu"), nn.Linear(6, 4))
            layers += [self.sum(inner, nn.Identity()), nn.Tanh(), nn.Linear(4, 3)]
        self.model = nn.Sequential(*layers)
        self.model(torch.zeros(self.example_shape))

    def convolution(self, channels: int, width: int, size: int, **options: object) -> nn.Module:
        bias = self.random.random() < 0.3
        return CONVOLUTIONS[self.rank - 1](channels, width, size, bias=bias, **options)

    def norm(self, channels: int, noise: float = 0.7) -> list[nn.Module]:
        layers: list[nn.Module] = [BATCH_NORMS[self.rank - 1](channels, affine=self.random.random() < 0.8)]
        if self.random.random() < noise:
            layers.append(NoiseLayer(channels))
        return layers

    def sum(self, first: nn.Module, second: nn.Module) -> Sum:
        way = self.random.choice(["operator", "function", "method", "in place"])
        # Where one operand is the input itself, overwriting it would change the other one too.
        return Sum(first, second, "operator" if type(first) is nn.Identity else way)

    def block(self) -> list[nn.Module]:
        width = self.random.choice([self.channels, self.channels, 4, 6])
        stride = self.random.choice([1, 1, 2]) if width != self.channels else 1
        inner = self.random.choice([2, 4])
        kind = self.random.choice(["basic", "bottleneck", "depthwise", "preactivation", "behind relu"])
        body: list[nn.Module]
        if kind == "basic":
            body = [self.convolution(self.channels, inner, 3, stride=stride, padding=1), *self.norm(inner)]
            body += [nn.ReLU(inplace=True), self.convolution(inner, width, 3, padding=1), *self.norm(width)]
        elif kind == "bottleneck":
            groups = self.random.choice([1, 2])
            body = [self.convolution(self.channels, inner, 1), *self.norm(inner), nn.ReLU()]
            body += [self.convolution(inner, inner, 3, stride=stride, padding=1, groups=groups)]
            body += [
                *self.norm(inner),
                nn.LeakyReLU(0.2),
                self.convolution(inner, width, 1),
                *self.norm(width),
            ]
        elif kind == "depthwise":
            body = [self.convolution(self.channels, inner, 1), *self.norm(inner), nn.Hardswish()]
            body += [self.convolution(inner, inner, 3, stride=stride, padding=1, groups=inner)]
            body += [*self.norm(inner), nn.ReLU6(), self.convolution(inner, width, 1), *self.norm(width)]
        elif kind == "preactivation":
            body = [
                *self.norm(self.channels),
                nn.ReLU(),
                self.convolution(self.channels, inner, 1, stride=stride),
            ]
            body += [*self.norm(inner), nn.SiLU(), self.convolution(inner, width, 3, padding=1)]
        else:
            body = [
                self.convolution(self.channels, inner, 3, stride=stride, padding=1),
                nn.ReLU(),
                NoiseLayer(inner),
            ]
            body += [self.convolution(inner, width, 1), *self.norm(width, noise=0.5)]
        shortcut: nn.Module = nn.Identity()
        if width != self.channels or self.random.random() < 0.2:
            projection = self.convolution(self.channels, width, 1, stride=stride)
            shortcut = nn.Sequential(projection, *self.norm(width))
        branches = [nn.Sequential(*body), shortcut]
        self.random.shuffle(branches)
        self.channels = width
        behind = [
            [nn.ReLU()],
            [nn.ReLU(inplace=True)],
            [],
            [nn.GELU()],
            [nn.MaxPool1d(1)] if self.rank == 1 else [],
        ]
        return [self.sum(*branches), *self.random.choice(behind)]
