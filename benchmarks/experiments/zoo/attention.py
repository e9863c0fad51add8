"""Transformers and other networks with attention, written out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments.zoo.entry import Entry, entry_of, noise_at
from benchmarks.experiments.zoo.inputs import (
    CLASSES,
    IMAGE,
    SMALL_IMAGE,
    VOCABULARY,
    floats,
    token_argument,
    token_pairs,
)
from benchmarks.experiments.zoo.parts import ConvNorm


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


def attention_networks() -> Iterable[Entry]:
    """Return the networks of this family."""
    ids = token_argument()
    heads = [("blocks.?.attn.proj", 4)]
    return (
        entry_of("vision_transformer", TimmVisionTransformer, IMAGE, "*.fc1", heads=heads),
        entry_of("language_model", lambda: LanguageModel(Mlp), ids, "*.fc1", heads=heads),
        entry_of("glu", lambda: LanguageModel(GluFeedForward), ids, noise_at("*.glu", 48, -1), heads=heads),
        entry_of(
            "chunked_glu",
            lambda: LanguageModel(ChunkedFeedForward),
            ids,
            noise_at("*.act", 48, -1),
            heads=heads,
        ),
        entry_of("experts", lambda: LanguageModel(Experts), ids, "*.experts.?.up", heads=heads),
        entry_of("stock_encoder", StockEncoder, token_argument(3, 7), "*.linear1"),
        entry_of("stock_encoder_norm_first", lambda: StockEncoder(True), ids, "*.linear1"),
        entry_of("stock_transformer", StockTransformer, token_pairs, "*.linear1"),
        entry_of("hybrid_transformer", HybridTransformer, SMALL_IMAGE, "stem.?.norm", "*.fc1", heads=heads),
        entry_of("attention_pooling", AttentionPooling, floats((2, 9, 8)), "embed.0", "score.0", "embed.2"),
        entry_of("mixer", Mixer, IMAGE, "*.fc1"),
    )
