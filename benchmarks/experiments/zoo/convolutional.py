"""Plain, branched and depthwise convolutional networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments.zoo.entry import Entry, entry_of
from benchmarks.experiments.zoo.inputs import (
    CLASSES,
    IMAGE,
    SMALL_IMAGE,
)
from benchmarks.experiments.zoo.parts import Classifier, ConvNorm


class Vgg(nn.Module):
    """Convolutions with batch norm, max pools and a classifier of two linear layers."""

    def __init__(self, layout: Sequence[int | str] = (8, "M", 16, "M", 24, 24, "M", 32, 32, "M")) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in layout:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 4, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class DenseLayer(nn.Module):
    """Bottleneck that computes a few new channels from all earlier ones."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        """New channels."""
        x = torch.cat(features, 1)
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlock(nn.Module):
    """Layers that each see the outputs of all earlier ones."""

    def __init__(self, in_channels: int, growth: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(in_channels + i * growth, growth) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the input and all layers' outputs."""
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet() -> nn.Module:
    """Two dense blocks with a transition between them."""
    transition = [nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1, bias=False), nn.AvgPool2d(2)]
    return Classifier(
        nn.Sequential(
            ConvNorm(3, 8, stride=2),
            DenseBlock(8, 8, 3),
            nn.Sequential(*transition),
            DenseBlock(16, 8, 2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        ),
        32,
    )


class InceptionBlock(nn.Module):
    """Four branches, concatenated."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branch1 = ConvNorm(in_channels, channels, 1)
        self.branch3 = nn.Sequential(ConvNorm(in_channels, channels, 1), ConvNorm(channels, channels))
        self.branch5 = nn.Sequential(ConvNorm(in_channels, channels, 1), ConvNorm(channels, channels, 5))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNorm(in_channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches."""
        branches = [self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)]
        return torch.cat(branches, dim=1)


def inception() -> nn.Module:
    """Two inception blocks."""
    return Classifier(
        nn.Sequential(ConvNorm(3, 8), InceptionBlock(8, 8), nn.MaxPool2d(2), InceptionBlock(32, 12)), 48
    )


class SqueezeExcitation(nn.Module):
    """Scales channels by a function of their means over the image."""

    def __init__(self, channels: int, squeezed: int, gate: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.5)  # The means are small, and the gates should still differ.

    def forward(self, x: Tensor) -> Tensor:
        """Scaled channels."""
        return x * self.gate(self.fc2(F.relu(self.fc1(self.pool(x)))))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-excitation if there is a gate, and projection."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        kernel: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU6,
        gate: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * in_channels
        self.expand = ConvNorm(in_channels, hidden, 1, activation=activation)
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, hidden, activation)
        self.se = nn.Identity() if gate is None else SqueezeExcitation(hidden, hidden // 4, gate)
        self.project = ConvNorm(hidden, out_channels, 1, activation=nn.Identity)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Add the input where the shape allows it."""
        out = self.project(self.se(self.depthwise(self.expand(x))))
        return x + out if self.residual else out


def mobile_network(
    activation: Callable[[], nn.Module], gate: Callable[[], nn.Module] | None = None, kernel: int = 3
) -> nn.Module:
    """Inverted residuals with an activation, and with squeeze-excitation if there is a gate."""
    block = functools.partial(InvertedResidual, activation=activation, gate=gate)
    return Classifier(
        nn.Sequential(
            ConvNorm(3, 8, 3, 2, activation=activation),
            block(8, 8),
            block(8, 12, 2, kernel),
            block(12, 12, 1, kernel),
            block(12, 16, 2),
            ConvNorm(16, 48, 1, activation=activation),
        ),
        48,
    )


class ShuffleUnit(nn.Module):
    """Half the channels pass, the others go through a branch; the channels are then shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.first = ConvNorm(half, half, 1)
        self.depthwise = ConvNorm(half, half, 3, groups=half, activation=nn.Identity)
        self.last = ConvNorm(half, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shuffled channels."""
        passed, x = x.chunk(2, dim=1)
        out = torch.cat((passed, self.last(self.depthwise(self.first(x)))), dim=1)
        batch, channels, height, width = out.shape
        out = out.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return out.view(batch, channels, height, width)


def shufflenet() -> nn.Module:
    """Units with channel shuffles, and a last 1x1 convolution."""
    return Classifier(
        nn.Sequential(ConvNorm(3, 16, stride=2), ShuffleUnit(16), ShuffleUnit(16), ConvNorm(16, 32, 1)), 32
    )


class ChannelsFirstNorm(nn.LayerNorm):
    """Layer norm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize with channels last."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Depthwise 7x7 convolution and a feed-forward block over channels, scaled and added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(0.1 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        out = self.dwconv(x).permute(0, 2, 3, 1)
        out = self.pwconv2(self.act(self.pwconv1(self.norm(out))))
        return x + (self.gamma * out).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """ConvNeXt with two stages."""
    return Classifier(
        nn.Sequential(
            nn.Conv2d(3, 16, 4, 4),
            ChannelsFirstNorm(16),
            ConvNextBlock(16),
            ConvNextBlock(16),
            ChannelsFirstNorm(16),
            nn.Conv2d(16, 24, 2, 2),
            ConvNextBlock(24),
        ),
        24,
    )


def convolutional_networks() -> Iterable[Entry]:
    """Return the networks of this family."""
    hidden = "*.depthwise.norm"
    return (
        entry_of("vgg", Vgg, IMAGE, {"where": nn.BatchNorm2d}, "classifier.0"),
        entry_of("densenet", densenet, SMALL_IMAGE, "*.norm2", "*.conv2"),
        entry_of("inception", inception, SMALL_IMAGE, {"where": nn.BatchNorm2d}),
        entry_of("mobilenet_v2", lambda: mobile_network(nn.ReLU6), IMAGE, hidden, "features.5.norm"),
        entry_of(
            "mobilenet_v3", lambda: mobile_network(nn.Hardswish, nn.Hardsigmoid, 5), IMAGE, hidden, "*.se.fc1"
        ),
        entry_of("efficientnet_lite0", lambda: mobile_network(nn.ReLU6, kernel=5), IMAGE, "*.expand.norm"),
        entry_of(
            "efficientnet_b0", lambda: mobile_network(nn.SiLU, nn.Sigmoid, 5), IMAGE, hidden, "*.se.fc1"
        ),
        entry_of("shufflenet", shufflenet, SMALL_IMAGE, "*.first.norm", "features.3.norm"),
        entry_of("convnext", convnext, IMAGE, "*.pwconv1"),
    )
