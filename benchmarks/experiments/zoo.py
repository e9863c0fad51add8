"""Small versions of the architectures that people use, to try compaction on.

Every entry builds a network with random weights and fewer than 300 000 parameters, makes inputs for it, and says
where noise goes so that pruned structures can be removed: hidden units of feed-forward blocks, inner channels of
residual blocks, batch norms of plain convolutional networks. The networks are written plainly, the way their authors
or the usual libraries write them, because compaction has to cope with how people write forward passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Inputs: TypeAlias = Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]

CLASSES = 10
VOCABULARY = 64


@dataclass(frozen=True)
class Entry:
    """A network with its inputs and the places of its noise.

    Attributes:
        name: name of the architecture.
        build: returns the network; the weights follow from the seed that the caller sets.
        inputs: returns arguments and keyword arguments of forward; floating ones have the given dtype, and the
            values do not depend on the seed that the caller sets.
        noise: keyword arguments of successive calls of ``bmrs.add_noise``.
        heads: glob patterns of attention output projections, each with the number of heads that its input consists
            of; one noise variable per head could multiply that input.
        needs_transformers: whether ``build`` imports the transformers library.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    noise: tuple[dict[str, Any], ...]
    heads: tuple[tuple[str, int], ...] = ()
    needs_transformers: bool = False


