"""VGG-16 with batch normalisation (arXiv 1409.1556), by the names of torchvision's parameters."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from bmrs.checks import check_integer
from bmrs.models.arguments import check_image

# Convolutions of each stage, and their channels in multiples of the first stage's.
_STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


def vgg16_bn(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    width: int = 64,
    hidden: int = 4096,
    dropout: float = 0.5,
) -> nn.Sequential:
    """Return VGG-16 with batch norm; 138,365,992 parameters for ImageNet, as it stands.

    The classifier reads the last feature map pooled to 7×7 or, where images are smaller than 224 pixels, as it is.

    Args:
        num_classes: number of outputs (logits).
        in_channels: channels of the images.
        image_size: their height and width in pixels, 32 or more.
        width: channels of the first stage.
        hidden: units of both hidden layers of the classifier.
        dropout: probability behind these layers.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is too small.
    """
    check_image(num_classes, in_channels, image_size, minimum=32)
    check_integer("width", width, minimum=1)
    check_integer("hidden", hidden, minimum=1)
    features: list[nn.Module] = []
    channels = in_channels
    for count, multiple in _STAGES:
        for _ in range(count):
            convolution = nn.Conv2d(channels, multiple * width, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            features += [convolution, nn.BatchNorm2d(multiple * width), nn.ReLU(inplace=True)]
            channels = multiple * width
        features.append(nn.MaxPool2d(2))
    side = min(7, image_size // 2 ** len(_STAGES))
    classifier: list[nn.Module] = []
    inputs = channels * side**2
    for _ in range(2):
        classifier += [nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        inputs = hidden
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            features=nn.Sequential(*features),
            avgpool=nn.AdaptiveAvgPool2d(side),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(*classifier, nn.Linear(hidden, num_classes)),
        )
    )
