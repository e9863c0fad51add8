"""What is done to a batch of images on its device: random crops and flips, sizes, and scaling to mean 0 and sd 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from bmrs.checks import check_integer
from bmrs.data.checks import DataError
from bmrs.data.split import Split

_VALUES = 2**21
"""Pixel values that are looked at together."""


def augment(images: Tensor, *, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Return images each of which was moved at random and, if wanted, mirrored with probability ½.

    A crop of the image's own size is taken at random from the image with a black margin.

    Args:
        images: shape (N, C, H, W), of any dtype, on any device.
        padding: width of the margin in pixels; 0 for no crops.
        flip: whether left and right are exchanged in half of the images.
        generator: the source of all choices, on any device. The same number of them is drawn whatever the images are.

    Returns:
        The images, of the same shape, dtype and device.

    Raises:
        TypeError, ValueError: `padding` is no number of pixels.
    """
    check_integer("padding", padding, minimum=0)
    number, _, height, width = images.shape
    moves = torch.randint(-padding, padding + 1, (2, number, 1), generator=generator, device=generator.device)
    down, right = moves.to(images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    if flip:
        mirrored = torch.randint(2, (number, 1), generator=generator, device=generator.device)
        columns = torch.where(mirrored.to(images.device).bool(), columns.flip(1), columns)
    picked = images[
        torch.arange(number, device=images.device)[:, None, None],
        :,
        rows.clamp(0, height - 1)[:, :, None],
        columns.clamp(0, width - 1)[:, None, :],
    ].permute(0, 3, 1, 2)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    return (picked * inside[:, None]).contiguous()


def resized(images: Tensor, size: int) -> Tensor:
    """Return images as squares of a height and width in pixels (bilinear, antialiased); as they are if they are.

    Args:
        images: shape (N, C, H, W), uint8 or floating.
        size: height and width of the result.

    Returns:
        Shape (N, C, size, size); what were uint8 in [0, 255] are float32 in [0, 1] if their size has changed.
    """
    if tuple(images.shape[-2:]) == (size, size):
        return images
    scale = 255 if images.dtype == torch.uint8 else 1
    return F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True) / scale


@dataclass(frozen=True)
class Normalization:
    """Scaling of each channel to mean 0 and standard deviation 1.

    Attributes:
        mean: mean of each channel; of uint8 images as a share of 255, in [0, 1].
        std: standard deviation of each channel, likewise; greater than 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"mean and std must have one number for each channel, got {len(self.mean)} and {len(self.std)}"
            )
        if not all(std > 0 for std in self.std):
            raise ValueError(f"std must be greater than 0 in every channel, got {self.std}")

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 images of the same shape and device.

        Args:
            images: shape (N, C, H, W); uint8 in [0, 255], or floating in the units of `mean` and `std`.

        Raises:
            ValueError: they have another number of channels.
        """
        if images.shape[1] != len(self.mean):
            raise ValueError(
                f"the images have {images.shape[1]} channels, expected {len(self.mean)} as the normalization has"
            )
        scale = 255 if images.dtype == torch.uint8 else 1
        shape = (1, -1, 1, 1)
        mean, std = (
            torch.tensor(values, device=images.device).view(shape) for values in (self.mean, self.std)
        )
        return (images.float() / scale - mean) / std


IMAGENET: Final = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's training images, RGB, which most pretrained networks want."""


def normalization_of(split: Split, *, images: int = 10_000, seed: int = 0) -> Normalization:
    """Return the mean and the standard deviation of each channel over a sample of a split, read a batch at a time.

    Args:
        split: as a rule the training images, as they are before normalization.
        images: how many of them are asked, drawn at random; all if there are no more.
        seed: of that choice.

    Raises:
        DataError: a channel is the same everywhere, and cannot be scaled.
    """
    check_integer("images", images, minimum=1)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:images].sort().values
    part = max(1, _VALUES // math.prod(split.image_shape))
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in split.batches(order.split(part)):
        pixels = batch.images.transpose(0, 1).flatten(1).cpu().double()
        pixels = pixels / 255 if batch.images.dtype == torch.uint8 else pixels
        count += pixels.shape[1]
        total = total + pixels.sum(1)
        squares = squares + pixels.square().sum(1)
    mean = total / count
    # Of values near 1 in float64, so that the difference loses nothing that matters.
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if std.min() < 1e-6:
        raise DataError(
            f"channel {int(std.argmin())} of the images is {mean[std.argmin()].item():.4g} everywhere, and cannot be "
            "scaled to a standard deviation of 1: leave the normalization out or read grey images"
        )
    return Normalization(tuple(mean.tolist()), tuple(std.tolist()))
