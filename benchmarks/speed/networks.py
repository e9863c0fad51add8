"""Networks for the timings of training and pruning: the paper's, and smaller ones that stand in for them on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import bmrs
from bmrs.noise.placement import Where
from bmrs_kernels.options import Backend, Granularity

NUM_CLASSES = 10
IMAGENET_CLASSES = 1000

Builder = Callable[[Granularity | None, Backend], nn.Module]


@dataclass(frozen=True)
class TimedNetwork:
    """A network with the setting that it is measured in.

    Attributes:
        name: for people; that of a stand-in says how it is smaller.
        batch: examples of a training step.
        input_shape: shape of one example.
        build: makes the network from the granularity of its noise, None for no noise layers, and their backend.
        classes: number of its outputs.
        paper_ratio: time of a training step with noise over one without, from Tables 3 and 4 of arXiv 2406.01345;
            None if the paper has none.
        stand_in: whether it is smaller than the network of its name.
        channels_last: whether weights and examples are laid out so, as convolutions on a GPU like them.
        recomputes: whether all its noise stands behind layers of which `add_noise` takes ``recompute``.
    """

    name: str
    batch: int
    input_shape: tuple[int, ...]
    build: Builder
    classes: int = NUM_CLASSES
    paper_ratio: float | None = None
    stand_in: bool = False
    channels_last: bool = False
    recomputes: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of weights and examples."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def inputs(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Return random examples of shape (batch, *input_shape)."""
        examples = torch.randn(batch, *self.input_shape, device=device)
        return examples.contiguous(memory_format=self.memory_format)

    def labels(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Return random classes of shape (batch,)."""
        return torch.randint(self.classes, (batch,), device=device)


class VisionTransformer(nn.Module):
    """ViT-B/16 (arXiv 2010.11929) for images of shape (N, 3, 224, 224): 768 features, 12 heads.

    Args:
        num_blocks: number of encoder blocks; ViT-B has 12.
        num_classes: number of outputs (logits).
    """

    def __init__(self, num_blocks: int = 12, num_classes: int = IMAGENET_CLASSES) -> None:
        super().__init__()
        features, patch, tokens = 768, 16, 1 + (224 // 16) ** 2
        self.patches = nn.Conv2d(3, features, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, features))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, features))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    features, 12, 4 * features, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
                )
                for _ in range(num_blocks)
            )
        )
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.classes = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, num_classes)."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1) + self.positions
        return self.classes(self.norm(self.blocks(tokens))[:, 0])


def convolution_chain(num_classes: int = NUM_CLASSES) -> nn.Sequential:
    """Return the 13 convolutions of VGG-16 (arXiv 1409.1556) with one linear layer behind, for 32×32 images."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, num_classes))


def with_noise_behind(make: Callable[[], nn.Module], where: Where) -> Builder:
    """Return the builder of a network that gets its noise from `bmrs.add_noise`.

    Args:
        make: returns the network without noise.
        where: the layers that get noise.
    """

    def build(granularity: Granularity | None, backend: Backend) -> nn.Module:
        network = make()
        if granularity is None:
            return network
        return bmrs.add_noise(network, where=where, granularity=granularity, backend=backend)

    return build


def with_noise_inside(make: Callable[..., nn.Module]) -> Builder:
    """Return the builder of a network of `bmrs.models`, whose noise layers hold their activations too."""

    def build(granularity: Granularity | None, backend: Backend) -> nn.Module:
        if granularity is None:
            return make(noise=False)
        return make(granularity=granularity, backend=backend)

    return build


MLP = TimedNetwork(
    name="MLP",
    batch=128,
    input_shape=(1, 32, 32),
    build=with_noise_inside(
        functools.partial(bmrs.models.MLP, in_features=32 * 32, num_blocks=7, hidden=100)
    ),
    paper_ratio=8.3,
)
LENET5 = TimedNetwork(
    name="LeNet-5, batch 32",
    batch=32,
    input_shape=(1, 32, 32),
    build=with_noise_inside(bmrs.models.LeNet5),
    paper_ratio=4.9,
)
LENET5_BATCH_128 = replace(LENET5, name="LeNet-5, batch 128", batch=128)
RESNET50 = TimedNetwork(
    name="ResNet-50",
    batch=32,
    input_shape=(3, 224, 224),
    build=with_noise_behind(functools.partial(bmrs.models.resnet50, stem="7x7"), nn.BatchNorm2d),
    classes=IMAGENET_CLASSES,
    paper_ratio=6.9,
    channels_last=True,
    recomputes=True,
)
VIT = TimedNetwork(
    name="ViT-B/16",
    batch=32,
    input_shape=(3, 224, 224),
    build=with_noise_behind(VisionTransformer, "blocks.*.linear2"),
    classes=IMAGENET_CLASSES,
    paper_ratio=1.35,
)
CONVOLUTION_CHAIN = TimedNetwork(
    name="chain of VGG-16's convolutions",
    batch=128,
    input_shape=(3, 32, 32),
    build=with_noise_behind(convolution_chain, nn.Conv2d),
)
SMALL_RESNET50 = replace(
    RESNET50,
    name="ResNet-50, batch 4, 64²",
    batch=4,
    input_shape=(3, 64, 64),
    stand_in=True,
    channels_last=False,
)
SMALL_VIT = replace(
    VIT,
    name="ViT of 3 blocks, batch 2",
    batch=2,
    build=with_noise_behind(functools.partial(VisionTransformer, 3), "blocks.*.linear2"),
    stand_in=True,
)


def trained_networks(device: torch.device, *, whole: bool = False) -> dict[str, TimedNetwork]:
    """Return the networks whose training steps are timed on a device, by the names that commands take.

    Args:
        device: where; on a CPU, smaller networks stand in for large ones.
        whole: whether the large ones themselves are timed there too.
    """
    whole |= device.type == "cuda"
    return {
        "mlp": MLP,
        "lenet5": LENET5,
        "lenet5-batch128": LENET5_BATCH_128,
        "resnet50": RESNET50 if whole else SMALL_RESNET50,
        "vit": VIT if whole else SMALL_VIT,
    }