def randomize_vectors(model: nn.Module) -> None:
    """Move biases, scales and slopes away from trivial values such as 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def estimate_statistics(model: nn.Module, inputs: Inputs) -> None:
    """Give batch norms statistics like those of training; with the initial ones, signals fade in deep networks."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.9  # Some of the initial variance stays, so that none is nearly 0.
    args, kwargs = inputs(torch.get_default_dtype())
    with torch.no_grad():
        model.train()(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _entry(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Inputs,
    *noise: str | dict[str, Any],
    heads: Sequence[tuple[str, int]] = (),
    needs_transformers: bool = False,
) -> Entry:
    def build_with_random_vectors() -> nn.Module:
        model = build()
        randomize_vectors(model)
        estimate_statistics(model, inputs)
        return model

    places = tuple({"where": place} if isinstance(place, str) else place for place in noise)
    return Entry(name, build_with_random_vectors, inputs, places, tuple(heads), needs_transformers)


def _at(where: str, num_structures: int, dim: int = 1) -> dict[str, Any]:
    """Noise behind a layer whose structures cannot be inferred."""
    return {"where": where, "num_structures": num_structures, "dim": dim}


def floats(*shapes: tuple[int, ...]) -> Inputs:
    """Inputs of one normal tensor per shape, as positional arguments."""

    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        # Drawn in one dtype, so that every dtype sees the same values.
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        return tuple(draw(shape).to(dtype) for shape in shapes), {}

    return inputs


def tokens(batch: int = 2, length: int = 12, *, padding: int = 0, **lengths: int) -> Inputs:
    """Inputs of random token numbers, as ``input_ids`` among keyword arguments.

    Args:
        batch: number of sequences.
        length: tokens of each sequence.
        padding: how many tokens at the end of the first sequence an ``attention_mask`` hides; 0 for no mask.
        lengths: lengths of further sequences of random tokens, by the names of their keyword arguments.
    """

    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(torch.randint, 3, VOCABULARY, generator=generator)
        arguments: dict[str, Any] = {"input_ids": draw(size=(batch, length))}
        if padding:
            mask = torch.ones(batch, length, dtype=torch.long)
            mask[0, -padding:] = 0
            arguments["attention_mask"] = mask
        for name, its_length in lengths.items():
            arguments[name] = draw(size=(batch, its_length))
        return (), arguments

    return inputs


def token_argument(batch: int = 2, length: int = 12) -> Inputs:
    """Inputs of random token numbers, as the one positional argument."""

    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = tokens(batch, length)(dtype)[1]
        return (arguments["input_ids"],), {}

    return inputs


def token_pairs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of two sequences of random token numbers, as positional arguments."""
    arguments = tokens(target=9)(dtype)[1]
    return (arguments["input_ids"], arguments["target"]), {}


IMAGE = floats((2, 3, 32, 32))
SMALL_IMAGE = floats((2, 3, 16, 16))


# Parts


class ConvNorm(nn.Module):
    """Convolution, batch norm and an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three."""
        return self.act(self.norm(self.conv(x)))


class Classifier(nn.Module):
    """Features, their mean over the image and a linear layer."""

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


# Residual networks


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


# Plain and branched convolutional networks


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


def _image_classifiers() -> Iterable[Entry]:
    hidden = "*.depthwise.norm"
    return (
        _entry("resnet18", resnet18, IMAGE, "*.bn1"),
        _entry("resnet_bottleneck", resnet_bottleneck, IMAGE, "*.bn[12]"),
        _entry("resnext", resnext, SMALL_IMAGE, "*.bn[12]"),
        _entry("preactivation_resnet", preactivation_resnet, floats((3, 3, 16, 16)), "*.bn2"),
        _entry("wide_resnet", lambda: preactivation_resnet((24, 48), 0.3), SMALL_IMAGE, "*.bn2"),
        _entry("resnet_option_a", resnet_option_a, SMALL_IMAGE, "*.bn1"),
        _entry(
            "repvgg",
            repvgg,
            SMALL_IMAGE,
            _at("features.0.act", 8),
            _at("features.1.[01].act", 16),
            _at("features.1.[23].act", 32),
            _at("features.2.act", 48),
        ),
        _entry("vgg", Vgg, IMAGE, {"where": nn.BatchNorm2d}, "classifier.0"),
        _entry("densenet", densenet, SMALL_IMAGE, "*.norm2", "*.conv2"),
        _entry("inception", inception, SMALL_IMAGE, {"where": nn.BatchNorm2d}),
        _entry("mobilenet_v2", lambda: mobile_network(nn.ReLU6), IMAGE, hidden, "features.5.norm"),
        _entry(
            "mobilenet_v3", lambda: mobile_network(nn.Hardswish, nn.Hardsigmoid, 5), IMAGE, hidden, "*.se.fc1"
        ),
        _entry("efficientnet_lite0", lambda: mobile_network(nn.ReLU6, kernel=5), IMAGE, "*.expand.norm"),
        _entry("efficientnet_b0", lambda: mobile_network(nn.SiLU, nn.Sigmoid, 5), IMAGE, hidden, "*.se.fc1"),
        _entry("shufflenet", shufflenet, SMALL_IMAGE, "*.first.norm", "features.3.norm"),
        _entry("convnext", convnext, IMAGE, "*.pwconv1"),
    )


# Images from images


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


def _image_outputs() -> Iterable[Entry]:
    yolo_inner = ("*.m.?.cv1.norm", "coarse.1.cv1.norm", "heads.?.0.norm")
    return (
        _entry("unet", UNet, SMALL_IMAGE, {"where": nn.BatchNorm2d}, {"where": nn.ConvTranspose2d}),
        _entry("yolo", Yolo, IMAGE, *yolo_inner),
        _entry("feature_pyramid", FeaturePyramid, IMAGE, "*.bn1", "smooth.?"),
        _entry("segformer_head", SegFormerHead, IMAGE, "*.bn1", "project.?", "fuse.norm"),
        _entry("autoencoder", autoencoder, SMALL_IMAGE, "[0369]"),
        _entry("super_resolution", SuperResolution, floats((2, 3, 8, 8)), "blocks.?.0"),
    )


# Attention


class Attention(nn.Module):
    """Self-attention with one linear layer for queries, keys and values, in timm's style."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each sequence."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class ExplicitAttention(nn.Module):
    """Causal self-attention out of matrix products and a softmax, in the style of small teaching codes."""

    tril: Tensor

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("tril", torch.tril(torch.ones(length, length)))

    def forward(self, x: Tensor) -> Tensor:
        """Attend to earlier positions."""
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        weights = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5
        weights = weights.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        weights = self.dropout(weights.softmax(dim=-1))
        return self.proj((weights @ v).transpose(1, 2).contiguous().view(batch, length, width))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int, out_width: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, out_width or width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply them."""
        return self.fc2(self.act(self.fc1(x)))


class GluFeedForward(nn.Module):
    """Feed-forward block whose hidden units are products of two halves of one linear layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * hidden)
        self.glu = nn.GLU(dim=-1)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Gate and contract."""
        return self.contract(self.glu(self.expand(x)))


class ChunkedFeedForward(nn.Module):
    """Feed-forward block that splits one linear layer into values and gates."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.wi = nn.Linear(width, 2 * hidden, bias=False)
        self.act = nn.SiLU()
        self.wo = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate and contract."""
        gate, value = self.wi(x).chunk(2, dim=-1)
        return self.wo(self.act(gate) * value)


class Experts(nn.Module):
    """Gated experts, all computed and weighted by a softmax router."""

    def __init__(self, width: int, hidden: int, count: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Weighted sum of the experts."""
        weights = self.router(x).softmax(dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * weights.unsqueeze(-2)).sum(dim=-1)


