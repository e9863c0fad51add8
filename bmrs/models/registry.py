"""The networks by name: how each is built, what images it is meant for and where its noise goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bmrs.checks import check_choice
from bmrs.models import resnet, small, vgg, vit
from bmrs.models.placement import NoisePlace


@dataclass(frozen=True)
class Network:
    """A network that can be built by name.

    Attributes:
        build: returns it without noise; takes ``num_classes``, ``in_channels`` and ``image_size`` and what else its
            docstring says, all by keyword.
        image_size: height and width, in pixels, of the images that it is meant for.
        in_channels: channels of these images.
        placements: places of noise by name: ``"paper"``, where arXiv 2406.01345 puts it, and ``"inner"``, where nothing
            but the structures themselves keeps them: hidden units, inner channels of residual blocks, heads.
    """

    build: Callable[..., nn.Module]
    image_size: int
    in_channels: int
    placements: Mapping[str, tuple[NoisePlace, ...]]


def _chain(build: Callable[..., nn.Module], image_size: int, activations: str) -> Network:
    """Return a network without branches, in which both placements are the same."""
    places = (NoisePlace(activations),)
    return Network(build, image_size, 1, {"paper": places, "inner": places})


_NORMS = (NoisePlace(nn.BatchNorm2d),)


def _residual(build: Callable[..., nn.Module], image_size: int, *inner: str) -> Network:
    return Network(build, image_size, 3, {"paper": _NORMS, "inner": tuple(map(NoisePlace, inner))})


def _transformer(build: Callable[..., nn.Module]) -> Network:
    block = "encoder.layers.*"
    inner = (NoisePlace(f"{block}.mlp.0"), NoisePlace(f"{block}.self_attention.out_proj", structures="heads"))
    return Network(build, 224, 3, {"paper": (NoisePlace(f"{block}.mlp.3"),), "inner": inner})


NETWORKS: dict[str, Network] = {
    "mlp": _chain(small.mlp, 32, "hidden*_tanh"),
    "lenet5": _chain(small.lenet5, 32, "*_relu"),
    "lenet5_caffe": _chain(small.lenet5_caffe, 28, "*_relu"),
    "lenet_300_100": _chain(small.lenet_300_100, 28, "*_relu"),
    "resnet18": _residual(resnet.resnet18, 224, "layer*.bn1"),
    "resnet50": _residual(resnet.resnet50, 224, "layer*.bn1", "layer*.bn2"),
    "resnet20": _residual(resnet.resnet20, 32, "layer*.bn1"),
    "resnet56": _residual(resnet.resnet56, 32, "layer*.bn1"),
    "vgg16_bn": Network(
        vgg.vgg16_bn,
        224,
        3,
        {"paper": _NORMS, "inner": (*_NORMS, NoisePlace("classifier.0"), NoisePlace("classifier.3"))},
    ),
    "vit_small": _transformer(vit.vit_small),
    "vit_b16": _transformer(vit.vit_b16),
}


def build_network(
    name: str, *, num_classes: int, in_channels: int, image_size: int, **options: Any
) -> nn.Module:
    """Return a network of `NETWORKS`, untrained and without noise.

    Args:
        name: a key of `NETWORKS`.
        num_classes: number of outputs (logits).
        in_channels: channels of the images.
        image_size: their height and width in pixels.
        options: further arguments of the network's builder, such as ``stem`` of the ResNets.

    Raises:
        TypeError: an argument is of the wrong type, or the network does not take it.
        ValueError: there is no network of that name, or it does not take such images.
    """
    check_choice("network", name, tuple(NETWORKS))
    return NETWORKS[name].build(
        num_classes=num_classes, in_channels=in_channels, image_size=image_size, **options
    )
