"""Vision transformers (arXiv 2010.11929) by the names of torchvision's parameters."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmrs.checks import check_integer
from bmrs.models.arguments import check_image

_EPSILON = 1e-6  # of the layer norms, as published weights were trained with


class SelfAttention(nn.Module):
    """Multi-head self-attention whose output projection is a layer that is called, so that noise can be put on heads.

    torch's ``MultiheadAttention`` has the same parameters but reads them itself.

    Args:
        width: features of a token.
        num_heads: number of heads; it divides ``width``.

    Attributes:
        num_heads: that number, which compaction lowers.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each token of x, of shape (N, tokens, width), takes from all of them, of the same shape."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        queries, keys, values = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(queries, keys, values)
        return self.out_proj(heads.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Attention and a perceptron of one hidden layer, each behind a layer norm and added to the tokens.

    Args:
        width: features of a token.
        num_heads: number of attention heads.
        hidden: units of the perceptron's hidden layer.
        dropout: probability behind the attention and both layers of the perceptron.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=_EPSILON)
        self.self_attention = SelfAttention(width, num_heads)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(width, eps=_EPSILON)
        layers = [nn.Linear(width, hidden), nn.Linear(hidden, width)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(layers[0], nn.GELU(), nn.Dropout(dropout), layers[1], nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the shape of x, (N, tokens, width)."""
        x = x + self.dropout(self.self_attention(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Blocks on tokens that know their positions.

    Args:
        tokens: number of tokens, the class token among them.
        depth: number of blocks.
        width: features of a token.
        num_heads: number of attention heads.
        hidden: units of the perceptrons' hidden layers.
        dropout: probability behind the positions and in the blocks.
    """

    def __init__(
        self, tokens: int, depth: int, width: int, num_heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(
            OrderedDict(
                (f"encoder_layer_{i}", EncoderBlock(width, num_heads, hidden, dropout)) for i in range(depth)
            )
        )
        self.ln = nn.LayerNorm(width, eps=_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the shape of x, (N, tokens, width)."""
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))


class VisionTransformer(nn.Module):
    """An encoder on the patches of an image and a class token, which a linear layer reads.

    Args:
        num_classes: number of outputs (logits).
        in_channels: channels of the images.
        image_size: their height and width in pixels.
        patch_size: height and width of a patch; it divides ``image_size``.
        depth: number of encoder blocks.
        width: features of a token.
        num_heads: number of attention heads; it divides ``width``.
        hidden: units of the perceptrons' hidden layers; four times ``width`` if None.
        dropout: probability of dropout in the encoder.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is less than 1, or does not divide what it has to.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        patch_size: int,
        depth: int,
        width: int,
        num_heads: int,
        hidden: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_image(num_classes, in_channels, image_size)
        hidden = 4 * width if hidden is None else hidden
        numbers = {
            "patch_size": patch_size,
            "depth": depth,
            "width": width,
            "num_heads": num_heads,
            "hidden": hidden,
        }
        for name, value in numbers.items():
            check_integer(name, value, minimum=1)
        if image_size % patch_size:
            raise ValueError(f"patch_size must divide image_size={image_size}, got {patch_size}")
        if width % num_heads:
            raise ValueError(f"num_heads must divide width={width}, got {num_heads}")
        self.conv_proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (in_channels * patch_size**2)))
        nn.init.zeros_(self.conv_proj.bias)  # type: ignore[arg-type]
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        tokens = 1 + (image_size // patch_size) ** 2
        self.encoder = Encoder(tokens, depth, width, num_heads, hidden, dropout)
        head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        self.heads = nn.Sequential(OrderedDict(head=head))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, num_classes) for images of shape (N, in_channels, image_size, image_size)."""
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1)
        return self.heads(self.encoder(tokens)[:, 0])


def vit_small(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    patch_size: int | None = None,
    depth: int = 12,
    width: int = 384,
    num_heads: int = 6,
    hidden: int | None = None,
    dropout: float = 0.0,
) -> VisionTransformer:
    """Return ViT-S (arXiv 2012.12877); 22,050,664 parameters as it stands.

    Args:
        num_classes: as for `VisionTransformer`.
        in_channels: as for `VisionTransformer`.
        image_size: as for `VisionTransformer`.
        patch_size: as for `VisionTransformer`; None takes 16 or, for images of less than 112 pixels, the largest power
            of two that makes seven patches a side or more: 8 for 64 pixels, 4 for 32 and 28.
        depth: as for `VisionTransformer`.
        width: as for `VisionTransformer`.
        num_heads: as for `VisionTransformer`.
        hidden: as for `VisionTransformer`.
        dropout: as for `VisionTransformer`.

    Raises:
        TypeError, ValueError: as for `VisionTransformer`.
    """
    check_image(num_classes, in_channels, image_size)
    return VisionTransformer(
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        patch_size=_patch_size(image_size) if patch_size is None else patch_size,
        depth=depth,
        width=width,
        num_heads=num_heads,
        hidden=hidden,
        dropout=dropout,
    )


def vit_b16(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    patch_size: int | None = None,
    depth: int = 12,
    width: int = 768,
    num_heads: int = 12,
    hidden: int | None = None,
    dropout: float = 0.0,
) -> VisionTransformer:
    """Return ViT-B/16 with torchvision's parameter names; 86,567,656 parameters as it stands.

    Args:
        num_classes: as for `vit_small`.
        in_channels: as for `vit_small`.
        image_size: as for `vit_small`.
        patch_size: as for `vit_small`.
        depth: as for `vit_small`.
        width: as for `vit_small`.
        num_heads: as for `vit_small`.
        hidden: as for `vit_small`.
        dropout: as for `vit_small`.

    Raises:
        TypeError, ValueError: as for `VisionTransformer`.
    """
    return vit_small(
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        patch_size=patch_size,
        depth=depth,
        width=width,
        num_heads=num_heads,
        hidden=hidden,
        dropout=dropout,
    )


def _patch_size(image_size: int) -> int:
    size = 16
    while size > 1 and image_size < 7 * size:
        size //= 2
    return size
