"""Convolutional networks with shortcuts around their blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments.zoo.entry import Entry, entry_of, noise_at
from benchmarks.experiments.zoo.inputs import (
    IMAGE,
    SMALL_IMAGE,
    floats,
)
from benchmarks.experiments.zoo.parts import Classifier, ConvNorm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = projection_shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class GroupedBottleneck(nn.Module):
    """1x1, (grouped) 3x3 and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection_shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


def projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """1x1 convolution and batch norm where a block changes the shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def residual_stages(
    block: Callable[..., nn.Module], in_channels: int, widths: Sequence[int], depth: int, expansion: int = 1
) -> nn.Sequential:
    """Stages of ``depth`` blocks, of which each but the first halves the image."""
    blocks = []
    for stage, width in enumerate(widths):
        for index in range(depth):
            blocks.append(block(in_channels, width, 2 if stage and not index else 1))
            in_channels = width * expansion
    return nn.Sequential(*blocks)


def resnet18() -> nn.Module:
    """The layout of torchvision's resnet18."""
    stem = [ConvNorm(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1)]
    return Classifier(nn.Sequential(*stem, residual_stages(BasicBlock, 8, (8, 16, 24, 32), 2)), 32)


def resnet_bottleneck() -> nn.Module:
    """The layout of torchvision's resnet50, with fewer blocks."""
    stem = [ConvNorm(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1)]
    return Classifier(nn.Sequential(*stem, residual_stages(GroupedBottleneck, 8, (8, 12, 16), 2, 4)), 64)


def resnext() -> nn.Module:
    """Bottlenecks with grouped convolutions."""
    block = functools.partial(GroupedBottleneck, groups=4)
    return Classifier(nn.Sequential(ConvNorm(3, 16), residual_stages(block, 16, (16, 24), 2, 4)), 96)


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU in front of each convolution, with dropout between the convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.dropout = dropout
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut, which starts behind the first ReLU where it projects."""
        out = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        out = F.dropout(out, self.dropout, self.training)
        return self.conv2(out) + identity


def preactivation_resnet(widths: Sequence[int] = (8, 16, 32), dropout: float = 0.0) -> nn.Module:
    """ResNet with pre-activation, or WideResNet with large widths and dropout."""
    block = functools.partial(PreActivationBlock, dropout=dropout)
    blocks = residual_stages(block, 8, widths, 2)
    end = [nn.BatchNorm2d(widths[-1]), nn.ReLU()]
    return Classifier(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), blocks, *end), widths[-1])


class PaddedShortcutBlock(nn.Module):
    """Residual block whose shortcut strides and pads with zero channels ("option A")."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


def resnet_option_a() -> nn.Module:
    """ResNet for CIFAR-10 with parameter-free shortcuts."""
    return Classifier(
        nn.Sequential(ConvNorm(3, 8), residual_stages(PaddedShortcutBlock, 8, (8, 16, 32), 2)), 32
    )


class RepVggBlock(nn.Module):
    """3x3, 1x1 and identity branches, each with batch norm, added in front of a ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.dense = ConvNorm(in_channels, channels, 3, stride, activation=nn.Identity)
        self.pointwise = ConvNorm(in_channels, channels, 1, stride, activation=nn.Identity)
        same = stride == 1 and in_channels == channels
        self.identity = nn.BatchNorm2d(channels) if same else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the branches, rectified."""
        out = self.dense(x) + self.pointwise(x)
        if self.identity is not None:
            out = out + self.identity(x)
        return self.act(out)


def repvgg() -> nn.Module:
    """RepVGG as it is trained, in front of the fusion of the branches."""
    return Classifier(
        nn.Sequential(
            RepVggBlock(3, 8), residual_stages(RepVggBlock, 8, (16, 32), 2), RepVggBlock(32, 48, 2)
        ),
        48,
    )


def residual_networks() -> Iterable[Entry]:
    """Return the networks of this family."""
    return (
        entry_of("resnet18", resnet18, IMAGE, "*.bn1"),
        entry_of("resnet_bottleneck", resnet_bottleneck, IMAGE, "*.bn[12]"),
        entry_of("resnext", resnext, SMALL_IMAGE, "*.bn[12]"),
        entry_of("preactivation_resnet", preactivation_resnet, floats((3, 3, 16, 16)), "*.bn2"),
        entry_of("wide_resnet", lambda: preactivation_resnet((24, 48), 0.3), SMALL_IMAGE, "*.bn2"),
        entry_of("resnet_option_a", resnet_option_a, SMALL_IMAGE, "*.bn1"),
        entry_of(
            "repvgg",
            repvgg,
            SMALL_IMAGE,
            noise_at("features.0.act", 8),
            noise_at("features.1.[01].act", 16),
            noise_at("features.1.[23].act", 32),
            noise_at("features.2.act", 48),
        ),
    )