class Expert(nn.Module):
    """Feed-forward block with a gate of its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate and contract."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TransformerBlock(nn.Module):
    """Attention and a feed-forward block, each behind a norm and added."""

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        mlp: nn.Module,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm1 = norm(width)
        self.attn = attention
        self.norm2 = norm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmVisionTransformer(nn.Module):
    """Patches with a class token, in timm's style."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.cls_token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, Attention(width, heads), Mlp(width, 64)) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class LanguageModel(nn.Module):
    """Token and position embeddings, blocks, and an output layer tied to the embedding."""

    def __init__(
        self, feed_forward: Callable[[int, int], nn.Module], length: int = 16, width: int = 32
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, ExplicitAttention(width, 4, length), feed_forward(width, 48), nn.RMSNorm)
            for _ in range(2)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the next token at each position."""
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class StockEncoder(nn.Module):
    """Classifier on torch's own transformer encoder."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(self.encoder(self.embed(ids)).mean(dim=1))


class StockTransformer(nn.Module):
    """Torch's own encoder-decoder transformer, with sequences first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.transformer = nn.Transformer(32, 4, 1, 1, 48, activation="gelu")
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores of the next target token, of shape (batch, length, vocabulary)."""
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        mask = mask.to(self.head.weight.dtype)
        source, target = self.embed(source).transpose(0, 1), self.embed(target).transpose(0, 1)
        return self.head(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)).transpose(0, 1)


