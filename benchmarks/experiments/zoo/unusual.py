"""Unusual norms and activations, shared layers, and several inputs or outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments.zoo.entry import Entry, entry_of, noise_at
from benchmarks.experiments.zoo.inputs import (
    CLASSES,
    SMALL_IMAGE,
    floats,
)
from benchmarks.experiments.zoo.parts import Classifier, ConvNorm


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


def unusual_networks() -> Iterable[Entry]:
    """Return the networks of this family."""
    instance_norm = functools.partial(nn.InstanceNorm2d, affine=True)
    vector = floats((2, 8))
    return (
        entry_of(
            "group_norm",
            lambda: norm_network(functools.partial(nn.GroupNorm, 8)),
            SMALL_IMAGE,
            noise_at("*.norm2", 24),
            "*.squeeze",
        ),
        entry_of(
            "instance_norm",
            lambda: norm_network(instance_norm),
            SMALL_IMAGE,
            noise_at("*.norm2", 24),
            "*.squeeze",
        ),
        entry_of("prelu", prelu_network, SMALL_IMAGE, "1", "3", "7"),
        entry_of("shared_block", SharedBlock, vector, "block.0"),
        entry_of(
            "two_inputs",
            TwoInputs,
            floats((3, 3, 16, 16), (3, 5)),
            "image.0.norm",
            "numbers.0",
            "joint",
        ),
        entry_of("siamese", Siamese, floats((2, 3, 16, 16), (2, 3, 16, 16)), "*.norm", "encoder.3"),
        entry_of("tuple_output", TupleOutput, vector, "body.0", "body.2", "value.0"),
        entry_of("film", Film, floats((2, 3, 8, 8), (2, 6)), "condition.0", noise_at("*.act", 20)),
        entry_of("highway", highway, vector, "*.transform.0"),
    )
