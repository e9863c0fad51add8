"""The networks of the registry, made tiny."""

import torch
from torch import nn

from bmrs.models import NETWORKS, build_network

# What makes each network tiny; image_size where it is not 16.
TINY = {
    "mlp": {"image_size": 4, "num_blocks": 1, "hidden": 9},
    "lenet5": {"image_size": 32},
    "lenet5_caffe": {"widths": (4, 6, 9)},
    "lenet_300_100": {"image_size": 4, "widths": (9, 7)},
    "resnet18": {"width": 4, "layers": (1, 1)},
    "resnet50": {"width": 4, "layers": (1, 1), "stem": "7x7"},
    "resnet20": {"image_size": 8, "width": 4, "blocks": 1},
    "resnet56": {"image_size": 8, "width": 4, "blocks": 1},
    "vgg16_bn": {"image_size": 32, "width": 2, "hidden": 8},
    "vit_small": {"depth": 1, "width": 8, "num_heads": 4},
    "vit_b16": {"depth": 1, "width": 8, "num_heads": 4, "patch_size": 8},
}


def tiny(name: str, num_classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    options = {"image_size": 16} | TINY[name]
    return build_network(name, num_classes=num_classes, in_channels=NETWORKS[name].in_channels, **options)


def images(name: str, number: int = 2) -> torch.Tensor:
    side = TINY[name].get("image_size", 16)
    return torch.randn(number, NETWORKS[name].in_channels, side, side)