class HybridTransformer(nn.Module):
    """Convolutions, then transformer blocks on their pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, 24, 3, 2), nn.Conv2d(24, width, 1))
        self.blocks = nn.Sequential(TransformerBlock(width, Attention(width, 4), Mlp(width, 48)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.stem(x)
        x = self.blocks(x.flatten(2).permute(0, 2, 1))
        return self.head(x.mean(1))


class AttentionPooling(nn.Module):
    """Hidden units of every element, averaged with learned weights."""

    def __init__(self, width: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.score = nn.Sequential(nn.Linear(hidden, 16), nn.Tanh(), nn.Linear(16, 1))
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.embed(x)
        weights = torch.softmax(self.score(x), dim=1)
        return self.head(torch.sum(weights * x, dim=1))


class MixerBlock(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.token_mlp = Mlp(length, 24)
        self.norm2 = nn.LayerNorm(width)
        self.channel_mlp = Mlp(width, 48)

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches."""
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(MixerBlock(16, width), MixerBlock(16, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def _attention_networks() -> Iterable[Entry]:
    ids = token_argument()
    heads = [("blocks.?.attn.proj", 4)]
    return (
        _entry("vision_transformer", TimmVisionTransformer, IMAGE, "*.fc1", heads=heads),
        _entry("language_model", lambda: LanguageModel(Mlp), ids, "*.fc1", heads=heads),
        _entry("glu", lambda: LanguageModel(GluFeedForward), ids, _at("*.glu", 48, -1), heads=heads),
        _entry(
            "chunked_glu", lambda: LanguageModel(ChunkedFeedForward), ids, _at("*.act", 48, -1), heads=heads
        ),
        _entry("experts", lambda: LanguageModel(Experts), ids, "*.experts.?.up", heads=heads),
        _entry("stock_encoder", StockEncoder, token_argument(3, 7), "*.linear1"),
        _entry("stock_encoder_norm_first", lambda: StockEncoder(True), ids, "*.linear1"),
        _entry("stock_transformer", StockTransformer, token_pairs, "*.linear1"),
        _entry("hybrid_transformer", HybridTransformer, SMALL_IMAGE, "stem.?.norm", "*.fc1", heads=heads),
        _entry("attention_pooling", AttentionPooling, floats((2, 9, 8)), "embed.0", "score.0", "embed.2"),
        _entry("mixer", Mixer, IMAGE, "*.fc1"),
    )


# Networks of the transformers library


def _library_model(class_name: str, config_name: str, **config: Any) -> nn.Module:
    """A model of the transformers library."""
    import transformers

    # Larger than the library's default, because in narrow layers that leaves next to nothing.
    defaults = {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    settings = getattr(transformers, config_name)(**(defaults | config))
    model: nn.Module = getattr(transformers, class_name)(settings)
    return model


def _library(
    name: str,
    model: tuple[str, str],
    config: dict[str, Any],
    inputs: Inputs,
    *noise: str | dict[str, Any],
    heads: Sequence[tuple[str, int]] = (),
) -> Entry:
    build = functools.partial(_library_model, *model, **config)
    return _entry(name, build, inputs, *noise, heads=heads, needs_transformers=True)


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = _SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
_DECODER = _TEXT | {"use_cache": False}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
_PATCHES = _SIZES | {"image_size": 32, "patch_size": 8}
_EAGER = {"attn_implementation": "eager"}


def pixel_values(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of an image, as a keyword argument."""
    return (), {"pixel_values": IMAGE(dtype)[0][0]}


def _library_encoders() -> Iterable[Entry]:
    bert = ("BertForSequenceClassification", "BertConfig")
    bert_places = ("*.intermediate.dense", "bert.pooler.dense")
    bert_heads = [("*.attention.output.dense", 4)]
    out_proj = [("*.self_attn.out_proj", 4)]
    swin = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "mlp_ratio": 2.0,
    }
    distilbert = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    whisper = {
        "num_mel_bins": 16,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "max_source_positions": 8,
        "classifier_proj_size": 24,
    }
    return (
        _library(
            "vit",
            ("ViTForImageClassification", "ViTConfig"),
            _PATCHES,
            pixel_values,
            "*.mlp.fc1",
            heads=[("*.attention.o_proj", 4)],
        ),
        _library(
            "swin",
            ("SwinForImageClassification", "SwinConfig"),
            swin,
            pixel_values,
            "*.mlp.fc1",
            heads=[("*.layers.0.*.attention.o_proj", 2), ("*.layers.1.*.attention.o_proj", 4)],
        ),
        _library("bert", bert, _TEXT, tokens(), *bert_places, heads=bert_heads),
        _library("bert_eager", bert, _TEXT | _EAGER, tokens(padding=4), *bert_places, heads=bert_heads),
        _library(
            "distilbert",
            ("DistilBertForSequenceClassification", "DistilBertConfig"),
            distilbert | {"max_position_embeddings": 32},
            tokens(padding=3),
            "*.ffn.lin1",
            "pre_classifier",
            heads=[("*.attention.out_lin", 4)],
        ),
        _library(
            "clip_text", ("CLIPTextModel", "CLIPTextConfig"), _TEXT, tokens(), "*.mlp.fc1", heads=out_proj
        ),
        _library(
            "clip_vision",
            ("CLIPVisionModel", "CLIPVisionConfig"),
            _PATCHES,
            pixel_values,
            "*.mlp.fc1",
            heads=out_proj,
        ),
        _library(
            "whisper_encoder",
            ("WhisperForAudioClassification", "WhisperConfig"),
            whisper,
            floats((2, 16, 16)),
            "encoder.layers.?.fc1",
            "encoder.conv1",
            "projector",
            heads=out_proj,
        ),
    )


def _library_decoders() -> Iterable[Entry]:
    llama = ("LlamaForCausalLM", "LlamaConfig")
    up, o_proj = "*.mlp.up_proj", [("*.self_attn.o_proj", 4)]
    gpt2 = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "use_cache": False,
    }
    t5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    t5_heads = [("*.SelfAttention.o", 4), ("*.EncDecAttention.o", 4)]
    return (
        _library(
            "gpt2",
            ("GPT2LMHeadModel", "GPT2Config"),
            gpt2,
            tokens(),
            _at("*.mlp.c_fc", 48, -1),
            heads=[("*.attn.c_proj", 4)],
        ),
        _library("llama", llama, _DECODER, tokens(), up, heads=o_proj),
        _library("llama_eager", llama, _GROUPED | _EAGER, tokens(), up, heads=o_proj),
        _library("qwen2", ("Qwen2ForCausalLM", "Qwen2Config"), _GROUPED, tokens(), up, heads=o_proj),
        _library(
            "qwen3",
            ("Qwen3ForCausalLM", "Qwen3Config"),
            _GROUPED | {"head_dim": 8},
            tokens(),
            up,
            heads=o_proj,
        ),
        _library(
            "mistral",
            ("MistralForCausalLM", "MistralConfig"),
            _GROUPED | {"sliding_window": 6},
            tokens(),
            up,
            heads=o_proj,
        ),
        _library(
            "gemma",
            ("GemmaForCausalLM", "GemmaConfig"),
            _DECODER | {"num_key_value_heads": 1, "head_dim": 16},
            tokens(3, 8),
            up,
            heads=o_proj,
        ),
        _library(
            "mixtral",
            ("MixtralForCausalLM", "MixtralConfig"),
            _GROUPED | {"num_local_experts": 4, "experts_implementation": "batched_mm"},
            tokens(),
            # The experts are parameters of one module, whose activation they share.
            _at("*.experts.act_fn", 48, -1),
            heads=o_proj,
        ),
        _library(
            "t5",
            ("T5ForConditionalGeneration", "T5Config"),
            t5 | {"use_cache": False, "decoder_start_token_id": 0},
            tokens(decoder_input_ids=7),
            "*.DenseReluDense.wi",
            heads=t5_heads,
        ),
        _library(
            "t5_gated",
            ("T5ForConditionalGeneration", "T5Config"),
            t5 | {"use_cache": False, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
            tokens(padding=4, decoder_input_ids=7),
            "*.DenseReluDense.wi_1",
            heads=t5_heads,
        ),
    )


# Sequences, points and volumes


class RecurrentClassifier(nn.Module):
    """Projection of the inputs, a recurrent layer, and a hidden layer on its last output."""

    def __init__(self, recurrent: type[nn.LSTM] | type[nn.GRU], layers: int = 1) -> None:
        super().__init__()
        self.project = nn.Linear(6, 16)
        self.recurrent = recurrent(16, 24, layers, batch_first=True, bidirectional=layers > 1)
        self.hidden = nn.Linear(48 if layers > 1 else 24, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        out, _ = self.recurrent(F.relu(self.project(x)))
        return self.head(F.relu(self.hidden(out[:, -1])))


def conv1d_network() -> nn.Module:
    """Convolutions over a signal."""
    return nn.Sequential(
        nn.Conv1d(2, 16, 5, padding=2),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 24, 3, padding=1),
        nn.BatchNorm1d(24),
        nn.ELU(),
        nn.AvgPool1d(2),
        nn.Flatten(),
        nn.Linear(24 * 8, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    )


def conv3d_network() -> nn.Module:
    """Convolutions over a volume."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


class PointNet(nn.Module):
    """Layers shared by all points, and the maximum over the points."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 32, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(32)
        self.fc1 = nn.Linear(32, 24)
        self.bn3 = nn.BatchNorm1d(24)
        self.fc2 = nn.Linear(24, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        """Log-probabilities of the classes; points has shape (batch, points, 3)."""
        x = points.transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 32)
        return F.log_softmax(self.fc2(F.relu(self.bn3(self.fc1(x)))), dim=1)


class WaveNetBlock(nn.Module):
    """Gated dilated convolution with a residual and a skip output."""

    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.filter = nn.Conv1d(channels, hidden, 2, dilation=dilation)
        self.gate = nn.Conv1d(channels, hidden, 2, dilation=dilation)
        self.residual = nn.Conv1d(hidden, channels, 1)
        self.skip = nn.Conv1d(hidden, 16, 1)
        self.dilation = dilation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Next input and skip output."""
        padded = F.pad(x, (self.dilation, 0))
        out = torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded))
        return x + self.residual(out), self.skip(out)


class WaveNet(nn.Module):
    """Gated dilated convolutions whose skip outputs are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 12, 1)
        self.blocks = nn.ModuleList(WaveNetBlock(12, 20, 2**level) for level in range(3))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(16, 16, 1), nn.ReLU(), nn.Conv1d(16, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scores at each time."""
        x = self.first(x)
        total = 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return self.last(total)


class TemporalBlock(nn.Module):
    """Two causal convolutions, whose surplus end is cut off, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv1 = nn.Conv1d(in_channels, channels, 3, padding=self.padding, dilation=dilation)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=self.padding, dilation=dilation)
        self.dropout = nn.Dropout(0.2)
        self.downsample = nn.Conv1d(in_channels, channels, 1) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        out = self.dropout(F.relu(self.conv1(x)[:, :, : -self.padding].contiguous()))
        out = self.dropout(F.relu(self.conv2(out)[:, :, : -self.padding].contiguous()))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class TemporalNetwork(nn.Module):
    """Temporal convolutional network, classified at its last time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            TemporalBlock(4, 16, 1), TemporalBlock(16, 16, 2), TemporalBlock(16, 16, 4)
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(self.blocks(x)[:, :, -1])


def _sequence_networks() -> Iterable[Entry]:
    steps, places = floats((2, 9, 6)), ("project", "hidden")
    return (
        _entry("lstm", lambda: RecurrentClassifier(nn.LSTM), steps, *places),
        _entry("gru", lambda: RecurrentClassifier(nn.GRU), steps, *places),
        _entry("deep_lstm", lambda: RecurrentClassifier(nn.LSTM, 2), steps, *places),
        _entry("conv1d", conv1d_network, floats((2, 2, 32)), {"where": nn.BatchNorm1d}),
        _entry("conv3d", conv3d_network, floats((2, 1, 8, 8, 8)), {"where": nn.BatchNorm3d}),
        _entry("pointnet", PointNet, floats((2, 24, 3)), {"where": nn.BatchNorm1d}),
        _entry("wavenet", WaveNet, floats((2, 1, 16)), "*.filter", "last.1"),
        _entry("temporal_network", TemporalNetwork, floats((3, 4, 16)), "*.conv1"),
    )


# Norms, activations, sharing, and several inputs or outputs


class NormBlock(nn.Module):
    """Residual block with any norm."""

    def __init__(self, channels: int, hidden: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.norm2 = norm(hidden)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.widen = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Add a branch with norms and one without."""
        out = self.conv1(F.silu(self.norm1(x)))
        x = x + self.conv2(F.silu(self.norm2(out)))
        return x + self.widen(F.relu(self.squeeze(x)))


def norm_network(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Two residual blocks with any norm."""
    return Classifier(
        nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), NormBlock(16, 24, norm), NormBlock(16, 24, norm)), 16
    )


def prelu_network() -> nn.Module:
    """Convolutions and linear layers with learned slopes, one for each channel or one for all."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.PReLU(16),
        nn.Conv2d(16, 24, 3, 2, 1),
        nn.PReLU(),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 32),
        nn.PReLU(32),
        nn.Linear(32, CLASSES),
    )


class SharedBlock(nn.Module):
    """One block, used three times."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.block = nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.embed(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


class TwoInputs(nn.Module):
    """Image and numbers, joined; returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(ConvNorm(3, 16, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.numbers = nn.Sequential(nn.Linear(5, 24), nn.ReLU())
        self.joint = nn.Linear(64 + 24, 32)
        self.classes = nn.Linear(32, CLASSES)
        self.value = nn.Linear(32, 1)

    def forward(self, image: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Scores of the classes, a value, and the features."""
        joint = F.relu(self.joint(torch.cat([self.image(image), self.numbers(numbers)], dim=-1)))
        return {"classes": self.classes(joint), "value": self.value(joint).squeeze(-1)}


class Siamese(nn.Module):
    """One encoder on two images, compared."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            ConvNorm(3, 16, stride=2), ConvNorm(16, 24, stride=2), nn.Flatten(), nn.Linear(24 * 16, 32)
        )
        self.head = nn.Linear(32, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Similarity."""
        return torch.sigmoid(self.head(torch.abs(self.encoder(first) - self.encoder(second))))


class TupleOutput(nn.Module):
    """Policy and value from common features, as in reinforcement learning."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh())
        self.policy = nn.Linear(24, 4)
        self.value = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the actions and the value."""
        x = self.body(x)
        return self.policy(x), self.value(x)


class FilmBlock(nn.Module):
    """Residual block whose channels a condition scales and shifts."""

    def __init__(self, channels: int, hidden: int, condition: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.bn = nn.BatchNorm2d(hidden, affine=False)
        self.film = nn.Linear(condition, 2 * hidden)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Add the branch."""
        scale, shift = self.film(condition).chunk(2, dim=1)
        out = self.bn(self.conv1(x))
        out = self.act((1 + scale[:, :, None, None]) * out + shift[:, :, None, None])
        return x + self.conv2(out)


class Film(nn.Module):
    """Image network that a second input conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(6, 24), nn.ReLU())
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(FilmBlock(12, 20, 24) for _ in range(2))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        """Scores of the classes."""
        condition = self.condition(condition)
        x = self.stem(image)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x.mean(dim=(2, 3)))


