"""Networks that make images, or something for each pixel or cell of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments.zoo.entry import Entry, entry_of
from benchmarks.experiments.zoo.inputs import (
    CLASSES,
    IMAGE,
    SMALL_IMAGE,
    floats,
)
from benchmarks.experiments.zoo.parts import ConvNorm
from benchmarks.experiments.zoo.residual import BasicBlock


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions with batch norm and ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(ConvNorm(in_channels, channels), ConvNorm(channels, channels))


class UNet(nn.Module):
    """Encoder and decoder with concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = DoubleConv(3, 8)
        self.down2 = DoubleConv(8, 16)
        self.bottom = DoubleConv(16, 32)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, 2)
        self.merge2 = DoubleConv(32, 16)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge1 = DoubleConv(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every pixel."""
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.merge2(torch.cat([second, self.up2(x)], dim=1))
        x = self.merge1(torch.cat([first, self.up1(x)], dim=1))
        return self.out(x)


class YoloBottleneck(nn.Module):
    """Two convolutions, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(channels, channels, activation=nn.SiLU)
        self.cv2 = ConvNorm(channels, channels, activation=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Bottlenecks in sequence, all of whose outputs are concatenated with both halves of the input."""

    def __init__(self, in_channels: int, channels: int, depth: int = 2) -> None:
        super().__init__()
        half = channels // 2
        self.cv1 = ConvNorm(in_channels, channels, 1, activation=nn.SiLU)
        self.cv2 = ConvNorm((2 + depth) * half, channels, 1, activation=nn.SiLU)
        self.m = nn.ModuleList(YoloBottleneck(half) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Mix of all parts."""
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(m(parts[-1]) for m in self.m)
        return self.cv2(torch.cat(parts, 1))


class Sppf(nn.Module):
    """Max pools in sequence, concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(channels, channels // 2, 1, activation=nn.SiLU)
        self.cv2 = ConvNorm(2 * channels, channels, 1, activation=nn.SiLU)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Mix of the pools."""
        parts = [self.cv1(x)]
        parts.extend(self.m(parts[-1]) for _ in range(3))
        return self.cv2(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Backbone, top-down path and a head of boxes and classes on two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 2, activation=nn.SiLU)
        self.fine = C2f(8, 16)
        self.down = ConvNorm(16, 24, 3, 2, activation=nn.SiLU)
        self.coarse = nn.Sequential(C2f(24, 24), Sppf(24))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge = C2f(40, 16)
        self.heads = nn.ModuleList(
            nn.Sequential(ConvNorm(width, 16, activation=nn.SiLU), nn.Conv2d(16, 4 + CLASSES, 1))
            for width in (16, 24)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Boxes and scores of all cells, of shape (batch, 4 + classes, cells)."""
        fine = self.fine(self.stem(x))
        coarse = self.coarse(self.down(fine))
        scales = [self.merge(torch.cat([self.up(coarse), fine], 1)), coarse]
        outputs = [head(scale) for head, scale in zip(self.heads, scales, strict=True)]
        boxes, scores = torch.cat([out.flatten(2) for out in outputs], 2).split((4, CLASSES), 1)
        return torch.cat([boxes, scores.sigmoid()], 1)


class Backbone(nn.Module):
    """Three stages, whose outputs are all returned."""

    def __init__(self, widths: Sequence[int] = (8, 16, 24)) -> None:
        super().__init__()
        self.stem = ConvNorm(3, widths[0])
        self.stages = nn.ModuleList(
            BasicBlock(widths[max(index - 1, 0)], width, 2) for index, width in enumerate(widths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images of falling resolution."""
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class FeaturePyramid(nn.Module):
    """Top-down path that adds enlarged coarse images to lateral projections; returns one image per scale."""

    def __init__(self, widths: Sequence[int] = (8, 16, 24), channels: int = 16) -> None:
        super().__init__()
        self.backbone = Backbone(widths)
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in widths)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, CLASSES, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Scores of each scale's cells, by name."""
        images = self.backbone(x)
        merged = self.lateral[-1](images[-1])
        results = {str(len(images) - 1): self.head(self.smooth[-1](merged))}
        for level in reversed(range(len(images) - 1)):
            enlarged = F.interpolate(merged, size=images[level].shape[-2:], mode="nearest")
            merged = self.lateral[level](images[level]) + enlarged
            results[str(level)] = self.head(self.smooth[level](merged))
        return results


class SegFormerHead(nn.Module):
    """Linear layers per scale, enlarged to one size, concatenated and fused."""

    def __init__(self, widths: Sequence[int] = (8, 16, 24), channels: int = 16) -> None:
        super().__init__()
        self.backbone = Backbone(widths)
        self.project = nn.ModuleList(nn.Linear(width, channels) for width in widths)
        self.fuse = ConvNorm(channels * len(widths), 24, 1)
        self.classifier = nn.Conv2d(24, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every pixel of the finest scale."""
        images = self.backbone(x)
        enlarged = []
        for image, project in zip(images, self.project, strict=True):
            batch, _, height, width = image.shape
            out = project(image.flatten(2).transpose(1, 2))
            out = out.permute(0, 2, 1).reshape(batch, -1, height, width)
            size = images[0].size()[2:]
            enlarged.append(F.interpolate(out, size=size, mode="bilinear", align_corners=False))
        return self.classifier(self.fuse(torch.cat(enlarged[::-1], dim=1)))


def autoencoder() -> nn.Module:
    """Strided convolutions, then transposed convolutions and an upsampling."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, 2, 1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 16, 3, 2, 1, output_padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        nn.Conv2d(16, 12, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(12, 3, 3, padding=1),
        nn.Sigmoid(),
    )


class SuperResolution(nn.Module):
    """Residual blocks without batch norm, a long skip and a pixel shuffle."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, 24, 3, padding=1), nn.ReLU(True), nn.Conv2d(24, channels, 3, padding=1)
            )
            for _ in range(2)
        )
        self.expand = nn.Conv2d(channels, 4 * 8, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Image of twice the size."""
        x = self.first(x)
        skip = x
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return self.last(self.shuffle(self.expand(x + skip)))


def image_networks() -> Iterable[Entry]:
    """Return the networks of this family."""
    yolo_inner = ("*.m.?.cv1.norm", "coarse.1.cv1.norm", "heads.?.0.norm")
    return (
        entry_of("unet", UNet, SMALL_IMAGE, {"where": nn.BatchNorm2d}, {"where": nn.ConvTranspose2d}),
        entry_of("yolo", Yolo, IMAGE, *yolo_inner),
        entry_of("feature_pyramid", FeaturePyramid, IMAGE, "*.bn1", "smooth.?"),
        entry_of("segformer_head", SegFormerHead, IMAGE, "*.bn1", "project.?", "fuse.norm"),
        entry_of("autoencoder", autoencoder, SMALL_IMAGE, "[0369]"),
        entry_of("super_resolution", SuperResolution, floats((2, 3, 8, 8)), "blocks.?.0"),
    )
