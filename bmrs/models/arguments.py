"""Checks of what all networks take."""

from __future__ import annotations

from bmrs.checks import check_integer


def check_image(num_classes: object, in_channels: object, image_size: object, *, minimum: int = 1) -> None:
    """Raise TypeError unless the arguments are ints, ValueError unless they are positive and images large enough."""
    check_integer("num_classes", num_classes, minimum=1)
    check_integer("in_channels", in_channels, minimum=1)
    check_integer("image_size", image_size, minimum=minimum)