class HighwayLayer(nn.Module):
    """A gate chooses between a transform and the input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix of both."""
        gate = torch.sigmoid(self.gate(x))
        return gate * self.transform(x) + (1 - gate) * x


def highway() -> nn.Module:
    """Highway layers between linear layers."""
    return nn.Sequential(nn.Linear(8, 16), HighwayLayer(16, 24), HighwayLayer(16, 24), nn.Linear(16, CLASSES))


def _other_networks() -> Iterable[Entry]:
    instance_norm = functools.partial(nn.InstanceNorm2d, affine=True)
    vector = floats((2, 8))
    return (
        _entry(
            "group_norm",
            lambda: norm_network(functools.partial(nn.GroupNorm, 8)),
            SMALL_IMAGE,
            _at("*.norm2", 24),
            "*.squeeze",
        ),
        _entry(
            "instance_norm",
            lambda: norm_network(instance_norm),
            SMALL_IMAGE,
            _at("*.norm2", 24),
            "*.squeeze",
        ),
        _entry("prelu", prelu_network, SMALL_IMAGE, "1", "3", "7"),
        _entry("shared_block", SharedBlock, vector, "block.0"),
        _entry(
            "two_inputs",
            TwoInputs,
            floats((3, 3, 16, 16), (3, 5)),
            "image.0.norm",
            "numbers.0",
            "joint",
        ),
        _entry("siamese", Siamese, floats((2, 3, 16, 16), (2, 3, 16, 16)), "*.norm", "encoder.3"),
        _entry("tuple_output", TupleOutput, vector, "body.0", "body.2", "value.0"),
        _entry("film", Film, floats((2, 3, 8, 8), (2, 6)), "condition.0", _at("*.act", 20)),
        _entry("highway", highway, vector, "*.transform.0"),
    )


def _all_entries() -> Iterable[Entry]:
    return (
        *_image_classifiers(),
        *_image_outputs(),
        *_attention_networks(),
        *_library_encoders(),
        *_library_decoders(),
        *_sequence_networks(),
        *_other_networks(),
    )


ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _all_entries()}
