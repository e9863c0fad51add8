"""Residual networks (arXiv 1512.03385): for ImageNet by the names of torchvision's parameters, and for CIFAR."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

from bmrs.checks import check_choice, check_integer
from bmrs.models.arguments import check_image

Stem: TypeAlias = Literal["7x7", "3x3"]

_LARGEST_SMALL_IMAGE = 64


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut.

    Args:
        channels: channels of the input.
        width: channels of both convolutions and the output.
        stride: that of the first convolution; 2 halves the image.
    """

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for images of shape (N, channels, height, width)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut; the stride is in the 3×3 one (version 1.5).

    Args:
        channels: channels of the input.
        width: channels of the 3×3 convolution; the output has four times as many.
        stride: that of the 3×3 convolution; 2 halves the image.
    """

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for images of shape (N, channels, height, width)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)


def _projection(channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the shortcut of a block that changes the shape, None where the input itself will do."""
    if stride == 1 and channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResNet(nn.Sequential):
    """A stem, stages of residual blocks of which all but the first halve the image, and a linear classifier.

    Args:
        block: the kind of its blocks.
        layers: blocks of each stage.
        width: channels of the stem, and of the blocks of the first stage; they double from stage to stage.
        stem: ``"7x7"``, a convolution of stride 2 and max pooling, or ``"3x3"``, a convolution that keeps the size.
        num_classes: number of outputs (logits).
        in_channels: channels of the images.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        *,
        layers: Sequence[int],
        width: int,
        stem: Stem,
        num_classes: int,
        in_channels: int,
    ) -> None:
        large = stem == "7x7"
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(
                in_channels,
                width,
                7 if large else 3,
                2 if large else 1,
                padding=3 if large else 1,
                bias=False,
            ),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
        )
        if large:
            parts["maxpool"] = nn.MaxPool2d(3, 2, padding=1)
        channels = width
        for stage, count in enumerate(layers):
            blocks = []
            for index in range(count):
                blocks.append(block(channels, width * 2**stage, 2 if stage > 0 and index == 0 else 1))
                channels = width * 2**stage * block.expansion
            parts[f"layer{stage + 1}"] = nn.Sequential(*blocks)
        parts |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        super().__init__(OrderedDict(parts, fc=nn.Linear(channels, num_classes)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet18(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    stem: Stem | None = None,
    width: int = 64,
    layers: Sequence[int] = (2, 2, 2, 2),
) -> ResNet:
    """Return ResNet-18 with torchvision's parameter names; 11,689,512 parameters as it stands.

    Args:
        num_classes: number of outputs (logits).
        in_channels: channels of the images.
        image_size: their height and width in pixels; decides the stem only.
        stem: ``"7x7"``, ImageNet's, which makes images four times smaller, or ``"3x3"``, which keeps their size; None
            takes ``"3x3"`` for images of up to 64 pixels. Published weights are those of ``"7x7"``.
        width: channels of the first stage.
        layers: blocks of each stage.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an argument is out of its range.
    """
    return _for_imagenet(BasicBlock, num_classes, in_channels, image_size, stem, width, layers)


def resnet50(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    stem: Stem | None = None,
    width: int = 64,
    layers: Sequence[int] = (3, 4, 6, 3),
) -> ResNet:
    """Return ResNet-50, version 1.5, with torchvision's parameter names; 25,557,032 parameters as it stands.

    Args:
        num_classes: as for `resnet18`.
        in_channels: as for `resnet18`.
        image_size: as for `resnet18`.
        stem: as for `resnet18`.
        width: as for `resnet18`.
        layers: as for `resnet18`.

    Raises:
        TypeError, ValueError: as for `resnet18`.
    """
    return _for_imagenet(Bottleneck, num_classes, in_channels, image_size, stem, width, layers)


def resnet20(
    *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: int = 16, blocks: int = 3
) -> ResNet:
    """Return ResNet-20 for CIFAR, three stages of basic blocks; 272,474 parameters as it stands.

    Where a block changes the shape its shortcut is a 1×1 convolution with batch norm (option B of the paper). The
    paper's option A pads with channels of zeros: every stage's channels are then the first stage's and more, and
    `bmrs.compact` could remove almost none of them. It has 1 % fewer parameters.

    Args:
        num_classes: number of outputs (logits).
        in_channels: channels of the images.
        image_size: their height and width in pixels; changes nothing.
        width: channels of the first stage.
        blocks: blocks of each stage.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is less than 1.
    """
    check_image(num_classes, in_channels, image_size)
    check_integer("width", width, minimum=1)
    check_integer("blocks", blocks, minimum=1)
    return ResNet(
        BasicBlock,
        layers=3 * (blocks,),
        width=width,
        stem="3x3",
        num_classes=num_classes,
        in_channels=in_channels,
    )


def resnet56(
    *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: int = 16, blocks: int = 9
) -> ResNet:
    """Return ResNet-56 for CIFAR, which is `resnet20` with more blocks; 855,770 parameters as it stands.

    Args:
        num_classes: as for `resnet20`.
        in_channels: as for `resnet20`.
        image_size: as for `resnet20`.
        width: as for `resnet20`.
        blocks: as for `resnet20`.

    Raises:
        TypeError, ValueError: as for `resnet20`.
    """
    return resnet20(
        num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width, blocks=blocks
    )


def _for_imagenet(
    block: type[BasicBlock] | type[Bottleneck],
    num_classes: int,
    in_channels: int,
    image_size: int,
    stem: Stem | None,
    width: int,
    layers: Sequence[int],
) -> ResNet:
    check_image(num_classes, in_channels, image_size)
    check_integer("width", width, minimum=1)
    check_choice("stem", stem, (*get_args(Stem), None))
    return ResNet(
        block,
        layers=layers,
        width=width,
        stem=stem or ("3x3" if image_size <= _LARGEST_SMALL_IMAGE else "7x7"),
        num_classes=num_classes,
        in_channels=in_channels,
    )
